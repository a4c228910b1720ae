"""Messages straight over a lifeline: how broker and worker talk.

A worker's lifeline is a socket pair that the supervisor made, so nobody else is at its ends and no token is
needed.  A frame is one packet; the kernel keeps frames whole and in order, wakes the reader directly, and what
was sent before a process ended is still there to be read.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from . import messages as m
from .errors import ProtocolError
from .lifeline import PACKET_BYTES
from .spinning import Spin

FRAME_BYTES: Final = PACKET_BYTES
"""Most bytes of a frame, which is one packet."""

HEARD_WITH: Final = 8
"""Over ZeroMQ: after so many frames, what was heard is said in a frame that is sent anyway."""

HEARD_ALONE: Final = 16
"""And after so many in a frame of its own."""


class Hearing:
    """Frames from the broker, each once.

    A broker that takes over from one that died cannot know whether its last frames went out, and sends them again.  The
    frames that a peer was sent are counted at both ends, so the peer knows which it has had.  They are never lost: what
    was sent is in the socket, which outlives the broker.
    """

    def __init__(self) -> None:
        self._heard = 0
        self._again = 0

    def take(self, frame: bytes | memoryview) -> list[m.FromBroker]:
        """The messages of a frame; none if it was heard before.

        Raises:
            ProtocolError: the broker sent something else than messages.
        """
        messages = m.decode_from_broker(frame)
        if messages and type(messages[0]) is m.Resume:
            self._again = max(0, self._heard - messages[0].said)
            return []
        if self._again:
            self._again -= 1
            return []
        self._heard += 1
        return messages


class Post:
    """What goes over ZeroMQ, each frame once, though frames on their way are lost with a broker.

    Both ends count the frames that they send and hear, and keep those that the other has not said it heard
    (`messages.Heard`).  On a new connection each says how many it has had, and the other goes on after these.

    Attributes:
        heard: frames that we had.
        told: how many of these the other end knows of.
        made: frames that we sent.
        unheard: the last of these, which the other has perhaps not had.
    """

    __slots__ = ("heard", "made", "told", "unheard")

    def __init__(self) -> None:
        self.heard = self.told = self.made = 0
        self.unheard: deque[bytes] = deque()

    def keep(self, frames: Iterable[bytes]) -> None:
        """These are sent."""
        before = len(self.unheard)
        self.unheard.extend(frames)
        self.made += len(self.unheard) - before

    @property
    def dropped(self) -> int:
        """Frames that are kept no more, since the other has said that it had them."""
        return self.made - len(self.unheard)

    @property
    def owes(self) -> int:
        """Frames that the other end does not know to have been heard."""
        return self.heard - self.told

    def say_heard(self) -> m.Heard:
        """What to say of it, in a frame that is sent."""
        self.told = self.heard
        return m.Heard(self.heard)

    def drop(self, heard: int) -> None:
        """The other end has had so many.

        Raises:
            ProtocolError: there are not so many.
        """
        if heard > self.made:
            raise ProtocolError(f"{heard} frames were heard of {self.made} that were sent")
        for _ in range(heard - self.made + len(self.unheard)):
            self.unheard.popleft()


class Pipe:
    """The worker's end.

    Args:
        sock: a connected `SOCK_SEQPACKET` socket, which the pipe takes over, and closes.
        spin_us: how long `receive` may spin before it sleeps.
    """

    def __init__(self, sock: socket.socket, spin_us: int = 0) -> None:
        self._sock = sock
        self._spin = Spin(spin_us)
        self._hearing = Hearing()
        # Frames are read into one buffer: bytes of the largest size, made for each, cost more than the rest.
        self._buffer = memoryview(bytearray(FRAME_BYTES))
        sock.setblocking(True)

    def send(self, messages: Sequence[m.ToBroker]) -> None:
        """Send messages as one frame.

        Raises:
            ConnectionError: the broker has ended.
        """
        self._sock.send(m.encode(messages), socket.MSG_NOSIGNAL)

    def receive(self, *, spins: bool = True) -> list[m.FromBroker]:
        """Wait for the next frame; an empty list means that the pool has ended.

        Args:
            spins: spin before sleeping, if that pays: no other thread is to run meanwhile.

        Raises:
            ProtocolError: the broker sent something else than messages.
        """
        while True:
            size = self._spin.wait(self._look, self._sleep) if spins else self._sleep()
            if not size:
                return []
            if messages := self._hearing.take(bytes(self._buffer[:size])):
                return messages

    def poll(self) -> list[m.FromBroker] | None:
        """As `receive`, without waiting: None if nothing is there yet.

        Raises:
            ProtocolError: the broker sent something else than messages.
        """
        while True:
            try:
                size = self._read(socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            if not size:
                return []
            if messages := self._hearing.take(bytes(self._buffer[:size])):
                return messages

    def _look(self) -> int | None:
        try:
            return self._read(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def _sleep(self) -> int:
        return self._read(0)

    def _read(self, flags: int) -> int:
        """Read a frame into the buffer; its size, 0 at the end."""
        try:
            return self._sock.recv_into(self._buffer, 0, flags)
        except ConnectionResetError:  # it closed with something of ours unread: told once, before what it sent last
            return self._sock.recv_into(self._buffer, 0, flags)

    def close(self) -> None:
        """Close the lifeline.  Again: nothing."""
        self._sock.close()
