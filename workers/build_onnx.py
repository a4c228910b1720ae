"""ONNX files as a builder needs them: reading, digests, and dtypes at the borders.

Dtypes are changed in the graph, not by calls to TensorRT, because only that works in every flavour: networks are
strongly typed in the newest, and take all types from the file.

::

    images float32 --> Conv ...            images uint8 --> Cast --> Conv ...          (images=uint8)
    ... Gemm --> logits float32            ... Gemm --> Cast --> logits float16        (logits=fp16)
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from trtpool.ipc.building import WEIGHTS_SUFFIX
from trtpool.ipc.errors import ConfigError, MissingExtra, ModelError

from .build_float16 import convert, graphs, insert_cast, names
from .trust import check_file

IO_DTYPES: Final = {
    "fp32": "float32", "float32": "float32", "fp16": "float16", "float16": "float16", "uint8": "uint8", "int8": "int8",
}  # fmt: skip
"""What users call the dtypes of inputs and outputs."""

MAX_FILE_BYTES: Final = 1 << 30
"""A model of more is written with its weights in a file beside it; a protobuf message ends at 2 GiB."""

_ELEM_TYPES: Final = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
                      10: "float16", 11: "float64", 12: "uint32", 13: "uint64"}  # fmt: skip
"""TensorProto.DataType as NumPy calls it: part of the format, so they never change."""

ELEM_NUMBERS: Final = {name: number for number, name in _ELEM_TYPES.items()}
FLOATS: Final = ("float16", "float32", "float64")


class GraphTensor(NamedTuple):
    """An input or output of a model, as its file declares it.

    Attributes:
        dtype: as NumPy calls it; "" if it has none.
        dims: batch axis first; None where it is open.
    """

    name: str
    dtype: str
    dims: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join('?' if dim is None else str(dim) for dim in self.dims)})"


# ---------------------------------------------------------------------------------- files


def load(path: Path, *, weights: bool = True, types: bool = False) -> Any:
    """Read an ONNX file.

    Args:
        path: the file.
        weights: read those that are in files beside it, too.
        types: find out the dtype of every tensor inside, as `convert_to_float16` needs it.

    Returns:
        An ``onnx.ModelProto``.

    Raises:
        ModelError: it cannot be read, or is no ONNX model.
        MissingExtra: onnx is not installed.
    """
    onnx = _import("onnx")
    if path.is_dir():
        raise ModelError(f"{path} is not a file; name the .onnx file itself")
    try:
        check_file(path, path.stat())
        model = onnx.load(os.fspath(path), load_external_data=False)
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}; check path and permissions") from error
    except ModelError:
        raise
    except Exception as error:  # DecodeError of whichever protobuf is there
        raise ModelError(f"{path} is damaged or no ONNX model; copy it again, or export the model to ONNX") from error
    if not model.graph.output:  # an empty file decodes too
        raise ModelError(f"{path} is no ONNX model, or one without outputs; export the model to ONNX")
    try:
        if types and model.functions:
            model = _import("onnx.inliner").inline_local_functions(model)
        if types:
            model = _import("onnx.shape_inference").infer_shapes(model)
        if weights:
            _check_weights(path, model)
            onnx.load_external_data_for_model(model, os.fspath(path.parent))
    except (ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        raise ModelError(f"onnx {onnx.__version__} refuses {path}: {_one_line(error)}; export it again") from error
    return model


def digest(path: Path, model: Any) -> str:
    """SHA-256, in hexadecimal, of the file at `path` and of the files that hold the weights of `model`, read from it.

    Raises:
        ModelError: one of them cannot be read.
    """
    _check_weights(path, model)
    total = hashlib.sha256()
    for name in ("", *weight_files(model)):
        try:
            with (path.parent / name if name else path).open("rb") as file:
                total.update(f"{name}\0{os.fstat(file.fileno()).st_size}\0".encode())
                while part := file.read(1 << 22):
                    total.update(part)
        except OSError as error:
            raise ModelError(f"cannot read the model {path} {name}: {error.strerror}; check permissions") from error
    return total.hexdigest()


def weight_files(model: Any) -> list[str]:
    """The files that hold weights of `model`, relative to its own, sorted."""
    names: set[str] = set()
    for graph in graphs(model.graph):
        tensors = [*graph.initializer]
        for node in graph.node:
            for attribute in node.attribute:
                tensors += [attribute.t, *attribute.tensors]
        for tensor in tensors:
            if tensor.data_location == 1:  # TensorProto.EXTERNAL
                names.update(entry.value for entry in tensor.external_data if entry.key == "location")
    return sorted(names)


def save(model: Any, path: Path) -> None:
    """Write `model`, and the weights of a large one beside it."""
    try:
        size = model.ByteSize()
    except Exception:  # noqa: BLE001  # protobuf's own error, beyond 2 GiB
        size = MAX_FILE_BYTES + 1
    large = {"save_as_external_data": True, "location": f"{path.name}{WEIGHTS_SUFFIX}"} if size > MAX_FILE_BYTES else {}
    _import("onnx").save_model(model, os.fspath(path), **large)


def _check_weights(path: Path, model: Any) -> None:
    for name in weight_files(model):
        if not (path.parent / name).is_file():
            raise ModelError(f"{path} has weights in {name}, which is not there; put that file beside it")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def import_onnx() -> Any:
    """The package onnx.  Raises `MissingExtra` if it is not installed."""
    return _import("onnx")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(
            f"building a plan needs {name}, which cannot be imported ({error}); "
            "install it with: pip install 'trtpool[build]'"
        ) from error


# ---------------------------------------------------------------------------------- tensors


def inputs(model: Any) -> list[GraphTensor]:
    """The inputs of `model`, without those that are weights with a default."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [_describe(value) for value in model.graph.input if value.name not in weights]


def outputs(model: Any) -> list[GraphTensor]:
    """The outputs of `model`."""
    return [_describe(value) for value in model.graph.output]


def _describe(value: Any) -> GraphTensor:
    kind = value.type.tensor_type
    # Some exporters (Paddle's) write -1 for an open axis.
    dims = tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None for dim in kind.shape.dim)
    return GraphTensor(value.name, _ELEM_TYPES.get(kind.elem_type, ""), dims)


def has_unnamed_axes(model: Any) -> bool:
    """Whether an input has open axes with a name that is none, as Paddle's exporter calls them all "?"."""
    return any(_unnamed(dim) for value in model.graph.input for dim in value.type.tensor_type.shape.dim)


def name_axes(model: Any) -> bool:
    """Give such axes names of their own, since TensorRT holds axes of one name to one size; returns whether any is."""
    found = has_unnamed_axes(model)
    if found:
        for value in model.graph.input:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if _unnamed(dim):
                    dim.dim_param = f"{value.name}_axis_{axis}"
        for value in [*model.graph.output, *model.graph.value_info]:
            for dim in value.type.tensor_type.shape.dim:
                if _unnamed(dim):
                    dim.ClearField("dim_param")
    return found


def _unnamed(dim: Any) -> bool:
    return bool(dim.dim_param) and not dim.dim_param[0].isalpha() and dim.dim_param[0] != "_"


def change_io(model: Any, wanted: Mapping[str, str], skip: Collection[str] = ()) -> dict[str, tuple[str, str]]:
    """Give inputs and outputs of `model` other dtypes, with a Cast behind each input and before each output.

    Args:
        model: changed in place.
        wanted: dtype by tensor name, in the words of `IO_DTYPES`.  ``""`` stands for all inputs and outputs of a
            floating-point dtype, and for inputs alone if the dtype is an integer.
        skip: inputs that stay as they are.

    Returns:
        What was changed: old and new dtype by tensor name.

    Raises:
        ConfigError: a dtype that is none of these.
        ModelError: a name that the model does not have, or a tensor that has no number for elements.
    """
    onnx = _import("onnx")
    goals = {name: io_dtype(word) for name, word in wanted.items()}
    ins, outs = inputs(model), outputs(model)
    unknown = goals.keys() - {tensor.name for tensor in ins + outs} - {""}
    if unknown:
        raise ModelError(
            f"--io names {min(unknown)!r}, which the model does not have; its inputs are "
            f"{', '.join(tensor.name for tensor in ins)}, its outputs {', '.join(tensor.name for tensor in outs)}"
        )
    changed = {}
    for tensor, is_input in [*((tensor, True) for tensor in ins), *((tensor, False) for tensor in outs)]:
        goal = goals.get(tensor.name) or _goal_for_all(goals.get("", ""), tensor, is_input=is_input)
        if goal in ("", tensor.dtype) or (is_input and tensor.name in skip):
            continue
        if tensor.dtype in ("", "bool"):
            raise ModelError(f"--io {tensor.name}: the model's tensor is no number, so its dtype cannot be changed")
        inner = f"{tensor.name}_{tensor.dtype}"
        while inner in names(model.graph):
            inner += "_"
        dtypes = ELEM_NUMBERS[tensor.dtype], ELEM_NUMBERS[goal]
        insert_cast(onnx, model.graph, tensor.name, inner, dtypes, is_input=is_input)
        changed[tensor.name] = (tensor.dtype, goal)
    return changed


def io_dtype(word: str) -> str:
    """NumPy's name of a dtype in the words of `IO_DTYPES`, whatever format is behind it.

    Raises:
        ConfigError: it is none of them.
    """
    dtype = IO_DTYPES.get(word.partition(":")[0])
    if dtype is None:
        raise ConfigError(f"--io {word}: choose one of fp32, fp16, uint8 and int8")
    return dtype


def _goal_for_all(goal: str, tensor: GraphTensor, *, is_input: bool) -> str:
    """The dtype that `tensor` gets from an option for all tensors."""
    return goal if tensor.dtype in FLOATS and (is_input or goal in FLOATS) else ""


def convert_to_float16(model: Any) -> None:
    """Put float16 for float32 inside `model`, which `load` read with its types; inputs and outputs stay as they were.

    Raises:
        ModelError: it has a graph that onnx does not take.
    """
    try:
        convert(_import("onnx"), model)
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"the model cannot be converted to float16 ({_one_line(error)}); "
            "convert it where it is exported, and leave out --fp16"
        ) from error
