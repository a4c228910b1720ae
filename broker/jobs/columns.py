"""Finished rows of a chunk, as the bytes that a sink appends.

A model's outputs go from the slot into one array for each tensor and chunk (the one copy out of the arena), which
Parquet's encoder and the `.npy` sink then read in place.  What a ``--post`` function returns is kept as it is until the
chunk is full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from trtpool.ipc.arrow_columns import column_of
from trtpool.ipc.errors import ConfigError, InvalidInput
from trtpool.ipc.tensors import TensorSpec

from .tables import pyarrow_parquet

ROW: Final = "row"
KEY: Final = "key"
ERROR: Final = "error"
OWN_COLUMNS: Final = (ROW, KEY, ERROR)


class ChunkRows:
    """The rows of one chunk, filled in any order.

    Args:
        first: the first row's number.
        count: rows.
        outputs: the model's, if rows are its outputs as they are; empty if they are what a function returns.
    """

    def __init__(self, first: int, count: int, outputs: tuple[TensorSpec, ...]) -> None:
        self.first = first
        self.count = count
        self.keys = [""] * count
        self.errors: dict[int, str] = {}
        self.arrays = {spec.name: np.empty((count, *spec.shape), spec.numpy_dtype) for spec in outputs}
        self.values: dict[str, dict[int, Any]] = {}
        self._left = count

    def fill(self, at: int, key: str, values: Mapping[str, Any]) -> bool:
        """Store a row; True if the chunk is full now."""
        if self.arrays:
            for name, array in self.arrays.items():
                array[at] = values[name]
        else:
            for name, value in values.items():
                self.values.setdefault(name, {})[at] = _kept(value)
        return self._count_down(at, key)

    def fail(self, at: int, key: str, text: str) -> bool:
        """Store an error in place of a row; True if the chunk is full now."""
        self.errors[at] = text
        for array in self.arrays.values():
            array[at] = 0
        return self._count_down(at, key)

    def _count_down(self, at: int, key: str) -> bool:
        self.keys[at] = key
        self._left -= 1
        return not self._left

    def failures(self) -> tuple[tuple[int, str, str], ...]:
        """Row number, key and text of each row without a result."""
        return tuple((self.first + at, self.keys[at], text) for at, text in sorted(self.errors.items()))


def _kept(value: Any) -> Any:
    """A value that stays: views of a slot are valid only for as long as the slot is ours."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {name: _kept(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_kept(one) for one in value]
    return value


def check_names(names: tuple[str, ...]) -> None:
    """Raise `ConfigError` if columns would be called like the sinks' own."""
    if taken := [name for name in names if name in OWN_COLUMNS]:
        raise ConfigError(
            f"a column cannot be called {taken[0]!r}, which says where a row is from; rename it in --post"
        )


# ---------------------------------------------------------------------------------- JSON lines


def json_lines(rows: ChunkRows) -> list[bytes | memoryview]:
    """A line for each row: row, key, the columns (null in error rows), error (null in others)."""
    check_names(tuple(rows.values))
    names = [*rows.arrays, *rows.values]
    out = bytearray()
    for at in range(rows.count):
        error = rows.errors.get(at)
        line: dict[str, Any] = {ROW: rows.first + at, KEY: rows.keys[at]}
        for name in names:
            value = rows.arrays[name][at] if name in rows.arrays else rows.values[name].get(at)
            line[name] = None if error is not None else value
        line[ERROR] = error
        out += msgspec.json.encode(line, enc_hook=_plain) + b"\n"
    return [bytes(out)]


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise InvalidInput(f"a {type(value).__name__} cannot be written; return numbers, text, lists, dicts or arrays")


# ---------------------------------------------------------------------------------- Parquet, Arrow


def parquet_file(rows: ChunkRows, schema: Any) -> list[bytes | memoryview]:
    """A Parquet file with one row group.

    Args:
        rows: what is in it.
        schema: a `pyarrow.Schema` for the columns that ``--post`` makes, or None to infer their types.
    """
    import pyarrow as pa

    table = table_of(rows, schema, _tensor_column)
    sink = pa.BufferOutputStream()
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]  # looking numbers up takes long
    parquet = pyarrow_parquet("Parquet is written")
    parquet.write_table(table, sink, row_group_size=max(1, rows.count), use_dictionary=texts)
    return [memoryview(sink.getvalue())]


def arrow_batch(rows: ChunkRows, schema: Any) -> list[bytes | memoryview]:
    """Two messages of Arrow's IPC format, schema and record batch.

    Args:
        rows, schema: see `parquet_file`.
    """
    return [memoryview(part) for part in arrow_messages(table_of(rows, schema, column_of))]


def arrow_messages(table: Any) -> list[Any]:
    """Schema and rows of a table as `pyarrow.Buffer` of Arrow's IPC format."""
    import pyarrow as pa

    if encoded := [field.name for field in table.schema if _has_dictionary(field.type)]:
        raise ConfigError(f"--post: {encoded[0]!r} has a dictionary type; give `schema` a plain one, or write Parquet")
    # A batch even if there are no rows or columns, and one alone.
    batch = pa.RecordBatch.from_arrays(
        [column.combine_chunks() if column.num_chunks != 1 else column.chunk(0) for column in table.columns],
        schema=table.schema,
    )
    return [table.schema.serialize(), batch.serialize()]


def _has_dictionary(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_dictionary(kind) or any(_has_dictionary(kind.field(at).type) for at in range(kind.num_fields))


def table_of(rows: ChunkRows, schema: Any, tensors: Callable[[npt.NDArray[Any], Mapping[int, str]], Any]) -> Any:
    """The rows as a `pyarrow.Table`: row, key, the columns, error.

    Args:
        rows, schema: see `parquet_file`.
        tensors: makes a column of a tensor's array and the rows of it that are null.
    """
    import pyarrow as pa

    fields = [pa.field(ROW, pa.int64(), nullable=False), pa.field(KEY, pa.string(), nullable=False)]
    arrays = [pa.array(range(rows.first, rows.first + rows.count), pa.int64()), pa.array(rows.keys, pa.string())]
    for name, array in rows.arrays.items():
        made = tensors(array, rows.errors)
        shape = {"shape": str(list(array.shape[1:]))} if array.ndim > 2 and tensors is _tensor_column else None
        fields.append(pa.field(name, made.type, metadata=shape))
        arrays.append(made)
    names = list(schema.names if schema is not None else rows.values) if not rows.arrays else []
    check_names(tuple(names))
    if schema is not None and (extra := [name for name in rows.values if name not in names]):
        raise ConfigError(f"--post returned {extra[0]!r}, which its schema does not have")
    for name in names:
        given = rows.values.get(name, {})
        values = [None if at in rows.errors else _python(given.get(at)) for at in range(rows.count)]
        try:
            made = pa.array(values, schema.field(name).type if schema is not None else None)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise ConfigError(
                f"--post: the values of {name!r} do not have one type: {error}; give the function an attribute "
                "`schema`, a pyarrow.Schema"
            ) from error
        fields.append(schema.field(name) if schema is not None else pa.field(name, made.type))
        arrays.append(made)
    errors = pa.array([rows.errors.get(at) for at in range(rows.count)], pa.string())
    return pa.Table.from_arrays([*arrays, errors], schema=pa.schema([*fields, pa.field(ERROR, pa.string())]))


def _tensor_column(array: npt.NDArray[Any], errors: Mapping[int, str]) -> Any:
    """Scalars as they are, other items as lists of one length, flattened; null where there is an error.

    Not as fixed-size lists, which pyarrow before 26 writes and cannot read again if some are null.
    """
    import pyarrow as pa

    absent = np.zeros(len(array), bool)
    absent[list(errors)] = True
    if array.ndim == 1:
        return pa.array(array, mask=absent)
    present = array[~absent] if errors else array
    ends = np.cumsum(np.where(absent, 0, math.prod(array.shape[1:])))
    offsets = pa.array(np.concatenate(([0], ends)), pa.int64())
    mask = pa.array(absent) if errors else None
    return pa.LargeListArray.from_arrays(offsets, pa.array(present.reshape(-1)), mask=mask)


def _python(value: Any) -> Any:
    """Arrays as lists, since pyarrow takes only vectors; all else as it is."""
    if isinstance(value, np.ndarray):
        return value.tolist() if value.ndim != 1 else value
    if isinstance(value, dict):
        return {name: _python(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_python(one) for one in value]
    return value


# ---------------------------------------------------------------------------------- arrays


class ArrayHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One column of a chunk for `.npy`: its bytes follow those of the columns before it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def array_bytes(rows: ChunkRows) -> list[bytes | memoryview]:
    """The columns as arrays: a line of JSON that describes them, then their bytes; NaN or 0 in error rows."""
    arrays = dict(rows.arrays) or {name: _stacked(rows, name, values) for name, values in rows.values.items()}
    for array in arrays.values():
        if array.dtype.kind in "fc" and rows.errors:
            array[list(rows.errors)] = np.nan
    heads = [ArrayHead(name, array.dtype.str, array.shape[1:]) for name, array in arrays.items()]
    return [
        msgspec.json.encode(heads) + b"\n",
        *(memoryview(a.reshape(-1).view(np.uint8).data) for a in arrays.values()),
    ]


def _stacked(rows: ChunkRows, name: str, values: Mapping[int, Any]) -> npt.NDArray[Any]:
    good = [at for at in range(rows.count) if at not in rows.errors]
    try:
        some = np.stack([np.asarray(values[at]) for at in good])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"--post: {name!r} is not an array of one shape in every row; write JSON lines") from error
    if some.dtype.kind not in "biufc":
        raise ConfigError(f"--post: {name!r} holds no numbers, which .npy needs; write JSON lines or Parquet")
    full = np.zeros((rows.count, *some.shape[1:]), some.dtype)
    full[good] = some
    return full
