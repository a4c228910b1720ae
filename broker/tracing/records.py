"""What a broker writes while it is traced, and the bounded memory that it writes it to.

::

    | magic | end | dropped | closed_ns |  length, record | length, record | ...      end |          room |

The memory is a memfd of the command that asked, allocated and sealed before the broker sees it, so that writing there
takes no system call, never waits for a reader, and cannot fail.  `end` is changed after the record is there: whenever
the broker is killed, what is before `end` is whole.  Once a record does not fit, no later one is written, so that what
is there has no holes; the rest is counted.

Records say what peers said and were told, which is all that a story needs; see `story`.  No token, no path and no text
of a request is in them but what errors say.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

import msgspec

from trtpool.ipc import messages as m
from trtpool.ipc.errors import ProtocolError

_MAGIC: Final = b"trttrace"
_HEADER: Final = struct.Struct("<8sQQQ")
_LENGTH: Final = struct.Struct("<I")
_END: Final = struct.Struct("<Q")
_END_AT: Final = 8
_DROPPED_AT: Final = 16
_CLOSED_AT: Final = 24

MIN_BYTES: Final = 1 << 20
MAX_BYTES: Final = 4 << 30
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

Said: TypeAlias = m.Lease | m.Submit | m.Release | m.Ready | m.Finished | m.Failed
"""What peers say that is of interest."""

Told: TypeAlias = m.Grant | m.Done | m.Error
"""What peers are told that is; of Runs there are `Sent`."""


class _Row(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Base of all that records are made of."""


class Part(_Row, frozen=True):
    """Slots of one submission in a batch or a queue: `count` from `at` in their lease, with `items` items."""

    lease: int
    at: int
    count: int
    seq: int
    items: int
    queued_ns: int


class Sent(_Row, frozen=True):
    """A batch that a worker was sent."""

    worker: int
    batch: int
    attempt: int
    model: int
    sent_ns: int
    parts: list[Part]


class Held(_Row, frozen=True):
    """A lease that is there already: the states of its slots, as `slots.State`."""

    peer: int
    lease: int
    model: int
    states: bytes


class Asked(_Row, frozen=True):
    """A request for slots that waits already."""

    peer: int
    request: int
    model: int
    count: int
    asked_ns: int


class Present(_Row, frozen=True):
    """A peer; a worker that is ready has lanes."""

    peer: int
    pid: int
    is_worker: bool
    device: str = ""
    lanes: int = 0
    gpu: int | None = None


class Opening(_Row, frozen=True, tag=0):
    """What there is when a trace begins: the first record.

    `models` are names and slots, `levels` as in `Turn`.
    """

    now_ns: int
    pool: str
    pid: int
    models: list[tuple[str, int]]
    peers: list[Present]
    held: list[Held]
    asked: list[Asked]
    queued: list[tuple[int, Part]]
    sent: list[Sent]
    levels: list[int]


class Heard(_Row, frozen=True, tag=1):
    """What a peer said in one frame, and was not refused."""

    now_ns: int
    peer: int
    said: list[Said]


class Joined(_Row, frozen=True, tag=2):
    """A peer came."""

    now_ns: int
    peer: int
    pid: int
    is_worker: bool


class Left(_Row, frozen=True, tag=3):
    """A worker ended, or a client's lifeline or process did."""

    now_ns: int
    peer: int
    text: str


class Turn(_Row, frozen=True, tag=4):
    """A turn of the broker ended, by which this was sent.

    `levels` are, for each model, its free slots and its queued items; empty: as they were.
    """

    now_ns: int
    sent: list[Sent]
    told: list[tuple[int, list[Told]]]
    levels: list[int]


Record: TypeAlias = Opening | Heard | Joined | Left | Turn

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


def create(size: int) -> int:
    """Memory for a trace, allocated and sealed; returns its descriptor.

    Raises:
        OSError: there is no memory.
    """
    fd = os.memfd_create("trtpool-trace", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Writer:
    """The broker's end; takes the descriptor.

    Args:
        fd: see `create`; another process made it.

    Raises:
        ProtocolError: it is something else.
    """

    def __init__(self, fd: int) -> None:
        try:
            size = os.fstat(fd).st_size
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS
            if sealed != _SEALS or not MIN_BYTES <= size <= MAX_BYTES:
                raise ProtocolError(f"memory for a trace must be sealed and have {MIN_BYTES} to {MAX_BYTES} bytes")
            self._map = mmap.mmap(fd, size)
        except OSError as error:
            raise ProtocolError(f"a trace cannot be written to what was passed for it: {error.strerror}") from error
        finally:
            os.close(fd)
        self._size = size
        self._at = _HEADER.size
        self._dropped = 0
        _HEADER.pack_into(self._map, 0, _MAGIC, self._at, 0, 0)

    def write(self, record: Record, events: int) -> None:
        """Append a record, which tells of so many events, or count them as dropped."""
        if not self._dropped:
            body = _encode(record)
            start = self._at + _LENGTH.size
            end = start + len(body)
            if end <= self._size:
                _LENGTH.pack_into(self._map, self._at, len(body))
                self._map[start:end] = body
                self._at = end
                _END.pack_into(self._map, _END_AT, end)
                return
        self._dropped += events
        _END.pack_into(self._map, _DROPPED_AT, self._dropped)

    def close(self, now_ns: int) -> None:
        """The trace ends.  Again: nothing."""
        if not self._map.closed:
            _END.pack_into(self._map, _CLOSED_AT, now_ns)
            self._map.close()


class Written(NamedTuple):
    """What a broker wrote: its records, how many events had no room, and when the trace ended (0: nobody said)."""

    records: Iterator[Record]
    dropped: int
    closed_ns: int


def read(fd: int) -> Written:
    """What was written, when nobody writes any more; the caller keeps the descriptor.

    Raises:
        ProtocolError: a broker of another version wrote it.
    """
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
        magic, end, dropped, closed_ns = _HEADER.unpack_from(memory, 0)
        body = memory[_HEADER.size : end] if magic == _MAGIC else b""
    return Written(_records(body), dropped, closed_ns)


def _records(body: bytes) -> Iterator[Record]:
    view, at = memoryview(body), 0
    while at < len(body):
        (length,) = _LENGTH.unpack_from(body, at)
        at += _LENGTH.size
        try:
            yield _decode(view[at : at + length])
        except msgspec.MsgspecError as error:
            raise ProtocolError(
                f"what the pool wrote cannot be read ({error}); do pool and command have the same version of trtpool?"
            ) from error
        at += length
