"""What a model's tensors look like: names, dtypes, item shapes, sizes.

A `TensorSpec` describes one *item*, without the batch axis: an image model with
input ``(N, 3, 224, 224)`` has the item shape ``(3, 224, 224)``.  Specs are made by an
engine (`trtpool.workers`), travel as JSON, and are checked when they arrive.

Items may differ in shape, between `TensorSpec.least` and `TensorSpec.shape`, which sizes the rows.  A *shared* tensor
has no batch axis: it has one value for a whole batch, and so for each slot.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from .errors import InvalidInput, MissingExtra, ModelError

DTYPES: Final[dict[str, np.dtype[np.generic]]] = {
    name: np.dtype(name)
    for name in (
        "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
        "float16", "float32", "float64",
    )
}  # fmt: skip
"""The dtypes a plane can have: those that NumPy has without help."""

ML_DTYPES: Final[dict[str, int]] = {
    "bfloat16": 2, "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip
"""Those that NumPy has with the help of ml_dtypes, and their bytes: a broker need not import it."""

MAX_VARYING_AXES: Final = 256
"""Axes that the tensors whose shape varies may have together: a message names them all."""

Dimension = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Sizes = Annotated[tuple[Size, ...], msgspec.Meta(max_length=16)]


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shapes of an item from `least` to `most`, in each axis."""

    least: _Sizes
    most: _Sizes

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a shape is one of them."""
        return _within(shape, self.least, self.most)

    def __str__(self) -> str:
        sizes = zip(self.least, self.most, strict=True)
        return f"({', '.join(str(high) if low == high else f'{low} to {high}' for low, high in sizes)})"


def _within(shape: tuple[int, ...], least: tuple[int, ...], most: tuple[int, ...]) -> bool:
    return len(shape) == len(least) == len(most) and all(
        low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
    )


def _extension(name: str) -> np.dtype[np.generic]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingExtra(
            f"arrays of {name} need ml_dtypes, which is not installed: pip install 'trtpool[dtypes]'"
        ) from error
    dtype: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, name))
    return dtype


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output tensor of a model, for one item.

    Attributes:
        name: the tensor's name in the model.
        dtype: a key of `DTYPES` or of `ML_DTYPES`.
        shape: the item's shape, without the batch axis; ``()`` is a scalar per item.  Where items differ, the largest.
        least: the smallest shape of an item; None: all have `shape`.
        shared: there is no batch axis, and `shape` is that of the whole tensor, one for each slot.
        format: how the numbers lie in memory, such as "chw16", which `shape` is the shape in; "": plainly, as the model
            declares them.
    """

    name: Name
    dtype: str
    shape: Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=16)]
    least: Annotated[tuple[Size, ...], msgspec.Meta(max_length=16)] | None = None
    shared: bool = False
    format: Annotated[str, msgspec.Meta(max_length=16)] = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES and self.dtype not in ML_DTYPES:
            raise ModelError(
                f"tensor {self.name!r} has dtype {self.dtype}, which planes cannot hold; "
                f"convert the model so that it uses one of {', '.join((*DTYPES, *ML_DTYPES))}"
            )
        if self.least is not None and not _within(self.least, (0,) * len(self.shape), self.shape):
            raise ModelError(f"tensor {self.name!r} has items from {self.least} to {self.shape}, which is no range")

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The dtype of its arrays.

        Raises:
            MissingExtra: ml_dtypes has it, and is not installed.
        """
        return DTYPES.get(self.dtype) or _extension(self.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return ML_DTYPES.get(self.dtype) or DTYPES[self.dtype].itemsize

    @property
    def item_bytes(self) -> int:
        """Bytes of one item of this tensor; of the largest one."""
        return math.prod(self.shape) * self.itemsize

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether an item may have this shape."""
        return shape == self.shape or (self.least is not None and _within(shape, self.least, self.shape))

    def describe_shape(self) -> str:
        """The shape of an item, or their range: ``(3, 32 to 64)``."""
        return str(Span(self.least or self.shape, self.shape))

    def __str__(self) -> str:
        shape = self.describe_shape()[1:-1]
        dtype = f"{self.dtype}:{self.format}" if self.format else self.dtype
        return f"{self.name} {dtype} ({shape if self.shared else f'N, {shape}' if shape else 'N'})"


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model as the pool serves it.

    Attributes:
        name: what clients call it; unique in a pool.
        path: the file it is loaded from, absolute.
        inputs, outputs: its tensors, in the model's order.
        batch_limit: the largest batch (items) that the engine takes, 0 when it has no limit.
        batch_least: the smallest that it runs; one of fewer items is filled up, so it costs as much.
        batched: its tensors have a batch axis, but for shared ones.  False: an item is all that one call takes, shapes
            are those of whole tensors, and `batch_limit` is 1.
        whole_slots: every slot must be submitted full, since it is a batch of the only size that the model takes.
        profiles: where the model takes several ranges of shapes, and not all between the smallest and the largest:
            each of them, with the range of every input that varies, in the order of `varying`; empty: it takes all.
    """

    name: Name
    path: str
    inputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=64)]
    outputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1, max_length=64)]
    batch_limit: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    batch_least: Annotated[int, msgspec.Meta(ge=1, le=2**31)] = 1
    batched: bool = True
    whole_slots: bool = False
    profiles: Annotated[tuple[tuple[Span, ...], ...], msgspec.Meta(max_length=256)] = ()

    def __post_init__(self) -> None:
        if sum(len(spec.shape) for spec in self.inputs + self.outputs if spec.least is not None) > MAX_VARYING_AXES:
            raise ModelError(
                f"the tensors of model {self.name!r} whose shape varies have more than {MAX_VARYING_AXES} axes; "
                "fix some with --shape"
            )
        for role, specs in (("input", self.inputs), ("output", self.outputs)):
            names = [spec.name for spec in specs]
            if len(set(names)) != len(names):
                raise ModelError(f"model {self.name!r} has two {role}s of one name: {names}")

    @property
    def item_bytes(self) -> int:
        """Bytes of one item, inputs and outputs together."""
        return sum(spec.item_bytes for spec in self.inputs + self.outputs)

    @property
    def varying(self) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Inputs and outputs whose items differ in shape; messages name their shapes in this order."""
        inputs, outputs = (tuple(t for t in tensors if t.least is not None) for tensors in (self.inputs, self.outputs))
        return inputs, outputs

    def covers(self, shapes: tuple[tuple[int, ...], ...]) -> bool:
        """Whether one of the `profiles` takes these shapes, of an item of each input that varies."""
        return not self.profiles or any(
            all(span.takes(shape) for span, shape in zip(profile, shapes, strict=True)) for profile in self.profiles
        )

    def describe_profiles(self) -> str:
        """The `profiles`, such as ``x (3, 32 to 64) or x (3, 128)``."""
        inputs, _ = self.varying
        return " or ".join(
            " with ".join(f"{tensor.name} {span}" for tensor, span in zip(inputs, profile, strict=True))
            for profile in self.profiles
        )

    @property
    def largest(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the largest item that the model takes, of each input that varies."""
        inputs, _ = self.varying
        if not self.profiles:
            return tuple(tensor.shape for tensor in inputs)
        return max(
            (tuple(span.most for span in profile) for profile in self.profiles),
            key=lambda shapes: sum(
                math.prod(shape) * tensor.itemsize for tensor, shape in zip(inputs, shapes, strict=True)
            ),
        )

    @property
    def is_uniform(self) -> bool:
        """Whether any items of it may share a batch, and all results have one shape."""
        return not any(spec.least is not None or spec.shared for spec in self.inputs + self.outputs)


def check_array(spec: TensorSpec, array: npt.ArrayLike, leading: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return `array` as an array that fits rows of `spec`, else say how it does not.

    Args:
        spec: the input to fill.
        array: what the caller gave; shape ``(*leading, *spec.shape)`` is wanted, dtype as in `spec`.
        leading: the axes before the item's own, such as ``(items,)``.  Where items differ in shape, theirs may be any
            within the range.

    Raises:
        InvalidInput: shape or dtype differ; nothing is converted silently.
    """
    try:
        given = np.asarray(array)
    except (TypeError, ValueError) as error:  # rows of different lengths
        raise InvalidInput(f"input {spec.name!r} cannot be made an array: {error}") from error
    wanted = (*leading, *spec.shape)
    if given.shape != wanted and not (
        given.shape[: len(leading)] == leading and spec.takes(given.shape[len(leading) :])
    ):
        shown = wanted if spec.least is None else f"{leading} and then {spec.describe_shape()}"
        raise InvalidInput(f"input {spec.name!r} must have shape {shown}, got {given.shape}")
    if given.dtype != spec.numpy_dtype:
        raise InvalidInput(
            f"input {spec.name!r} must be {spec.dtype}, got {given.dtype}; "
            f"convert it with .astype({spec.dtype!r}) where it is made"
        )
    return given
