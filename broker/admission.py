"""How peers come in: clients through the listening socket, workers from the supervisor.

::

    client --- connects --> its user is allowed? --- no --> Denial
                                  | yes
    supervisor <-- PeerAdmitted + lifeline, pidfd     pending: it is told nothing before it outlives this broker
               --- PeerIsKept --> Description: arena, layout, token;  PeerNotKept --> Denial
    worker     --- WorkerStarted + lifeline, pidfd --> Description, and Welcome

A listener that may not be read now, for want of descriptors or since too many are pending, is left alone for a while:
it stays readable, and epoll would wake us for it without end.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time
from typing import Final

from trtpool.ipc import lifeline
from trtpool.ipc.process import peer_credentials, peer_pidfd
from trtpool.ipc.settings import PROTOCOL_VERSION, BrokerConfig

from . import control as c
from .control_socket import ControlSocket
from .doorman import Doorman
from .inheritance import Kept
from .ledger import Ledger
from .peers import Peer, Peers

log = logging.getLogger("trtpool.broker")

MAX_PENDING: Final = 64
"""Clients at once that the supervisor was told of and has not answered for: so many answers have room in its socket."""

MAX_DENIED_LOGGED: Final = 100
"""Users whose first refusal is logged."""

PENDING_PAUSE_NS: Final = 5_000_000
"""How long until the listener is looked at again when too many clients are pending."""

NO_DESCRIPTORS_PAUSE_NS: Final = 100_000_000
"""The same after running out of descriptors."""


class Admission:
    """See the module.

    Args:
        config: the pool, as peers are told of it; its listener becomes ours.
        endpoint: where clients find the ROUTER.
        allowed: users whose processes may come in.
        ledger: where workers are noted.
        peers: who has been let in.
        doorman: who makes tokens for clients.
        control: the supervisor.
        epoll: what watches the listener.

    Attributes:
        listener: what clients connect to.
        again_ns: when the listener is to be looked at again; 0: it is looked at.
    """

    def __init__(
        self,
        config: BrokerConfig,
        endpoint: str,
        allowed: set[int],
        ledger: Ledger,
        peers: Peers,
        doorman: Doorman,
        control: ControlSocket,
        epoll: select.epoll,
    ) -> None:
        self._config = config
        self._endpoint = endpoint
        self._allowed = allowed
        self._ledger = ledger
        self._peers = peers
        self._doorman = doorman
        self._control = control
        self._epoll = epoll
        self._kept = config.table_fd is not None  # by a supervisor, for the next of us
        self._pending: dict[int, Peer] = {}  # clients that the supervisor has not answered for
        self._denied: set[int] = set()
        self.again_ns = 0
        self.listener = socket.socket(fileno=config.listener_fd)
        epoll.register(self.listener.fileno(), select.EPOLLIN)

    # ------------------------------------------------------------------ clients

    def accept(self) -> None:
        """Admit all who have connected."""
        while not self.again_ns:
            if len(self._pending) >= MAX_PENDING:
                self._accept_later(PENDING_PAUSE_NS)
                return
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("no more connections for now: %s; raise the limit on open files (ulimit -n)", error)
                    self._accept_later(NO_DESCRIPTORS_PAUSE_NS)
                    return
                continue  # it gave up before we came to it
            try:
                self._admit(sock)
            except ProcessLookupError:
                sock.close()
            except OSError as error:
                log.warning("a connection was dropped: %s", error)
                sock.close()

    def accept_again(self) -> None:
        """The pause is over."""
        self.again_ns = 0
        self._epoll.register(self.listener.fileno(), select.EPOLLIN)

    def _accept_later(self, pause_ns: int) -> None:
        self._epoll.unregister(self.listener.fileno())
        self.again_ns = time.monotonic_ns() + pause_ns

    def _admit(self, sock: socket.socket) -> None:
        who = peer_credentials(sock)
        if who.uid not in self._allowed:
            self._refuse_user(sock, who.uid, who.pid)
            return
        try:
            pidfd = peer_pidfd(sock)
        except ProcessLookupError:
            raise
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # the connection took the last descriptor
                self._deny_for_want_of_descriptors(sock, error.strerror)
            else:
                self._deny_whom_we_cannot_watch(sock, error.strerror)
            raise
        peer = self._peers.new(sock, pidfd, who.pid, None)
        if not self._kept:
            self._let_in(peer)
            return
        try:
            self._control.tell(c.PeerAdmitted(peer.number, who.pid), [sock.fileno(), pidfd])
        except OSError:  # more descriptors are on their way than a user may have
            os.close(pidfd)
            raise
        self._pending[peer.number] = peer

    def _refuse_user(self, sock: socket.socket, uid: int, pid: int) -> None:
        if uid not in self._denied and len(self._denied) < MAX_DENIED_LOGGED:  # or anyone could fill the log
            self._denied.add(uid)
            log.warning("user %d was refused (process %d); said once for each user", uid, pid)
        text = (
            f"user {uid} may not attach to pool {self._config.name!r}: run as user {os.getuid()}, or start the "
            f"pool with --allow-user {uid}"
        )
        lifeline.send_packet(sock, lifeline.Denial(text))
        sock.close()

    def _deny_whom_we_cannot_watch(self, sock: socket.socket, why: str | None) -> None:
        """Its slots would never come back."""
        text = (
            f"pool {self._config.name!r} cannot watch your process ({why}), which is perhaps in another pid namespace: "
            "share that of the pool (docker run --pid=container:POOL, Kubernetes: shareProcessNamespace), or use Linux "
            "6.5 or newer; `trtpool doctor` beside the pool says what is missing"
        )
        lifeline.send_packet(sock, lifeline.Denial(text))

    def _deny_for_want_of_descriptors(self, sock: socket.socket, why: str | None) -> None:
        text = f"pool {self._config.name!r} can take no more clients: {why}; raise its limit (ulimit -n)"
        lifeline.send_packet(sock, lifeline.Denial(text))

    def decided_on(self, number: int, *, kept: bool) -> None:
        """The supervisor keeps a client that was admitted, or cannot."""
        peer = self._pending.pop(number)
        try:
            if kept:
                self._let_in(peer)
                return
            self._deny_for_want_of_descriptors(peer.sock, "the supervisor has too many open files")
            os.close(peer.pidfd)
        except OSError as error:  # it gave up
            log.debug("peer %d took no description: %s", number, error)
        peer.sock.close()

    # ------------------------------------------------------------------ workers, and all

    def start_worker(self, worker: int, kept: Kept) -> None:
        """Let a worker in."""
        try:
            self._let_in(self._peers.new(kept.sock, kept.pidfd, kept.pid, worker), kept.generation)
        except OSError as error:  # it ended already; WorkerGone follows
            kept.sock.close()
            log.debug("worker %d took no description: %s", worker, error)

    def _let_in(self, peer: Peer, generation: int = 0) -> None:
        """Tell a peer all it needs, and listen to it.

        Raises:
            OSError: it takes nothing in, and was forgotten; its lifeline is left to the caller.
        """
        number, worker = peer.number, peer.worker
        description = lifeline.Description(
            version=PROTOCOL_VERSION,
            epoch=self._config.epoch,
            pool=self._config.name,
            endpoint=self._endpoint,
            token=self._doorman.issue(number) if worker is None else b"",
            layout=self._config.layout,
            gpus=self._config.gpus,
            busy_poll=self._config.busy_poll,
            spin_us=self._config.spin_us,
            slow_ms=self._config.slow_ms,
        )
        try:
            lifeline.send_packet(peer.sock, description, [self._config.arena_fd])
        except OSError:
            os.close(peer.pidfd)
            self._doorman.forget(number)
            if worker is None:
                self._peers.forget_kept(number)
            raise
        self._peers.watch(peer)
        if worker is not None:
            self._ledger.join_worker(number, peer.pid, worker, time.monotonic_ns(), generation)
            peer.mail = self._ledger.mail[number]
        log.info(
            "peer %d is process %d%s", number, peer.pid, "" if worker is None else f", worker {worker}",
            extra={"peer": number, "peer_pid": peer.pid},
        )  # fmt: skip

    def close(self) -> None:
        """Drop those who were not let in."""
        for peer in self._pending.values():
            peer.sock.close()
            os.close(peer.pidfd)
