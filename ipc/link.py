"""A peer's end of the connection to the broker: lifeline and ZeroMQ socket together.

Not thread-safe: whoever uses a `Link` from several threads holds a lock, except around `wait`, which touches
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
from .settings import PROTOCOL_VERSION

# Plain integers: pyzmq's enum flags cost 2 us a use, on a path that has 10 us.
NOBLOCK: Final = int(zmq.NOBLOCK)
EVENTS: Final = int(zmq.EVENTS)
POLLIN: Final = int(zmq.POLLIN)

MAX_SENT: Final = 512
"""Most messages in a frame that we send; of so many the longest stay below `MAX_FRAME_BYTES`."""

LINGER_MS: Final = 1000
"""How long closing waits for the last messages to go out."""


class Link:
    """Connects at once; `welcome` is the broker's answer.

    Args:
        lifeline: a connected lifeline, which the link takes over, and closes.
        description: what came over it.

    Raises:
        PoolClosed: the pool ended meanwhile.
        ProtocolError: the broker refused us.
    """

    def __init__(self, lifeline: socket.socket, description: Description) -> None:
        self.ended = False
        self._lifeline = lifeline
        self._lifeline.setblocking(False)
        self._wake = -1
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pid = os.getpid()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._dealer = self._context.socket(zmq.DEALER)
        try:
            self._dealer.setsockopt(zmq.LINGER, LINGER_MS)
            self._dealer.setsockopt(zmq.SNDHWM, 0)  # what we send is bounded by the slots we hold
            self._dealer.setsockopt(zmq.RCVHWM, 0)
            self._dealer.connect(description.endpoint)
            self._poller = select.poll()
            self._zmq_fd = int(self._dealer.getsockopt(zmq.FD))
            for fd in (self._zmq_fd, lifeline.fileno(), self._wake):
                self._poller.register(fd, select.POLLIN)
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
        """Send messages, as one frame unless they are very many; never blocks."""
        while len(messages) > MAX_SENT:
            self._dealer.send(m.encode(messages[:MAX_SENT]), NOBLOCK)
            messages = messages[MAX_SENT:]
        self._dealer.send(m.encode(messages), NOBLOCK)

    def receive(self) -> list[m.FromBroker]:
        """All messages that have arrived, without waiting."""
        received: list[m.FromBroker] = []
        dealer = self._dealer
        while dealer.getsockopt(EVENTS) & POLLIN:  # type: ignore[operator]  # looking costs a third of `zmq.Again`
            received += m.decode_from_broker(dealer.recv(NOBLOCK))
        return received

    def wait(self, timeout_s: float | None) -> None:
        """Sleep until something arrives, the lifeline ends (`ended`), `wake` is called, or time is up."""
        timeout_ms = None if timeout_s is None else max(0.0, timeout_s * 1000)
        for fd, _ in self._poller.poll(timeout_ms):
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
            elif fd != self._zmq_fd and not self.ended:
                self._look_at_lifeline()

    def wake(self) -> None:
        """End a `wait` in another thread."""
        os.eventfd_write(self._wake, 1)

    def _look_at_lifeline(self) -> None:
        try:
            self.ended = not self._lifeline.recv(1)
        except BlockingIOError:
            return
        except OSError:
            self.ended = True
        if self.ended:
            self._poller.unregister(self._lifeline.fileno())

    def close(self, linger_ms: int = LINGER_MS) -> None:
        """Close both, after sending what is still queued, for at most `linger_ms`.  Again: nothing."""
        if self._wake < 0:
            return
        wake, self._wake = self._wake, -1
        self._dealer.close(linger=linger_ms)
        self._context.term()
        self._lifeline.close()
        os.close(wake)

    def abandon_in_child(self) -> None:
        """After a fork, in the child: close the descriptors that would keep the parent's lifeline open."""
        self.ended = True
        self._lifeline.close()
