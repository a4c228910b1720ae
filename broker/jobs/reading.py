"""The rows of a chunk, as a producer reads them.

What is read is mapped, not copied, where the format allows it: rows of a `.npy` file, values of a column.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trtpool.ipc.errors import InvalidInput

from .batches import BatchFile
from .members import Shard, member_value
from .shards import member_of
from .tables import column_value, pyarrow_parquet
from .wire import Chunk, Sample


class Item(NamedTuple):
    """One row, as functions given with ``--decode`` and ``--post`` get it.

    Attributes:
        row: its number, counted from 0 over all inputs.
        key: the file; ``FILE#ROW`` for a row of a Parquet, Arrow or `.npy` file; ``SHARD#MEMBER`` for a member of a
            tar shard, without its suffix if there are several for a row.
        value: a `pathlib.Path`; a row of a `.npy` file as a read-only array; from Parquet and Arrow an array, a
            `pyarrow.Buffer` (binary columns), a string; from a tar shard an array (`.npy`) or `bytes`; with several
            ``--column`` a dict of these by input name.
    """

    row: int
    key: str
    value: Any


class Reader:
    """Reads the rows of chunks, in a producer.

    Args:
        kind: as in `Inputs`.
        columns: by model input, as `sources.choose` gives them.
    """

    def __init__(self, kind: str, columns: dict[str, str]) -> None:
        self._columns = columns
        self._open: tuple[tuple[str, int], Any] | None = None  # what was read last: a file, or a row group of one
        self._batches: tuple[str, BatchFile] | None = None
        self._rows = {
            "files": self._files,
            "npy": self._npy,
            "parquet": self._parquet,
            "arrow": self._arrow,
            "tar": self._tar,
        }[kind]

    def rows(self, chunk: Chunk) -> Iterator[tuple[Item, Callable[[], Any]]]:
        """Each row without its value, and what gives the value.

        A value that cannot be read is the row's error, so it is read where errors are caught.
        """
        return self._rows(chunk)

    def _files(self, chunk: Chunk) -> Iterator[tuple[Item, Callable[[], Any]]]:
        for offset, path in enumerate(chunk.paths):
            yield Item(chunk.first + offset, path, None), lambda path=path: Path(path)  # type: ignore[misc]

    def _stored(self, chunk: Chunk, value: Callable[[int], Any]) -> Iterator[tuple[Item, Callable[[], Any]]]:
        for offset in range(chunk.count):
            row = chunk.at + offset
            yield Item(chunk.first + offset, f"{chunk.path}#{row}", None), lambda row=row: value(row)  # type: ignore[misc]

    def _npy(self, chunk: Chunk) -> Iterator[tuple[Item, Callable[[], Any]]]:
        array = self._kept((chunk.path, 0), lambda: np.load(chunk.path, mmap_mode="r", allow_pickle=False))
        return self._stored(chunk, lambda row: np.asarray(array[row]))

    def _parquet(self, chunk: Chunk) -> Iterator[tuple[Item, Callable[[], Any]]]:
        def read() -> Any:
            file = pyarrow_parquet("a Parquet file is read").ParquetFile(chunk.path, memory_map=True)
            return file.read_row_group(chunk.group, columns=sorted(set(self._columns.values())))

        return self._table(chunk, read)

    def _arrow(self, chunk: Chunk) -> Iterator[tuple[Item, Callable[[], Any]]]:
        def read() -> Any:
            if self._batches is None or self._batches[0] != chunk.path:
                self._batches = chunk.path, BatchFile(chunk.path, set(self._columns.values()))
            return self._batches[1].batch(chunk.group)

        return self._table(chunk, read)

    def _table(self, chunk: Chunk, read: Callable[[], Any]) -> Iterator[tuple[Item, Callable[[], Any]]]:
        """Rows of what `read` gives, which is read within the first row's value: broken, it is its rows' error."""

        def value(row: int) -> Any:
            table = self._kept((chunk.path, chunk.group), read)
            values = {
                name: column_value(table.column(column)[row - chunk.group_at]) for name, column in self._columns.items()
            }
            return values if len(values) > 1 else next(iter(values.values()))

        return self._stored(chunk, value)

    def _tar(self, chunk: Chunk) -> Iterator[tuple[Item, Callable[[], Any]]]:
        def value(sample: Sample) -> Any:
            if sample.broken:
                raise InvalidInput(sample.broken)
            shard = self._kept((chunk.path, 0), lambda: Shard(chunk.path))
            values = {}
            for name, column in self._columns.items():
                member = member_of(sample, column)
                values[name] = member_value(member.suffix, shard.read(member))
            return values if len(values) > 1 else next(iter(values.values()))

        for offset, sample in enumerate(chunk.samples):
            item = Item(chunk.first + offset, self._member_key(chunk.path, sample), None)
            yield item, lambda sample=sample: value(sample)  # type: ignore[misc]

    def _member_key(self, path: str, sample: Sample) -> str:
        name = sample.key
        if len(self._columns) == 1:
            with contextlib.suppress(InvalidInput):  # without the member, its sample must do
                name += f".{member_of(sample, *self._columns.values()).suffix}"
        return f"{path}#{name}" if name else path

    def _kept(self, key: tuple[str, int], read: Callable[[], Any]) -> Any:
        if self._open is None or self._open[0] != key:
            if self._open is not None and isinstance(self._open[1], Shard):
                self._open[1].close()
            self._open = None  # before the next is read, so that there are never two
            self._open = key, read()
        return self._open[1]
