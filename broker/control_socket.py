"""The broker's end of the socket over which it and the supervisor talk; `control` has what they say.

The supervisor always reads, if not always at once, so the broker may wait to be heard, and tells everything in order.
What the supervisor says of a new worker comes with descriptors, for which some are held back: without a worker
nobody's work would go on.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence
from typing import Final

from trtpool.ipc import lifeline

from . import control as c
from .reserve import Reserve

RESERVE: Final = 2
"""Descriptors that no client can take: those that come with a new worker."""


class ControlSocket:
    """See the module.

    Args:
        fd: the socket, which is its from now on.

    Attributes:
        sock: to wait for, and to inherit from.
    """

    def __init__(self, fd: int) -> None:
        self.sock = socket.socket(fileno=fd)
        self._reserve = Reserve(RESERVE)

    def hold_reserve(self) -> None:
        """From now on there are descriptors for a new worker."""
        self._reserve.refill()

    def tell(self, message: c.Control, fds: Sequence[int] = ()) -> None:
        """Tell the supervisor.

        Raises:
            OSError: more descriptors are on their way than a user may have.
        """
        while True:
            try:
                lifeline.send_packet(self.sock, message, fds)
            except BlockingIOError:
                writable = select.poll()
                writable.register(self.sock, select.POLLOUT)
                writable.poll()
            else:
                return

    def receive(self) -> tuple[c.Control, list[int]]:
        """The next thing that the supervisor said.

        Raises:
            BlockingIOError: it said no more.
            SystemExit: it ended.
        """
        with self._reserve.spent():
            data, fds = lifeline.receive_packet(self.sock, socket.MSG_DONTWAIT)
        if not data:
            raise SystemExit(1)
        return c.decode(data), fds

    def release(self) -> None:
        """Let go of what was held back; the socket ends with the process, which tells the supervisor that we did."""
        self._reserve.close()
