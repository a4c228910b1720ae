"""The peers of a broker: lifelines, the processes behind them, and how each ends.

::

    watch --> reads, is sent mail --> cut_off: its lifeline is closed --> its process ended --> forget: nothing is left
                                      (end of file, a violation,          (its pidfd says so;   (what ran for it has
                                      too slow, too much kept)            no more slots)        ended as well)

What a client holds is free when its process has ended, and not before, since until then it may write there.  A client
that never said Hello is forgotten as soon as it is cut off.  A worker's end is told by the supervisor, which reaps it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time

from trtpool.ipc.process import has_ended

from . import control as c
from . import events as e
from .control_socket import ControlSocket
from .doorman import Doorman
from .ledger import Ledger
from .mail import Mail

log = logging.getLogger("trtpool.broker")


class Peer:
    """A lifeline, and the process behind it.

    Attributes:
        number: what the broker calls it; never reused.
        worker: the supervisor's number for it, if it is a worker.
        direct: whether its messages go over the lifeline.
        joined: whether it was welcomed.
        told: whether the supervisor knows why it must end.
        mail: that of the ledger, once it has joined.
        resume: what goes out before all mail.
        looks, had_more: how often it was read, and whether it had more than one frame the last time.
    """

    __slots__ = (
        "direct", "had_more", "joined", "looks", "mail", "number", "pid", "pidfd", "resume", "sock", "told", "worker",
    )  # fmt: skip

    def __init__(self, number: int, sock: socket.socket, pidfd: int, pid: int, worker: int | None) -> None:
        self.number = number
        self.sock = sock
        self.pidfd = pidfd
        self.pid = pid
        self.worker = worker
        self.direct = self.joined = worker is not None
        self.told = False
        self.mail = Mail()
        self.resume = b""
        self.looks = 0
        self.had_more = False


class Peers:
    """All who are there.

    Args:
        ledger: what is told of their ends.
        doorman: what is told when one is gone.
        control: the supervisor, which keeps clients for the next broker if `kept`.
        epoll: what watches them.

    Attributes:
        of: each peer by its number.
        by_fd: those that are watched, by lifeline and pidfd.
        slow: those whose mail waits until there is room for it.
        stalled: those whose mail waits until they say something.
    """

    def __init__(
        self, ledger: Ledger, doorman: Doorman, control: ControlSocket, epoll: select.epoll, *, kept: bool
    ) -> None:
        self._ledger = ledger
        self._doorman = doorman
        self._control = control
        self._epoll = epoll
        self._kept = kept
        self.of: dict[int, Peer] = {}
        self.by_fd: dict[int, Peer] = {}
        self.slow: set[Peer] = set()
        self.stalled: set[Peer] = set()

    def new(self, sock: socket.socket, pidfd: int, pid: int, worker: int | None) -> Peer:
        """One with a number of its own, who is not watched yet."""
        self._ledger.next_peer += 1
        return Peer(self._ledger.next_peer - 1, sock, pidfd, pid, worker)

    def watch(self, peer: Peer) -> None:
        """Look at what comes from a peer, and at a client's end; of a worker's the supervisor tells, which reaps it."""
        peer.sock.setblocking(False)
        peer.mail = self._ledger.mail.get(peer.number, peer.mail)
        self.of[peer.number] = peer
        self.by_fd[peer.sock.fileno()] = self.by_fd[peer.pidfd] = peer
        self._epoll.register(peer.sock.fileno(), select.EPOLLIN)
        if peer.worker is None:
            self._epoll.register(peer.pidfd, select.EPOLLIN)

    def heard_from(self, peer: Peer) -> None:
        """A stalled one said something: perhaps that it has heard what it was sent."""
        self.stalled.discard(peer)
        self.slow.add(peer)

    # ------------------------------------------------------------------ ends

    def cut_off(self, peer: Peer) -> None:
        """Close the lifeline; what the peer holds is free when its process has ended."""
        if peer.sock.fileno() < 0:
            return
        self.close_lifeline(peer)
        if peer.worker is None:
            if not peer.joined:
                self.forget(peer)  # it never said Hello
            else:
                self._ledger.decide(e.ProducerClosed(peer.number), time.monotonic_ns())

    def cut_off_for_violation(self, peer: Peer) -> None:
        """Count it, say it, and `cut_off`."""
        self._ledger.core.violations += 1
        log.warning("peer %d (process %d) broke the protocol, and is cut off", peer.number, peer.pid)
        self.cut_off(peer)

    def close_lifeline(self, peer: Peer) -> None:
        """Neither read nor write there any more."""
        fd = peer.sock.fileno()
        self._epoll.unregister(fd)
        del self.by_fd[fd]
        shut(peer.sock)
        peer.mail.clear()
        self.slow.discard(peer)
        self.stalled.discard(peer)

    def process_may_have_ended(self, peer: Peer) -> None:
        """The pidfd of a client has something to say."""
        if not has_ended(peer.pidfd):
            return
        log.info("peer %d: process %d ended", peer.number, peer.pid, extra={"peer": peer.number, "peer_pid": peer.pid})
        self.cut_off(peer)
        if peer.number in self.of:
            self._ledger.decide(e.ProducerEnded(peer.number), time.monotonic_ns())
            # The core forgets it when what runs for it has ended; its process needs no more watching.
            if peer.number in self.of and peer.pidfd in self.by_fd:
                self._epoll.unregister(peer.pidfd)
                del self.by_fd[peer.pidfd]

    def forget(self, peer: Peer) -> None:
        """Nothing of it is left, here, in the ledger and with the supervisor."""
        if self.of.pop(peer.number, None) is None:
            return
        self._doorman.forget(peer.number)
        self.slow.discard(peer)
        self.stalled.discard(peer)
        for fd in (peer.sock.fileno(), peer.pidfd):
            if self.by_fd.pop(fd, None) is not None:
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)
        if peer.worker is None:
            shut(peer.sock)
            self.forget_kept(peer.number)
        peer.sock.close()
        os.close(peer.pidfd)
        self._ledger.forget(peer.number)

    def forget_kept(self, number: int) -> None:
        """The next broker need not know of this client."""
        if self._kept:
            self._control.tell(c.PeerForgotten(number))


def shut(sock: socket.socket) -> None:
    """Close a socket of which the supervisor has a duplicate, so that the peer sees it at once."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
