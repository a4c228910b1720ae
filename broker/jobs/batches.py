"""Record batches of Arrow IPC files, mapped: what they are cut into, and reading one.

Files (``.arrow``, ``.feather``, ``.ipc``) begin with a magic word and end with a list of places.  Streams have neither;
Hugging Face's datasets are that, and are called ``.arrow`` too.  Rows are counted by the batches' metadata.  Reading a
batch that is not compressed only makes pointers into the mapped file, and so does passing over those of a stream.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from typing import Any

from .arrow_footers import END, MAGIC, PREFIX_BYTES, Head, head_of, metadata_bytes, places_of
from .tables import pyarrow_module


class BatchFile:
    """The record batches of a file or stream.

    Args:
        path: it.
        columns: read only these; None: all.

    Raises:
        MissingExtra: pyarrow is not installed.
        OSError, ValueError: it cannot be read, or is neither.
    """

    def __init__(self, path: str, columns: Collection[str] | None = None) -> None:
        self._pa = pyarrow_module("pyarrow.ipc", "Arrow files are read")
        self._mapped = self._pa.memory_map(path)
        self._is_file = self._mapped.read_at(len(MAGIC), 0) == MAGIC if self._mapped.size() > len(MAGIC) else False
        self.schema = self._opened([]).schema
        try:
            self._heads = list(self._file_heads() if self._is_file else self._stream_heads())
        except (struct.error, IndexError, OverflowError) as error:
            raise ValueError(f"its metadata is damaged: {error}") from error
        self._columns = list(self.schema.names) if columns is None else sorted(columns)
        self._batches: Any = None
        self._next = 0

    def _opened(self, fields: list[int]) -> Any:
        """A reader from the start, of these fields; of all if none is named."""
        self._mapped.seek(0)
        options = self._pa.ipc.IpcReadOptions(included_fields=fields)
        make = self._pa.ipc.open_file if self._is_file else self._pa.ipc.open_stream
        return make(self._mapped, options=options)

    def _bytes(self, at: int, count: int) -> bytes:
        if at < 0 or count < 0 or at + count > self._mapped.size():
            raise ValueError(f"it is cut off: {count:,} bytes at {at:,} are not there")
        data: bytes = self._mapped.read_at(count, at)
        return data

    def _file_heads(self) -> Iterator[Head]:
        tail = 4 + len(MAGIC)
        end = self._mapped.size() - tail
        (length,) = struct.unpack("<i", self._bytes(end, 4))
        for place in places_of(self._bytes(end - length, length)):
            yield head_of(self._bytes(place.offset + PREFIX_BYTES, place.metadata - PREFIX_BYTES))

    def _stream_heads(self) -> Iterator[Head]:
        at, size = 0, self._mapped.size()
        while at < size and (prefix := self._bytes(at, PREFIX_BYTES)) != END:
            length = metadata_bytes(prefix)
            head = head_of(self._bytes(at + PREFIX_BYTES, length - PREFIX_BYTES))
            at += length + head.body
            if head.body < 0 or at > size:
                raise ValueError(f"it is cut off: it has {size:,} bytes, and a batch ends at {at:,}")
            if head.is_batch:
                yield head

    def counts(self) -> tuple[int, ...]:
        """Rows of each batch."""
        return tuple(head.rows for head in self._heads)

    def _fields(self) -> list[int]:
        """The fields to read: naming some saves decompressing others, but makes pyarrow copy what it could map."""
        compressed = any(head.compressed for head in self._heads)
        return [at for at, name in enumerate(self.schema.names) if name in self._columns] if compressed else []

    def batch(self, number: int) -> Any:
        """A batch, checked, so that no value of it can lie outside it.

        Raises:
            OSError, ValueError: it is damaged.
        """
        if self._batches is None or (not self._is_file and number < self._next):
            self._batches, self._next = self._opened(self._fields()), 0
        if self._is_file:
            batch = self._batches.get_batch(number)
        else:
            while self._next < number:
                self._batches.read_next_batch()
                self._next += 1
            batch = self._batches.read_next_batch()
            self._next += 1
        batch = batch.select(self._columns)
        batch.validate(full=True)
        return batch
