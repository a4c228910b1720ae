"""What goes between a job and its producers: JSON lines one way, frames the other.

A frame is a header and a payload: ``<header bytes: u32> <payload bytes: u64> <header: JSON> <payload>``.  The payload
is a chunk in the form that the sink appends, so it is never parsed on its way.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import msgspec

_LENGTHS: Final = struct.Struct("<IQ")


class Member(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A member of a tar shard: its suffix without the first dot, and its place in the decompressed file, in bytes."""

    suffix: str
    at: int
    bytes: int


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """The members of a tar shard that are one row; `broken` says why it cannot be read, if it cannot."""

    key: str
    members: tuple[Member, ...]
    broken: str = ""


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rows that one producer does, and that are written together.

    Attributes:
        number: counts chunks from 0.
        first, count: its rows, counted over all inputs.
        path: the file that they are in; "" if each is a file.
        at: the first of them, counted from the file's first row.
        group, group_at: the row group of a Parquet file that they are in, and that group's first row.
        paths: the files, if each row is one.
        samples: the rows, if the file is a tar shard.
    """

    number: int
    first: int
    count: int
    path: str = ""
    at: int = 0
    group: int = 0
    group_at: int = 0
    paths: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()


class Assign(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A chunk to do; `lost` are rows of it that are not to be touched, and why."""

    chunk: Chunk
    lost: dict[int, str] = {}


class Ready(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The producer has connected, and the functions that it was told to use are there."""


class Spent(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What was done since the last frame: `rows` of `chunk`, and nanoseconds that went into functions of the user."""

    chunk: int
    rows: int
    decode_ns: int
    post_ns: int


class Finished(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A whole chunk; `errors` are its rows without a result, with their keys and what went wrong."""

    chunk: int
    errors: tuple[tuple[int, str, str], ...]


class Fatal(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Nothing more comes: `kind` is a class of `trtpool.ipc.errors`."""

    kind: str
    text: str


FromProducer: TypeAlias = "Ready | Spent | Finished | Fatal"

_decoder: msgspec.json.Decoder[Ready | Spent | Finished | Fatal] = msgspec.json.Decoder(
    Ready | Spent | Finished | Fatal
)


def send(fd: int, header: Ready | Spent | Finished | Fatal, payload: Sequence[bytes | memoryview] = ()) -> None:
    """Write a frame, whole."""
    head = msgspec.json.encode(header)
    parts = [memoryview(part).cast("B") for part in payload if len(part)]
    lengths = _LENGTHS.pack(len(head), sum(len(part) for part in parts))
    for part in (memoryview(lengths + head), *parts):
        rest = part
        while len(rest):
            rest = rest[os.write(fd, rest) :]


def frames(fd: int) -> Iterator[tuple[Ready | Spent | Finished | Fatal, memoryview]]:
    """Read frames until the stream ends; a frame that is cut short is dropped."""
    while (lengths := _read(fd, _LENGTHS.size)) is not None:
        head_bytes, payload_bytes = _LENGTHS.unpack(lengths)
        head, payload = _read(fd, head_bytes), _read(fd, payload_bytes)
        if head is None or payload is None:
            return
        yield _decoder.decode(head), payload


def _read(fd: int, count: int) -> memoryview | None:
    """Exactly `count` bytes, or None at the end of the stream."""
    buffer = memoryview(bytearray(count))
    got = 0
    while got < count:
        taken = os.readv(fd, [buffer[got:]])
        if not taken:
            return None
        got += taken
    return buffer
