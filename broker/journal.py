"""The slot table's memory: all that a broker did, where the next one finds it.

The core is a function of its events and their times, so it is enough to keep those: a new broker starts from the last
snapshot and handles again what was written after it.  What is written is what came in, not what is: the cost is that
of the message, however many slots and clients are idle::

    | header: which half counts | half 0: length, snapshot | log ...      | half 1: length, snapshot | log ...      |
                                                           record, record, 0

A frame is received straight into the log.  The kernel takes a packet off a socket and puts it here in one system call,
which a signal, SIGKILL too, does not interrupt: so there is no moment at which it is neither in the socket nor here.
Only its length may be missing then, and a frame's own bytes say where it ends.

A record counts once its length, written last, is not 0; what follows the last record is all zeros.  (A process that
is killed loses nothing that it wrote to shared memory, nor its order; a machine that loses power loses all of it, and
the pool with it.)  That all messages of a turn were sent is noted in the next record: until there is one, they would be
sent again, and skipped.

When the log is nearly full, a snapshot is written into the other half, the log after it cleared, and the header
changed last.  Only the broker and the supervisor have this memory: nobody else is given its descriptor.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

from trtpool.ipc.layout import Layout
from trtpool.ipc.messages import SHARED_BYTES
from trtpool.ipc.pipe import FRAME_BYTES
from trtpool.ipc.tensors import ModelSpec

LOG_BYTES: Final = 4 << 20
RESERVE_BYTES: Final = 1 << 20
"""Kept in a log for what is not a frame, since a frame can be left in its socket until there is room."""

SLOT_BYTES: Final = 256
"""Of a snapshot, for each slot at most: a lease, a work, a batch and a timer of its own, and what is sent of these."""

_DIMENSION_BYTES: Final = 9
_ARRAY_BYTES: Final = 3

REQUEST_BYTES: Final = 64
"""Of a snapshot, for each request that waits, at most, with its timer."""

BASE_BYTES: Final = 256 << 20
"""Of a snapshot, for all else: frames for slow readers and requests, for the most part.

Neither is bounded by what was configured, since clients are not: if they come to more than this, those clients that
most of it is for are cut off, after which it fits.
"""

PAGE_BYTES: Final = mmap.PAGESIZE
_HEADER_BYTES: Final = PAGE_BYTES
_LENGTH: Final = struct.Struct("<Q")
_RECORD: Final = struct.Struct("<QQII")  # time, peer, kind, length + 1: CPython packs one after the other
_WORD: Final = struct.Struct("<I")
_WORD_AT: Final = _RECORD.size - _WORD.size
_SETTLED: Final = 1 << 16
"""Beside a kind: before this record, all was sent."""
MAX_LOST_ZEROS: Final = 4096 + 64
"""A message ends with at most as many bytes that are 0: the longest text, and a few integers."""


class Kind(IntEnum):
    """What a record says."""

    FRAME = 1
    """Came from a peer; its bytes as they were."""
    EVENT = 2
    """Something else that the core was told."""
    WORKER = 3
    """The peer is a worker, whose number is the time."""
    ZMQ = 4
    """The peer's messages go over ZeroMQ."""
    TURN = 5
    """The turn ended; what follows from it has perhaps been sent."""
    SENT = 6
    """All of that has been sent, but for what the body says still waits.  If nothing does, the next record says so."""


_FRAME: Final = int(Kind.FRAME)


class Record(NamedTuple):
    """One record; `whole`: its length and its time are known."""

    kind: Kind
    peer: int
    now_ns: int
    body: bytes
    whole: bool = True


class JournalFull(Exception):
    """A snapshot, or a record, has no room: more is known of the pool than was reckoned with."""


def slot_bytes(spec: ModelSpec) -> int:
    """Of a snapshot, for each slot of a model at most: with shapes of items, of the work and in what is sent of it."""
    if spec.is_uniform:
        return SLOT_BYTES
    varying = [tensor for tensors in spec.varying for tensor in tensors]
    axes = sum(len(tensor.shape) for tensor in varying)
    return SLOT_BYTES + SHARED_BYTES + 2 * (_DIMENSION_BYTES * axes + _ARRAY_BYTES * (len(varying) + 2))


def journal_bytes(layout: Layout) -> int:
    """How large the memory must be for a pool; what is not used takes no memory."""
    slots = sum(model.slots * slot_bytes(model.spec) for model in layout.models)
    half = LOG_BYTES + BASE_BYTES + slots
    return _HEADER_BYTES + 2 * (-(-half // PAGE_BYTES) * PAGE_BYTES)


def create_table(size: int) -> int:
    """Memory for a journal, sealed against shrinking and growing; returns its descriptor."""
    fd = os.memfd_create("trtpool-table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Journal:
    """See the module.

    Args:
        fd: of the memory, which has `journal_bytes`; -1: memory of our own, for a broker that nobody takes over from.
        size: its bytes.
        log_bytes: of each log.
        reserve_bytes: see `RESERVE_BYTES`.

    Attributes:
        settled: all that follows from the last turn was sent; the next record will say so.
    """

    def __init__(
        self, fd: int, size: int, *, log_bytes: int = LOG_BYTES, reserve_bytes: int = RESERVE_BYTES + FRAME_BYTES
    ) -> None:
        self._map = mmap.mmap(fd, size)
        self._view = memoryview(self._map)
        self._half_bytes = (size - _HEADER_BYTES) // 2
        self._log_bytes = log_bytes
        self._reserve = reserve_bytes
        self._half = self._view[0]
        start = _HEADER_BYTES + self._half * self._half_bytes
        self._log = self._at = start + _LENGTH.size + self._snapshot_length(start)
        self._end = min(self._log + log_bytes, start + self._half_bytes)
        self.settled = False

    def close(self) -> None:
        """Unmap.  Again: nothing."""
        self._view.release()
        self._map.close()

    def _snapshot_length(self, start: int) -> int:
        return int(_LENGTH.unpack_from(self._view, start)[0])

    # ------------------------------------------------------------------ writing

    @property
    def has_room(self) -> bool:
        """Whether a frame, and all else that a turn may bring, still fit; if not, let the turn end."""
        return self._end - self._at >= self._reserve

    def frame(self, peer: int) -> memoryview:
        """Where to receive a frame from `peer`; `commit` follows if one came."""
        _RECORD.pack_into(self._view, self._at, 0, peer, _FRAME | _SETTLED if self.settled else _FRAME, 0)
        start = self._at + _RECORD.size
        return self._view[start : start + FRAME_BYTES]

    def commit(self, length: int, now_ns: int) -> memoryview:
        """The frame that was received; it stays until the next `replace`."""
        at = self._at
        _LENGTH.pack_into(self._view, at, now_ns)
        _WORD.pack_into(self._view, at + _WORD_AT, length + 1)
        body = at + _RECORD.size
        self._at = end = body + length
        self.settled = False
        return self._view[body:end]

    def write(self, kind: int, peer: int = 0, now_ns: int = 0, body: bytes = b"") -> None:
        """Append a record.

        Raises:
            JournalFull: it has no room.
        """
        start = self._at + _RECORD.size
        end = start + len(body)
        if end + _RECORD.size > self._end:
            raise JournalFull(f"a record of {len(body)} bytes does not fit the log of {self._log_bytes} bytes")
        if body:
            self._view[start:end] = body
        _RECORD.pack_into(self._view, self._at, now_ns, peer, kind | _SETTLED if self.settled else kind, len(body) + 1)
        self._at = end
        self.settled = False

    def replace(self, snapshot: bytes) -> None:
        """Begin a new log after `snapshot`, which says all that the old one did.

        Raises:
            JournalFull: it has no room.
        """
        half = 1 - self._half
        start = _HEADER_BYTES + half * self._half_bytes
        body = start + _LENGTH.size
        log = body + len(snapshot)
        end = min(log + self._log_bytes, start + self._half_bytes)
        if end - log < self._reserve:
            raise JournalFull(f"a snapshot of {len(snapshot)} bytes does not fit {self._half_bytes} bytes with its log")
        self._view[body:log] = snapshot
        _LENGTH.pack_into(self._view, start, len(snapshot))
        self._view[log:end] = bytes(end - log)
        self._view[0] = half
        self._half, self._log, self._at, self._end = half, log, log, end
        self.settled = False

    # ------------------------------------------------------------------ reading

    @property
    def snapshot(self) -> memoryview:
        """What the log follows; empty in new memory."""
        start = _HEADER_BYTES + self._half * self._half_bytes + _LENGTH.size
        return self._view[start : self._log]

    def records(self) -> Iterator[Record]:
        """What was written since the snapshot; the last may be a frame whose length is not known."""
        at = self._log
        while at + _RECORD.size <= self._end:
            now_ns, peer, kind, length = _RECORD.unpack_from(self._view, at)
            body = at + _RECORD.size
            settled, kind = divmod(kind, _SETTLED)
            if settled and (length or self._view[body]):
                yield Record(Kind.SENT, 0, 0, b"")
            if not length:
                if kind == Kind.FRAME and self._view[body]:
                    yield Record(Kind.FRAME, peer, 0, self._torn_frame(body), whole=False)
                return
            yield Record(Kind(kind), peer, now_ns, bytes(self._view[body : body + length - 1]))
            at = body + length - 1

    def _torn_frame(self, body: int) -> bytes:
        """All of a frame that came in, and the zeros that may be its end."""
        frame = bytes(self._view[body : min(body + FRAME_BYTES, self._end)]).rstrip(b"\0")
        return frame + bytes(MAX_LOST_ZEROS)
