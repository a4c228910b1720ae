"""The broker's loop: all of its input and output, around a `Core` that decides.

One turn: sleep until something happens; read lifelines, pidfds, the control socket and every ZeroMQ message
that has arrived; let the core end its turn, which makes batches of all of it; send each peer at most one frame.

One epoll watches everything: 256 descriptors in a `zmq.Poller` would cost 28 us a poll, and in an epoll 2.
ZeroMQ's descriptor is edge-triggered, and any use of its socket may use up the edge: `_zmq_used` says that the socket
must be asked whether it has messages (zmq_getsockopt(3), ZMQ_FD).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import zmq

from trtpool.ipc import lifeline
from trtpool.ipc import messages as m
from trtpool.ipc.errors import ProtocolError, RunDirError
from trtpool.ipc.process import has_ended, peer_credentials, peer_pidfd
from trtpool.ipc.rundir import ZMQ_PREFIX, socket_mode
from trtpool.ipc.settings import MAX_FRAME_BYTES, PROTOCOL_VERSION, BrokerConfig

from . import control as c
from . import events as e
from .core import Core
from .doorman import Doorman
from .inheritance import Inheritance, Kept, inherit
from .journal import Journal, JournalFull, journal_bytes
from .ledger import Ledger, Mail, Told

log = logging.getLogger("trtpool.broker")

# Plain integers: enum flags cost 2 us a use.
NOBLOCK: Final = int(zmq.NOBLOCK)
SNDMORE: Final = int(zmq.SNDMORE) | NOBLOCK
RCVMORE: Final = int(zmq.RCVMORE)
EVENTS: Final = int(zmq.EVENTS)
POLLIN: Final = int(zmq.POLLIN)
SEND_FLAGS: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

MAX_FRAMES_A_TURN: Final = 256
MAX_FRAMES_OF_A_PEER: Final = 64
"""Frames that are read over ZeroMQ, and over one lifeline, before others have their turn."""

MAX_BYTES_OF_A_PEER: Final = 32 * 1024
"""Bytes after which no more frames are read over one lifeline in this turn: a frame may hold thousands of messages."""

MAX_OUTBOX_FRAMES: Final = 1024
"""Frames kept for a peer that reads too slowly; one more ends its connection."""

MAX_UNSENT_BYTES: Final = 32 << 20
"""Bytes kept for all peers that read too slowly; more end the connection of the one that has most.  The journal must
have room for them."""

ZMQ_WINDOW: Final = 256
"""Frames that a client over ZeroMQ may be sent without having said that it heard them; a lifeline takes as many."""

MAX_PENDING: Final = 64
"""Clients at once that the supervisor was told of and has not answered for: so many answers have room in its socket."""

RECONNECT_NS: Final = 2_000_000_000
"""How long a pool that has drained waits for clients over ZeroMQ to take what is left for them."""

MAX_DENIED_LOGGED: Final = 100
"""Users whose first refusal is logged."""

RETRY_NS: Final = 5_000_000
"""How long until a full outbox is tried again, and new connections after running out of descriptors."""

FINE_TIMER_S: Final = 0.01
"""Timers nearer than this are slept for by select(2), whose resolution is better than epoll's millisecond."""

LONGEST_SLEEP_NS: Final = 60_000_000_000
"""Timers may be further away than a poll can say."""

RESERVE: Final = 2
"""Descriptors that no client can take: those that come with a new worker, without which nobody's work would go on."""

BYE_LINGER_MS: Final = 5000


class _Peer:
    """A lifeline, and the process behind it.  `told`: the supervisor knows why it must end."""

    __slots__ = ("direct", "joined", "mail", "number", "pid", "pidfd", "resume", "sock", "told", "worker")

    def __init__(self, number: int, sock: socket.socket, pidfd: int, pid: int, worker: int | None) -> None:
        self.number = number
        self.sock = sock
        self.pidfd = pidfd
        self.pid = pid
        self.worker = worker
        self.direct = self.joined = worker is not None  # `direct`: its messages go over the lifeline
        self.told = False
        self.mail = Mail()  # that of the ledger, once it has joined
        self.resume = b""  # goes out before all mail


class Loop:
    """Serves until drained, or until the supervisor ends.

    Args:
        config: what to serve; its descriptors become the loop's.
    """

    def __init__(self, config: BrokerConfig) -> None:
        self._config = config
        self._core = Core(
            config.layout.models,
            max_slots_per_producer=config.max_slots_per_producer,
            max_delay_us=config.max_delay_us,
            batch_timeout_s=config.batch_timeout_s,
            recall_timeout_s=config.recall_timeout_s,
            evict=config.evict,
            owner_pid=config.owner_pid,
            gpus=config.gpus,
            name=config.name,
            epoch=config.epoch,
            arena_bytes=config.layout.segment_bytes,
            started_ns=time.monotonic_ns(),
        )
        table_fd = -1 if config.table_fd is None else config.table_fd
        self._kept = config.table_fd is not None  # by a supervisor, for the next of us
        self._journal = Journal(table_fd, journal_bytes(config.layout))
        self._ledger = Ledger(self._core, self._journal)
        self._doorman = Doorman()
        self._peers: dict[int, _Peer] = {}
        self._by_fd: dict[int, _Peer] = {}
        self._pending: dict[int, _Peer] = {}  # clients that the supervisor has not answered for
        self._slow: set[_Peer] = set()
        self._stalled: set[_Peer] = set()  # whose mail waits until they say something, unlike that of the slow
        self._stay_until_ns = 0
        self._accept_again_ns = 0
        self._finished = False
        self._listener = socket.socket(fileno=config.listener_fd)
        self._control = socket.socket(fileno=config.control_fd)
        self._endpoint = f"ipc://{Path(config.run_dir) / ZMQ_PREFIX}{config.epoch}"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._router.setsockopt(zmq.LINGER, BYE_LINGER_MS)
        self._allowed = {os.getuid(), *config.allow_users}
        for uid in self._allowed:  # ZeroMQ takes a C int; who is not named gets no connection
            self._router.setsockopt(zmq.IPC_FILTER_UID, uid if uid < 2**31 else uid - 2**32)
        self._denied: set[int] = set()
        try:
            self._router.bind(self._endpoint)
        except zmq.ZMQError as error:
            raise RunDirError(
                f"no socket can be made in the run directory {config.run_dir}: {error.strerror}; make room, or choose "
                "another with --run-dir"
            ) from error
        Path(self._endpoint.removeprefix("ipc://")).chmod(socket_mode(shared=bool(config.allow_users)))
        self._epoll = select.epoll()
        self._zmq_fd = int(self._router.getsockopt(zmq.FD))
        self._zmq_used = True
        for fd in (self._zmq_fd, self._listener.fileno(), self._control.fileno()):
            self._epoll.register(fd, select.EPOLLIN)
        self._reserve: list[int] = []
        self._refill_reserve()

    def run(self) -> None:
        """Serve."""
        if self._config.takes_over:
            self._take_over(inherit(self._control))
        self._tell(c.BrokerReady())
        while not self._finished or self._stays():
            for fd in self._sleep():
                self._look_at(fd)
            self._read_messages()
            self._end_turn()
        self._say_bye()

    # ------------------------------------------------------------------ taking over

    def _take_over(self, kept: Inheritance) -> None:
        """Go on where a broker ended.  Who dies in this leaves all as it was, until the ledger is compact."""
        ledger, now = self._ledger, time.monotonic_ns()
        rest = ledger.recover(now)
        ledger.next_peer = max(ledger.next_peer, *(number + 1 for number in kept.peers), 1)
        numbers = {mail.worker: peer for peer, mail in ledger.mail.items() if mail.worker is not None}
        for worker, one in kept.workers.items():
            if worker in numbers:
                self._watch(_Peer(numbers[worker], one.sock, one.pidfd, one.pid, worker))
        for number, one in kept.peers.items():
            if number in self._core.producers:
                self._resume_client(number, one)
            else:  # it was not welcomed yet, and connects again
                self._shut(one.sock)
                os.close(one.pidfd)
                self._forget_kept(number)
                ledger.forget(number)
        self._see_to(rest)
        self._compact(lambda: self._forget_all(self._see_to(ledger.end_turn(now)[1])))
        for peer in list(self._peers.values()):
            if peer.sock.fileno() >= 0:
                peer.resume = m.encode([self._resume(peer)])
                self._send_mail(peer)
        ledger.sent(peer.number for peer in self._slow)
        for worker, one in kept.workers.items():
            if worker not in numbers:  # the last broker never heard of it
                self._start_worker(worker, one)
        for worker in numbers.keys() - kept.workers.keys():
            ledger.decide(e.WorkerEnded(numbers[worker], "it ended while the broker did"), now)
        for number in [one for one in self._core.producers if one not in self._peers]:
            log.warning(
                "peer %d was lost: what it holds stays taken; raise the limit on open files (ulimit -n)", number
            )
            ledger.decide(e.ProducerClosed(number), now)
        log.warning("this broker has taken over: epoch %d, %d peers", self._config.epoch, len(self._peers))

    def _resume(self, peer: _Peer) -> m.Resume | m.Reconnect:
        """What a peer of the last broker is told first."""
        post = peer.mail.post
        if post is None:
            return m.Resume(self._config.epoch, peer.mail.said)
        token = self._doorman.issue(peer.number)
        return m.Reconnect(self._config.epoch, post.heard, self._endpoint, token)

    def _resume_client(self, number: int, kept: Kept) -> None:
        peer = _Peer(number, kept.sock, kept.pidfd, kept.pid, None)
        peer.joined = True
        peer.direct = not self._ledger.mail.get(number, Mail()).zmq
        self._watch(peer)
        if self._core.producers[number].closed:
            self._close_lifeline(peer)

    # ------------------------------------------------------------------ sleeping

    def _sleep(self) -> list[int]:
        """Wait for the next thing to happen; returns the descriptors that it happened to."""
        if self._accept_again_ns and time.monotonic_ns() >= self._accept_again_ns:
            self._accept_again_ns = 0
            self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        timers = [self._core.next_timer_ns(), self._accept_again_ns or None, self._stay_until_ns or None]
        if self._slow:
            timers.append(time.monotonic_ns() + RETRY_NS)
        due = [timer for timer in timers if timer is not None]
        timeout_s = None
        if self._zmq_used and self._has_messages():
            timeout_s = 0.0
        elif due:
            timeout_s = min(max(0, min(due) - time.monotonic_ns()), LONGEST_SLEEP_NS) / 1e9
            if 0 < timeout_s < FINE_TIMER_S:
                select.select([self._epoll.fileno()], [], [], timeout_s)
                timeout_s = 0.0
        return [fd for fd, _ in self._epoll.poll(timeout_s)]

    def _has_messages(self) -> bool:
        return bool(self._router.getsockopt(EVENTS) & POLLIN)  # type: ignore[operator]

    def _look_at(self, fd: int) -> None:
        if fd == self._zmq_fd:
            self._zmq_used = True
        elif fd == self._listener.fileno():
            self._accept()
        elif fd == self._control.fileno():
            self._read_control()
        else:
            peer = self._by_fd.get(fd)
            if peer is not None and fd == peer.pidfd:
                self._process_ended(peer)
            elif peer is not None:
                self._read_lifeline(peer)

    # ------------------------------------------------------------------ lifelines

    def _accept(self) -> None:
        while not self._accept_again_ns:
            if len(self._pending) >= MAX_PENDING:
                self._accept_later(RETRY_NS)
                return
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("no more connections for now: %s; raise the limit on open files (ulimit -n)", error)
                    self._accept_later(20 * RETRY_NS)
                    return
                continue  # it gave up before we came to it
            try:
                self._admit(sock)
            except ProcessLookupError:
                sock.close()
            except OSError as error:
                log.warning("a connection was dropped: %s", error)
                sock.close()

    def _accept_later(self, pause_ns: int) -> None:
        """The listener stays readable, and epoll would wake us for it without end."""
        self._epoll.unregister(self._listener.fileno())
        self._accept_again_ns = time.monotonic_ns() + pause_ns

    def _admit(self, sock: socket.socket) -> None:
        who = peer_credentials(sock)
        if who.uid not in self._allowed:
            if who.uid not in self._denied and len(self._denied) < MAX_DENIED_LOGGED:  # or anyone could fill the log
                self._denied.add(who.uid)
                log.warning("user %d was refused (process %d); said once for each user", who.uid, who.pid)
            text = (
                f"user {who.uid} may not attach to pool {self._config.name!r}: run as user {os.getuid()}, or start the "
                f"pool with --allow-user {who.uid}"
            )
            lifeline.send_packet(sock, lifeline.Denial(text))
            sock.close()
            return
        try:
            pidfd = peer_pidfd(sock)
        except ProcessLookupError:
            raise
        except OSError as error:  # the connection took the last descriptor
            self._deny_for_want_of_descriptors(sock, error.strerror)
            raise
        peer = self._new_peer(sock, pidfd, who.pid, None)
        if not self._kept:
            self._let_in(peer)
            return
        try:
            self._tell(c.PeerAdmitted(peer.number, who.pid), [sock.fileno(), pidfd])
        except OSError:  # more descriptors are on their way than a user may have
            os.close(pidfd)
            raise
        self._pending[peer.number] = peer

    def _deny_for_want_of_descriptors(self, sock: socket.socket, why: str | None) -> None:
        text = f"pool {self._config.name!r} can take no more clients: {why}; raise its limit (ulimit -n)"
        lifeline.send_packet(sock, lifeline.Denial(text))

    def _decided_on(self, number: int, *, kept: bool) -> None:
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

    def _new_peer(self, sock: socket.socket, pidfd: int, pid: int, worker: int | None) -> _Peer:
        self._ledger.next_peer += 1
        return _Peer(self._ledger.next_peer - 1, sock, pidfd, pid, worker)

    def _let_in(self, peer: _Peer) -> None:
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
        )
        try:
            lifeline.send_packet(peer.sock, description, [self._config.arena_fd])
        except OSError:
            os.close(peer.pidfd)
            self._doorman.forget(number)
            if worker is None:
                self._forget_kept(number)
            raise
        self._watch(peer)
        if worker is not None:
            self._ledger.join_worker(number, peer.pid, worker, time.monotonic_ns())
            peer.mail = self._ledger.mail[number]
        log.debug("peer %d is process %d%s", number, peer.pid, "" if worker is None else f", worker {worker}")

    def _watch(self, peer: _Peer) -> None:
        """Look at what comes from a peer, and at a client's end; of a worker's the supervisor tells, which reaps it."""
        peer.sock.setblocking(False)
        peer.mail = self._ledger.mail.get(peer.number, peer.mail)
        self._peers[peer.number] = peer
        self._by_fd[peer.sock.fileno()] = self._by_fd[peer.pidfd] = peer
        self._epoll.register(peer.sock.fileno(), select.EPOLLIN)
        if peer.worker is None:
            self._epoll.register(peer.pidfd, select.EPOLLIN)

    def _read_lifeline(self, peer: _Peer) -> None:
        """Take what a peer has sent over its lifeline; at the end of file, wait for the end of its process."""
        bytes_read = 0
        for _ in range(MAX_FRAMES_OF_A_PEER):
            if peer.sock.fileno() < 0 or not self._journal.has_room or bytes_read >= MAX_BYTES_OF_A_PEER:
                return
            try:
                length = peer.sock.recv_into(self._journal.frame(peer.number))
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it closed with something unread, which is told once, before what it sent last
            except OSError:
                length = 0
            if not length:
                self._cut_off(peer)
                return
            bytes_read += length
            now = time.monotonic_ns()
            frame = self._journal.commit(length, now)
            if not peer.direct:
                self._greet_direct(peer, frame, now)
                continue
            self._ledger.receive(peer.number, frame, now)
            if peer.worker is not None:
                self._pass_on_reason(peer, peer.worker)

    def _greet_direct(self, peer: _Peer, frame: memoryview, now: int) -> None:
        """The first frame over a lifeline, if the peer did not choose ZeroMQ, must begin with Hello and its token."""
        hello = _hello(frame)
        if peer.joined or hello is None or not self._doorman.redeem(peer.number, hello):
            self._cut_off_for_violation(peer)
            return
        peer.direct = peer.joined = True
        self._ledger.join(peer.number, frame, now, peer.pid)

    def _cut_off_for_violation(self, peer: _Peer) -> None:
        self._core.violations += 1
        log.warning("peer %d (process %d) broke the protocol, and is cut off", peer.number, peer.pid)
        self._cut_off(peer)

    def _cut_off(self, peer: _Peer) -> None:
        """Close the lifeline; what the peer holds is free when its process has ended."""
        if peer.sock.fileno() < 0:
            return
        self._close_lifeline(peer)
        if peer.worker is None:
            if not peer.joined:
                self._forget(peer)  # it never said Hello
            else:
                self._decide(e.ProducerClosed(peer.number))

    def _close_lifeline(self, peer: _Peer) -> None:
        fd = peer.sock.fileno()
        self._epoll.unregister(fd)
        del self._by_fd[fd]
        self._shut(peer.sock)
        peer.mail.clear()
        self._slow.discard(peer)
        self._stalled.discard(peer)

    @staticmethod
    def _shut(sock: socket.socket) -> None:
        """Close a socket of which the supervisor has a duplicate, so that the peer sees it at once."""
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()

    def _process_ended(self, peer: _Peer) -> None:
        if not has_ended(peer.pidfd):
            return
        log.debug("peer %d: process %d ended", peer.number, peer.pid)
        self._cut_off(peer)
        if peer.number in self._peers:
            self._decide(e.ProducerEnded(peer.number))
            # The core forgets it when what runs for it has ended; its process needs no more watching.
            if peer.number in self._peers and peer.pidfd in self._by_fd:
                self._epoll.unregister(peer.pidfd)
                del self._by_fd[peer.pidfd]

    def _forget(self, peer: _Peer) -> None:
        if self._peers.pop(peer.number, None) is None:
            return
        self._doorman.forget(peer.number)
        self._slow.discard(peer)
        self._stalled.discard(peer)
        for fd in (peer.sock.fileno(), peer.pidfd):
            if self._by_fd.pop(fd, None) is not None:
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)
        if peer.worker is None:
            self._shut(peer.sock)
            self._forget_kept(peer.number)
        peer.sock.close()
        os.close(peer.pidfd)
        self._ledger.forget(peer.number)

    def _forget_kept(self, number: int) -> None:
        if self._kept:
            self._tell(c.PeerForgotten(number))

    # ------------------------------------------------------------------ the supervisor

    def _read_control(self) -> None:
        while True:
            try:
                data, fds = self._receive_control()
            except BlockingIOError:
                return
            if not data:
                raise SystemExit(1)  # the supervisor ended
            message = c.decode(data)
            if isinstance(message, c.WorkerStarted):
                self._start_worker(message.worker, Kept(message.pid, socket.socket(fileno=fds[0]), fds[1]))
            elif isinstance(message, c.WorkerGone):
                self._worker_gone(message)
            elif isinstance(message, c.DrainNow):
                self._decide(e.Drain())
            elif isinstance(message, (c.PeerIsKept, c.PeerNotKept)):
                self._decided_on(message.peer, kept=isinstance(message, c.PeerIsKept))

    def _receive_control(self) -> tuple[bytes, list[int]]:
        """The next packet of the supervisor; its descriptors have room even if clients hold all that we may have."""
        lifeline.close_all(self._reserve)
        self._reserve.clear()
        try:
            return lifeline.receive_packet(self._control, socket.MSG_DONTWAIT)
        finally:
            self._refill_reserve()

    def _refill_reserve(self) -> None:
        """Hold descriptors for the next worker; those that there are none for now are got with the next packet."""
        with contextlib.suppress(OSError):
            while len(self._reserve) < RESERVE:
                self._reserve.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def _start_worker(self, worker: int, kept: Kept) -> None:
        try:
            self._let_in(self._new_peer(kept.sock, kept.pidfd, kept.pid, worker))
        except OSError as error:  # it ended already; WorkerGone follows
            kept.sock.close()
            log.debug("worker %d took no description: %s", worker, error)

    def _worker_gone(self, message: c.WorkerGone) -> None:
        for peer in self._peers.values():
            if peer.worker == message.worker:
                self._read_lifeline(peer)  # what it had finished before it ended counts
                self._decide(e.WorkerEnded(peer.number, message.reason))
                self._forget(peer)
                return

    def _pass_on_reason(self, peer: _Peer, number: int) -> None:
        """Tell the supervisor why a worker must end, once, as soon as it has said so."""
        worker = self._core.workers.get(peer.number)
        if worker is not None and worker.said and not peer.told:
            peer.told = True
            self._tell(c.WorkerSaid(number, worker.said))

    def _end_worker(self, hung: e.Hung) -> None:
        """Have the supervisor kill a worker; its batches go back when it says that the process is gone."""
        peer = self._peers.get(hung.peer)
        if peer is not None and peer.worker is not None:  # or it ended with the last broker, which had it killed
            self._tell(c.WorkerHangs(peer.worker, hung.text))

    def _evict(self, evict: e.Evict) -> None:
        """Kill the process of a client; its slots come back as after any end of a producer."""
        peer = self._peers.get(evict.peer)
        if peer is None or peer.pid == self._config.owner_pid:  # it left meanwhile; or all would end with it
            return
        try:
            signal.pidfd_send_signal(peer.pidfd, signal.SIGKILL)
        except ProcessLookupError:  # it ended, which the pidfd is about to tell
            log.info("process %d had ended before it was evicted", peer.pid)
        except PermissionError:
            log.warning("process %d is another user's and cannot be killed; end it: %s", peer.pid, evict.text)
        else:
            log.warning("process %d was killed (--evict): %s", peer.pid, evict.text)

    def _tell(self, message: c.Control, fds: Sequence[int] = ()) -> None:
        """Tell the supervisor, which always reads, if not always at once."""
        while True:
            try:
                lifeline.send_packet(self._control, message, fds)
            except BlockingIOError:
                writable = select.poll()
                writable.register(self._control, select.POLLOUT)
                writable.poll()
            else:
                return

    # ------------------------------------------------------------------ messages in

    def _read_messages(self) -> None:
        router = self._router
        for _ in range(MAX_FRAMES_A_TURN if self._zmq_used else 0):
            if not self._has_messages():
                self._zmq_used = False
                return
            if not self._journal.has_room:
                return
            identity = router.recv(NOBLOCK)
            frame = router.recv(NOBLOCK)
            # More parts than one would be taken for another peer's identity and frame.
            whole = True
            while router.getsockopt(RCVMORE):
                router.recv(NOBLOCK)
                whole = False
            self._take_frame(identity, frame if whole else b"")

    def _take_frame(self, identity: bytes, frame: bytes) -> None:
        number = self._doorman.peer_of(identity)
        now = time.monotonic_ns()
        if number is not None:
            self._ledger.take(number, frame, now)
            peer = self._peers[number]
            if peer in self._stalled:  # perhaps it said that it has heard what it was sent
                self._stalled.discard(peer)
                self._slow.add(peer)
            return
        if self._doorman.has_left(identity):
            return
        hello = _hello(frame)
        number = None if hello is None else self._doorman.bind(identity, hello)
        if number is None:
            if not self._doorman.has_left(identity, hello):
                self._turn_away(identity)
            return
        peer = self._peers[number]
        if peer.joined:
            self._reconnected(peer, frame)
            return
        peer.joined = True
        self._ledger.join_over_zmq(number, frame, now, peer.pid)
        peer.mail = self._ledger.mail[number]

    def _reconnected(self, peer: _Peer, frame: bytes) -> None:
        """A client of the last broker said Hello, and how many frames it has had: send what it has not."""
        try:
            self._ledger.reconnect(peer.number, frame)
        except ProtocolError:
            self._cut_off_for_violation(peer)
            return
        self._stalled.discard(peer)
        self._slow.add(peer)

    def _turn_away(self, identity: bytes) -> None:
        self._core.violations += 1
        if self._doorman.turn_away(identity):
            frame = m.encode([m.Error(m.DENIED, "the first message must be Hello with a token of this pool")])
            with contextlib.suppress(zmq.ZMQError):
                self._zmq_used = True
                self._router.send_multipart([identity, frame], NOBLOCK)

    # ------------------------------------------------------------------ decisions out

    def _decide(self, event: Told) -> None:
        self._ledger.decide(event, time.monotonic_ns())

    def _end_turn(self) -> None:
        """Carry out what the core decided in this turn, and see that there is room to write down the next."""
        self._carry_out()
        if not self._journal.has_room:
            self._compact(self._carry_out)

    def _compact(self, carry_out: Callable[[], None]) -> None:
        """Write down what is in place of how it came to that, at the end of a turn; `carry_out` ends one more."""
        while True:
            try:
                self._ledger.compact()
            except JournalFull as full:
                self._shed(full)
                carry_out()
            else:
                return

    def _shed(self, full: JournalFull) -> None:
        """Cut off those clients that most of what does not fit is kept for: frames that wait, and requests.

        Raises:
            JournalFull: it is kept for nobody.
        """
        weights = {
            peer: self._ledger.weight(peer.number)
            for peer in self._peers.values()
            if peer.worker is None and peer.sock.fileno() >= 0
        }
        total = too_much = sum(weights.values())
        if not total:
            raise full
        for peer in sorted(weights, key=weights.__getitem__, reverse=True):
            log.warning("peer %d (process %d) lets too much wait for it, and is cut off", peer.number, peer.pid)
            self._cut_off(peer)
            too_much -= weights[peer]
            if 4 * too_much <= 3 * total:
                return

    def _carry_out(self) -> None:
        """Do what the core decided; one frame a peer."""
        had_slow = bool(self._slow)
        for peer in list(self._slow):
            self._send_mail(peer)
        peers, rest = self._ledger.end_turn(time.monotonic_ns())
        forgotten = self._see_to(rest)
        for number in peers:
            reader = self._peers.get(number)
            if reader is not None:
                reader.mail = self._ledger.mail[number]
                self._send_mail(reader)
        if self._slow or self._stalled:
            self._bound_outboxes()
        self._forget_all(forgotten)
        if peers or rest or had_slow:
            self._ledger.sent(peer.number for peer in self._slow)

    def _forget_all(self, numbers: list[int]) -> None:
        for number in numbers:
            self._ledger.forget(number)
            gone = self._peers.get(number)
            if gone is not None and gone.worker is None:
                self._forget(gone)

    def _see_to(self, actions: list[e.Action]) -> list[int]:
        """Do what is not to send; returns the peers to forget when all is sent."""
        forgotten = []
        for action in actions:
            if isinstance(action, e.Forget):
                forgotten.append(action.peer)
            elif isinstance(action, e.WorkerReady):
                peer = self._peers.get(action.peer)
                if peer is not None and peer.worker is not None:
                    self._tell(c.WorkerIsReady(peer.worker))
            elif isinstance(action, e.Hung):
                self._end_worker(action)
            elif isinstance(action, e.Overdue):
                log.warning("%s", action.text)
            elif isinstance(action, e.Evict):
                self._evict(action)
            elif isinstance(action, e.Drained):
                self._tell(c.IsDrained())
                self._finished = True
                self._stay_until_ns = time.monotonic_ns() + RECONNECT_NS
        return forgotten

    def _send_mail(self, peer: _Peer) -> None:
        """Send what waits for a peer, as far as it takes it now."""
        unsent = peer.mail.unsent
        if peer.sock.fileno() < 0:
            peer.mail.clear()  # it left, or was cut off
            return
        if peer.resume:
            if not self._try_pipe(peer, peer.resume):
                self._slow.add(peer)
                return
            peer.resume = b""
        while unsent and self._may_send(peer) and self._try_send(peer, unsent[0]):
            unsent.popleft()
        self._slow.discard(peer)
        self._stalled.discard(peer)
        if not unsent:
            return
        (self._slow if self._may_send(peer) else self._stalled).add(peer)
        mail = peer.mail
        if len(mail.kept) > MAX_OUTBOX_FRAMES + (ZMQ_WINDOW if mail.zmq else 0):
            self._cut_off_slow(peer)

    def _bound_outboxes(self) -> None:
        """Keep what waits for slow readers below `MAX_UNSENT_BYTES`."""
        sizes = {peer: sum(map(len, peer.mail.kept)) for peer in self._slow | self._stalled}
        total = sum(sizes.values())
        for peer, size in sorted(sizes.items(), key=lambda item: -item[1]):
            if total <= MAX_UNSENT_BYTES:
                return
            self._cut_off_slow(peer)
            total -= size

    def _cut_off_slow(self, peer: _Peer) -> None:
        log.warning("peer %d (process %d) reads too slowly, and is cut off", peer.number, peer.pid)
        self._cut_off(peer)

    def _may_send(self, peer: _Peer) -> bool:
        """Whether a peer is there to be sent something; one over ZeroMQ has also heard most of what it was sent."""
        post = peer.mail.post
        if post is None:
            return True
        there = self._doorman.identity_of(peer.number) is not None
        return there and len(post.unheard) - len(peer.mail.unsent) < ZMQ_WINDOW

    def _stays(self) -> bool:
        """Whether, all being done, there are clients that have yet to connect to take what is left for them."""
        return bool(self._stalled) and time.monotonic_ns() < self._stay_until_ns

    def _try_send(self, peer: _Peer, frame: bytes) -> bool:
        """Send a frame if it can be sent now.  To one that is gone it counts as sent: its end is on its way to us."""
        if peer.direct:
            return self._try_pipe(peer, frame)
        identity = self._doorman.identity_of(peer.number)
        if identity is None:
            return True
        try:
            self._zmq_used = True
            self._router.send(identity, SNDMORE)
            self._router.send(frame, NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
        return True

    @staticmethod
    def _try_pipe(peer: _Peer, frame: bytes) -> bool:
        try:
            peer.sock.send(frame, SEND_FLAGS)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EBADF, errno.ENOTCONN):
                raise
        return True

    def _say_bye(self) -> None:
        """Tell all who are left, wait until that is out, and close."""
        frame = m.encode([m.Bye(f"pool {self._config.name!r} was stopped")])
        for peer in self._peers.values():
            with contextlib.suppress(zmq.ZMQError):
                self._send_mail(peer)
                if not peer.mail.unsent:
                    self._try_send(peer, frame)
        self._router.close()
        self._context.term()
        for peer in self._pending.values():
            peer.sock.close()
            os.close(peer.pidfd)
        for peer in list(self._peers.values()):
            self._forget(peer)
        lifeline.close_all(self._reserve)
        self._epoll.close()
        self._journal.close()


def _hello(frame: bytes | memoryview) -> m.Hello | None:
    """What a frame begins with, if it is a good one that begins with Hello."""
    try:
        first = m.decode_to_broker(frame)[0]
    except ProtocolError:
        return None
    return first if isinstance(first, m.Hello) else None


def configure(raw: bytes) -> BrokerConfig:
    """The broker's configuration from its standard input."""
    return msgspec.json.decode(raw, type=BrokerConfig)
