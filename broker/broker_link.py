"""The supervisor's end of the socket over which it and the broker talk; `control` has what they say.

Each broker gets a socket pair of its own.  A broker that ends ends the socket, but not before all that it said has been
read.  The supervisor never waits for a broker to read, except for one that takes over, which reads nothing else first.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import time
from typing import Final

from trtpool.ipc import lifeline

from . import control as c

log = logging.getLogger("trtpool.supervisor")

BEQUEATH_PAUSE_S: Final = 0.002


class BrokerLink:
    """See the module.

    Args:
        epoll: what is to watch it.

    Attributes:
        hears: whether the broker may still say something.
    """

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._sock: socket.socket | None = None
        self.hears = False

    @property
    def sock(self) -> socket.socket:
        """Our end."""
        assert self._sock is not None, "no broker was started"
        return self._sock

    def renew(self) -> socket.socket:
        """The end for another broker, which the caller closes; what the last one had is over."""
        self.close()
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.hears = True
        return theirs

    def watch(self) -> None:
        """The broker has its end: look at what it says."""
        self._epoll.register(self.sock.fileno(), select.EPOLLIN)

    def is_fd(self, fd: int) -> bool:
        """Whether this is what is watched."""
        return self._sock is not None and fd == self._sock.fileno()

    def tell(self, message: c.Control, fds: list[int] | None = None) -> None:
        """Tell the broker, if there is one."""
        with contextlib.suppress(ConnectionError):  # the broker ended, which its pidfd tells
            lifeline.send_packet(self.sock, message, fds or [])

    def bequeath(self, message: c.Control, fds: list[int]) -> None:
        """Tell a broker that starts, and may not read yet; if it ends, its pidfd tells."""
        while True:
            try:
                lifeline.send_packet(self.sock, message, fds)
            except ConnectionError:
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ETOOMANYREFS):
                    raise
                # Full, or more descriptors on their way than a user may have: until it takes some.
                poller = select.poll()
                poller.register(self.sock, select.POLLOUT)
                poller.poll()
                time.sleep(BEQUEATH_PAUSE_S)
            else:
                return

    def receive(self) -> tuple[c.Control, list[int]] | None:
        """The next thing that the broker said, if there is one and it could be taken."""
        if not self.hears:
            return None
        try:
            data, fds = lifeline.receive_packet(self.sock, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except lifeline.NoDescriptors as error:
            message = c.decode(error.data)
            assert isinstance(message, c.PeerAdmitted), message
            log.warning("a client could not be kept for the case that the broker ends, and is refused: %s", error)
            self.tell(c.PeerNotKept(message.peer))
            return None
        except ConnectionError:
            data, fds = b"", []
        if not data:
            self.hears = False
            self._epoll.unregister(self.sock.fileno())  # the broker's end follows
            return None
        return c.decode(data), fds

    def close(self) -> None:
        """Nothing more is said."""
        if self._sock is not None:
            self._sock.close()
