"""The broker's loop: what a turn is, around a `Core` that decides.

::

    sleep --> look: lifelines, pidfds, listener, control --> read ZeroMQ --> end of turn: decide, send, write down
      ^                    peers, admission, greeting           router         turn_end, outboxes         |
      '---------------------------------------------------------------------------------------------------'

All that has arrived is read before the core ends its turn, which makes batches of all of it, and each peer is sent at
most one frame.  No peer is read without bound while others wait.

One epoll watches everything: 256 descriptors in a `zmq.Poller` would cost 28 us a poll, and in an epoll 2.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from typing import Final

import msgspec
import zmq

from trtpool.ipc import messages as m
from trtpool.ipc.settings import BrokerConfig
from trtpool.ipc.spinning import Spin

from . import control as c
from . import events as e
from .admission import Admission
from .control_socket import ControlSocket
from .core import Core
from .doorman import Doorman
from .greeting import Greeting
from .inheritance import Kept, inherit
from .journal import Journal, journal_bytes
from .ledger import Ledger
from .outboxes import Outboxes
from .peers import Peer, Peers
from .router import Router
from .takeover import TakeOver
from .tracing.tracer import Tracer
from .trail import FollowedCore
from .turn_end import TurnEnd

log = logging.getLogger("trtpool.broker")

MAX_FRAMES_A_TURN: Final = 256
MAX_FRAMES_OF_A_PEER: Final = 64
"""Frames that are read over ZeroMQ, and over one lifeline, before others have their turn."""

MAX_BYTES_OF_A_PEER: Final = 32 * 1024
"""Bytes after which no more frames are read over one lifeline in this turn: a frame may hold thousands of messages."""

RETRY_NS: Final = 5_000_000
"""How long until a full outbox is tried again."""

FINE_TIMER_S: Final = 0.01
"""Timers nearer than this are slept for by select(2), whose resolution is better than epoll's millisecond."""

MAX_ROUNDS: Final = 8
"""How often a turn looks for more, before all who were heard are answered."""

LOOKS: Final = 8
"""A peer that had one frame to read is looked at for a second so seldom; one that had a second, each time."""

VAIN_LOOKS: Final = 32
"""After so many turns in a row in which nothing came meanwhile, only every `LOOKS`-th turn looks whether something did:
a turn more costs as much as this many looks."""

LONGEST_SLEEP_NS: Final = 60_000_000_000
"""Timers may be further away than a poll can say."""


class Loop:
    """Serves until drained, or until the supervisor ends.

    Args:
        config: what to serve; its descriptors become the loop's.
    """

    def __init__(self, config: BrokerConfig) -> None:
        self._config = config
        self._core = core = _core(config)
        if isinstance(core, FollowedCore):
            core.silent = config.takes_over
        table_fd = -1 if config.table_fd is None else config.table_fd
        self._journal = Journal(table_fd, journal_bytes(config.layout))
        self._ledger = ledger = Ledger(self._core, self._journal)
        self._doorman = doorman = Doorman()
        self._spins = config.busy_poll
        self._spin = Spin(config.spin_us)
        self._turns = 0
        self._vain = 0  # turns in a row that looked for what came meanwhile, and found nothing
        self._control = control = ControlSocket(config.control_fd)
        allowed = {os.getuid(), *config.allow_users}
        self._router = router = Router(config, allowed, doorman)
        self._epoll = epoll = select.epoll()
        for fd in (router.fd, control.sock.fileno()):
            epoll.register(fd, select.EPOLLIN)
        self._peers = peers = Peers(ledger, doorman, control, epoll, kept=config.table_fd is not None)
        self._admission = Admission(config, router.endpoint, allowed, ledger, peers, doorman, control, epoll)
        self._greeting = Greeting(ledger, peers, doorman, router)
        self._outboxes = Outboxes(ledger, peers, doorman, router)
        self._turn_end = TurnEnd(ledger, self._journal, peers, self._outboxes, control, config.owner_pid)
        self._tracer = Tracer(ledger, control)
        control.hold_reserve()

    def run(self) -> None:
        """Serve."""
        if self._config.takes_over:
            self._take_over()
            if isinstance(self._core, FollowedCore):
                self._core.silent = False
        self._control.tell(c.BrokerReady())
        while not self._turn_end.drained or self._stays():
            self.turn()
        self._say_bye()

    def turn(self) -> None:
        """Sleep until something happens, and do all that is to do then.

        What comes in meanwhile is of this turn too, up to a bound: under load the turns become longer by themselves,
        and batches and frames larger, while each costs much the same.
        """
        ready = self._sleep()
        self._turns += 1
        for rounds in range(MAX_ROUNDS):
            for fd, _ in ready:
                self._look_at(fd)
            if self._router.used:
                self._read_messages()
            if self._vain >= VAIN_LOOKS and self._turns % LOOKS:
                break
            ready = self._epoll.poll(0)
            if not ready:
                self._vain = 0 if rounds else self._vain + 1
                break
        self._turn_end.end_turn()

    def _take_over(self) -> None:
        TakeOver(
            self._ledger,
            self._peers,
            self._outboxes,
            self._admission,
            self._turn_end,
            self._doorman,
            self._router.endpoint,
            self._config.epoch,
        ).run(inherit(self._control.sock))

    # ------------------------------------------------------------------ sleeping

    def _sleep(self) -> list[tuple[int, int]]:
        """Wait for the next thing to happen; returns the descriptors that it happened to, and what it was."""
        admission = self._admission
        if admission.again_ns and time.monotonic_ns() >= admission.again_ns:
            admission.accept_again()
        if self._spins or (self._router.used and self._router.has_messages()):
            return self._epoll.poll(0)
        due_ns = self._core.next_timer_ns() or 0
        for timer_ns in (admission.again_ns, self._turn_end.stay_until_ns):
            if timer_ns:
                due_ns = min(due_ns, timer_ns) if due_ns else timer_ns
        if not due_ns and not self._peers.slow:
            return self._spin.wait(self._look, self._epoll.poll)
        now_ns = time.monotonic_ns()
        if self._peers.slow:
            due_ns = min(due_ns or now_ns + RETRY_NS, now_ns + RETRY_NS)
        left_ns = min(max(0, due_ns - now_ns), LONGEST_SLEEP_NS)
        return self._spin.wait(self._look, lambda: self._sleep_for(left_ns / 1e9), left_ns)

    def _look(self) -> list[tuple[int, int]] | None:
        return self._epoll.poll(0) or None

    def _sleep_for(self, timeout_s: float) -> list[tuple[int, int]]:
        if 0 < timeout_s < FINE_TIMER_S:
            select.select([self._epoll.fileno()], [], [], timeout_s)
            timeout_s = 0.0
        return self._epoll.poll(timeout_s)

    def _look_at(self, fd: int) -> None:
        peer = self._peers.by_fd.get(fd)
        if peer is not None:
            if fd == peer.pidfd:
                self._peers.process_may_have_ended(peer)
            else:
                self._read_lifeline(peer)
        elif fd == self._router.fd:
            self._router.used = True
        elif fd == self._control.sock.fileno():
            self._read_control()
        elif fd == self._admission.listener.fileno():
            self._admission.accept()

    # ------------------------------------------------------------------ lifelines

    def _read_lifeline(self, peer: Peer) -> None:
        """Take what a peer has sent over its lifeline; at the end of file, wait for the end of its process.

        To look for a frame in vain costs a fifth of what it takes to handle one: see `LOOKS`.
        """
        bytes_read = frames = 0
        number, journal, ledger, sock = peer.number, self._journal, self._ledger, peer.sock
        peer.looks += 1
        wanted = MAX_FRAMES_OF_A_PEER if peer.had_more or not peer.direct or peer.looks % LOOKS == 0 else 1
        while frames < wanted and bytes_read < MAX_BYTES_OF_A_PEER and journal.has_room:
            try:
                length = sock.recv_into(journal.frame(number))
            except BlockingIOError:
                break
            except ConnectionResetError:
                continue  # it closed with something unread, which is told once, before what it sent last
            except OSError:
                length = 0
            if not length:
                self._peers.cut_off(peer)
                return
            frames += 1
            bytes_read += length
            now_ns = time.monotonic_ns()
            frame = journal.commit(length, now_ns)
            if not peer.direct:
                self._greeting.on_lifeline(peer, frame, now_ns)
                if sock.fileno() < 0:
                    return
                continue
            ledger.receive(number, frame, now_ns)
            if peer.worker is not None:
                self._pass_on_reason(peer, peer.worker)
        peer.had_more = frames > 1

    def _pass_on_reason(self, peer: Peer, number: int) -> None:
        """Tell the supervisor why a worker must end, once, as soon as it has said so."""
        worker = self._core.workers.get(peer.number)
        if worker is not None and worker.said and not peer.told:
            peer.told = True
            self._control.tell(c.WorkerSaid(number, worker.said))

    # ------------------------------------------------------------------ ZeroMQ

    def _read_messages(self) -> None:
        router = self._router
        for _ in range(MAX_FRAMES_A_TURN if router.used else 0):
            if not self._journal.has_room:
                return
            message = router.receive()
            if message is None:
                return
            self._take_frame(*message)

    def _take_frame(self, identity: bytes, frame: bytes) -> None:
        number = self._doorman.peer_of(identity)
        now = time.monotonic_ns()
        if number is None:
            self._greeting.of_identity(identity, frame, now)
            return
        self._ledger.take(number, frame, now)
        peer = self._peers.of[number]
        if peer in self._peers.stalled:
            self._peers.heard_from(peer)

    # ------------------------------------------------------------------ the supervisor

    def _read_control(self) -> None:
        while True:
            try:
                message, fds = self._control.receive()
            except BlockingIOError:
                return
            if isinstance(message, c.WorkerStarted):
                kept = Kept(message.pid, socket.socket(fileno=fds[0]), fds[1], message.generation)
                self._admission.start_worker(message.worker, kept)
            elif isinstance(message, c.WorkerGone):
                self._worker_gone(message)
            elif isinstance(message, c.SwitchWorkers):
                self._ledger.decide(e.Switch(message.generation, message.paths), time.monotonic_ns())
            elif isinstance(message, c.DrainNow):
                self._ledger.decide(e.Drain(), time.monotonic_ns())
            elif isinstance(message, (c.PeerIsKept, c.PeerNotKept)):
                self._admission.decided_on(message.peer, kept=isinstance(message, c.PeerIsKept))
            elif isinstance(message, c.StartTrace):
                self._tracer.start(message.trace, fds[0], time.monotonic_ns())
            elif isinstance(message, c.StopTrace):
                self._tracer.stop(message.trace, time.monotonic_ns())

    def _worker_gone(self, message: c.WorkerGone) -> None:
        for peer in self._peers.of.values():
            if peer.worker == message.worker:
                peer.had_more = True
                self._read_lifeline(peer)  # all of it: what it had finished before it ended counts
                self._ledger.decide(e.WorkerEnded(peer.number, message.reason), time.monotonic_ns())
                self._peers.forget(peer)
                return

    # ------------------------------------------------------------------ the end

    def _stays(self) -> bool:
        """Whether, all being done, there are clients that have yet to connect to take what is left for them."""
        return bool(self._peers.stalled) and time.monotonic_ns() < self._turn_end.stay_until_ns

    def _say_bye(self) -> None:
        """Tell all who are left, wait until that is out, and close."""
        frame = m.encode([m.Bye(f"pool {self._config.name!r} was stopped")])
        for peer in self._peers.of.values():
            with contextlib.suppress(zmq.ZMQError):
                self._outboxes.say_last(peer, frame)
        self._router.close()
        self._admission.close()
        for peer in list(self._peers.of.values()):
            self._peers.forget(peer)
        self._control.release()
        self._epoll.close()
        self._journal.close()


def _core(config: BrokerConfig) -> Core:
    """A new core for what is to be served; where all is logged, one that says what becomes of it."""
    kind = FollowedCore if log.isEnabledFor(logging.DEBUG) else Core
    return kind(
        config.layout.models,
        terms=config.terms,
        max_slots_per_producer=config.max_slots_per_producer,
        max_delay_us=config.max_delay_us,
        batch_timeout_s=config.batch_timeout_s,
        recall_timeout_s=config.recall_timeout_s,
        evict=config.evict,
        slow_ms=config.slow_ms,
        owner_pid=config.owner_pid,
        gpus=config.gpus,
        name=config.name,
        epoch=config.epoch,
        arena_bytes=config.layout.segment_bytes,
        started_ns=time.monotonic_ns(),
    )


def configure(raw: bytes) -> BrokerConfig:
    """The broker's configuration from its standard input."""
    return msgspec.json.decode(raw, type=BrokerConfig)
