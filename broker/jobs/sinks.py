"""Where rows go: Parquet, Arrow, JSON lines, `.npy`.  Chunks are appended as they come and put into order in the end.

Parquet and Arrow need no second writing for that, since a footer says which rows are next (`table_sinks`); `.npy` rows
have their place from the start; JSON lines are copied once more by the kernel if chunks did not come in order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from trtpool.ipc.errors import ConfigError

from .appending import DATA, Moves, Sink, write_at
from .columns import ArrayHead
from .journal import Entry
from .table_sinks import ArrowSink, ParquetSink
from .wire import Chunk

SORTED: Final = "sorted"


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
        kind: "parquet", "arrow", "npy" or "jsonl".
        folder, output, safe: see `Sink`.
        rows: of the whole job.
    """
    make: dict[str, Callable[[], Sink]] = {
        "parquet": lambda: ParquetSink(folder, output, safe.values()),
        "arrow": lambda: ArrowSink(folder, output, safe.values()),
        "jsonl": lambda: JsonLinesSink(folder, output, safe.values()),
        "npy": lambda: NpySink(folder, output, safe.values(), rows),
    }
    return make[kind]()


SINKS: Final = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".npy": "npy",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
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
