"""What an ONNX model's tensors look like for one item: asked before a pool starts.

A pool needs to know the largest shape of an item of every tensor, and where the batch is.  Inputs say so, or the user
does (``--shape x=3x640x640``, or a range, ``--shape x=3x32..640x32..640``)::

    first axes of the inputs                     then
    open in at least one                         that is the batch; an input with a fixed first axis, or with none, is
                                                 shared: it has one value for a whole batch
    the same number in all that have any         the model takes batches of this size only; those with none are shared
    anything else                                nobody can tell; `--no-batch` serves the model call by call

Outputs say so when they share the name of the inputs' first axis and leave nothing open; others are learnt from a run
on zeros of the largest shapes.  One whose size depends on more than that has no bound but what the user gives.

What cannot be served is refused here with a text that says what to change.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from trtpool.ipc.errors import ModelError
from trtpool.ipc.settings import EngineSettings, ShapeRange
from trtpool.ipc.tensors import DTYPES, ML_DTYPES, ModelSpec, TensorSpec

from .onnx_model import one_line
from .ranges import ends, show_range

Dims = tuple["int | str | None", ...]
"""Axes as a model declares them: a size, a name for one that is open, or None for one that has no name."""

ELEMENT_TYPES: Final = {
    "bfloat16": 16, "float8_e4m3fn": 17, "float8_e4m3fnuz": 18, "float8_e5m2": 19, "float8_e5m2fnuz": 20,
}  # fmt: skip
"""ONNX's numbers of the dtypes of ml_dtypes, which onnxruntime does not take by their NumPy dtype."""

_KINDS: Final = {
    "float": "float32",
    "double": "float64",
    **{dtype.replace("_", ""): dtype for dtype in ML_DTYPES},
}


def element_type(tensor: TensorSpec) -> Any:
    """The dtype of a tensor, as `bind_input` and `bind_output` take it."""
    return ELEMENT_TYPES.get(tensor.dtype) or tensor.numpy_dtype


def call_shape(spec: ModelSpec, tensor: TensorSpec, items: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a whole tensor in a call with `items` items of `shape`."""
    return shape if tensor.shared or not spec.batched else (items, *shape)


def describe(session: Any, path: Path, name: str, settings: EngineSettings) -> ModelSpec:
    """The model in `session` as it can be served under `name`.

    Args:
        session: an `onnxruntime.InferenceSession`.
        path: the file it was loaded from, absolute.
        name: what clients call the model.
        settings: `shapes`, `no_batch` and `partial` count.

    Raises:
        ModelError: a tensor cannot be served, or `settings` do not fit the model.
        MissingExtra: a dtype of it needs ml_dtypes.
    """
    return _Describer(session, path, name, settings).describe()


class _Describer:
    """Finds out what a loaded model's tensors look like; `describe` has the result."""

    def __init__(self, session: Any, path: Path, name: str, settings: EngineSettings) -> None:
        self._session = session
        self._path = path
        self._file = path.name
        self._name = name
        self._shapes: Mapping[str, ShapeRange] = settings.shapes
        self._batched = name not in settings.no_batch
        self._whole = settings.partial == "refuse"
        self._arguments = session.get_inputs()
        firsts = [argument.shape[0] for argument in self._arguments if argument.shape]
        self._batch_names = {first for first in firsts if isinstance(first, str)}
        self._is_open = any(not isinstance(first, int) for first in firsts)
        self._size = 0  # of every batch, if that is fixed
        if self._batched and not self._is_open:
            self._size = self._fixed_size(firsts)

    def describe(self) -> ModelSpec:
        outputs = self._session.get_outputs()
        known = [argument.name for argument in (*self._arguments, *outputs)]
        if unknown := self._shapes.keys() - set(known):
            raise ModelError(
                f"--shape names {', '.join(sorted(unknown))}, but the inputs of {self._file} are: "
                f"{', '.join(argument.name for argument in self._arguments)}"
            )
        inputs = tuple(self._input(argument) for argument in self._arguments)
        size = self._size or 1
        spec = ModelSpec(
            *(self._name, os.fspath(self._path), inputs, self._outputs(inputs, outputs)),
            batch_limit=self._size if self._batched else 1,
            batch_least=size,
            batched=self._batched,
            whole_slots=self._whole and size > 1,
        )
        try:  # bounds are checked when a spec is decoded, elsewhere; here the file can be named
            return msgspec.convert(msgspec.to_builtins(spec), ModelSpec)
        except msgspec.ValidationError as error:
            raise ModelError(f"{self._file} is beyond what a pool can describe: {error}") from error

    def _fixed_size(self, firsts: list[Any]) -> int:
        if len(set(firsts)) == 1:
            return int(firsts[0])
        shown = ", ".join(f"{argument.name} {_show(tuple(argument.shape))}" for argument in self._arguments)
        what = (
            "need a first axis for the batch" if not firsts else "have different first axes, so none can be the batch"
        )
        raise ModelError(
            f"the inputs of {self._file} ({shown}) {what}: export the model with one, or run each item as a call of "
            f"its own with --no-batch {self._name}"
        )

    # ------------------------------------------------------------------ inputs

    def _input(self, argument: Any) -> TensorSpec:
        dtype, dims = self._dtype("input", argument), tuple(argument.shape)
        shown = f"input {argument.name!r} of {self._file} has shape {_show(dims)}"
        shared = self._batched and (not dims or (self._is_open and isinstance(dims[0], int)))
        if shared and self._batch_names.intersection(dims):
            raise ModelError(
                f"{shown}, whose first axis is not the batch: export the model with the batch in front, or run each "
                f"item as a call of its own with --no-batch {self._name}"
            )
        item = dims[1:] if self._batched and not shared else dims
        given = self._shapes.get(argument.name)
        if given is None and any(not isinstance(dim, int) for dim in item):
            example = "x".join(str(dim if isinstance(dim, int) else 640 if len(item) > 2 else 128) for dim in item)
            raise ModelError(
                f"{shown}: give its item shape, for example --shape {argument.name}={example}, or with a range, "
                "such as 32..640, for each axis in which items differ"
            )
        shape, least = ends(item if given is None else given)
        if not (_fits(shape, item) and _fits(least, item)):
            raise ModelError(f"{shown}: --shape {argument.name}={show_range(given or ())} does not fit it")
        return self._tensor(argument.name, dtype, shape, least, shown, shared=shared)

    # ------------------------------------------------------------------ outputs

    def _outputs(self, inputs: tuple[TensorSpec, ...], arguments: Sequence[Any]) -> tuple[TensorSpec, ...]:
        dtypes = [self._dtype("output", argument) for argument in arguments]
        passed = {argument.name for argument in arguments} & {tensor.name for tensor in inputs}
        if passed:
            raise ModelError(
                f"{self._file} has inputs that are outputs too ({', '.join(passed)}); remove those outputs"
            )
        declared = [tuple(argument.shape) for argument in arguments]
        items: list[tuple[Any, ...]] = [dims[1:] if self._batched else dims for dims in declared]
        bounds = [self._bound(argument, item) for argument, item in zip(arguments, items, strict=True)]
        known = [bound is not None or self._is_certain(dims) for bound, dims in zip(bounds, declared, strict=True)]
        shapes = items
        if not all(known):
            seen = self._probe(inputs, known, self._size or 1)
            # A second size shows axes that are as long as the batch by chance, and those that grow with it.
            if self._batched and not self._size and seen != self._probe(inputs, known, 2):
                raise ModelError(f"item shapes of the outputs of {self._file} change with the batch; make them fixed")
            shapes = [item if shape is None else shape for item, shape in zip(items, seen, strict=True)]
        varies = any(tensor.least is not None for tensor in inputs)
        tensors = []
        for argument, dtype, item, shape, bound in zip(arguments, dtypes, items, shapes, bounds, strict=True):
            most = bound if bound is not None else shape
            least = tuple(
                (size if isinstance(dim, int) else 0)
                for size, dim in zip(most, item or (None,) * len(most), strict=True)
            )  # an unknown rank is told by no axes
            shown = f"output {argument.name!r} of {self._file} has shape ({'N, ' if self._batched else ''}*{most})"
            least = least if varies or bound is not None else most
            tensors.append(self._tensor(argument.name, dtype, most, least, shown))
        return tuple(tensors)

    def _bound(self, argument: Any, item: Dims) -> tuple[int, ...] | None:
        """The largest item of an output, if the user gives that."""
        given = self._shapes.get(argument.name)
        if given is None:
            return None
        bound, _ = ends(given)
        if tuple(argument.shape) and not _fits(bound, item):
            raise ModelError(
                f"output {argument.name!r} of {self._file} has shape {_show(tuple(argument.shape))}: "
                f"--shape {argument.name}={show_range(given)} does not fit it"
            )
        return bound

    def _is_certain(self, dims: Dims) -> bool:
        """Whether `dims` of an output tell its item shape, and that its first axis is the batch."""
        if not self._batched:
            return bool(dims) and all(isinstance(dim, int) for dim in dims)
        if not dims or not all(isinstance(dim, int) for dim in dims[1:]):
            return False
        return dims[0] == self._size if self._size else dims[0] in self._batch_names

    def _probe(self, inputs: tuple[TensorSpec, ...], known: list[bool], items: int) -> list[tuple[int, ...] | None]:
        """Item shapes of the outputs that are not known, from a run on `items` items of zeros of the largest shapes."""
        zeros = [np.zeros((items, tensor.item_bytes), np.uint8) for tensor in inputs]
        try:
            binding = self._session.io_binding()
            for tensor, array in zip(inputs, zeros, strict=True):
                shape = tensor.shape if tensor.shared or not self._batched else (items, *tensor.shape)
                binding.bind_input(tensor.name, "cpu", 0, element_type(tensor), shape, array.ctypes.data)
            for argument in self._session.get_outputs():
                binding.bind_output(argument.name, "cpu")
            self._session.run_with_iobinding(binding)
        except Exception as error:
            unknown = [one.name for one, sure in zip(self._session.get_outputs(), known, strict=True) if not sure]
            raise ModelError(
                f"{self._file} does not tell its output shapes and fails on zeros{self._in_batch(items)}, so they stay "
                f"unknown: {one_line(error)}; {'export it with a dynamic batch axis, or ' if self._batched else ''}"
                f"give the largest item of each: {' '.join(f'--shape {name}=...' for name in unknown)}"
            ) from error
        shapes: list[tuple[int, ...] | None] = []
        arguments = self._session.get_outputs()
        for argument, value, is_known in zip(arguments, binding.get_outputs(), known, strict=True):
            if is_known:
                shapes.append(None)
                continue
            dims, shape = tuple(argument.shape), tuple(value.shape())
            shown = (
                f"output {argument.name!r} of {self._file} is declared {_show(dims)} and had shape "
                f"{shape}{self._in_batch(items)}"
            )
            if self._batched and shape[:1] != (items,):
                raise ModelError(
                    f"{shown}: its first axis must be the batch; change the model, remove this output, or run each "
                    f"item as a call of its own with --no-batch {self._name}"
                )
            # onnxruntime shows the same, no axes, for a scalar and for an unknown rank.
            if dims and not _fits(shape, dims):
                raise ModelError(f"{shown}: correct the declaration, which onnxruntime would hold it to")
            shapes.append(shape[1:] if self._batched else shape)
        return shapes

    def _in_batch(self, items: int) -> str:
        return f" in a batch of {items}" if self._batched else ""

    # ------------------------------------------------------------------ both

    def _dtype(self, role: str, argument: Any) -> str:
        kind = argument.type.removeprefix("tensor(").removesuffix(")")
        dtype: str = _KINDS.get(kind, kind)
        if dtype not in DTYPES and dtype not in ML_DTYPES:
            raise ModelError(
                f"{role} {argument.name!r} of {self._file} is a {argument.type}, which shared memory cannot "
                f"hold; change the model so that it is a tensor of {', '.join((*DTYPES, *ML_DTYPES))}"
            )
        return dtype

    def _tensor(
        self, name: str, dtype: str, shape: tuple[int, ...], least: tuple[int, ...], shown: str, *, shared: bool = False
    ) -> TensorSpec:
        if 0 in shape:
            raise ModelError(
                f"{shown}: an item of it is empty or has no fixed size; remove it, make its size fixed, or give the "
                f"largest with --shape {name}=..."
            )
        tensor = TensorSpec(name, dtype, shape, None if least == shape else least, shared)
        _ = tensor.numpy_dtype  # now, and not when a client asks for an array
        return tensor


def _fits(shape: tuple[int, ...], dims: Dims) -> bool:
    """Whether `shape` has the rank of `dims` and agrees where `dims` are fixed."""
    return len(shape) == len(dims) and all(
        not isinstance(dim, int) or dim == size for size, dim in zip(shape, dims, strict=True)
    )


def _show(dims: Dims) -> str:
    """`dims` as text, such as ``(N, 3, ?, ?)``."""
    return f"({', '.join('?' if dim is None else str(dim) for dim in dims)})"
