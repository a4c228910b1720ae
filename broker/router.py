"""The broker's ROUTER socket, for clients that chose ZeroMQ.

A frame counts only if it is the whole message.  Identities are those that the socket generates; the doorman knows which
of them is which peer.

The descriptor of the socket is edge-triggered, and any use of the socket may use up the edge: `Router.used` says that
the socket must be asked whether it has messages (zmq_getsockopt(3), ZMQ_FD).

MANDATORY is on, so that what cannot be sent now is known; the default drops it in silence.
"""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import Final

import zmq

from trtpool.ipc.errors import RunDirError
from trtpool.ipc.rundir import ZMQ_PREFIX, socket_mode
from trtpool.ipc.settings import MAX_FRAME_BYTES, BrokerConfig

from .doorman import Doorman

# Plain integers: enum flags cost 2 us a use.
NOBLOCK: Final = int(zmq.NOBLOCK)
SNDMORE: Final = int(zmq.SNDMORE) | NOBLOCK
RCVMORE: Final = int(zmq.RCVMORE)
EVENTS: Final = int(zmq.EVENTS)
POLLIN: Final = int(zmq.POLLIN)

BYE_LINGER_MS: Final = 5000


class Router:
    """See the module.

    Args:
        config: where to listen, in which epoch, and for whom.
        allowed: users who get a connection.
        doorman: who knows which identity is which peer.

    Attributes:
        endpoint: what clients connect to.
        fd: to wait for.
        used: whether `fd` may be silent although there are messages.

    Raises:
        RunDirError: no socket can be made.
    """

    def __init__(self, config: BrokerConfig, allowed: set[int], doorman: Doorman) -> None:
        self._doorman = doorman
        self.endpoint = f"ipc://{Path(config.run_dir) / ZMQ_PREFIX}{config.epoch}"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.LINGER, BYE_LINGER_MS)
        for uid in allowed:  # ZeroMQ takes a C int; who is not named gets no connection
            self._socket.setsockopt(zmq.IPC_FILTER_UID, uid if uid < 2**31 else uid - 2**32)
        try:
            self._socket.bind(self.endpoint)
        except zmq.ZMQError as error:
            raise RunDirError(
                f"no socket can be made in the run directory {config.run_dir}: {error.strerror}; make room, or choose "
                "another with --run-dir"
            ) from error
        Path(self.endpoint.removeprefix("ipc://")).chmod(socket_mode(shared=bool(config.allow_users)))
        self.fd = int(self._socket.getsockopt(zmq.FD))
        self.used = True

    def has_messages(self) -> bool:
        """Whether there is something to receive; once there is not, `fd` tells when there is."""
        return bool(self._socket.getsockopt(EVENTS) & POLLIN)  # type: ignore[operator]

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next message, as identity and frame; the frame is empty if there was more than one part."""
        router = self._socket
        if not router.getsockopt(EVENTS) & POLLIN:  # type: ignore[operator]
            self.used = False
            return None
        identity = router.recv(NOBLOCK)
        frame = router.recv(NOBLOCK)
        # More parts than one would be taken for another peer's identity and frame.
        while router.getsockopt(RCVMORE):
            router.recv(NOBLOCK)
            frame = b""
        return identity, frame

    def answer(self, identity: bytes, frame: bytes) -> None:
        """Send a frame to an identity that is bound to nobody, if it can be sent now."""
        with contextlib.suppress(zmq.ZMQError):
            self.used = True
            self._socket.send_multipart([identity, frame], NOBLOCK)

    def send(self, peer: int, frame: bytes) -> bool:
        """Send a frame if it can be sent now.  To one that is gone it counts as sent: its end is on its way to us."""
        identity = self._doorman.identity_of(peer)
        if identity is None:
            return True
        self.used = True
        try:
            self._socket.send(identity, SNDMORE)
            self._socket.send(frame, NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
        return True

    def close(self, linger_ms: int = BYE_LINGER_MS) -> None:
        """End, once what was sent last is out, or the time is over."""
        self._socket.close(linger=linger_ms)
        self._context.term()
