"""ONNX files: loading one, and finding out what its tensors look like for one item.

A pool needs to know every tensor's item shape before it starts, and that the first axis of each is the
batch.  Inputs say so, or the user does (``--shape x=3x640x640``).  Outputs say so when they share the name
of the inputs' first axis; others are learnt from a run on zeros.  What cannot be served is refused here,
when the pool starts, with a text that says what to change.
"""

from __future__ import annotations

import importlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from trtpool.ipc.errors import MissingExtra, ModelError
from trtpool.ipc.tensors import DTYPES, ModelSpec, TensorSpec

from .trust import check_file

ERROR_CHARACTERS: Final = 400
"""onnxruntime's texts are cut to this length: they can hold whole graphs."""

Dims = tuple["int | str | None", ...]
"""Axes as a model declares them: a size, a name for one that is open, or None for one that has no name."""


def load(path: Path, threads: int) -> Any:
    """An `onnxruntime.InferenceSession` for `path`, whose calls run on `threads` threads.

    Raises:
        ModelError: the file cannot be read, or onnxruntime does not take it.
        MissingExtra: onnxruntime is not installed.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path} is not a file; name the .onnx file itself")
        with path.open("rb") as file:
            if not file.read(1):
                raise ModelError(f"{path} is empty; export or copy the model again")
            check_file(path, os.fstat(file.fileno()))
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}; check path and permissions") from error
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingExtra(
            f"the CPU engine needs onnxruntime, which cannot be imported ({one_line(error)}); "
            "install it with: pip install 'trtpool[cpu]'"
        ) from error
    ort.set_default_logger_severity(3)  # errors
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Workers share the CPUs: one that spins while it has no work takes them from one that has.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        text = one_line(error)
        raise ModelError(f"onnxruntime {ort.__version__} cannot load {path}: {text}; {_load_remedy(text)}") from error


def _load_remedy(text: str) -> str:
    """What to do when onnxruntime does not load a model and says `text`."""
    if "Protobuf parsing failed" in text:
        return "the file is damaged or no ONNX model: copy it again, or export the model to ONNX"
    if "External data" in text or "No such file" in text:  # the second is onnxruntime 1.20
        return "put the files that hold the model's weights beside it"
    return "export it with an older opset and without custom operators, or upgrade onnxruntime"


def describe(session: Any, path: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """The model in `session` as it can be served under `name`.

    Args:
        session: an `onnxruntime.InferenceSession`.
        path: the file it was loaded from, absolute.
        name: what clients call the model.
        shapes: item shapes by input name, for inputs that leave theirs open.

    Raises:
        ModelError: a tensor cannot be served, or `shapes` do not fit the model.
    """
    return _Describer(session, path, shapes).describe(name)


class _Describer:
    """Finds out what a loaded model's tensors look like; `describe` has the result.

    Attributes:
        limit: 1 if an input's first axis is fixed to 1, else 0.
    """

    def __init__(self, session: Any, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._session = session
        self._path = path
        self._file = path.name
        self._shapes = shapes
        self.limit = 0
        self._batch_names: set[str] = set()

    def describe(self, name: str) -> ModelSpec:
        arguments = self._session.get_inputs()
        if unknown := set(self._shapes) - {argument.name for argument in arguments}:
            names = ", ".join(argument.name for argument in arguments)
            raise ModelError(f"--shape names {', '.join(sorted(unknown))}, but the inputs of {self._file} are: {names}")
        inputs = tuple(self._input(argument) for argument in arguments)
        spec = ModelSpec(name, os.fspath(self._path), inputs, self._outputs(inputs), self.limit)
        try:  # bounds are checked when a spec is decoded, elsewhere; here the file can be named
            return msgspec.convert(msgspec.to_builtins(spec), ModelSpec)
        except msgspec.ValidationError as error:
            raise ModelError(f"{self._file} is beyond what a pool can describe: {error}") from error

    def _input(self, argument: Any) -> TensorSpec:
        dtype, dims = self._dtype("input", argument), tuple(argument.shape)
        shown = f"input {argument.name!r} of {self._file} has shape {_show(dims)}"
        if not dims:
            raise ModelError(f"{shown}: it needs a first axis for the batch; export the model with one")
        if isinstance(dims[0], str):
            self._batch_names.add(dims[0])
        elif dims[0] is not None:
            if dims[0] != 1:
                raise ModelError(f"{shown}: export the model with a dynamic first axis, for batches of any size")
            self.limit = 1
        given = self._shapes.get(argument.name)
        if given is None and any(not isinstance(dim, int) for dim in dims[1:]):
            example = "x".join(str(dim if isinstance(dim, int) else 640 if len(dims) > 3 else 128) for dim in dims[1:])
            raise ModelError(f"{shown}: give its item shape, for example --shape {argument.name}={example}")
        shape = dims[1:] if given is None else given
        if not _fits(shape, dims[1:]):
            raise ModelError(f"{shown}: --shape {argument.name}={'x'.join(map(str, shape))} does not fit it")
        return self._tensor(argument.name, dtype, shape, shown)

    def _outputs(self, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        arguments = self._session.get_outputs()
        dtypes = [self._dtype("output", argument) for argument in arguments]
        passed = {argument.name for argument in arguments} & {tensor.name for tensor in inputs}
        if passed:
            raise ModelError(
                f"{self._file} has inputs that are outputs too ({', '.join(passed)}); remove those outputs"
            )
        declared = [tuple(argument.shape) for argument in arguments]
        shapes: list[tuple[Any, ...]] = [dims[1:] for dims in declared]
        if not all(map(self._is_certain, declared)):
            shapes = self._probe(inputs, declared, 1)
            # A second size shows axes that are as long as the batch by chance, and those that grow with it.
            if not self.limit and shapes != self._probe(inputs, declared, 2):
                raise ModelError(f"item shapes of the outputs of {self._file} change with the batch; make them fixed")
        return tuple(
            self._tensor(
                argument.name,
                dtype,
                shape,
                f"output {argument.name!r} of {self._file} has shape (N, *{shape})",
            )
            for argument, dtype, shape in zip(arguments, dtypes, shapes, strict=True)
        )

    def _is_certain(self, dims: Dims) -> bool:
        """Whether `dims` of an output tell its item shape, and that its first axis is the batch."""
        if not dims or not all(isinstance(dim, int) for dim in dims[1:]):
            return False
        return dims[0] == 1 if self.limit else dims[0] in self._batch_names

    def _probe(self, inputs: tuple[TensorSpec, ...], declared: list[Dims], items: int) -> list[tuple[Any, ...]]:
        """Item shapes of the outputs, from a run on `items` items of zeros."""
        zeros = {tensor.name: np.zeros((items, *tensor.shape), tensor.numpy_dtype) for tensor in inputs}
        try:
            values = self._session.run(None, zeros)
        except Exception as error:
            raise ModelError(
                f"{self._file} does not tell its output shapes and fails on zeros in a batch of {items}, "
                f"so they stay unknown: {one_line(error)}; export it with a dynamic batch axis"
            ) from error
        shapes = []
        for argument, dims, value in zip(self._session.get_outputs(), declared, values, strict=True):
            shown = (
                f"output {argument.name!r} of {self._file} is declared {_show(dims)} and had shape "
                f"{value.shape} in a batch of {items}"
            )
            if value.shape[:1] != (items,):
                raise ModelError(f"{shown}: its first axis must be the batch; change the model, or remove this output")
            # onnxruntime shows the same, no axes, for a scalar and for an unknown rank.
            if dims and not _fits(value.shape, dims):
                raise ModelError(f"{shown}: correct the declaration, which onnxruntime would hold it to")
            shapes.append(value.shape[1:])
        return shapes

    def _dtype(self, role: str, argument: Any) -> str:
        kind = argument.type.removeprefix("tensor(").removesuffix(")")
        dtype: str = {"float": "float32", "double": "float64"}.get(kind, kind)
        if dtype not in DTYPES:
            raise ModelError(
                f"{role} {argument.name!r} of {self._file} is a {argument.type}, which shared memory cannot "
                f"hold; change the model so that it is a tensor of {', '.join(DTYPES)}"
            )
        return dtype

    def _tensor(self, name: str, dtype: str, shape: tuple[int, ...], shown: str) -> TensorSpec:
        if 0 in shape:
            raise ModelError(f"{shown}: an item of it is empty or has no fixed size; remove it, or make its size fixed")
        return TensorSpec(name, dtype, shape)


def _fits(shape: tuple[int, ...], dims: Dims) -> bool:
    """Whether `shape` has the rank of `dims` and agrees where `dims` are fixed."""
    return len(shape) == len(dims) and all(
        not isinstance(dim, int) or dim == size for size, dim in zip(shape, dims, strict=True)
    )


def _show(dims: Dims) -> str:
    """`dims` as text, such as ``(N, 3, ?, ?)``."""
    return f"({', '.join('?' if dim is None else str(dim) for dim in dims)})"


def one_line(error: Exception) -> str:
    """The text of `error` on one line, less what only onnxruntime's developers can read."""
    text = " ".join(str(error).split()).rstrip(".")
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"Load model from \S+ failed:", "", text)
    text = re.sub(r"/\S+\.(?:cc|h):\d+ [^()]*\([^()]*\) (?:.*? was false\. )?", "", text)  # where it was raised
    return text if len(text) <= ERROR_CHARACTERS else text[:ERROR_CHARACTERS] + "..."
