"""Messages straight over a lifeline: how broker and worker talk.

A worker's lifeline is a socket pair that the supervisor made, so nobody else is at its ends and no token is
needed.  A frame is one packet; the kernel keeps frames whole and in order, wakes the reader directly, and what
was sent before a process ended is still there to be read.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Final

from . import messages as m
from .lifeline import PACKET_BYTES

FRAME_BYTES: Final = PACKET_BYTES
"""Most bytes of a frame, which is one packet."""


class Pipe:
    """The worker's end.

    Args:
        sock: a connected `SOCK_SEQPACKET` socket, which the pipe takes over, and closes.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(True)

    def send(self, messages: Sequence[m.ToBroker]) -> None:
        """Send messages as one frame.

        Raises:
            ConnectionError: the broker has ended.
        """
        self._sock.send(m.encode(messages), socket.MSG_NOSIGNAL)

    def receive(self) -> list[m.FromBroker]:
        """Wait for the next frame; an empty list means that the broker has ended.

        Raises:
            ProtocolError: the broker sent something else than messages.
        """
        try:
            frame = self._sock.recv(FRAME_BYTES)
        except ConnectionResetError:  # it closed with something of ours unread: told once, before what it sent last
            frame = self._sock.recv(FRAME_BYTES)
        return m.decode_from_broker(frame) if frame else []

    def close(self) -> None:
        """Close the lifeline.  Again: nothing."""
        self._sock.close()
