"""A CUDA device made of host memory: the part of `cuda.bindings.runtime` that workers use, under the same names.

::

    FakeRuntime                                  what tests see
      streams: queues of work, done when somebody    `copies`, `calls`      what was asked for
      waits, or by a thread each                     `left()`               what was not given back
      events, captures, graphs                       `misuses`              what a real device punishes later, or never
      device memory: ctypes buffers, addresses       `fail`, `break_device` what is to go wrong
      registrations of host memory

Calls answer as the bindings' do, with a tuple of the error and the values, None each after an error.  What CUDA refuses
is refused with CUDA's code: memory that is not the device's, copies that cross the bound of a registration, waiting
in a capture.  What CUDA lets pass, or answers with a crash (a destroyed handle, a graph launched while it runs), is in
`misuses`, which must be empty at the end: `check()`.

By default a stream works only while somebody waits for it, in order, up to what is waited for.  So nothing is
done too early by luck, and every run of a test is the same.
"""

# ruff: noqa: N802, N803, N815  # names as CUDA has them

from __future__ import annotations

import collections
import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tests.workers import fake_device as d
from tests.workers.fake_device import (
    CallFailed,
    Copy,
    DeviceFault,
    Event,
    Graph,
    GraphExec,
    Handle,
    Stream,
    host_memory,
)
from tests.workers.fake_device import cudaError_t as Code

TICK_NS: Final = 1000

MAPPED: Final = 1 << 60
"""The device sees pinned host memory this far beyond its own address."""

"""What each piece of work takes, by the device's clock."""

ALIGNMENT: Final = 256
"""Device memory begins at a multiple of this, in bytes."""

MAX_PITCH: Final = 2**31 - 1
"""CUDA's own limit, in bytes."""

POISON: Final = 0xDB
"""What new device memory holds."""


def call(values: int, name: str = "") -> Callable[[Callable[..., Any]], Callable[..., tuple[Any, ...]]]:
    """Make a method answer as the bindings do.

    The method returns a tuple of values, or None for none, and raises `CallFailed`.

    Args:
        values: how many values it has; after an error each is None.
        name: the call, if the method has another name.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        called = name or function.__name__

        @functools.wraps(function)
        def answer(self: FakeRuntime, *arguments: Any) -> tuple[Any, ...]:
            self.calls[called] += 1
            try:
                self._raise_fault()
                self._raise_injected(called)
                return Code.cudaSuccess, *(function(self, *arguments) or ())
            except CallFailed as failed:
                self.last_error = failed.code
                return failed.code, *[None] * values

        return answer

    return wrap


class FakeRuntime:
    """In place of the module `cuda.bindings.runtime`.

    Args:
        memory_bytes: of the device.
        copies_batches: whether there is `cudaMemcpyBatchAsync`, which CUDA 12.8 brought.
        fail_index: whether that answers as in 12.9, with the copy that failed.
        driver: the version of CUDA that the driver runs, as CUDA numbers them.
        capability: the device's compute capability.
        count_error: what counting the devices answers.
        devices: how many there are.
        threads: streams work by themselves, in a thread each.
        held: with `threads`: they stand still until `go`.
    """

    cudaError_t = d.cudaError_t
    cudaMemcpyKind = d.cudaMemcpyKind
    cudaStreamCaptureMode = d.cudaStreamCaptureMode
    cudaMemcpySrcAccessOrder = d.cudaMemcpySrcAccessOrder
    cudaMemcpyAttributes = d.cudaMemcpyAttributes
    cudaStreamNonBlocking = 1
    cudaEventDefault = 0
    cudaEventBlockingSync = 1
    cudaHostRegisterPortable = 1
    cudaHostRegisterMapped = 2

    def __init__(
        self,
        *,
        memory_bytes: int = 1 << 30,
        copies_batches: bool = True,
        fail_index: bool = False,
        driver: int = 13000,
        capability: tuple[int, int] = (9, 0),
        count_error: int = 0,
        devices: int = 1,
        threads: bool = False,
        held: bool = False,
    ) -> None:
        self.memory_bytes = memory_bytes
        self.driver = driver
        self.capability = capability
        self.count_error = count_error
        self.devices = devices
        self.threads = threads
        self.held = held
        self.broken: int = 0
        self.last_error: int = 0
        self.calls: collections.Counter[str] = collections.Counter()
        self.copies: list[Copy] = []
        self.misuses: list[str] = []
        self.registrations: dict[int, int] = {}  # address: bytes
        self.registered: list[tuple[str, int]] = []  # every success, in order: "register" or "unregister", address
        self._failures: dict[str, dict[int, int]] = {}  # call: {how many calls from now: error}
        self._memory: dict[int, tuple[Any, int]] = {}  # address: buffer and bytes
        self._handles: dict[int, Handle] = {}  # alive
        self._ticks = itertools.count(1)
        self._fail_index = fail_index
        if copies_batches:
            self.cudaMemcpyBatchAsync = self._copy_batch

    # ------------------------------------------------------------------ for tests

    def fail(self, name: str, code: int, nth: int = 1) -> None:
        """Let the `nth` call of `name` from now answer `code`."""
        self._failures.setdefault(name, {})[nth] = code

    def break_device(self, code: int = Code.cudaErrorIllegalAddress) -> None:
        """Let every call answer `code` from now on."""
        self.broken = code

    def go(self) -> None:
        """Let streams that were held go on."""
        self.held = False
        for stream in self.streams():
            stream.go()

    def left(self) -> dict[str, int]:
        """What was made and not given back, by kind."""
        counts = collections.Counter(type(handle).__name__.lower() for handle in self._handles.values())
        counts.update({"memory": len(self._memory), "registration": len(self.registrations)})
        return {kind: count for kind, count in counts.items() if count}

    def check(self) -> None:
        """At a test's end: nothing was misused and nothing is left."""
        assert not self.misuses
        assert not self.left()

    def streams(self) -> list[Stream]:
        return [handle for handle in [*self._handles.values()] if isinstance(handle, Stream)]

    # ------------------------------------------------------------------ for fake_tensorrt

    def stream(self, stream: Any) -> Stream:
        """The stream of a handle, or of its number."""
        found: Stream = self._handle(Stream, stream)
        return found

    def memory(self, address: int, size: int) -> npt.NDArray[np.uint8]:
        """The bytes of device memory, of shape ``(size,)``; a fault of the device where there is none."""
        if address >= MAPPED:
            if not any(s <= address - MAPPED <= s + n - size for s, n in [*self.registrations.items()]):
                raise DeviceFault
            return host_memory(address - MAPPED, size)
        if not self.on_device(address, size):
            raise DeviceFault
        return host_memory(address, size)

    def tick_ns(self) -> int:
        """The device's time, a little later than it was."""
        return next(self._ticks) * TICK_NS

    def on_device(self, address: int, size: int) -> bool:
        """Whether one allocation holds all of it."""
        return any(start <= address and address + size <= start + held for start, (_, held) in [*self._memory.items()])

    # ------------------------------------------------------------------ the device

    @call(1)
    def cudaGetDeviceCount(self) -> tuple[int]:
        if self.count_error:
            raise CallFailed(self.count_error)
        return (self.devices,)

    @call(0)
    def cudaSetDevice(self, device: int) -> None:
        if device >= self.devices:
            raise CallFailed(Code.cudaErrorInvalidDevice)

    @call(1)
    def cudaDriverGetVersion(self) -> tuple[int]:
        return (self.driver,)

    @call(1)
    def cudaRuntimeGetVersion(self) -> tuple[int]:
        return (self.driver,)

    @call(1)
    def cudaGetDeviceProperties(self, device: int) -> tuple[Any]:
        major, minor = self.capability
        properties = {"name": b"Fake GPU", "major": major, "minor": minor, "totalGlobalMem": self.memory_bytes}
        return (SimpleNamespace(**properties),)

    @call(1)
    def cudaDeviceGetPCIBusId(self, length: int, device: int) -> tuple[bytes]:
        return (b"0000:3B:00.0".ljust(length, b"\0"),)

    @call(2)
    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self.memory_bytes - sum(size for _, size in self._memory.values()), self.memory_bytes

    def cudaGetLastError(self) -> tuple[int]:
        error, self.last_error = self.broken or self.last_error, 0
        return (Code(error),)

    @staticmethod
    def cudaGetErrorName(error: Code) -> tuple[int, bytes]:
        return Code.cudaSuccess, error.name.encode()

    @staticmethod
    def cudaGetErrorString(error: Code) -> tuple[int, bytes]:
        return Code.cudaSuccess, f"text of {error.name}".encode()

    # ------------------------------------------------------------------ memory

    @call(1)
    def cudaHostGetDevicePointer(self, pHost: int, flags: int) -> tuple[int]:
        if flags or not any(start <= pHost < start + held for start, held in self.registrations.items()):
            raise CallFailed(Code.cudaErrorInvalidValue)
        return (pHost + MAPPED,)

    @call(0)
    def cudaHostRegister(self, ptr: int, size: int, flags: int) -> None:
        self._not_in_capture()
        if not size or flags != self.cudaHostRegisterPortable | self.cudaHostRegisterMapped:
            raise CallFailed(Code.cudaErrorInvalidValue)
        if any(ptr < start + held and start < ptr + size for start, held in self.registrations.items()):
            raise CallFailed(Code.cudaErrorHostMemoryAlreadyRegistered)
        self.registrations[ptr] = size
        self.registered.append(("register", ptr))

    @call(0)
    def cudaHostUnregister(self, ptr: int) -> None:
        self._not_in_capture()
        if ptr not in self.registrations:
            raise CallFailed(Code.cudaErrorHostMemoryNotRegistered)
        del self.registrations[ptr]
        self.registered.append(("unregister", ptr))

    @call(1)
    def cudaMalloc(self, size: int) -> tuple[int]:
        self._not_in_capture()
        if not size:
            raise CallFailed(Code.cudaErrorInvalidValue)
        if size + sum(held for _, held in self._memory.values()) > self.memory_bytes:
            raise CallFailed(Code.cudaErrorMemoryAllocation)
        buffer = (ctypes.c_uint8 * (size + ALIGNMENT))()
        address = -(-ctypes.addressof(buffer) // ALIGNMENT) * ALIGNMENT
        self._memory[address] = buffer, size
        host_memory(address, size)[:] = POISON
        return (address,)

    @call(0)
    def cudaFree(self, devPtr: int) -> None:
        self._not_in_capture()
        self._finish_all()
        if devPtr not in self._memory:
            raise CallFailed(Code.cudaErrorInvalidValue)
        del self._memory[devPtr]

    @call(0)
    def cudaMemset(self, devPtr: int, value: int, count: int) -> None:
        self._not_in_capture(Code.cudaErrorStreamCaptureImplicit)
        if not self.on_device(devPtr, count):
            raise CallFailed(Code.cudaErrorInvalidValue)
        host_memory(devPtr, count)[:] = value

    @call(0)
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: int, stream: Any) -> None:
        to_device = kind == d.cudaMemcpyKind.cudaMemcpyHostToDevice
        host, device = (src, dst) if to_device else (dst, src)
        copy = Copy(to_device, host, device, count, batched=False)
        self._enqueue_copies(self.stream(stream), [copy])

    @call(0)
    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: int, stream: Any
    ) -> None:
        if width > min(dpitch, spitch) or max(dpitch, spitch) > MAX_PITCH:
            raise CallFailed(Code.cudaErrorInvalidValue)
        to_device = kind == d.cudaMemcpyKind.cudaMemcpyHostToDevice
        (host, host_pitch), (device, pitch) = ((src, spitch), (dst, dpitch))[:: 1 if to_device else -1]
        whole = (height - 1) * host_pitch + width
        if self._crosses(host, whole):
            raise CallFailed(Code.cudaErrorInvalidValue)
        rows = [
            Copy(to_device, host + row * host_pitch, device + row * pitch, width, batched=False)
            for row in range(height)
        ]
        self._enqueue_copies(self.stream(stream), rows)

    @call(0, "cudaMemcpyBatchAsync")
    def _copy_batch(
        self,
        dsts: list[int],
        srcs: list[int],
        sizes: list[int],
        count: int,
        attrs: list[d.cudaMemcpyAttributes],
        attrsIdxs: list[int],
        numAttrs: int,
        stream: Any,
    ) -> tuple[int, ...]:
        on = self.stream(stream)
        if on.capture is not None:
            on.capture_void = True
            raise CallFailed(Code.cudaErrorStreamCaptureUnsupported)
        order = d.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        if (
            not count == len(dsts) == len(srcs) == len(sizes) > 0
            or not 0 < numAttrs == len(attrs) == len(attrsIdxs) <= count
            or attrsIdxs[0] != 0
            or any(attribute.srcAccessOrder != order for attribute in attrs)
        ):
            raise CallFailed(Code.cudaErrorInvalidValue)
        copies = []
        for target, source, size in zip(dsts, srcs, sizes, strict=True):
            to_device = self.on_device(target, size)
            host, device = (source, target) if to_device else (target, source)
            copies.append(Copy(to_device, host, device, size, batched=True))
        self._enqueue_copies(on, copies)
        return (0,) if self._fail_index else ()

    # ------------------------------------------------------------------ streams and events

    @call(1)
    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Stream]:
        if flags != self.cudaStreamNonBlocking:
            self.misuses.append("a stream that waits for the default one")
        return (self._new(Stream(self)),)

    @call(0)
    def cudaStreamSynchronize(self, stream: Any) -> None:
        on = self.stream(stream)
        self._not_in_capture()
        on.wait(on.put)
        self._raise_fault()

    @call(0)
    def cudaStreamDestroy(self, stream: Any) -> None:
        on = self.stream(stream)
        if on.capture is not None:
            self.misuses.append("a stream was destroyed while it captured")
        if on.thread is None:
            on.wait(on.put)  # it would run later
        self._destroy(on)
        with on.changed:
            on.changed.notify_all()

    @call(1)
    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Event]:
        if flags not in (self.cudaEventDefault, self.cudaEventBlockingSync):
            self.misuses.append("an event without a time")
        return (self._new(Event(blocks=flags == self.cudaEventBlockingSync)),)

    @call(0)
    def cudaEventRecord(self, event: Any, stream: Any) -> None:
        found, on = self._handle(Event, event), self.stream(stream)

        def happen() -> None:
            found.time_ns = self.tick_ns()

        on.enqueue(happen)
        found.of = on, on.put

    @call(0)
    def cudaEventSynchronize(self, event: Any) -> None:
        found = self._handle(Event, event)
        if not found.blocks:
            self.misuses.append("a thread spins on an event")
        if found.of is not None:
            stream, upto = found.of
            stream.wait(upto)
        self._raise_fault()

    @call(0)
    def cudaEventQuery(self, event: Any) -> None:
        """Not ready is an answer, which is kept as the last error all the same."""
        found = self._handle(Event, event)
        self._not_in_capture()
        if found.of is not None and found.of[0].done < found.of[1]:
            raise CallFailed(Code.cudaErrorNotReady)
        self._raise_fault()

    @call(1)
    def cudaEventElapsedTime(self, start: Any, end: Any) -> tuple[float]:
        first, last = self._handle(Event, start), self._handle(Event, end)
        for event in (first, last):
            if event.of is None:
                raise CallFailed(Code.cudaErrorInvalidResourceHandle)
            if event.of[0].done < event.of[1]:
                raise CallFailed(Code.cudaErrorNotReady)
        return ((last.time_ns - first.time_ns) / 1e6,)

    @call(0)
    def cudaEventDestroy(self, event: Any) -> None:
        self._destroy(self._handle(Event, event))

    # ------------------------------------------------------------------ captures and graphs

    @call(0)
    def cudaStreamBeginCapture(self, stream: Any, mode: int) -> None:
        on = self.stream(stream)
        if on.capture is not None:
            raise CallFailed(Code.cudaErrorIllegalState)
        if mode != d.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal:
            self.misuses.append("a capture that forbids calls to other threads")
        on.capture, on.capture_void, on.capture_thread = [], False, threading.get_ident()

    @call(1)
    def cudaStreamEndCapture(self, stream: Any) -> tuple[Graph]:
        on = self.stream(stream)
        if on.capture is None:
            raise CallFailed(Code.cudaErrorIllegalState)
        if on.capture_thread != threading.get_ident():
            on.capture_void = True
            raise CallFailed(Code.cudaErrorStreamCaptureWrongThread)
        captured, on.capture = on.capture, None
        if on.capture_void:
            raise CallFailed(Code.cudaErrorStreamCaptureInvalidated)
        return (self._new(Graph(captured)),)

    @call(1)
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[GraphExec]:
        return (self._new(GraphExec(self._handle(Graph, graph).work)),)

    @call(0)
    def cudaGraphDestroy(self, graph: Any) -> None:
        self._destroy(self._handle(Graph, graph))

    @call(0)
    def cudaGraphExecDestroy(self, graphExec: Any) -> None:
        graph = self._handle(GraphExec, graphExec)
        if graph.in_flight:
            self.misuses.append("a graph was destroyed while it ran")
        self._destroy(graph)

    @call(0)
    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> None:
        graph, on = self._handle(GraphExec, graphExec), self.stream(stream)
        if graph.in_flight:
            self.misuses.append("a graph was launched while it ran")
        graph.in_flight += 1

        def run() -> None:
            try:
                for work in graph.work:
                    work()
            finally:
                graph.in_flight -= 1

        on.enqueue(run)

    # ------------------------------------------------------------------ inside

    def _raise_injected(self, name: str) -> None:
        """Count down to the failures that were asked of a call, and raise the one that is due."""
        due = self._failures.pop(name, {})
        if later := {nth - 1: code for nth, code in due.items() if nth > 1}:
            self._failures[name] = later
        if 1 in due:
            raise CallFailed(due[1])

    def _new(self, handle: Any) -> Any:
        self._handles[handle.number] = handle
        return handle

    def _handle(self, kind: type[Any], handle: Any) -> Any:
        found = self._handles.get(int(handle))
        if not isinstance(found, kind):
            self.misuses.append(f"a {kind.__name__.lower()} that was destroyed, or is none")
            raise CallFailed(Code.cudaErrorInvalidResourceHandle)
        return found

    def _destroy(self, handle: Handle) -> None:
        handle.alive = False
        del self._handles[handle.number]

    def _raise_fault(self) -> None:
        if self.broken:
            raise CallFailed(self.broken)

    def _finish_all(self) -> None:
        for stream in self.streams():
            stream.wait(stream.put)
        self._raise_fault()

    def _captures(self) -> Iterator[Stream]:
        """The streams that capture what this thread does."""
        for stream in self.streams():
            if stream.capture is not None and stream.capture_thread == threading.get_ident():
                yield stream

    def _not_in_capture(self, code: int = Code.cudaErrorStreamCaptureUnsupported) -> None:
        """What waits may not be called during a capture, and makes it void."""
        if voided := [*self._captures()]:
            for stream in voided:
                stream.capture_void = True
            raise CallFailed(code)

    def _enqueue_copies(self, stream: Stream, copies: list[Copy]) -> None:
        for copy in copies:
            if not copy.size or not self.on_device(copy.device, copy.size) or self._crosses(copy.host, copy.size):
                raise CallFailed(Code.cudaErrorInvalidValue)
        self.copies += copies

        def run() -> None:
            for copy in reversed(copies):  # in no order among themselves
                device, host = self.memory(copy.device, copy.size), host_memory(copy.host, copy.size)
                if copy.to_device:
                    device[:] = host
                else:
                    host[:] = device

        stream.enqueue(run)

    def _crosses(self, host: int, size: int) -> bool:
        """Whether host memory begins or ends in a registration that does not hold all of it."""
        return any(
            host < start + held and start < host + size and not (start <= host and host + size <= start + held)
            for start, held in self.registrations.items()
        )
