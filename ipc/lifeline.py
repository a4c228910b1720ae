"""The lifeline: the Unix socket between the broker and each client or worker.

It does three things that ZeroMQ cannot.  It tells the broker who connects (`SO_PEERCRED`), it passes the
arena's descriptor, and it ends with the process, so that the end is known.  After the first packet a client over
ZeroMQ is told nothing more on it, but that another broker has taken over::

    client                                broker
      | --- connect ------------------------> |  checks the user, opens a pidfd
      | <-- Description + arena descriptor -- |  with a token for one ZeroMQ identity
      |              ...                      |
      x --- end of file --------------------> |

`SOCK_SEQPACKET` keeps packet bounds, so the description arrives whole, with its descriptor.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from .errors import AccessDenied, ModelError, PoolNotFound, ProtocolError, RunDirError
from .layout import Layout
from .process import peer_credentials
from .rundir import LIFELINE, default_root, socket_mode
from .settings import PROTOCOL_VERSION, TOKEN_BYTES

PACKET_BYTES: Final = 160 * 1024
"""Most bytes of one packet; below the default `net.core.wmem_default` (212,992) less its overhead."""

CONNECT_TIMEOUT_S: Final = 10.0


class NoDescriptors(ProtocolError):
    """A packet came without its descriptors, since we may have no more; `data` is the rest of it."""

    def __init__(self, data: bytes) -> None:
        super().__init__("a packet on a Unix socket was cut off; is the limit on open files reached (ulimit -n)?")
        self.data = data


class Unwelcome(PoolNotFound):
    """The broker ended before it had said anything; if the pool goes on, another takes over."""


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="description"):
    """All a peer needs to attach.

    Attributes:
        version: of the protocol.
        epoch: the broker's life.
        pool: the pool's name.
        endpoint: where its ZeroMQ ROUTER listens.
        token: proves to the ROUTER that a ZeroMQ identity belongs to this lifeline; good for one use.  Empty for a
            worker, which talks over the lifeline itself: see `pipe`.
        layout: the arena.
        gpus: how many GPUs the pool has; 0 for a pool on the CPU.
        busy_poll: whether the pool's processes spin while they wait, as its clients are to.
        spin_us: else, how long at most they spin before they sleep.
        slow_ms: requests that take so long are logged; 0: none.
    """

    version: int
    epoch: int
    pool: str
    endpoint: str
    token: bytes
    layout: Layout
    gpus: int = 0
    busy_poll: bool = False
    spin_us: int = 0
    slow_ms: float = 0.0

    def __post_init__(self) -> None:
        if len(self.token) not in (0, TOKEN_BYTES):
            raise ValueError(f"a token has {TOKEN_BYTES} bytes, not {len(self.token)}")

    def __repr__(self) -> str:
        """Without the token, which no log shall show."""
        return f"Description(version={self.version}, epoch={self.epoch}, pool={self.pool!r})"


class Denial(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="denial"):
    """Sent in place of a description: `text` says why, and what to do."""

    text: str


_decoder = msgspec.msgpack.Decoder(Description | Denial)
_encoder = msgspec.msgpack.Encoder()


def listen(run_dir: Path, *, shared: bool = False) -> socket.socket:
    """A listening lifeline socket in `run_dir`, non-blocking; `shared`: other users are allowed.

    Raises:
        RunDirError: it cannot be made there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        path = run_dir / LIFELINE
        sock.bind(os.fspath(path))
        path.chmod(socket_mode(shared=shared))
        sock.listen(1024)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise RunDirError(
            f"no socket can be made in the run directory {run_dir}: {error.strerror}; make room, or choose another "
            "with --run-dir"
        ) from error
    except BaseException:
        sock.close()
        raise
    return sock


def send_packet(sock: socket.socket, message: object, fds: Sequence[int] = ()) -> None:
    """Send one packet with descriptors, without waiting.

    Raises:
        OSError: the peer has ended, or takes nothing in.
    """
    data = _encoder.encode(message)
    if len(data) > PACKET_BYTES:
        raise ProtocolError(f"a packet of {len(data)} bytes is over {PACKET_BYTES}; serve fewer models in one pool")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def receive_packet(sock: socket.socket, flags: int = 0, max_fds: int = 4) -> tuple[bytes, list[int]]:
    """Receive one packet; ``(b"", [])`` at end of file.  The caller owns the descriptors.

    Raises:
        ProtocolError: the packet was cut off.
        NoDescriptors: its descriptors were.
    """
    data, ancillary, got, _ = sock.recvmsg(
        PACKET_BYTES, socket.CMSG_SPACE(4 * max_fds), flags | socket.MSG_CMSG_CLOEXEC
    )
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(payload) - len(payload) % 4
            fds.extend(struct.unpack(f"{whole // 4}i", payload[:whole]))
    if got & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        if got & socket.MSG_TRUNC:
            raise ProtocolError(f"a packet on a Unix socket was cut off after {PACKET_BYTES} bytes")
        raise NoDescriptors(data)
    return data, fds


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors, whatever each answers."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def connect(run_dir: Path) -> socket.socket:
    """Connect to the lifeline of the pool in `run_dir`.

    Raises:
        PoolNotFound: nothing listens there.
        AccessDenied: the directory is closed to this user, or is ours and somebody else listens in it.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(CONNECT_TIMEOUT_S)
        sock.connect(os.fspath(run_dir / LIFELINE))
    except PermissionError as error:
        sock.close()
        raise AccessDenied(
            f"user {os.getuid()} may not attach to the pool in {run_dir}: run as the user who started it, or start it "
            f"with --allow-user {os.getuid()}"
        ) from error
    except OSError as error:
        sock.close()
        raise PoolNotFound(
            f"no pool answers in {run_dir} ({error.strerror or error}); start one with `trtpool start`"
        ) from error
    except BaseException:
        sock.close()
        raise
    owner = peer_credentials(sock).uid
    if run_dir.parent == default_root() and owner != os.getuid():
        # Not a pool that was named with --run-dir, but one in the place where only ours should be.
        sock.close()
        raise AccessDenied(
            f"what answers in {run_dir} belongs to user {owner} and not to you, so nothing was sent to it; a pool for "
            "several users is to be started elsewhere, with --run-dir"
        )
    return sock


def receive_description(sock: socket.socket) -> tuple[Description, int]:
    """Wait for the first packet on a connected lifeline; returns it and the arena's descriptor.

    Raises:
        AccessDenied: the broker refused this user.
        PoolNotFound: the pool ended meanwhile, or did not answer.
        ProtocolError: another version, or not what a broker sends.
    """
    sock.settimeout(CONNECT_TIMEOUT_S)
    try:
        data, fds = receive_packet(sock)
    except ConnectionError as error:
        raise Unwelcome("the pool ended while we connected; start it again with `trtpool start`") from error
    except TimeoutError as error:
        raise PoolNotFound(f"the pool did not answer within {CONNECT_TIMEOUT_S:.0f} s; is it stopped?") from error
    try:
        if not data:
            raise Unwelcome("the pool ended while we connected; start it again with `trtpool start`")
        try:
            packet = _decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, ModelError) as error:  # the last: a spec's own checks
            raise ProtocolError(
                f"the pool's description cannot be read ({error}); do pool and client have the same version of trtpool?"
            ) from error
        if isinstance(packet, Denial):
            raise AccessDenied(packet.text)
        if packet.version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the pool speaks protocol {packet.version}, this trtpool {PROTOCOL_VERSION}; install the same version"
            )
        packet.layout.validate()
        if len(fds) != 1:
            raise ProtocolError(f"the pool passed {len(fds)} descriptors, expected the arena's one")
    except BaseException:
        close_all(fds)
        raise
    return packet, fds[0]
