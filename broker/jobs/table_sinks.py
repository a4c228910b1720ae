"""Sinks that hold typed columns: Parquet, Arrow.  All chunks have one schema: the first's that has all types.

Each kind of file ends with a list of places by which readers find their way, and this is written last, so chunks lie in
the order in which they came and are read in the order that is wanted.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trtpool.ipc.errors import ConfigError

from . import arrow_footers, columns
from .appending import DATA, Moves, Sink, write_at
from .footers import MAGIC, TAIL_BYTES, moved
from .journal import Entry
from .tables import pyarrow_module, pyarrow_parquet
from .wire import Chunk


class TableSink(Sink):
    """What Parquet and Arrow share: chunks are brought to the schema of the first, or wait until there is one."""

    def __init__(self, folder: Path, output: Path, safe: Iterable[Entry]) -> None:
        safe = list(safe)
        super().__init__(folder, output, safe)
        self._pa = pyarrow_module("pyarrow.ipc", "tables are written")
        self._schema: Any = None
        self._waiting: list[tuple[Chunk, memoryview, tuple[tuple[int, str, str], ...]]] = []
        if safe:
            self._schema = self._written_schema(safe[0])

    def _written_schema(self, entry: Entry) -> Any:
        """The schema of what is in the file."""
        raise NotImplementedError

    def _schema_of(self, payload: memoryview) -> Any:
        raise NotImplementedError

    def _table_of(self, payload: memoryview) -> Any:
        raise NotImplementedError

    def _payload_of(self, table: Any) -> memoryview:
        raise NotImplementedError

    def append(self, chunk: Chunk, payload: memoryview, errors: tuple[tuple[int, str, str], ...]) -> list[Entry]:
        """See `Sink.append`; a chunk without a type for each column waits for one that has them."""
        schema = self._schema_of(payload)
        if self._schema is None:
            # A chunk of nothing but errors does not know what columns others have.
            if len(errors) == chunk.count or any(self._is_untyped(field.type) for field in schema):
                self._waiting.append((chunk, payload, errors))
                return []
            self._schema = schema
            waited, self._waiting = self._waiting, []
            return [entry for one in waited for entry in self.append(*one)] + [self._put(chunk, payload, errors)]
        return [self._put(chunk, self._fitting(payload, schema), errors)]

    def _is_untyped(self, kind: Any) -> bool:
        inner = [kind.field(at).type for at in range(kind.num_fields)]
        return bool(self._pa.types.is_null(kind)) or any(self._is_untyped(one) for one in inner)

    def _fitting(self, payload: memoryview, schema: Any) -> memoryview:
        """The chunk with the schema of the others."""
        pa = self._pa
        if schema.equals(self._schema):
            return payload
        table = self._table_of(payload)
        try:
            missing = [field for field in self._schema if field.name not in table.column_names]
            for field in missing:  # a chunk of nothing but errors knows no columns
                table = table.append_column(field.name, pa.nulls(len(table), field.type))
            if extra := [name for name in table.column_names if name not in self._schema.names]:
                raise pa.ArrowInvalid(f"a column {extra[0]!r} is new")
            table = table.select(self._schema.names).cast(self._schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
            raise ConfigError(
                f"--post: the columns of rows do not have the same types: {error}; give the function an attribute "
                "`schema`, a pyarrow.Schema"
            ) from error
        return self._payload_of(table)

    def held(self) -> list[Entry]:
        """See `Sink.held`: columns that never had a value become text."""
        pa = self._pa
        if not self._waiting:
            return []
        schema = max((self._schema_of(payload) for _, payload, _ in self._waiting), key=len)
        self._schema = pa.schema([pa.field(f.name, pa.string()) if pa.types.is_null(f.type) else f for f in schema])
        waited, self._waiting = self._waiting, []
        return [entry for one in waited for entry in self.append(*one)]


class ParquetSink(TableSink):
    """Parquet: each chunk is a row group, see `footers`."""

    def __init__(self, folder: Path, output: Path, safe: Iterable[Entry]) -> None:
        self._parquet = pyarrow_parquet("Parquet is written")
        super().__init__(folder, output, safe)

    def _written_schema(self, entry: Entry) -> Any:
        return self._parquet.read_schema(self._footer(entry))

    def _schema_of(self, payload: memoryview) -> Any:
        return self._parquet.read_schema(self._pa.BufferReader(payload))

    def _table_of(self, payload: memoryview) -> Any:
        return self._parquet.read_table(self._pa.BufferReader(payload))

    def _payload_of(self, table: Any) -> memoryview:
        sink = io.BytesIO()
        self._parquet.write_table(table, sink, row_group_size=max(1, len(table)))
        return sink.getbuffer()

    def _footer(self, entry: Entry) -> io.BytesIO:
        """A file with nothing but the footer of a chunk, with places as they are in the whole file."""
        end = entry.offset + entry.bytes
        length = int.from_bytes(os.pread(self._fd, TAIL_BYTES, end - TAIL_BYTES)[:4], "little") + TAIL_BYTES
        footer = moved(os.pread(self._fd, length, end - length), entry.offset)
        return io.BytesIO(MAGIC + footer)

    def finish(self, entries: Sequence[Entry]) -> Moves:
        """See `Sink.finish`."""
        whole, *others = (self._parquet.read_metadata(self._footer(entry)) for entry in entries)
        for metadata in others:
            whole.append_row_groups(metadata)
        footer = io.BytesIO()
        whole.write_metadata_file(footer)
        write_at(self._fd, footer.getvalue()[len(MAGIC) :], self.bytes)
        self.sync()
        return [(DATA, self._output.name)]


class ArrowSink(TableSink):
    """An Arrow IPC file: each chunk is a record batch, see `arrow_footers`.

    The schema is at the file's beginning and nowhere else, so of a chunk only the batch is written.
    """

    def _written_schema(self, _entry: Entry) -> Any:
        start = len(arrow_footers.HEAD)
        length = arrow_footers.metadata_bytes(os.pread(self._fd, arrow_footers.PREFIX_BYTES, start))
        return self._pa.ipc.read_schema(self._pa.BufferReader(os.pread(self._fd, length, start)))

    def _schema_of(self, payload: memoryview) -> Any:
        return self._pa.ipc.read_schema(self._pa.BufferReader(payload))

    def _table_of(self, payload: memoryview) -> Any:
        batch = self._pa.ipc.read_record_batch(
            self._pa.BufferReader(payload[arrow_footers.metadata_bytes(payload) :]), self._schema_of(payload)
        )
        return self._pa.Table.from_batches([batch])

    def _payload_of(self, table: Any) -> memoryview:
        return memoryview(b"".join(columns.arrow_messages(table)))

    def _put(self, chunk: Chunk, payload: memoryview | bytes, errors: tuple[tuple[int, str, str], ...]) -> Entry:
        if not self.bytes:
            head = arrow_footers.HEAD + self._schema.serialize().to_pybytes()
            write_at(self._fd, head, 0)
            self.bytes = len(head)
        return super()._put(chunk, payload[arrow_footers.metadata_bytes(payload) :], errors)

    def finish(self, entries: Sequence[Entry]) -> Moves:
        """See `Sink.finish`."""
        places = []
        for entry in entries:
            metadata = arrow_footers.metadata_bytes(os.pread(self._fd, arrow_footers.PREFIX_BYTES, entry.offset))
            places.append(arrow_footers.Place(entry.offset, metadata, entry.bytes - metadata))
        write_at(self._fd, arrow_footers.end_of_file(self._schema, places), self.bytes)
        self.sync()
        return [(DATA, self._output.name)]
