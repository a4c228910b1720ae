"""Where a supervisor takes requests of its user's commands; see `requests`.

It never waits for a command: one that reads nothing misses what it is told, and one that is gone is told nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import msgspec

from trtpool.ipc import lifeline
from trtpool.ipc.errors import ProtocolError, RunDirError, TrtpoolError
from trtpool.ipc.process import peer_credentials
from trtpool.ipc.rundir import REQUESTS
from trtpool.ipc.settings import Refusal

from .children import Children
from .reload.requests import Answer, ReloadRequest
from .requests import Refused, encode
from .tracing.requests import TraceEnd, TraceOver, TraceRequest, Tracing

MAX_ASKERS: Final = 8
"""Commands at once; one more is turned away, so that they do not take the descriptors that workers need."""


Request: TypeAlias = ReloadRequest | TraceRequest | TraceEnd

_decode = msgspec.json.Decoder(Request).decode


class Asker:
    """A command that is connected.

    Attributes:
        gone: it waits for no answer.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.gone = False

    def tell(self, answer: Answer | Tracing | TraceOver) -> None:
        """Tell it, if it listens."""
        if not self.gone:
            with contextlib.suppress(OSError):
                self.sock.send(encode(answer), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def refuse(self, error: TrtpoolError) -> None:
        """Tell it why not."""
        self.tell(Refused(Refusal(type(error).__name__, str(error))))


class Asked(NamedTuple):
    """What a command wants; None: nothing any more.  Descriptors come with a `TraceRequest`, and are the caller's."""

    asker: Asker
    request: Request | None
    fds: list[int]


class Desk:
    """See the module.

    Args:
        run_dir: the pool's.
        epoll: what is to watch it.
        children: who has descriptors to spare.

    Raises:
        RunDirError: no socket can be made there.
    """

    def __init__(self, run_dir: Path, epoll: select.epoll, children: Children) -> None:
        self._epoll = epoll
        self._children = children
        self._askers: dict[int, Asker] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            path = run_dir / REQUESTS
            self._listener.bind(os.fspath(path))
            path.chmod(0o600)
            self._listener.listen(MAX_ASKERS)
            self._listener.setblocking(False)
        except OSError as error:
            self._listener.close()
            raise RunDirError(
                f"no socket can be made in the run directory {run_dir}: {error.strerror}; make room, or choose "
                "another with --run-dir"
            ) from error
        epoll.register(self._listener.fileno(), select.EPOLLIN)

    def is_fd(self, fd: int) -> bool:
        """Whether this is what it looks after."""
        return fd in self._askers or fd == self._listener.fileno()

    def look_at(self, fd: int) -> Asked | None:
        """Something is to be read there; returns what a command said, if it did."""
        asker = self._askers.get(fd)
        if asker is None:
            self._accept()
            return None
        fds: list[int] = []
        try:
            with self._children.room():
                data, fds = lifeline.receive_packet(asker.sock, socket.MSG_DONTWAIT, max_fds=1)
        except BlockingIOError:
            return None
        except (OSError, ProtocolError):  # too large, or with more descriptors than one
            data = b""
        if not data:
            asker.gone = True
            lifeline.close_all(fds)
            self.dismiss(asker)
            return Asked(asker, None, [])
        try:
            request = _decode(data)
            if fds and not isinstance(request, TraceRequest):
                lifeline.close_all(fds)
                fds = []
            return Asked(asker, request, fds)
        except msgspec.MsgspecError as error:
            lifeline.close_all(fds)
            asker.refuse(ProtocolError(f"the pool cannot read that ({error}); is it of another version?"))
            self.dismiss(asker)
            return None

    def dismiss(self, asker: Asker) -> None:
        """It was told all."""
        asker.gone = True
        if asker.sock.fileno() >= 0:
            self._epoll.unregister(asker.sock.fileno())
            del self._askers[asker.sock.fileno()]
            asker.sock.close()

    def _accept(self) -> None:
        with self._children.room(), contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            # The socket's mode says the same; in a user namespace others may count as root.
            if peer_credentials(sock).uid != os.getuid() or len(self._askers) >= MAX_ASKERS:
                sock.close()
                return
            self._askers[sock.fileno()] = Asker(sock)
            self._epoll.register(sock.fileno(), select.EPOLLIN)

    def close(self) -> None:
        """Dismiss all."""
        for asker in list(self._askers.values()):
            self.dismiss(asker)
        self._listener.close()
