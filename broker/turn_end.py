"""The end of a turn: what the core decided is carried out, and room is made to write down the next turn.

::

    mail of slow readers --> ledger.end_turn: TURN is written --> actions that are not to send --> one frame a peer
        --> those who are gone are forgotten --> SENT is written --> if the log is full: a snapshot in its place
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable
from typing import Final

from . import control as c
from . import events as e
from .control_socket import ControlSocket
from .journal import Journal, JournalFull
from .ledger import Ledger
from .outboxes import Outboxes
from .peers import Peers

log = logging.getLogger("trtpool.broker")

RECONNECT_NS: Final = 2_000_000_000
"""How long a pool that has drained waits for clients over ZeroMQ to take what is left for them."""


class TurnEnd:
    """See the module.

    Args:
        ledger: who decides.
        journal: where that is written down.
        peers: whom it is about.
        outboxes: how they are told.
        control: the supervisor.
        owner_pid: the process that the pool is part of; 0: none.

    Attributes:
        drained: whether all work is done.
        stay_until_ns: how long at most clients may then take to connect again for what is left for them.
    """

    def __init__(
        self,
        ledger: Ledger,
        journal: Journal,
        peers: Peers,
        outboxes: Outboxes,
        control: ControlSocket,
        owner_pid: int,
    ) -> None:
        self._ledger = ledger
        self._journal = journal
        self._peers = peers
        self._outboxes = outboxes
        self._control = control
        self._owner_pid = owner_pid
        self.drained = False
        self.stay_until_ns = 0

    def end_turn(self) -> None:
        """Carry out what the core decided in this turn, and see that there is room to write down the next."""
        self._carry_out()
        if not self._journal.has_room:
            self.compact(self._carry_out)

    def compact(self, carry_out: Callable[[], None]) -> None:
        """Write down what is in place of how it came to that, at the end of a turn; `carry_out` ends one more."""
        while True:
            try:
                self._ledger.compact()
            except JournalFull as full:
                self._outboxes.shed(full)
                carry_out()
            else:
                return

    def _carry_out(self) -> None:
        """Do what the core decided; one frame a peer."""
        ledger, peers, send = self._ledger, self._peers, self._outboxes.send
        had_slow = bool(peers.slow)
        if had_slow:
            for peer in list(peers.slow):
                send(peer)
        readers, rest = ledger.end_turn(time.monotonic_ns())
        forgotten = self.see_to(rest) if rest else ()
        for number in readers:
            reader = peers.of.get(number)
            if reader is not None:
                reader.mail = ledger.mail[number]
                send(reader)
        if peers.slow or peers.stalled:
            self._outboxes.bound()
        if forgotten:
            self.forget_all(forgotten)
        if readers or rest or had_slow:
            ledger.sent([peer.number for peer in peers.slow] if peers.slow else ())

    def forget_all(self, numbers: Iterable[int]) -> None:
        """Nothing of these clients is left, and all is sent."""
        for number in numbers:
            self._ledger.forget(number)
            gone = self._peers.of.get(number)
            if gone is not None and gone.worker is None:
                self._peers.forget(gone)

    def see_to(self, actions: list[e.Action]) -> list[int]:
        """Do what is not to send; returns the peers to forget when all is sent."""
        forgotten = []
        for action in actions:
            if isinstance(action, e.Forget):
                forgotten.append(action.peer)
            elif isinstance(action, (e.WorkerReady, e.Leaves)):
                peer = self._peers.of.get(action.peer)
                if peer is not None and peer.worker is not None:
                    kind = c.WorkerIsReady if isinstance(action, e.WorkerReady) else c.WorkerLeaves
                    self._control.tell(kind(peer.worker))
            elif isinstance(action, e.Switched):
                self._control.tell(c.WorkersSwitched(action.generation))
            elif isinstance(action, e.Hung):
                self._end_worker(action)
            elif isinstance(action, (e.Overdue, e.Slow)):
                log.warning("%s", action.text)
            elif isinstance(action, e.Evict):
                self._evict(action)
            elif isinstance(action, e.Drained):
                self._control.tell(c.IsDrained())
                self.drained = True
                self.stay_until_ns = time.monotonic_ns() + RECONNECT_NS
        return forgotten

    def _end_worker(self, hung: e.Hung) -> None:
        """Have the supervisor kill a worker; its batches go back when it says that the process is gone."""
        peer = self._peers.of.get(hung.peer)
        if peer is not None and peer.worker is not None:  # or it ended with the last broker, which had it killed
            self._control.tell(c.WorkerHangs(peer.worker, hung.text))

    def _evict(self, evict: e.Evict) -> None:
        """Kill the process of a client; its slots come back as after any end of a producer."""
        peer = self._peers.of.get(evict.peer)
        if peer is None or (peer.pid and peer.pid == self._owner_pid):  # it left meanwhile; or all would end with it
            return
        try:
            signal.pidfd_send_signal(peer.pidfd, signal.SIGKILL)
        except ProcessLookupError:  # it ended, which the pidfd is about to tell
            log.info("process %d had ended before it was evicted", peer.pid)
        except PermissionError:
            log.warning("process %d is another user's and cannot be killed; end it: %s", peer.pid, evict.text)
        except OSError as error:  # pidfd_send_signal(2): it is in a pid namespace that is not below ours
            log.warning(
                "peer %d is in another container and cannot be killed from here (%s); end it there: %s",
                peer.number, error.strerror, evict.text,
            )  # fmt: skip
        else:
            log.warning("process %d was killed (--evict): %s", peer.pid, evict.text)
