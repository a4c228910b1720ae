"""A client's messages to the broker and from it, and the lock over all that the client knows.

Outgoing messages go together where they can: a `Release` waits for the `Submit` that is likely to follow it.  What
comes in is handled by whichever thread waits, for all; see `waiting`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final

from . import messages as m
from .errors import ForkedClient, PoolClosed, ProtocolError, TrtpoolError
from .link import Link
from .waiting import LONGEST_SLEEP_S, Driver


def wire_ns(seconds: float | None) -> int | None:
    """A span of time as messages carry it: None is no bound, as is more than any clock takes; what is negative is 0."""
    return None if seconds is None or seconds > LONGEST_SLEEP_S else int(max(0.0, seconds) * 1e9)


class Wire:
    """See the module.  Methods are called under the lock, unless they say otherwise.

    Args:
        link: the connection, which the wire takes over.
        pending, unlocked: what there is to do after the lock was held; see `Driver`.

    Attributes:
        driver: the lock.
        over: why nothing more can be asked of the pool, once that is so.
        closed: the client was closed.
        forked: this process is a child of the one that connected.
        unsaid: slots that are released by messages that have yet to go out.
    """

    def __init__(self, link: Link, pending: Callable[[], bool], unlocked: Callable[[], None]) -> None:
        self.link: Final = link
        self.driver: Final = Driver(link, self.take_in, pending, unlocked)
        self.over: str | None = None
        self.closed = self.forked = False
        self.unsaid = 0
        self._pid = os.getpid()
        self._outgoing: list[m.Message] = []
        self._urgent = False  # whether these must not wait for the next Submit
        self._handlers: dict[type[Any], Callable[[Any], None]] = {}
        self._end: Callable[[str], None] = lambda _: None

    def serve(self, handlers: dict[type[Any], Callable[[Any], None]], end: Callable[[str], None]) -> None:
        """Begin with what came with the broker's welcome.

        Args:
            handlers: what to call with each kind of message that comes in.
            end: what to call when nothing more will, with the reason.
        """
        self._handlers, self._end = handlers, end
        for message in self.link.early:
            handlers[type(message)](message)

    def check_process(self) -> None:
        """Raise `ForkedClient` in a child of the process that connected; needs no lock."""
        if self.forked:
            raise ForkedClient(
                f"this client was connected by process {self._pid} and does not work in its child {os.getpid()}: "
                "call trtpool.connect() in the child, or give the child pool.handle(), which connects by itself"
            )

    @property
    def gone(self) -> bool:
        """Whether nobody here speaks to the broker any more; needs no lock."""
        return self.closed or self.forked

    def require_open(self) -> None:
        """Raise `PoolClosed` if nothing can be asked of the pool any more."""
        if self.closed:
            raise PoolClosed("this client is closed")
        if self.over is not None:
            raise PoolClosed(self.over)

    # ------------------------------------------------------------------ out

    def send(self, message: m.Message) -> None:
        """Send a message, and with it what waited for one."""
        self._outgoing.append(message)
        self._urgent = True
        self.push()

    def enclose(self, message: m.Message) -> None:
        """Have a message go out with the next that is sent."""
        self._outgoing.append(message)

    def hurry(self) -> None:
        """Let what waits go out with the next `push` or look at the link."""
        self._urgent = bool(self._outgoing)

    def push(self) -> None:
        """Send what must go out; what has arrived is left to the next wait, unless somebody sleeps in it."""
        if self._send_urgent() and self.driver.led:
            self.exchange()

    def flush(self) -> None:
        """Send all that waits; takes the lock."""
        with self.driver:
            self.hurry()
            self.exchange()

    def _send_urgent(self) -> bool:
        """Send what must go out; whether there was anything."""
        if not self._urgent:
            return False
        self._urgent = False
        if self.over is not None or self.closed:
            return False
        outgoing, self._outgoing = self._outgoing, []
        self.unsaid = 0
        self.link.send(outgoing)
        return True

    # ------------------------------------------------------------------ in

    def exchange(self) -> None:
        """Send what must go out and take in what has arrived, until neither is left."""
        while self.take_in():
            pass

    def take_in(self) -> bool:
        """Send what must go out, and take in what has arrived, a frame at a time; whether there was any.

        To look once more after the last one costs a tenth of a round trip, and who waits knows when it has what it
        waits for.
        """
        if self.closed:
            return False
        self._send_urgent()
        received = self.link.receive()
        for message in received:
            handler = self._handlers.get(type(message))
            if handler is None:
                raise ProtocolError(f"the broker sent a client {type(message).__name__}")
            handler(message)
        if received:
            self._send_urgent()
            return True
        if self.link.ended and self.over is None and not self.closed:
            if self.driver.led:
                self.link.wake()  # who sleeps on the link sees to it: two must not
            else:
                self._receive_last()
        return False

    def attend(self) -> bool:
        """Take in what came though nobody waits; whether more may come.  Takes the lock; see `Link.attend`."""
        with self.driver:
            try:
                self.exchange()
            except TrtpoolError as error:
                self._end(str(error))
        return not (self.link.ended or self.closed)

    def _receive_last(self) -> None:
        """The lifeline has ended: take in what the broker sent before, up to its Bye."""
        deadline = time.monotonic() + self.link.late_s
        while self.over is None and time.monotonic() < deadline:
            self.link.wait(deadline - time.monotonic())
            for message in self.link.receive():
                self._handlers[type(message)](message)
        if self.over is None:
            self._end("the pool ended unexpectedly; see its log, and start it again with `trtpool start`")
