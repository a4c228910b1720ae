"""TensorRT's runtime on a `FakeRuntime`: modules that load plans written here, and run them with NumPy.

`write_plan` writes a plan, `make_module` makes a module of one of the flavours, and `installed` lets `import` find it::

    write_plan(path, *neg())
    with installed(make_module("tensorrt", runtime)):
        engine = TensorrtEngine(...)

A plan is what a real one begins with, and then JSON.  Failures come as they do from the real ones: deserializing gives
None, most calls of a context give False, choosing a profile raises, and the reason goes to the logger.
"""

from __future__ import annotations

import contextlib
import enum
import json
import math
import os
import re
import struct
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt

from tests.workers.fake_cuda import ALIGNMENT, FakeRuntime
from tests.workers.fake_device import DeviceFault
from trtpool.ipc.settings import FLAVOURS

Arrays = Mapping[str, npt.NDArray[Any]]

VERSIONS: Final = {"tensorrt": "10.13.0.35", "rtx": "1.7.1.116", "lean": "11.4.0.106"}
"""What a module calls itself if the test does not say."""

HEADER: Final = struct.Struct("<4sI Q 8s 4s")
"""Magic, format, bytes in all, something, version: 28 bytes, as far as anybody looks at them."""

LINEAR: Final = "Row major linear FP32 format (kLINEAR)"

FAULT: Final = 113
"""An item with this number in it makes the device fail, if the plan says `faults`."""

BATCH: Final = "N"

_DTYPES: Final = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT4": "int8",
}


class Tensor(NamedTuple):
    """A tensor of a plan.

    Attributes:
        shape: batch axis first.  Of an input, -1 is open.  Of an output, "N" is the batch, "2N" twice that, "x.2" the
            size of axis 2 of input x, and "?" depends on the data.
        profiles: of an input with something open: smallest, best and largest shape, for each profile.
    """

    name: str
    shape: Sequence[int | str]
    profiles: Sequence[Sequence[Sequence[int]]] = ()
    dtype: str = "FLOAT"
    location: str = "DEVICE"
    format: str = LINEAR
    vectorized_dim: int = -1


def batched(name: str, item: Sequence[int], dtype: str = "FLOAT", least: int = 1, most: int = 64) -> Tensor:
    """An input with a profile for batches of `least` to `most`."""
    return Tensor(name, (-1, *item), [[(least, *item), (most, *item), (most, *item)]], dtype)


FUNCTIONS: Final[dict[str, Callable[[Arrays], dict[str, npt.NDArray[Any]]]]] = {
    "neg": lambda given: {"y": -given["x"]},
    "sum": lambda given: {"sum": given["a"] + given["b"], "twice": given["a"] * 2},
    "flatten": lambda given: {"y": given["x"].reshape(len(given["x"]), -1).sum(1)},
    "varying": lambda given: {
        "y": -given["x"],
        "s": given["x"].sum(1),
        "m": given["x"].max((1, 2))[:, None],
    },
    "shared": lambda given: {"y": given["x"] * given["k"] + given["b"].max(0)},
    "nonzero": lambda given: {"y": np.flatnonzero(given["x"])},
    "upto": lambda given: {"y": given["x"][:, : int(given["x"][:, 0].max())], "n": given["x"][:, :1]},
    "whole": lambda given: {"y": given["x"].sum(), "z": given["x"][:, 0]},
    "same": lambda given: {name.replace("_in", "_out"): array for name, array in given.items()},
}
"""What a plan computes, by the name that is in it: batches in, batches out."""


def neg(least: int = 1, most: int = 64) -> tuple[str, list[Tensor], list[Tensor]]:
    """``y = -x`` for items of 4 float32."""
    return "neg", [batched("x", (4,), least=least, most=most)], [Tensor("y", (BATCH, 4))]


def write_plan(
    path: Path,
    function: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    magic: bytes = b"ftrt",
    version: Sequence[int] = (10, 13, 0, 35),
    **options: Any,
) -> Path:
    """Write a plan, and return its path.

    Args:
        path: where.
        function: a key of `FUNCTIONS`.
        inputs, outputs: its tensors.
        magic, version: what its header says.
        options: what is unusual about it:
            capability (list): of the GPU that it was built for; by default any;
            host_code: it has code to run on the host;
            unshared ("select" or "enqueue"): where a second context on its profile fails, as in TensorRT 8.6;
            weights_bytes: device memory that it needs;
            scratch_bytes: device memory that each context takes;
            uncapturable: it waits for the device while it is enqueued;
            refused (list): batch sizes that are not enqueued;
            faults: the device fails on `FAULT`.
    """
    body = {"function": function, "inputs": inputs, "outputs": outputs, **options}
    data = json.dumps(body).encode()
    path.write_bytes(HEADER.pack(magic, 2, HEADER.size + len(data), b"", bytes(version)) + data)
    return path


def make_module(flavour: str, runtime: FakeRuntime, version: str = "") -> ModuleType:
    """The module of a flavour.

    Args:
        flavour: a key of `FLAVOURS`.
        runtime: the device that it runs on.
        version: of it; by default one of `VERSIONS`.
    """
    version = version or VERSIONS[flavour]
    module = ModuleType(FLAVOURS[flavour])
    library = Library(module, flavour, tuple(map(int, version.split("."))), runtime)
    enums = {
        "DataType": [*_DTYPES],
        "TensorIOMode": ["NONE", "INPUT", "OUTPUT"],
        "TensorLocation": ["DEVICE", "HOST"],
        "TensorFormat": ["LINEAR", "CHW2", "HWC8", "CHW4", "CHW16", "CHW32", "HWC", "DLA_LINEAR", "HWC16"],
    }
    if flavour == "lean":
        del enums["TensorFormat"]
    for name, members in enums.items():
        make_enum: Any = enum.Enum
        setattr(module, name, make_enum(name, members, start=library.version[0]))  # numbers differ between versions
    vars(module).update(
        __version__=version,
        ILogger=Logger,
        IOutputAllocator=OutputAllocator,
        Runtime=lambda logger: Runtime(library, logger),
    )
    return module


@contextlib.contextmanager
def installed(*modules: ModuleType) -> Iterator[None]:
    """Let `import` find these modules, and none of the other flavours."""
    found: dict[str, Any] = dict.fromkeys(FLAVOURS.values())
    found.update({module.__name__: module for module in modules})
    with mock.patch.dict(sys.modules, found):
        yield


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class Logger:
    """The native base class of loggers."""

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class OutputAllocator:
    """The native base class of what hands out memory for outputs; TensorRT 10 and newer call the second."""

    def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
        raise NotImplementedError

    def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
        raise NotImplementedError

    def notify_shape(self, tensor_name: str, shape: tuple[int, ...]) -> None:
        raise NotImplementedError


class Library:
    """What the objects of one module share."""

    def __init__(self, module: Any, flavour: str, version: tuple[int, ...], runtime: FakeRuntime) -> None:
        self.module = module
        self.flavour = flavour
        self.version = version
        self.runtime = runtime
        self.logger: Logger | None = None

    def error(self, text: str) -> None:
        assert self.logger is not None
        self.logger.log(Severity.ERROR, text)


class Runtime:
    """``trt.Runtime``."""

    def __init__(self, library: Library, logger: Logger) -> None:
        if not library.runtime.calls["cudaGetDeviceCount"]:
            library.runtime.misuses.append("a runtime without a look at the driver, which can crash the process")
        library.logger = library.logger or logger  # the first one is kept for good
        self._library = library
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, data: Any) -> Engine | None:
        try:
            return Engine(self._library, self._read(bytes(data)))
        except _Refused as refused:
            self._library.error(str(refused))
            return None

    def _read(self, raw: bytes) -> dict[str, Any]:
        """What is in a plan that fits this library and device."""
        library = self._library
        prefix = "IRuntime::deserializeCudaEngine: Error Code"
        if len(raw) < HEADER.size:
            raise _Refused(
                "[runtime.cpp::readHeader::765] Error Code 2: Internal Error (Assertion bufferSize >= minBufferSize "
                "failed.  In readHeader at /_src/runtime/dispatch/runtime.cpp:765)"
            )
        _, _, size, _, built = HEADER.unpack_from(raw)
        if tuple(built)[:3] != library.version[:3]:
            raise _Refused(
                f"{prefix} 1: Serialization (Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed."
                "Version tag does not match. Note: Current Version: 239, Serialized Engine Version: 240)"
            )
        if size != len(raw):
            raise _Refused(
                f"{prefix} 1: Serialization (Serialization assertion plan.header.size == blobSize failed. In parsePlan "
                "at /_src/runtime/dispatch/runtime.cpp:780)"
            )
        body: dict[str, Any] = json.loads(raw[HEADER.size :])
        ours, theirs = library.runtime.capability, tuple(body.get("capability") or library.runtime.capability)
        if ours != theirs:
            raise _Refused(
                f"{prefix} 6: API Usage Error (The engine plan file is generated on an incompatible device, expecting "
                f"compute {ours[0]}.{ours[1]} got compute {theirs[0]}.{theirs[1]}, please rebuild.)"
            )
        if body.get("host_code") and not self.engine_host_code_allowed:
            raise _Refused(
                f"{prefix} 4: API Usage Error (Cannot deserialize engine with lean runtime. Set "
                "IRuntime::setEngineHostCodeAllowed)"
            )
        if body.get("weights_bytes", 0) > library.runtime.memory_bytes:
            raise _Refused(f"{prefix} 2: OutOfMemory (Requested size was {body['weights_bytes']} bytes.)")
        return body


class _Refused(Exception):
    """A plan is not taken; the text is for the logger."""


class Engine:
    """``trt.ICudaEngine``."""

    def __init__(self, library: Library, body: dict[str, Any]) -> None:
        self.library = library
        self.body = body
        self.inputs = {tensor.name: tensor for tensor in (Tensor(*each) for each in body["inputs"])}
        self.outputs = {tensor.name: tensor for tensor in (Tensor(*each) for each in body["outputs"])}
        self.tensors = {**self.outputs, **self.inputs}  # in no useful order
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = max([1, *(len(tensor.profiles) for tensor in self.inputs.values())])
        self.contexts: weakref.WeakSet[ExecutionContext] = weakref.WeakSet()

    def get_tensor_name(self, index: int) -> str:
        return [*self.tensors][index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.library.module.TensorIOMode
        return modes.INPUT if name in self.inputs else modes.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return self.library.module.DataType[self.tensors[name].dtype]

    def get_tensor_location(self, name: str) -> Any:
        return self.library.module.TensorLocation[self.tensors[name].location]

    def get_tensor_format(self, name: str) -> Any:
        if self.library.flavour == "lean":
            raise TypeError("Unable to convert function return value to a Python type!")
        match = re.search(r"\(k(\w+)\)", self.tensors[name].format)
        assert match is not None
        return self.library.module.TensorFormat[match[1]]

    def get_tensor_format_desc(self, name: str) -> str:
        return self.tensors[name].format

    def get_tensor_vectorized_dim(self, name: str) -> int:
        return self.tensors[name].vectorized_dim

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.inputs[name].profiles[profile]]

    def create_execution_context(self) -> ExecutionContext | None:
        scratch = self.body.get("scratch_bytes", 0)
        address = 0
        if scratch:
            error, address = self.library.runtime.cudaMalloc(scratch)
            if error:
                self.library.error(
                    "IExecutionContext::IExecutionContext: Error Code 2: OutOfMemory (Requested size was "
                    f"{scratch} bytes.)"
                )
                return None
        context = (CapturableContext if self.library.flavour == "rtx" else ExecutionContext)(self)
        self.contexts.add(context)
        if scratch:
            weakref.finalize(context, self.library.runtime.cudaFree, address)
        return context


class ExecutionContext:
    """``trt.IExecutionContext``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._library = engine.library
        self._runtime = engine.library.runtime
        self._addresses: dict[str, int] = {}
        self._shapes = {name: engine.get_tensor_shape(name) for name in engine.inputs}
        self._allocators: dict[str, OutputAllocator] = {}
        self._enqueued: dict[str, tuple[int, ...]] | None = None  # the shapes that were enqueued last
        self._stream = 0
        self._ready: Callable[[], bool] = lambda: False
        self.profile = -1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        engine = self._engine
        taken = any(other.profile == index for other in engine.contexts)
        unshared = engine.body.get("unshared")
        if not 0 <= index < engine.num_optimization_profiles or (taken and unshared == "select"):
            self._library.error(
                f"IExecutionContext::setOptimizationProfileAsync: Error Code 3: API Usage Error (Profile {index} has "
                "been chosen for another IExecutionContext. Use another profileIndex or destroy the IExecutionContext)"
            )
            raise RuntimeError("Error in set optimization profile.")
        self.profile = -1 if taken and unshared == "enqueue" else index
        self._stream = stream
        on = self._runtime.stream(stream)
        on.enqueue(lambda: None)
        upto = on.put
        self._ready = lambda: on.done >= upto
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.tensors or address % ALIGNMENT:
            self._library.error(f"IExecutionContext::setTensorAddress: Error Code 3: ({name!r} cannot be at {address})")
            return False
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self._wait_for_profile()
        tensor, shape = self._engine.inputs[name], tuple(shape)
        fixed = [dim for dim in tensor.shape if isinstance(dim, int)]
        low, _, high = tensor.profiles[max(0, self.profile)] if tensor.profiles else (fixed, fixed, fixed)
        self._runtime.calls["set_input_shape"] += 1
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self._library.error(
                f"IExecutionContext::setInputShape: Error Code 3: API Usage Error (Supplied binding dimension {shape} "
                f"for bindings[0] exceed min ~ max range at index 0)"
            )
            return False
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        self._wait_for_profile()
        if name in self._shapes:
            return self._shapes[name]
        return tuple(self._size(dim) for dim in self._engine.outputs[name].shape)

    def _size(self, dim: int | str) -> int:
        if isinstance(dim, int):
            return dim
        if dim == "?":
            return -1
        name, dot, axis = dim.partition(".")
        if dot:
            return self._shapes[name][int(axis)]
        return self._batch() * int(dim.removesuffix(BATCH) or 1)

    def _batch(self) -> int:
        """The first axis of the first input that has it open, else of the first that has one."""
        inputs = [tensor for tensor in self._engine.inputs.values() if tensor.shape]
        leads = [tensor for tensor in inputs if tensor.shape[0] == -1] or inputs
        return self._shapes[leads[0].name][0] if leads else 1

    def set_output_allocator(self, name: str, output_allocator: OutputAllocator) -> bool:
        self._allocators[name] = output_allocator
        return True

    def get_max_output_size(self, name: str) -> int:
        """An upper bound that takes "?" for the largest axis of any input."""
        if any(size < 0 for shape in self._shapes.values() for size in shape):
            return -1
        most = max(size for shape in self._shapes.values() for size in shape)
        tensor = self._engine.outputs[name]
        sizes = [most if size < 0 else size for size in self.get_tensor_shape(name)]
        return math.prod(sizes) * np.dtype(_DTYPES[tensor.dtype]).itemsize

    def execute_async_v3(self, stream: int) -> bool:
        self._wait_for_profile()
        engine, runtime = self._engine, self._runtime
        on = runtime.stream(stream)
        if stream != self._stream:
            runtime.misuses.append("a context on two streams")
        shapes = {name: self.get_tensor_shape(name) for name in engine.tensors}
        batch = self._batch()
        told = {name for name in engine.outputs if any(size < 0 for size in shapes[name])}
        if wrong := self._misses(shapes, told, batch):
            return self._refuse(wrong)
        if on.capture is not None and (told or engine.body.get("uncapturable") or self._enqueued != shapes):
            runtime.cudaStreamSynchronize(stream)
            return self._refuse("Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)")
        self._enqueued = shapes
        runtime.calls["execute_async_v3"] += 1
        addresses = dict(self._addresses)  # a graph keeps them
        if told:
            return self._run_told(on, addresses, shapes, told)
        on.enqueue(lambda: engine_run(engine, addresses, shapes))
        return True

    def _misses(self, shapes: Mapping[str, tuple[int, ...]], told: set[str], batch: int) -> str:
        """Why a batch is not taken; "" if it is."""
        engine, error = self._engine, self._runtime.last_error
        if self.profile < 0:
            return "Error Code 2: Internal Error (Assertion mOptimizationProfile >= 0 failed. )"
        if batch in engine.body.get("refused", []) or error:  # whoever's it was
            return f"Error Code 1: Cuda Runtime ({error}, no kernel for a batch of {batch})"
        if self._addresses.keys() != engine.tensors.keys():
            return "Error Code 3: API Usage Error (a tensor has no address)"
        if any(size < 0 for name, shape in shapes.items() if name not in told for size in shape):
            return "Error Code 3: API Usage Error (an input has no shape)"
        if told - self._allocators.keys():
            return "Error Code 3: API Usage Error (an output has no allocator)"
        return ""

    def _run_told(self, on: Any, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]], told: set[str]) -> bool:
        """Run while the caller waits, and ask for memory when it is known how much."""
        engine = self._engine
        on.wait(on.put)
        answers = FUNCTIONS[engine.body["function"]](
            {name: _array(engine, name, addresses[name], shapes[name]) for name in engine.inputs}
        )
        for name in told:
            dtype = np.dtype(_DTYPES[engine.tensors[name].dtype])
            size, allocator = answers[name].size * dtype.itemsize, self._allocators[name]
            if self._library.version[0] >= 10:
                address = allocator.reallocate_output_async(name, addresses[name], size, ALIGNMENT, self._stream)
            else:
                address = allocator.reallocate_output(name, addresses[name], size, ALIGNMENT)
            if not address:
                return self._refuse(f"Error Code 2: OutOfMemory (no memory of {size} bytes for {name})")
            addresses[name], shapes[name] = address, answers[name].shape
            allocator.notify_shape(name, answers[name].shape)
        on.enqueue(lambda: engine_run(engine, addresses, shapes))
        return True

    def _refuse(self, text: str) -> bool:
        self._library.error(f"IExecutionContext::enqueueV3: {text}")
        return False

    def _wait_for_profile(self) -> None:
        if not self._ready():
            self._runtime.misuses.append("a context was used before its profile was chosen")


class CapturableContext(ExecutionContext):
    """That of TensorRT for RTX."""

    def is_stream_capturable(self, stream: int) -> bool:
        self._runtime.calls["is_stream_capturable"] += 1
        return not self._engine.body.get("uncapturable")


def _array(engine: Engine, name: str, address: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A tensor in the device's memory, in the shape that it has there."""
    tensor = engine.tensors[name]
    dtype, shape = np.dtype(_DTYPES[tensor.dtype]), _in_memory(tensor, shape)
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    return engine.library.runtime.memory(address, size).view(dtype).reshape(shape)


def _in_memory(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of ``(N, C, H, W)`` in a format, as TensorRT's header describes it."""
    match = re.search(r"\(k(CHW|HWC)(\d*)\)", tensor.format)
    if match is None:
        return shape
    batch, channels, *others = shape
    together = int(match[2] or 1)
    groups = math.ceil(channels / together)
    if match[1] == "HWC":
        return batch, *others, groups * together
    return batch, groups, *others, together


def engine_run(engine: Engine, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """The engine's work on the device."""
    given = {name: _array(engine, name, addresses[name], shapes[name]) for name in engine.inputs}
    if engine.body.get("faults") and any((items == FAULT).any() for items in given.values()):
        raise DeviceFault
    for name, answer in FUNCTIONS[engine.body["function"]](given).items():
        _array(engine, name, addresses[name], shapes[name])[...] = answer


def make_packages(folder: Path, **device: Any) -> dict[str, str]:
    """Write packages ``cuda`` and ``tensorrt`` that are the fakes, and return what to set for a child to import them.

    Args:
        folder: where.
        device: see `FakeRuntime`; all must be what `repr` can write.
    """
    bindings = folder / "cuda" / "bindings"
    bindings.mkdir(parents=True)
    for package in (folder / "cuda", bindings):
        (package / "__init__.py").touch()  # else one that is installed would be found first
    replace = "import sys\nsys.modules[__name__] = "
    (bindings / "runtime.py").write_text(
        f"from tests.workers.fake_cuda import FakeRuntime\n{replace}FakeRuntime(**{device!r})\n"
    )
    (bindings / "driver.py").write_text(
        "from types import SimpleNamespace\n"
        "def cuDeviceGet(ordinal):\n    return 0, ordinal\n"
        "def cuDeviceGetUuid(device):\n    return 0, SimpleNamespace(bytes=bytes(16))\n"
        "cuDeviceGetUuid_v2 = cuDeviceGetUuid\n"
    )
    (folder / "tensorrt.py").write_text(
        "from tests.workers.fake_tensorrt import make_module\n"
        f"{replace}make_module('tensorrt', sys.modules['cuda.bindings.runtime'])\n"
    )
    root = Path(__file__).resolve().parents[2]
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(root), os.environ["PYTHONPATH"]])}
