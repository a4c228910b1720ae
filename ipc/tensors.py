"""What a model's tensors look like: names, dtypes, item shapes, sizes.

A `TensorSpec` describes one *item*, without the batch axis: an image model with
input ``(N, 3, 224, 224)`` has the item shape ``(3, 224, 224)``.  Specs are made by an
engine (`trtpool.workers`), travel as JSON, and are checked when they arrive.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from .errors import InvalidInput, ModelError

DTYPES: Final[dict[str, np.dtype[np.generic]]] = {
    name: np.dtype(name)
    for name in (
        "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
        "float16", "float32", "float64",
    )
}  # fmt: skip
"""The dtypes a plane can have: those that NumPy has without help."""

Dimension = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output tensor of a model, for one item.

    Attributes:
        name: the tensor's name in the model.
        dtype: a key of `DTYPES`.
        shape: the item's shape, without the batch axis; ``()`` is a scalar per item.
    """

    name: Name
    dtype: str
    shape: Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=16)]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ModelError(
                f"tensor {self.name!r} has dtype {self.dtype}, which planes cannot hold; "
                f"convert the model so that it uses one of {', '.join(DTYPES)}"
            )

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        return DTYPES[self.dtype]

    @property
    def item_bytes(self) -> int:
        """Bytes of one item of this tensor."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(map(str, ('N', *self.shape)))})"


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model as the pool serves it.

    Attributes:
        name: what clients call it; unique in a pool.
        path: the file it is loaded from, absolute.
        inputs, outputs: its tensors, in the model's order.
        batch_limit: the largest batch (items) that the engine takes, 0 when it has no limit.
    """

    name: Name
    path: str
    inputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=64)]
    outputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=64)]
    batch_limit: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0

    def __post_init__(self) -> None:
        for role, specs in (("input", self.inputs), ("output", self.outputs)):
            names = [spec.name for spec in specs]
            if len(set(names)) != len(names):
                raise ModelError(f"model {self.name!r} has two {role}s of one name: {names}")

    @property
    def item_bytes(self) -> int:
        """Bytes of one item, inputs and outputs together."""
        return sum(spec.item_bytes for spec in self.inputs + self.outputs)


def check_array(spec: TensorSpec, array: npt.ArrayLike, leading: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return `array` as an array that fits rows of `spec`, else say how it does not.

    Args:
        spec: the input to fill.
        array: what the caller gave; shape ``(*leading, *spec.shape)`` is wanted, dtype as in `spec`.
        leading: the axes before the item's own, such as ``(items,)``.

    Raises:
        InvalidInput: shape or dtype differ; nothing is converted silently.
    """
    try:
        given = np.asarray(array)
    except (TypeError, ValueError) as error:  # rows of different lengths
        raise InvalidInput(f"input {spec.name!r} cannot be made an array: {error}") from error
    wanted = (*leading, *spec.shape)
    if given.shape != wanted:
        raise InvalidInput(f"input {spec.name!r} must have shape {wanted}, got {given.shape}")
    if given.dtype != spec.numpy_dtype:
        raise InvalidInput(
            f"input {spec.name!r} must be {spec.dtype}, got {given.dtype}; "
            f"convert it with .astype({spec.dtype!r}) where it is made"
        )
    return given
