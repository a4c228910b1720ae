"""Arrow columns as arrays of items, and back, without a loop over rows.

==================================================  ===========================================================
column                                              read as
==================================================  ===========================================================
numbers                                             their buffer; for items of one number
booleans                                            a copy: Arrow has 8 in a byte, NumPy one
fixed-size lists, also nested or of fixed shape     the buffer of the innermost values
lists and large lists, all of one length            the same
fixed-size binary, and binary all of one length     its bytes, as the tensor's dtype
==================================================  ===========================================================

Written are numbers, fixed-size lists for items of one axis, and fixed-shape tensors for more axes.  See "Arrow Columnar
Format", "Fixed-Size List Layout".
"""

from __future__ import annotations

import math
from collections.abc import Collection
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput
from .extras import load_extra
from .tensors import TensorSpec

if TYPE_CHECKING:
    import pyarrow as pa


def pyarrow() -> ModuleType:
    """The package.

    Raises:
        MissingExtra: it is not installed.
    """
    return load_extra("pyarrow", "trtpool.arrow needs pyarrow", "arrow")


def items_of(spec: TensorSpec, column: pa.Array, name: str) -> npt.NDArray[Any]:
    """The rows of a column as items of a tensor, of shape ``(rows, *spec.shape)``; a view unless they are booleans.

    Raises:
        InvalidInput: it has nulls, or another dtype or number of values in a row.
    """
    rows, axes = len(column), []
    values = column
    while True:
        if values.null_count:
            raise InvalidInput(
                f"column {name!r} has {values.null_count} nulls, and a tensor cannot have any; "
                "drop those rows or fill them first"
            )
        if hasattr(values, "storage"):  # an extension type, such as a fixed-shape tensor
            _check_order(values.type, name)
            values = values.storage
        elif hasattr(values.type, "value_type") and hasattr(values, "flatten"):
            axes.append(_length_of_lists(values, name))
            values = values.flatten()
        else:
            break
    flat = _flat(spec, values, name)
    wanted = math.prod(spec.shape)
    if flat.size != rows * wanted or (len(axes) > 1 and tuple(axes) != spec.shape):
        per_row = tuple(axes) if axes else (flat.size // max(1, rows),)
        raise InvalidInput(f"column {name!r} has rows of shape {per_row}, and input {spec.name!r} takes {spec.shape}")
    return flat.reshape(rows, *spec.shape)


def column_of(values: npt.NDArray[Any], failed: Collection[int] = ()) -> pa.Array:
    """Items, of shape ``(rows, *item_shape)``, as a column over the same memory, which it keeps alive.

    Booleans are copied, and numbers of which some are null.

    Args:
        values: the items, dense.
        failed: the rows that are null.
    """
    arrow = pyarrow()
    rows, *shape = values.shape
    mask = None
    if failed:
        mask = np.zeros(rows, bool)
        mask[list(failed)] = True
    if not shape:
        return arrow.array(values, mask=mask)
    flat = arrow.array(values.reshape(-1))
    lists = arrow.FixedSizeListArray.from_arrays(
        flat, math.prod(shape), mask=None if mask is None else arrow.array(mask)
    )
    if len(shape) == 1:
        return lists
    return arrow.ExtensionArray.from_storage(arrow.fixed_shape_tensor(flat.type, shape), lists)


def _check_order(kind: Any, name: str) -> None:
    order = getattr(kind, "permutation", None)
    if order is not None and list(order) != sorted(order):
        raise InvalidInput(f"column {name!r} holds tensors in the order {order}; write them in row-major order")


def _length_of_lists(lists: pa.Array, name: str) -> int:
    size = getattr(lists.type, "list_size", None)
    return _one_length(lists.offsets, name) if size is None else int(size)


def _one_length(offsets: pa.Array, name: str) -> int:
    """The length that all lists have, by their offsets; 0 if there are none."""
    lengths = np.diff(offsets.to_numpy())
    if lengths.size and (lengths != lengths[0]).any():
        row = int(np.argmax(lengths != lengths[0]))
        raise InvalidInput(
            f"column {name!r} has {lengths[0]} values in its first row and {lengths[row]} in row {row}; "
            "a model's items have one shape, so make the rows that"
        )
    return int(lengths[0]) if lengths.size else 0


def _flat(spec: TensorSpec, values: pa.Array, name: str) -> npt.NDArray[Any]:
    arrow = pyarrow()
    kind = values.type
    if arrow.types.is_fixed_size_binary(kind):
        return _of_bytes(
            spec, values.buffers()[1], values.offset * kind.byte_width, len(values) * kind.byte_width, name
        )
    if arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind):
        as_lists = values.cast(arrow.large_binary())
        ends = np.frombuffer(as_lists.buffers()[1], np.int64)[as_lists.offset :][: len(values) + 1]
        if not len(values):
            return np.empty(0, spec.numpy_dtype)
        _one_length(arrow.array(ends), name)
        return _of_bytes(spec, as_lists.buffers()[2], int(ends[0]), int(ends[-1] - ends[0]), name)
    try:
        flat: npt.NDArray[Any] = values.to_numpy(zero_copy_only=not arrow.types.is_boolean(kind))
    except arrow.ArrowInvalid as error:
        raise InvalidInput(f"column {name!r} of type {kind} is no tensor: {error}") from error
    if flat.dtype != spec.numpy_dtype:
        raise InvalidInput(
            f"column {name!r} holds {kind}, and input {spec.name!r} takes {spec.dtype}; "
            "convert it with pyarrow.compute.cast() where it is read"
        )
    return flat


def _of_bytes(spec: TensorSpec, buffer: pa.Buffer, start: int, size: int, name: str) -> npt.NDArray[Any]:
    if size % spec.item_bytes:
        raise InvalidInput(f"column {name!r} has rows of bytes, and an item of {spec.name!r} takes {spec.item_bytes}")
    if not size:
        return np.empty(0, spec.numpy_dtype)
    return np.frombuffer(buffer, np.uint8)[start : start + size].view(spec.numpy_dtype)
