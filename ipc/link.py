"""A client's end of the connection to the broker: the lifeline, and what carries the messages.

There are two transports with one interface, and a broker serves both at once:

`Link` sends messages over the lifeline itself.  A frame is one packet of a Unix socket; the kernel keeps it whole
and in order, and wakes the reader directly.

`ZmqLink` sends them over ZeroMQ, `DEALER` to `ROUTER`.  For each frame it wakes an input/output thread at either
end, which costs about as much as all the rest (docs/performance.md).

Not thread-safe: whoever uses a link from several threads holds a lock, except around `wait`, which touches
descriptors only.  ZeroMQ's descriptor is edge-triggered: after any use of the socket, `receive` until it is
empty before the next `wait` (zmq_getsockopt(3), ZMQ_FD).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Final

import zmq

from . import messages as m
from .errors import PoolClosed, ProtocolError
from .lifeline import CONNECT_TIMEOUT_S, Description
from .pipe import FRAME_BYTES, Hearing
from .settings import PROTOCOL_VERSION

# Plain integers: enum flags cost 2 us a use, on a path that has 10 us.
NOBLOCK: Final = int(zmq.NOBLOCK)
EVENTS: Final = int(zmq.EVENTS)
POLLIN: Final = int(zmq.POLLIN)
NOSIGNAL: Final = int(socket.MSG_NOSIGNAL)

MAX_SENT: Final = 512
"""Most messages in a frame that we send; of so many the longest stay below `MAX_FRAME_BYTES`."""

LINGER_MS: Final = 1000
"""How long closing waits for the last messages to go out."""


class Link:
    """A connection whose messages go over the lifeline; connects at once.

    Args:
        lifeline: a connected lifeline, which the link takes over, and closes.
        description: what came over it.

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

    def __init__(self, lifeline: socket.socket, description: Description) -> None:
        self.ended = False
        self._hearing = Hearing()
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
        self._send_frame(m.encode(messages))

    def receive(self) -> list[m.FromBroker]:
        """All messages that have arrived, without waiting."""
        received: list[m.FromBroker] = []
        while not self.ended:
            try:
                frame = self._lifeline.recv(FRAME_BYTES)
            except BlockingIOError:
                break
            except ConnectionResetError:
                continue  # it closed with something of ours unread, which is told once, before what it sent last
            except OSError:
                frame = b""
            if frame:
                received += self._hearing.take(frame)
            else:
                self._end()
        return received

    def wait(self, timeout_s: float | None) -> None:
        """Sleep until something arrives, the lifeline ends, `wake` is called, or time is up."""
        timeout_ms = None if timeout_s is None else max(0.0, timeout_s * 1000)
        for fd, _ in self._poller.poll(timeout_ms):
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            elif fd == self._lifeline.fileno():
                self._look_at_lifeline()

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

    def _open(self, description: Description) -> None:
        """Connect what carries the messages."""

    def _shut(self, linger_ms: int) -> None:
        """Disconnect what carries the messages."""

    def _look_at_lifeline(self) -> None:
        """It is readable: `receive` will see to it."""

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

    def _open(self, description: Description) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        dealer = self._dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, LINGER_MS)
        dealer.setsockopt(zmq.SNDHWM, 0)  # what we send is bounded by the slots we hold
        dealer.setsockopt(zmq.RCVHWM, 0)
        dealer.connect(description.endpoint)
        self._poller.register(int(dealer.getsockopt(zmq.FD)), select.POLLIN)

    def _shut(self, linger_ms: int) -> None:
        if self._dealer is not None:
            self._dealer.close(linger=linger_ms)
            self._context.term()

    def _send_frame(self, frame: bytes) -> None:
        assert self._dealer is not None
        self._dealer.send(frame, NOBLOCK)

    def receive(self) -> list[m.FromBroker]:
        """All messages that have arrived, without waiting."""
        received: list[m.FromBroker] = []
        dealer = self._dealer
        assert dealer is not None
        while dealer.getsockopt(EVENTS) & POLLIN:  # type: ignore[operator]  # looking costs a third of `zmq.Again`
            received += m.decode_from_broker(dealer.recv(NOBLOCK))
        return received

    def _look_at_lifeline(self) -> None:
        try:
            ended = not self._lifeline.recv(1)
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended and not self.ended:
            self._end()


TRANSPORTS: Final[dict[str, type[Link]]] = {"lifeline": Link, "zmq": ZmqLink}
