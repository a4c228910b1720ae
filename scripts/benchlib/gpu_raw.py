"""CUDA and TensorRT by hand, without any of the pool's code between: what the pool is measured against.

::

    ceiling   3 streams in turn   | copy in | graph | copy out | event     of others meanwhile
    series    1 stream            copy in, wait; graph, wait; copy out, wait

Both from private pinned buffers, in one process, with nobody to talk to.  `Lane` is one stream with all that it needs.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trtpool.workers.flavours import HEADER_BYTES, load_flavour, logger, take_errors

from .gpu_items import Tensor, prepare

DTYPES: Final = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool",
}  # fmt: skip
TRIES: Final = 5
"""Batches that are timed alone, to say what each part of one takes."""


class Cuda:
    """`cuda.bindings.runtime` with errors raised: ``cuda("cudaMalloc", size)`` gives the address.

    Attributes:
        rt: the module, for calls in the loop.
    """

    def __init__(self) -> None:
        self.rt: Any = importlib.import_module("cuda.bindings.runtime")
        # TensorRT without a driver may crash the process, so CUDA comes first.
        if not self("cudaGetDeviceCount"):
            raise RuntimeError("no GPU is visible; see nvidia-smi")
        self("cudaSetDevice", 0)
        self.h2d = self.rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.d2h = self.rt.cudaMemcpyKind.cudaMemcpyDeviceToHost

    def __call__(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self.rt, name)(*arguments)
        if error:
            raise RuntimeError(f"{name}: {self.rt.cudaGetErrorString(error)[1].decode()} ({int(error)})")
        return values[0] if values else None

    def device_name(self) -> str:
        name = self("cudaGetDeviceProperties", 0).name
        return name.decode() if isinstance(name, bytes) else str(name)

    def pinned(self, size: int) -> tuple[int, npt.NDArray[np.uint8]]:
        """The address of `size` bytes of pinned memory, and an array over them; both live as long as the process."""
        address = int(self("cudaHostAlloc", size, self.rt.cudaHostAllocDefault))
        return address, np.frombuffer(memoryview((ctypes.c_ubyte * size).from_address(address)), np.uint8)

    def stream(self) -> Any:
        return self("cudaStreamCreateWithFlags", self.rt.cudaStreamNonBlocking)

    def event(self, flags: int) -> Any:
        return self("cudaEventCreateWithFlags", flags)

    def wait(self, stream: Any) -> None:
        self("cudaStreamSynchronize", stream)


class Engine:
    """A plan on the GPU.

    Attributes:
        inputs, outputs: its tensors, for one item.
    """

    def __init__(self, cuda: Cuda, path: Path) -> None:
        with path.open("rb") as file:
            flavour = load_flavour("", file.read(HEADER_BYTES))
            trt = flavour.module
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                engine = trt.Runtime(logger(flavour)).deserialize_cuda_engine(buffer)
        if engine is None:
            raise RuntimeError(f"{flavour} does not load {path}: {take_errors()}")
        self._cuda, self._engine = cuda, engine
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        self._is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        context = self.context(cuda.stream(), {})
        self.inputs = tuple(self._tensor(context, name) for name in names if self._is_input[name])
        self._set_batch(context, 1)
        self.outputs = tuple(self._tensor(context, name) for name in names if not self._is_input[name])

    def _tensor(self, context: Any, name: str) -> Tensor:
        engine = self._engine
        if self._is_input[name]:
            shape = tuple(engine.get_tensor_shape(name))
            if -1 in shape[1:]:
                shape = tuple(engine.get_tensor_profile_shape(name, 0)[1])
        else:
            shape = tuple(context.get_tensor_shape(name))
        return Tensor(name, DTYPES[engine.get_tensor_dtype(name).name], tuple(map(int, shape[1:])))

    def context(self, stream: Any, addresses: dict[str, int]) -> Any:
        """An execution context for use on `stream`, its tensors at `addresses`."""
        context = self._engine.create_execution_context()
        if context is None:
            raise RuntimeError(f"no execution context: {take_errors()}")
        if context.set_optimization_profile_async(0, int(stream)) is False:
            raise RuntimeError(f"no profile: {take_errors()}")
        self._cuda.wait(stream)
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise RuntimeError(f"no address for {name}: {take_errors()}")
        return context

    def _set_batch(self, context: Any, items: int) -> None:
        for tensor in self.inputs:
            if not context.set_input_shape(tensor.name, (items, *tensor.shape)):
                raise RuntimeError(f"{tensor.name} takes no batch of {items}: {take_errors()}")

    def enqueue(self, context: Any, items: int, stream: Any) -> None:
        """Put a batch on `stream`, without a graph."""
        self._set_batch(context, items)
        if not context.execute_async_v3(int(stream)):
            raise RuntimeError(f"the engine was not enqueued: {take_errors()}")


class Lane:
    """A stream, an execution context, device buffers, pinned buffers and a CUDA graph, for batches of one size.

    Args:
        cuda, engine: the device and the plan.
        items: in a batch.

    Attributes:
        outputs: the pinned outputs, shape ``(items, *shape)``, by tensor name.
        graph: None where the engine's work cannot be captured.
    """

    def __init__(self, cuda: Cuda, engine: Engine, items: int) -> None:
        self._cuda, self._engine, self._items = cuda, engine, items
        rt = cuda.rt
        self.stream = cuda.stream()
        self._done = cuda.event(rt.cudaEventBlockingSync | rt.cudaEventDisableTiming)
        self._copies_in: list[tuple[int, int, int]] = []  # to, from, bytes
        self._copies_out: list[tuple[int, int, int]] = []
        self.outputs: dict[str, npt.NDArray[Any]] = {}
        addresses = {}
        for number, tensor in enumerate((*engine.inputs, *engine.outputs)):
            size = items * tensor.item_bytes
            device = addresses[tensor.name] = int(cuda("cudaMalloc", size))
            host, view = cuda.pinned(size)
            array = view.view(tensor.dtype).reshape(items, *tensor.shape)
            if number < len(engine.inputs):
                array[...] = prepare(tensor, 1, 2, seed=number)[1]  # one item's noise serves for all
                self._copies_in.append((device, host, size))
            else:
                view[...] = 0xFF  # not a number, until it is written
                self.outputs[tensor.name] = array
                self._copies_out.append((host, device, size))
        self._context = engine.context(self.stream, addresses)
        self.enqueue()
        cuda.wait(self.stream)
        self.graph = self._capture()

    def _capture(self) -> Any:
        cuda, rt = self._cuda, self._cuda.rt
        cuda("cudaStreamBeginCapture", self.stream, rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            self.enqueue()
            return cuda("cudaGraphInstantiate", cuda("cudaStreamEndCapture", self.stream), 0)
        except RuntimeError:
            rt.cudaStreamEndCapture(self.stream)
            rt.cudaGetLastError()
            return None

    def enqueue(self) -> None:
        """The engine alone, as it is without a graph."""
        self._engine.enqueue(self._context, self._items, self.stream)

    def compute(self) -> None:
        if self.graph is None:
            self.enqueue()
        elif error := self._cuda.rt.cudaGraphLaunch(self.graph, self.stream)[0]:
            raise RuntimeError(f"cudaGraphLaunch: {error}")

    def copy_in(self) -> None:
        self._copy(self._copies_in, self._cuda.h2d)

    def copy_out(self) -> None:
        self._copy(self._copies_out, self._cuda.d2h)

    def _copy(self, copies: list[tuple[int, int, int]], kind: Any) -> None:
        for target, source, size in copies:
            if error := self._cuda.rt.cudaMemcpyAsync(target, source, size, kind, self.stream)[0]:
                raise RuntimeError(f"cudaMemcpyAsync: {error}")

    def launch(self) -> None:
        """Enqueue a batch and the event that tells its end."""
        self.copy_in()
        self.compute()
        self.copy_out()
        if error := self._cuda.rt.cudaEventRecord(self._done, self.stream)[0]:
            raise RuntimeError(f"cudaEventRecord: {error}")

    def wait(self) -> None:
        """Block until the batch has ended."""
        if error := self._cuda.rt.cudaEventSynchronize(self._done)[0]:
            raise RuntimeError(f"cudaEventSynchronize: {error}")

    def in_series(self) -> None:
        """One batch, waiting after each part."""
        for part in (self.copy_in, self.compute, self.copy_out):
            part()
            self._cuda.wait(self.stream)

    def check(self) -> None:
        """Raise ValueError unless all outputs were written, for types that can tell."""
        for name, array in self.outputs.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"output {name} was not written by the engine, or is not finite")

    # ------------------------------------------------------------------ what each part takes, alone

    def alone(self) -> dict[str, float]:
        """Milliseconds of each part of a batch with nothing beside it, and microseconds of the CPU to enqueue it."""
        rt = self._cuda.rt
        marks = [self._cuda.event(rt.cudaEventBlockingSync) for _ in range(4)]
        parts: list[list[float]] = []
        for _ in range(TRIES):
            for mark, part in zip(marks, (self.copy_in, self.compute, self.copy_out, None), strict=True):
                self._cuda("cudaEventRecord", mark, self.stream)
                if part is not None:
                    part()
            self._cuda.wait(self.stream)
            parts.append([float(self._cuda("cudaEventElapsedTime", a, b)) for a, b in pairwise(marks)])
        names = ("copy_in_ms", "engine_ms", "copy_out_ms")
        medians = [statistics.median(values) for values in zip(*parts, strict=True)]
        facts = dict(zip(names, medians, strict=True))
        facts["enqueue_us"] = self._cpu_us(self.enqueue)
        if self.graph is not None:
            facts["graph_us"] = self._cpu_us(self.compute)
        return facts

    def _cpu_us(self, call: Callable[[], None]) -> float:
        took = []
        for _ in range(TRIES):
            began = time.perf_counter()
            call()
            took.append(time.perf_counter() - began)
            self._cuda.wait(self.stream)
        return 1e6 * statistics.median(took)
