"""Columns of tables: which one feeds which input of the model, and what a value of one is."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from trtpool.ipc.errors import ConfigError, InvalidInput, MissingExtra


def pyarrow_module(name: str, why: str) -> Any:
    """`pyarrow`, of which a module is imported.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(f"{why} with pyarrow; install it with: pip install 'trtpool[etl]'") from error
    return importlib.import_module("pyarrow")


def pyarrow_parquet(why: str) -> Any:
    """`pyarrow.parquet`; raises as `pyarrow_module`."""
    return pyarrow_module("pyarrow.parquet", why).parquet


def column_value(scalar: Any) -> Any:
    """A value of a column: lists and tensors as arrays, binary values as buffers, without copies.

    Args:
        scalar: a `pyarrow.Scalar`; a struct with the field ``bytes`` (as Hugging Face stores images) counts as that.

    Raises:
        InvalidInput: it is null.
    """
    import pyarrow as pa

    if not scalar.is_valid:
        raise InvalidInput("the value is null")
    kind = scalar.type
    if isinstance(kind, pa.BaseExtensionType):
        return column_value(scalar.value)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return column_value(scalar["bytes"])
    if isinstance(scalar, pa.BinaryScalar) and not isinstance(scalar, pa.StringScalar):
        return scalar.as_buffer()
    if isinstance(scalar, pa.ListScalar):
        return _list_value(scalar.values)
    value = scalar.as_py()
    return np.asarray(value) if isinstance(value, (bool, int, float)) else value


def _list_value(values: Any) -> Any:
    import pyarrow as pa

    shape = [len(values)]
    while isinstance(values, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        values = values.flatten()
        shape.append(len(values) // math.prod(shape) if all(shape) else 0)
    if values.null_count:
        raise InvalidInput("the list has nulls")
    if math.prod(shape) != len(values):
        raise InvalidInput("the list holds lists of different lengths")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def columns_by_input(wanted: Iterable[tuple[str, str]], names: Sequence[str], *, any_type: bool) -> dict[str, str]:
    """What ``--column`` means: a column for each input of the model.

    Args:
        wanted: from ``--column``: input and column; an empty input is the model's only one.
        names: the model's inputs.
        any_type: a function of the user's decodes, and may want columns that are for no input.

    Raises:
        ConfigError: they are not for these inputs.
    """
    given = list(wanted)
    if any(not name for name, _ in given) and len(given) > 1 and not any_type:
        raise ConfigError("--column: with several, say which input each is for, such as --column x=pixels")
    columns = {name or (names[0] if len(given) == 1 else column): column for name, column in given}
    if columns and not any_type and set(columns) != set(names):
        raise ConfigError(f"the model's inputs are {', '.join(names)}, but --column names {', '.join(columns)}")
    return columns


def choose_columns(
    path: str, schema: Any, wanted: Iterable[tuple[str, str]], names: Sequence[str], *, any_type: bool
) -> dict[str, str]:
    """Which column of a table feeds which model input.

    Args:
        path, schema: the table's, and what it has.
        wanted, names, any_type: see `columns_by_input`; with `any_type` a column of any type will do.

    Raises:
        ConfigError: an input has none, or a column is not there.
    """
    columns = columns_by_input(wanted, names, any_type=any_type)
    if not columns:
        columns = {name: name for name in names if name in schema.names}
    if not columns:
        usable = [field.name for field in schema if any_type or _feeds(field.type)]
        if len(usable) != 1 or len(names) != 1:
            raise ConfigError(
                f"{path} has the columns {', '.join(schema.names)}; say with --column which one is "
                f"for each input: {', '.join(f'--column {name}=COLUMN' for name in names)}"
            )
        columns[names[0]] = usable[0]
    if absent := [column for column in columns.values() if column not in schema.names]:
        raise ConfigError(f"--column {absent[0]}: {path} has only {', '.join(schema.names)}")
    if not any_type and (without := [name for name in names if name not in columns]):
        raise ConfigError(f"{path} has no column {without[0]}; say with --column {without[0]}=COLUMN which one it is")
    return columns


def _feeds(kind: Any) -> bool:
    """Whether values of a column's type can be a model's input or an encoded image."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return struct or any(test(kind) for test in (*lists, *binary))
