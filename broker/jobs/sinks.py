"""Where rows go: Parquet, JSON lines, `.npy`.  Chunks are appended as they come and put into order in the end.

Parquet needs no second writing for that, since its footer says which row group is next (`footers`); `.npy` rows have
their place from the start; JSON lines are copied once more by the kernel if chunks did not come in order.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from trtpool.ipc.errors import ConfigError

from .columns import ArrayHead
from .footers import MAGIC, TAIL_BYTES, moved
from .journal import Entry
from .tables import pyarrow_parquet
from .wire import Chunk

DATA: Final = "data"
SORTED: Final = "sorted"

Moves = list[tuple[str, str]]


class Sink:
    """A file, or some, that grow by chunks.

    Args:
        folder: where to write.
        output: what it is to become.
        safe: chunks that are there.
    """

    def __init__(self, folder: Path, output: Path, safe: Iterable[Entry]) -> None:
        self._folder = folder
        self._output = output
        self._fd = os.open(folder / DATA, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.bytes = max((entry.offset + entry.bytes for entry in safe), default=0)
        os.ftruncate(self._fd, self.bytes)

    def append(self, chunk: Chunk, payload: memoryview, errors: tuple[tuple[int, str, str], ...]) -> list[Entry]:
        """Write a chunk; returns entries for the journal, of this chunk or of others that waited for it."""
        return [self._put(chunk, payload, errors)]

    def _put(self, chunk: Chunk, payload: memoryview | bytes, errors: tuple[tuple[int, str, str], ...]) -> Entry:
        start = self.bytes
        write_at(self._fd, payload, start)
        self.bytes += len(payload)
        return Entry(chunk.number, start, len(payload), errors)

    def sync(self) -> None:
        """Wait until all is on disk."""
        os.fdatasync(self._fd)

    def held(self) -> list[Entry]:
        """Chunks that waited for something that will not come: written now."""
        return []

    def finish(self, entries: Sequence[Entry]) -> Moves:
        """Complete the file, with its chunks in the order of `entries`; returns what to move where."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the files."""
        os.close(self._fd)


def write_at(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at an offset."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(fd, rest, offset)
        rest, offset = rest[done:], offset + done


class JsonLinesSink(Sink):
    """JSON lines."""

    def finish(self, entries: Sequence[Entry]) -> Moves:
        """See `Sink.finish`."""
        offsets = [entry.offset for entry in entries]
        if offsets == sorted(offsets):
            return [(DATA, self._output.name)]
        with (self._folder / SORTED).open("wb") as target:
            for entry in entries:
                offset, end = entry.offset, entry.offset + entry.bytes
                while offset < end:
                    offset += os.sendfile(target.fileno(), self._fd, offset, end - offset)
            os.fsync(target.fileno())
        return [(SORTED, self._output.name)]


class ParquetSink(Sink):
    """Parquet: each chunk is a row group.  All must have one schema: the first's that has a type for each column."""

    def __init__(self, folder: Path, output: Path, safe: Iterable[Entry]) -> None:
        safe = list(safe)
        super().__init__(folder, output, safe)
        self._parquet = pyarrow_parquet("Parquet is written")
        self._schema: Any = None
        self._waiting: list[tuple[Chunk, memoryview, tuple[tuple[int, str, str], ...]]] = []
        if safe:
            self._schema = self._parquet.read_schema(self._footer(safe[0]))

    def append(self, chunk: Chunk, payload: memoryview, errors: tuple[tuple[int, str, str], ...]) -> list[Entry]:
        """See `Sink.append`; a chunk without a type for each column waits for one that has them."""
        import pyarrow as pa

        schema = self._parquet.read_schema(pa.BufferReader(payload))
        if self._schema is None:
            # A chunk of nothing but errors does not know what columns others have.
            if len(errors) == chunk.count or any(_is_untyped(field.type) for field in schema):
                self._waiting.append((chunk, payload, errors))
                return []
            self._schema = schema
            waited, self._waiting = self._waiting, []
            return [entry for one in waited for entry in self.append(*one)] + [self._put(chunk, payload, errors)]
        return [self._put(chunk, self._fitting(payload, schema), errors)]

    def _fitting(self, payload: memoryview, schema: Any) -> memoryview | bytes:
        """The chunk with the schema of the others."""
        import pyarrow as pa

        if schema.equals(self._schema):
            return payload
        table = self._parquet.read_table(pa.BufferReader(payload))
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
        sink = io.BytesIO()
        self._parquet.write_table(table, sink, row_group_size=max(1, len(table)))
        return sink.getvalue()

    def held(self) -> list[Entry]:
        """See `Sink.held`: columns that never had a value become text."""
        import pyarrow as pa

        if not self._waiting:
            return []
        schemas = [self._parquet.read_schema(pa.BufferReader(payload)) for _, payload, _ in self._waiting]
        schema = max(schemas, key=len)
        self._schema = pa.schema([pa.field(f.name, pa.string()) if pa.types.is_null(f.type) else f for f in schema])
        waited, self._waiting = self._waiting, []
        return [entry for one in waited for entry in self.append(*one)]

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


def _is_untyped(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_null(kind)) or any(_is_untyped(kind.field(i).type) for i in range(kind.num_fields))


class NpySink(Sink):
    """A `.npy` file for each column, of all rows; what has no result is NaN, or 0, and named in a file of errors."""

    def __init__(self, folder: Path, output: Path, safe: Iterable[Entry], rows: int) -> None:
        super().__init__(folder, output, [])
        self._rows = rows
        self._columns: dict[str, tuple[int, int, np.dtype[Any], tuple[int, ...]]] = {}
        for path in sorted(folder.glob("*.npy")) if any(True for _ in safe) else ():
            array = np.lib.format.open_memmap(path, mode="r")
            self._open(path, path.stem, array.offset, array.dtype, array.shape[1:])

    def _open(self, path: Path, name: str, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._columns[name] = os.open(path, os.O_RDWR | os.O_CLOEXEC), offset, dtype, shape

    def append(self, chunk: Chunk, payload: memoryview, errors: tuple[tuple[int, str, str], ...]) -> list[Entry]:
        """See `Sink.append`."""
        end = bytes(payload[:65536]).index(b"\n") + 1
        heads = msgspec.json.decode(payload[:end], type=list[ArrayHead])
        if self._columns and heads and {self._file_name(head.name) for head in heads} != set(self._columns):
            raise ConfigError("--post: the columns differ from row to row; return the same ones for every row")
        for head in heads:
            dtype, name = np.dtype(head.dtype), self._file_name(head.name)
            size = chunk.count * int(np.prod(head.shape)) * dtype.itemsize
            array = np.frombuffer(payload[end : end + size], dtype).reshape(chunk.count, *head.shape)
            end += size
            if name not in self._columns:
                self._create(name, dtype, head.shape)
            fd, offset, wanted, shape = self._columns[name]
            if shape != head.shape or not np.can_cast(dtype, wanted, "same_kind"):
                raise ConfigError(
                    f"--post: {head.name!r} is {wanted} {shape} in some rows and {dtype} {head.shape} in others; "
                    "return arrays of one shape and dtype"
                )
            data = np.ascontiguousarray(array.astype(wanted, copy=False)).reshape(-1).view(np.uint8)
            write_at(fd, data.data, offset + chunk.first * (data.nbytes // max(1, chunk.count)))
            self.bytes += data.nbytes
        return [Entry(chunk.number, 0, 0, errors)]

    @staticmethod
    def _file_name(column: str) -> str:
        return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in column)

    def _create(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        path = self._folder / f"{name}.npy"
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(self._rows, *shape))
        self._open(path, name, array.offset, dtype, shape)

    def sync(self) -> None:
        """See `Sink.sync`."""
        for fd, *_ in self._columns.values():
            os.fdatasync(fd)

    def finish(self, entries: Sequence[Entry]) -> Moves:
        """See `Sink.finish`."""
        errors = [error for entry in entries for error in entry.errors]
        if not self._columns:
            raise ConfigError("no row has a result, so there is nothing to write as .npy; JSON lines would say why")
        for fd, offset, dtype, shape in self._columns.values():
            if dtype.kind in "fc":
                row = np.full(shape, np.nan, dtype).tobytes()
                for number, _, _ in errors:
                    write_at(fd, row, offset + number * len(row))
        self.sync()
        stem = self._output.name.removesuffix(".npy")
        single = len(self._columns) == 1
        moves = [(f"{name}.npy", self._output.name if single else f"{stem}.{name}.npy") for name in self._columns]
        if errors:
            lines = [msgspec.json.encode({"row": r, "key": k, "error": t}) + b"\n" for r, k, t in errors]
            with (self._folder / "errors").open("wb") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            moves.append(("errors", f"{self._output.name}.errors.jsonl"))
        return moves

    def close(self) -> None:
        """See `Sink.close`."""
        super().close()
        for fd, *_ in self._columns.values():
            os.close(fd)


def open_sink(kind: str, folder: Path, output: Path, safe: Mapping[int, Entry], rows: int) -> Sink:
    """The sink of a kind.

    Args:
        kind: "parquet", "npy" or "jsonl".
        folder, output, safe: see `Sink`.
        rows: of the whole job.
    """
    make: dict[str, Callable[[], Sink]] = {
        "parquet": lambda: ParquetSink(folder, output, safe.values()),
        "jsonl": lambda: JsonLinesSink(folder, output, safe.values()),
        "npy": lambda: NpySink(folder, output, safe.values(), rows),
    }
    return make[kind]()


SINKS: Final = {".parquet": "parquet", ".pq": "parquet", ".npy": "npy", ".jsonl": "jsonl", ".ndjson": "jsonl"}
"""Kinds by suffix."""


def sink_of(output: Path) -> str:
    """The kind of sink that an output's name asks for.

    Raises:
        ConfigError: none.
    """
    kind = SINKS.get(output.suffix.lower())
    if kind is None:
        raise ConfigError(f"--output {output}: name a file that ends in {', '.join(SINKS)}")
    return kind
