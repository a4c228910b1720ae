"""Arrow IPC files that grow by record batches, and can be ended after any of them.

::

    HEAD  <schema>  <batch> <batch> ...  END  <footer> <its length: i32> MAGIC

The footer names the schema again and the place of each batch, and readers go by it, so batches may lie in any order.
pyarrow writes a footer only together with the batches.  So it writes a file with as many batches, all of them empty,
whose footer is then like ours but for the places; these are records of fixed size, and are written over.

Schema and batches are messages: ``<ff ff ff ff> <bytes of metadata: i32> <metadata> <body>``, in multiples of 8 bytes:
https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format.  The footer is a FlatBuffer:
https://github.com/apache/arrow/blob/main/format/File.fbs, and so is metadata (Message.fbs, beside it).  By that rows
are counted here too: pyarrow reads, and decompresses, a batch for it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from .tables import pyarrow_module

MAGIC: Final = b"ARROW1"
HEAD: Final = MAGIC + b"\0\0"
END: Final = b"\xff\xff\xff\xff\0\0\0\0"
"""What tells readers of a stream that no batch comes."""

PREFIX_BYTES: Final = 8
_BATCHES_FIELD: Final = 3  # of Footer: version, schema, dictionaries, recordBatches
_MESSAGE_FIELDS: Final = (1, 2, 3)  # of Message: version, header's type, header, bodyLength
_ROWS_AND_COMPRESSION_FIELDS: Final = (0, 3)  # of RecordBatch: length, nodes, buffers, compression
_RECORD_BATCH: Final = 3
_BLOCK: Final = struct.Struct("<qi4xq")


class Place(NamedTuple):
    """Where a batch is: its offset in the file, and the bytes of its metadata, with their prefix, and of its body."""

    offset: int
    metadata: int
    body: int


def metadata_bytes(message: bytes | memoryview) -> int:
    """Bytes of a message before its body."""
    marker, length = struct.unpack_from("<Ii", message)
    if marker != 0xFFFFFFFF or length <= 0:
        raise ValueError("it is no message of Arrow's IPC format")
    return PREFIX_BYTES + int(length)


def end_of_file(schema: Any, places: Sequence[Place]) -> bytes:
    """What comes behind the last batch.

    Args:
        schema: a `pyarrow.Schema` without dictionaries.
        places: the batches, in the order in which they are to be read.
    """
    pa = pyarrow_module("pyarrow.ipc", "Arrow files are written")
    sink = pa.BufferOutputStream()
    empty = pa.RecordBatch.from_arrays([_no_values(pa, field.type) for field in schema], schema=schema)
    with pa.ipc.new_file(sink, schema) as writer:
        for _ in places:
            writer.write_batch(empty)
    data: bytes = sink.getvalue().to_pybytes()
    tail = 4 + len(MAGIC)
    (length,) = struct.unpack_from("<i", data, len(data) - tail)
    footer = bytearray(data[-tail - length : -tail])
    _write_places(footer, places)
    return END + bytes(footer) + data[-tail:]


def _no_values(pa: Any, kind: Any) -> Any:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array([], kind.storage_type))
    return pa.array([], kind)


def _write_places(footer: bytearray, places: Sequence[Place]) -> None:
    """Write places over those that are there, as many."""
    at, count = _blocks(footer)
    assert count == len(places)
    for number, place in enumerate(places):
        _BLOCK.pack_into(footer, at + number * _BLOCK.size, *place)


def places_of(footer: bytes) -> list[Place]:
    """The places of the batches that a footer names."""
    at, count = _blocks(footer)
    return [Place(*_BLOCK.unpack_from(footer, at + number * _BLOCK.size)) for number in range(count)]


def _blocks(footer: bytes | bytearray) -> tuple[int, int]:
    """Where a footer has the places of its batches, and how many."""
    field = _field(footer, _target(footer, 0), _BATCHES_FIELD)
    if not field:
        return 0, 0
    at = _target(footer, field)
    return at + 4, int(struct.unpack_from("<I", footer, at)[0])


class Head(NamedTuple):
    """What a message's metadata says: whether it is a record batch, its rows, if these are compressed; its body."""

    is_batch: bool
    rows: int
    compressed: bool
    body: int


def head_of(metadata: bytes) -> Head:
    """What a message's metadata, without the prefix, says."""
    message = _target(metadata, 0)
    kind, header, body = (_field(metadata, message, field) for field in _MESSAGE_FIELDS)
    size = int(struct.unpack_from("<q", metadata, body)[0]) if body else 0
    if not (kind and header and metadata[kind] == _RECORD_BATCH):
        return Head(False, 0, False, size)
    batch = _target(metadata, header)
    rows, compression = (_field(metadata, batch, field) for field in _ROWS_AND_COMPRESSION_FIELDS)
    return Head(True, int(struct.unpack_from("<q", metadata, rows)[0]) if rows else 0, bool(compression), size)


def _target(data: bytes | bytearray, at: int) -> int:
    """Where what is named at `at` is."""
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: bytes | bytearray, table: int, number: int) -> int:
    """Where a field of a table is, 0 if it has its default."""
    names = table - struct.unpack_from("<i", data, table)[0]
    entry = 4 + 2 * number
    offset = struct.unpack_from("<H", data, names + entry)[0] if entry < struct.unpack_from("<H", data, names)[0] else 0
    return table + int(offset) if offset else 0
