"""A client's end of the connection to the broker: the lifeline, and what carries the messages.

There are two transports with one interface, and a broker serves both at once:

`Link` sends messages over the lifeline itself.  A frame is one packet of a Unix socket; the kernel keeps it whole
and in order, and wakes the reader directly.

`ZmqLink` sends them over ZeroMQ, `DEALER` to `ROUTER`.  For each frame it wakes an input/output thread at either
end, which costs about as much as all the rest (docs/performance.md).  Frames lie in these threads and are lost with a
broker that dies, so both ends keep them until the other has had them: see `pipe.Post`.

Not thread-safe: whoever uses a link from several threads holds a lock, except around `wait`, which touches
descriptors only.  ZeroMQ's descriptor is edge-triggered: after any use of the socket, `receive` until it is
empty before the next `wait` (zmq_getsockopt(3), ZMQ_FD).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Final

import zmq

from . import messages as m
from .errors import PoolClosed, ProtocolError
from .keeping import Keeper
from .lifeline import CONNECT_TIMEOUT_S, Description
from .pipe import FRAME_BYTES, HEARD_ALONE, HEARD_WITH, Hearing, Post
from .settings import MAX_FRAME_BYTES, PROTOCOL_VERSION
from .spinning import Spin, default_spin_us

# Plain integers: enum flags cost 2 us a use, on a path that has 10 us.
NOBLOCK: Final = int(zmq.NOBLOCK)
EVENTS: Final = int(zmq.EVENTS)
POLLIN: Final = int(zmq.POLLIN)
NOSIGNAL: Final = int(socket.MSG_NOSIGNAL)

MAX_SENT: Final = 512
"""Most messages in a frame that we send; of so many the longest without shapes stay below `MAX_FRAME_BYTES`."""

LINGER_MS: Final = 1000
"""How long closing waits for the last messages to go out."""


class Attendant(threading.Thread):
    """Looks when something comes over a lifeline, though nobody waits.

    A client over ZeroMQ must come to a broker that took over even while its threads do other things: what it released
    last was perhaps lost, and others wait for that.

    Args:
        lifeline_fd: what to sleep on.
        look: a method, not kept alive, that reads what came; returns whether more may come.
    """

    def __init__(self, lifeline_fd: int, look: Callable[[], bool]) -> None:
        super().__init__(name="trtpool-lifeline", daemon=True)
        self._look = weakref.WeakMethod(look)
        self._lifeline_fd = lifeline_fd
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sleep and look, until `stop` or the end."""
        poller = select.poll()
        for fd in (self._lifeline_fd, self._stop_fd):
            poller.register(fd, select.POLLIN)
        while not self._stopped.is_set():
            poller.poll()
            look = self._look()
            if self._stopped.is_set() or look is None or not look():
                return
            del look

    def stop(self) -> None:
        """End the thread, which may be the one that calls this."""
        self._stopped.set()
        os.eventfd_write(self._stop_fd, 1)
        if self is not threading.current_thread():
            self.join()
        os.close(self._stop_fd)

    @staticmethod
    def count() -> int:
        """How many there are in this process."""
        return sum(isinstance(thread, Attendant) for thread in threading.enumerate())


class Link:
    """A connection whose messages go over the lifeline; connects at once.

    Args:
        lifeline: a connected lifeline, which the link takes over, and closes.
        description: what came over it.
        busy_poll: whether `wait` spins; by default as the pool does.

    Attributes:
        late_s: how long messages may still come in after the lifeline has ended.
        welcome: the broker's answer.
        early: what came with it.
        ended: the lifeline has ended, and with it the broker, or its interest in us.

    Raises:
        PoolClosed: the pool ended meanwhile.
        ProtocolError: the broker refused us.
    """

    late_s = 0.0  # they come over it, in order

    def __init__(self, lifeline: socket.socket, description: Description, busy_poll: bool | None = None) -> None:
        self.ended = False
        self._spins = description.busy_poll if busy_poll is None else busy_poll
        spin_us = min(description.spin_us, default_spin_us())  # here may be fewer CPUs than the pool has
        self._spin = Spin(spin_us) if spin_us else None
        self._hearing = Hearing()
        self._buffer = memoryview(bytearray(FRAME_BYTES))
        self._lifeline = lifeline
        self._lifeline.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = select.poll()
        for fd in (lifeline.fileno(), self._wake):
            self._poller.register(fd, select.POLLIN)
        try:
            self._open(description)
            self.welcome, self.early = self._greet(description.token)
        except BaseException:
            self.close(linger_ms=0)
            raise

    def _greet(self, token: bytes) -> tuple[m.Welcome, list[m.FromBroker]]:
        self.send([m.Hello(PROTOCOL_VERSION, token)])
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while True:
            received = self.receive()
            if received:
                first = received[0]
                if isinstance(first, m.Welcome):
                    return first, received[1:]
                raise ProtocolError(f"the pool did not welcome us: {getattr(first, 'text', first)}")
            if self.ended or time.monotonic() > deadline:
                raise PoolClosed("the pool ended while we connected")
            self.wait(deadline - time.monotonic())

    def send(self, messages: Sequence[m.Message]) -> None:
        """Send messages, as one frame unless they are very many.  To a broker that has ended they are lost."""
        while len(messages) > MAX_SENT:
            self._send_frame(m.encode(messages[:MAX_SENT]))
            messages = messages[MAX_SENT:]
        frame = m.encode(messages)
        if len(frame) > MAX_FRAME_BYTES and len(messages) > 1:  # with many shapes in them
            middle = len(messages) // 2
            self.send(messages[:middle])
            self.send(messages[middle:])
        else:
            self._send_frame(frame)

    def receive(self) -> list[m.FromBroker]:
        """Messages that have arrived, without waiting: those of a frame, or more; none: there are no more frames."""
        while not self.ended:
            try:
                length = self._lifeline.recv_into(self._buffer)
            except BlockingIOError:
                break
            except ConnectionResetError:
                continue  # it closed with something of ours unread, which is told once, before what it sent last
            except OSError:
                length = 0
            if not length:
                self._end()
            elif received := self._hearing.take(self._buffer[:length]):
                return received
        return []

    def wait(self, timeout_s: float | None) -> None:
        """Sleep until something arrives, the lifeline ends, `wake` is called, or time is up."""
        if self._spins:
            deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
            while not (ready := self._poller.poll(0)) and time.monotonic() < deadline:
                pass
        else:
            timeout_ms = None if timeout_s is None else max(0.0, timeout_s * 1000)
            # Who looks keeps the interpreter from other threads; a keeper sleeps.
            if self._spin is None or threading.active_count() - Keeper.count() > 1:
                ready = self._poller.poll(timeout_ms)
            else:
                limit_ns = None if timeout_ms is None else int(timeout_ms * 1e6)
                ready = self._spin.wait(
                    lambda: self._poller.poll(0) or None, lambda: self._poller.poll(timeout_ms), limit_ns
                )
        for fd, _ in ready:
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)

    def wake(self) -> None:
        """End a `wait` in another thread."""
        os.eventfd_write(self._wake, 1)

    def close(self, linger_ms: int = LINGER_MS) -> None:
        """Close, after sending what is still queued, for at most `linger_ms`.  Again: nothing."""
        if self._wake < 0:
            return
        wake, self._wake = self._wake, -1
        self._shut(linger_ms)
        self._lifeline.close()
        os.close(wake)

    def abandon_in_child(self) -> None:
        """After a fork, in the child: close the descriptor that would keep the parent's lifeline open."""
        self.ended = True
        self._lifeline.close()

    def _end(self) -> None:
        self.ended = True
        self._poller.unregister(self._lifeline.fileno())

    # ------------------------------------------------------------------ what transports differ in

    def attend(self, look: Callable[[], bool]) -> None:
        """Have `look`, which receives, called when that must not wait for who uses the link; see `Attendant`."""

    def _open(self, description: Description) -> None:
        """Connect what carries the messages."""

    def _shut(self, linger_ms: int) -> None:
        """Disconnect what carries the messages."""

    def _send_frame(self, frame: bytes) -> None:
        while True:
            try:
                self._lifeline.send(frame, NOSIGNAL)
            except BlockingIOError:  # the broker, which always reads, is behind
                writable = select.poll()
                writable.register(self._lifeline.fileno(), select.POLLOUT)
                writable.poll()
            except OSError:
                return  # it has ended, which `receive` tells
            else:
                return


class ZmqLink(Link):
    """A connection whose messages go over ZeroMQ; see `Link`."""

    late_s = 1.0  # they are on their way through ZeroMQ's threads

    _dealer: zmq.Socket[bytes] | None = None
    _attendant: Attendant | None = None

    def _open(self, description: Description) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._post = Post()
        self._connect(description.endpoint)

    def _connect(self, endpoint: str) -> None:
        dealer = self._dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, LINGER_MS)
        dealer.setsockopt(zmq.SNDHWM, 0)  # what we send is bounded by the slots we hold
        dealer.setsockopt(zmq.RCVHWM, 0)
        dealer.connect(endpoint)
        self._poller.register(int(dealer.getsockopt(zmq.FD)), select.POLLIN)

    def attend(self, look: Callable[[], bool]) -> None:
        """See `Link.attend`."""
        self._attendant = Attendant(self._lifeline.fileno(), look)
        self._attendant.start()

    def _shut(self, linger_ms: int) -> None:
        if self._attendant is not None:
            self._attendant.stop()
        if self._dealer is not None:
            self._dealer.close(linger=linger_ms)
            self._context.term()

    def send(self, messages: Sequence[m.Message]) -> None:
        """See `Link.send`."""
        super().send([self._post.say_heard(), *messages] if self._post.owes >= HEARD_WITH else messages)

    def _send_frame(self, frame: bytes) -> None:
        assert self._dealer is not None
        self._post.keep((frame,))
        self._dealer.send(frame, NOBLOCK)

    def receive(self) -> list[m.FromBroker]:
        """All messages that have arrived, without waiting."""
        received: list[m.FromBroker] = []
        looking = True
        while looking:
            dealer = self._dealer
            assert dealer is not None
            while dealer.getsockopt(EVENTS) & POLLIN:  # type: ignore[operator]  # looking costs a third of `zmq.Again`
                received += self._hear(dealer.recv(NOBLOCK))
            looking = self._post.owes >= HEARD_ALONE
            if looking:
                self._send_frame(m.encode([self._post.say_heard()]))
            elif not received:
                looking = self._reconnect()
        return received

    def _hear(self, frame: bytes) -> list[m.FromBroker]:
        messages = m.decode_from_broker(frame)
        self._post.heard += 1
        if messages and type(messages[0]) is m.Heard:
            self._post.drop(messages[0].frames)
            return messages[1:]
        return messages

    def _reconnect(self) -> bool:
        """Go on with the broker that took over, if the lifeline brings word of one; whether there was any."""
        word = b""
        while not self.ended:
            try:
                packet = self._lifeline.recv(FRAME_BYTES)
            except BlockingIOError:
                break
            except OSError:
                packet = b""
            if packet:
                word = packet  # of several the last is the one that lives
            else:
                self._end()
        if not word or self.ended:
            return False
        (message,) = m.decode_from_broker(word)
        if not isinstance(message, m.Reconnect):
            raise ProtocolError(f"the broker sent {type(message).__name__} over the lifeline of a client over ZeroMQ")
        before = self._dealer
        assert before is not None
        self._poller.unregister(int(before.getsockopt(zmq.FD)))
        before.close(linger=0)
        self._post.drop(message.heard)
        self._connect(message.endpoint)
        assert self._dealer is not None
        self._dealer.send(m.encode([m.Hello(PROTOCOL_VERSION, message.token), self._post.say_heard()]), NOBLOCK)
        for frame in self._post.unheard:
            self._dealer.send(frame, NOBLOCK)
        self.wake()  # who waits does so on the descriptor of the old socket
        return True


TRANSPORTS: Final[dict[str, type[Link]]] = {"lifeline": Link, "zmq": ZmqLink}
