"""Signals that ask a pool to stop: the first drains it, the second stops it at once.

A signal is counted, and wakes the supervisor through a socket in its epoll.  It raises `Stopped` only where the
supervisor waits for a child that is looked after already: elsewhere it could fall between the start of a child and our
knowing of it.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Final

STOP: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """A signal ended the pool before it was ready."""


class Signals:
    """See the module.

    Args:
        epoll: what a signal is to wake.

    Attributes:
        asked: how many signals came.
        fd: what `epoll` says has something to read after one; see `clear`.
    """

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._interruptible = False
        self._wake_r, self._wake_w = socket.socketpair()
        self.asked = 0
        self.fd = self._wake_r.fileno()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """From here on signals are ours, once; at the end they are as they were."""
        for sock in (self._wake_r, self._wake_w):
            sock.setblocking(False)
        self._epoll.register(self.fd, select.EPOLLIN)
        before = {number: signal.signal(number, self._handle) for number in STOP}
        wake_before = signal.set_wakeup_fd(self._wake_w.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wake_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._wake_r.close()
            self._wake_w.close()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.asked += 1
        if self._interruptible:
            raise Stopped

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """While waiting for a child that is looked after already: a signal raises `Stopped`."""
        self._interruptible = True
        try:
            if self.asked:
                raise Stopped
            yield
        finally:
            self._interruptible = False

    def clear(self) -> None:
        """The wake-up was heard."""
        with contextlib.suppress(BlockingIOError):
            self._wake_r.recv(64)
