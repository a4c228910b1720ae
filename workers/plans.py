"""TensorRT plans: loading one, finding out what its tensors look like for one item, and running it.

This is the one place that talks to TensorRT's runtime, and it uses only what is the same in TensorRT 8.6, 10 and 11,
the lean runtime and TensorRT for RTX; what they do differently on failure (False, None, an exception) becomes one
exception with the logger's last words.

As with ONNX files, a pool needs every tensor's item shape before it starts, and that the first axis of each is the
batch.  A plan says so by its optimization profile 0; the output shapes are asked of an execution context.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from trtpool.ipc.arena import format_bytes
from trtpool.ipc.errors import DeviceUnavailable, ModelError
from trtpool.ipc.settings import EngineSettings, ModelSource, ShapeRange
from trtpool.ipc.tensors import ModelSpec, TensorSpec

from .cuda import Cuda
from .engine import EngineError
from .flavours import HEADER_BYTES, Flavour, load_flavour, logger, plan_version, take_errors
from .trust import check_file

DTYPES: Final = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
}
"""TensorRT's names of the dtypes that a plane can hold; `tensorrt.nptype` raises for some it has."""


class Plan:
    """A plan on the GPU.

    Args:
        source: the file, and the model's name.
        settings: the flavour, and item shapes that the plan leaves open.
        cuda: the device, which makes sure that there is a driver: without one some runtimes crash.

    Attributes:
        spec: the model as it can be served.
        min_batch: the smallest batch that the plan runs.

    Raises:
        ModelError: the file cannot be served; the text says what to change.
        MissingExtra: the TensorRT that it needs is not installed.
        DeviceUnavailable: the GPU's memory is too small.
    """

    def __init__(self, source: ModelSource, settings: EngineSettings, cuda: Cuda) -> None:
        if source.name in settings.no_batch:
            raise ModelError(f"--no-batch {source.name}: a plan must have a batch axis; leave it out, or use the CPU")
        self._cuda = cuda
        self._path = Path(os.path.abspath(source.path))
        self._flavour, self._engine = _load(self._path, settings, cuda)
        self._trt: Any = self._flavour.module
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        self._inputs = [name for name in names if self._is_input(name)]
        self._outputs = [name for name in names if not self._is_input(name)]
        self._fixed, self.min_batch, limit = self._batches()
        self._item_shapes = {name: self._item_shape(name, settings.shapes) for name in self._inputs}
        unknown = set(settings.shapes) - set(self._inputs)
        if unknown:
            raise ModelError(
                f"--shape {min(unknown)}: {self._path} has no such input; it has {', '.join(self._inputs)}"
            )
        inputs = tuple(self._tensor(name, self._item_shapes[name]) for name in self._inputs)
        outputs = self._output_tensors(limit)
        self.spec = ModelSpec(source.name, str(self._path), inputs, outputs, limit, max(1, self.min_batch))

    def close(self) -> None:
        """Let go of the plan; its contexts keep it until they end."""
        self._engine = None

    @property
    def version(self) -> str:
        """The TensorRT that runs it, such as ``"TensorRT 10.16.1.11"``."""
        return str(self._flavour)

    def new_context(self, stream: Any) -> Context:
        """An execution context with memory of its own, for use on `stream`.

        Raises:
            EngineError: the plan allows no more contexts.
            DeviceUnavailable: the GPU's memory is too small.
        """
        if self._engine is None:
            raise EngineError("the engine was closed")
        take_errors()
        raw = self._engine.create_execution_context()
        if raw is None:
            text = take_errors() or "TensorRT made no execution context"
            if _is_out_of_memory(text):
                raise DeviceUnavailable(_no_memory(self._path, self._cuda))
            raise EngineError(text)
        context = Context(raw, {} if self._fixed else self._item_shapes)
        context.select_profile(stream)
        self._cuda.synchronize(stream)
        return context

    # ------------------------------------------------------------------ what is in it

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    def _batches(self) -> tuple[bool, int, int]:
        """Whether the batch axis is fixed, and the smallest and largest batch; fewer items are padded to the first."""
        if not self._inputs or not self._outputs:
            raise ModelError(
                f"{self._path} has no {'outputs' if self._inputs else 'inputs'}; there is nothing to serve"
            )
        ranges = {}
        for name in self._inputs:
            dims = self._dims(name)
            if not dims:
                raise ModelError(
                    f"input {name!r} of {self._path} is a scalar without a batch axis; add one to the model"
                )
            if dims[0] >= 0:
                ranges[name] = (dims[0], dims[0])
            else:
                low, _, high = self._profile(name)
                ranges[name] = (low[0], high[0])
        least, most = max(low for low, _ in ranges.values()), min(high for _, high in ranges.values())
        shown = ", ".join(f"{name} {low} to {high}" for name, (low, high) in ranges.items())
        if least > most:
            raise ModelError(f"the inputs of {self._path} have no batch size in common: {shown}; build it again")
        return all(self._dims(name)[0] >= 0 for name in self._inputs), least, most

    def _dims(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, -1 for what is open."""
        return tuple(self._engine.get_tensor_shape(name))

    def _profile(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, best and largest shape of an input, batch axis first, in profile 0."""
        low, best, high = (tuple(dims) for dims in self._engine.get_tensor_profile_shape(name, 0))
        return low, best, high

    def _item_shape(self, name: str, given: Mapping[str, ShapeRange]) -> tuple[int, ...]:
        dims = self._dims(name)[1:]
        asked = _one_shape(name, given.get(name))
        if all(dim >= 0 for dim in dims):
            low = high = best = dims
        else:
            low, best, high = (shape[1:] for shape in self._profile(name))
        if asked is None:
            if low != high:
                raise ModelError(
                    f"input {name!r} of {self._path} takes items from {_show(low)} to {_show(high)}: give the shape, "
                    f"for example --shape {name}={'x'.join(map(str, best))}"
                )
            return best
        if len(asked) != len(low) or not all(a <= size <= b for a, size, b in zip(low, asked, high, strict=True)):
            raise ModelError(
                f"--shape {name}={'x'.join(map(str, asked))} does not fit {self._path}, which was built for items "
                + (f"of {_show(low)}" if low == high else f"from {_show(low)} to {_show(high)}")
            )
        return asked

    def _output_tensors(self, limit: int) -> tuple[TensorSpec, ...]:
        """The outputs, their item shapes learnt from a context at the smallest and the largest batch."""
        stream = self._cuda.new_stream()
        try:
            context = self.new_context(stream)
            shapes: dict[str, tuple[int, ...]] = {}
            for items in sorted({self.min_batch, limit}):
                context.set_items(items)
                for name in self._outputs:
                    shape = context.shape(name)
                    if shape[:1] != (items,) or min(shape) < 0 or shapes.setdefault(name, shape[1:]) != shape[1:]:
                        raise ModelError(
                            f"output {name!r} of {self._path} has shape {_show(shape)} in a batch of {items}: its "
                            "first axis must be the batch and the others known; change the model, or remove this output"
                        )
        except EngineError as error:
            raise ModelError(f"{self._path} cannot be run: {error}") from error
        finally:
            self._cuda.destroy_stream(stream)
        return tuple(self._tensor(name, shapes[name]) for name in self._outputs)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> TensorSpec:
        engine = self._engine
        shown = f"tensor {name!r} of {self._path}"
        dtype = DTYPES.get(engine.get_tensor_dtype(name).name)
        if dtype is None:
            raise ModelError(
                f"{shown} has dtype {engine.get_tensor_dtype(name).name}, which planes cannot hold; build it with "
                f"--io {name}=fp16 or fp32"
            )
        if engine.get_tensor_location(name) == self._trt.TensorLocation.HOST:
            raise ModelError(f"{shown} is read on the host (a shape tensor); make it a constant of the model")
        layout = str(engine.get_tensor_format_desc(name))
        if engine.get_tensor_vectorized_dim(name) >= 0 or "HWC" in layout:
            raise ModelError(f"{shown} has the format {layout!r}; build it with linear inputs and outputs")
        if 0 in shape:
            raise ModelError(f"{shown} is empty: its shape is {_show(('N', *shape))}; remove it")
        return TensorSpec(name, dtype, shape)


def _one_shape(name: str, given: ShapeRange | None) -> tuple[int, ...] | None:
    """A shape that the user gives, which must not be a range."""
    if given is None:
        return None
    shape = tuple(size for size in given if isinstance(size, int))
    if len(shape) < len(given):
        raise ModelError(f"--shape {name}: on a GPU all items have one shape; give that, without a range")
    return shape


class Context:
    """An execution context: one batch at a time, on one stream."""

    def __init__(self, raw: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._raw = raw
        self._shapes = shapes  # of one item, by input; empty when the plan's shapes are fixed
        self._items = 0

    def select_profile(self, stream: Any) -> None:
        """Use optimization profile 0; `stream` must be synchronized after it."""
        try:
            chosen = self._raw.set_optimization_profile_async(0, int(stream))
        except Exception as error:  # a pybind11 class of its own in each version
            raise EngineError(take_errors() or str(error)) from error
        if chosen is False:
            raise EngineError(take_errors() or "profile 0 is in use by another context")

    def bind(self, name: str, address: int) -> None:
        """Say where a tensor is, once and for all."""
        if not self._raw.set_tensor_address(name, address):
            raise EngineError(take_errors() or f"tensor {name!r} takes no address")

    def set_items(self, items: int) -> None:
        """Say how many items the next batch has."""
        if items == self._items:
            return
        self._items = 0
        for name, shape in self._shapes.items():
            if not self._raw.set_input_shape(name, (items, *shape)):
                raise EngineError(take_errors() or f"input {name!r} takes no batch of {items}")
        self._items = items

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor with the batch that was set."""
        return tuple(self._raw.get_tensor_shape(name))

    def enqueue(self, items: int, stream: int) -> None:
        """Put a batch of `items` on the stream whose handle is `stream`."""
        self.set_items(items)
        if not self._raw.execute_async_v3(stream):
            raise EngineError(take_errors() or "TensorRT did not enqueue the batch, and did not say why")

    def can_capture(self, stream: int) -> bool:
        """Whether TensorRT allows a CUDA graph of the next batch; only TensorRT for RTX can tell."""
        asks = getattr(self._raw, "is_stream_capturable", None)
        return asks is None or bool(asks(stream))

    def close(self) -> None:
        """Free the context's memory."""
        self._raw = None


def _load(path: Path, settings: EngineSettings, cuda: Cuda) -> tuple[Flavour, Any]:
    """The flavour for a plan, and the plan deserialized."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path} is not a file; name the plan itself")
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
            if not header:
                raise ModelError(f"{path} is empty; build or copy the plan again")
            check_file(path, os.fstat(file.fileno()), runs_code=settings.host_code)
            try:
                flavour = load_flavour(settings.flavour, header)
            except ModelError as error:
                raise ModelError(f"{path}: {error}") from error
            runtime = flavour.module.Runtime(logger(flavour))
            if settings.host_code:
                runtime.engine_host_code_allowed = True
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                take_errors()
                engine = runtime.deserialize_cuda_engine(buffer)
    except OSError as error:
        raise ModelError(f"cannot read the plan {path}: {error.strerror}; check path and permissions") from error
    if engine is None:
        raise _refusal(path, flavour, plan_version(header), take_errors(), cuda)
    return flavour, engine


def _refusal(
    path: Path, flavour: Flavour, version: tuple[int, ...] | None, text: str, cuda: Cuda
) -> ModelError | DeviceUnavailable:
    """Why a plan was not taken, in one sentence; `version` is what its header names, `text` what TensorRT said."""
    again = "build it again on this machine from its ONNX file: trtpool build"
    lower = text.lower()
    if _is_out_of_memory(text):
        return DeviceUnavailable(_no_memory(path, cuda))
    if re.search(r"host code|lean runtime", lower):
        return ModelError(
            f"{path} carries code to run on this host, which must be allowed: if you trust it like a program, start "
            "the pool with --allow-host-code"
        )
    # Of a plan that is cut short, too, TensorRT says that "serialization" failed.
    differs = version is not None and version[:3] != flavour.version[:3]
    if re.search(r"version tag|this version|library version", lower) or (differs and "serialization" in lower):
        builder = f"version {'.'.join(map(str, version))}" if version else "another version"
        return ModelError(f"{path} was built by {builder}, and here is {flavour}; {again} ({text})")
    if re.search(r"incompatible device|compute capability|generated on|sm_|gpu", lower):
        return ModelError(f"{path} was built for another GPU than {cuda.device_name()}; {again} ({text})")
    return ModelError(f"{flavour} cannot load {path}: {text or 'it does not say why'}; copy it again, or {again}")


def _is_out_of_memory(text: str) -> bool:
    return re.search(r"out of ?memory|cudaErrorMemoryAllocation|OutOfMemory", text, re.IGNORECASE) is not None


def _no_memory(path: Path, cuda: Cuda) -> str:
    free, total = cuda.memory()
    return (
        f"the GPU's memory is too small for {path}: {format_bytes(free)} of {format_bytes(total)} are free; lower "
        "--lanes, --max-batch or --workers-per-gpu, or end what else uses the GPU (nvidia-smi shows what)"
    )


def _show(shape: tuple[int | str, ...]) -> str:
    return "x".join(map(str, shape)) if shape else "scalars"
