"""The rows of a chunk, as a producer reads them.

What is read is mapped, not copied, where the format allows it: rows of a `.npy` file, values of a Parquet column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .tables import column_value, pyarrow_parquet
from .wire import Chunk


class Item(NamedTuple):
    """One row, as functions given with ``--decode`` and ``--post`` get it.

    Attributes:
        row: its number, counted from 0 over all inputs.
        key: the file, or ``FILE#ROW`` for a row of a Parquet or `.npy` file.
        value: a `pathlib.Path`; a row of a `.npy` file as a read-only array; from Parquet an array, a `pyarrow.Buffer`
            (binary columns), a string, or with several ``--column`` a dict of these by input name.
    """

    row: int
    key: str
    value: Any


class Reader:
    """Reads the rows of chunks, in a producer.

    Args:
        kind: as in `Inputs`.
        columns: Parquet columns by model input.
    """

    def __init__(self, kind: str, columns: dict[str, str]) -> None:
        self._columns = columns
        self._open: tuple[tuple[str, int], Any] | None = None  # what was read last: a file, or a row group of one
        self._rows = {"files": self._files, "npy": self._npy, "parquet": self._parquet}[kind]

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

        # The table is read within the first row's value, so that a broken row group is its rows' error.
        def value(row: int) -> Any:
            table = self._kept((chunk.path, chunk.group), read)
            values = {
                name: column_value(table.column(column)[row - chunk.group_at]) for name, column in self._columns.items()
            }
            return values if len(values) > 1 else next(iter(values.values()))

        return self._stored(chunk, value)

    def _kept(self, key: tuple[str, int], read: Callable[[], Any]) -> Any:
        if self._open is None or self._open[0] != key:
            self._open = None  # before the next is read, so that there are never two
            self._open = key, read()
        return self._open[1]
