"""The parts of a fake CUDA device: errors, enums, streams, events and graphs; see `fake_cuda`."""

# ruff: noqa: N801, N815  # names as CUDA has them

from __future__ import annotations

import collections
import ctypes
import enum
import itertools
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

NET_S: Final = 60.0
"""Far more than anything takes; a wait that reaches it has failed."""


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorDevicesUnavailable = 46
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalState = 401
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorHostMemoryAlreadyRegistered = 712
    cudaErrorHostMemoryNotRegistered = 713
    cudaErrorNotSupported = 801
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureImplicit = 906
    cudaErrorStreamCaptureWrongThread = 908


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class cudaMemcpySrcAccessOrder(enum.IntEnum):
    cudaMemcpySrcAccessOrderStream = 1


class cudaMemcpyAttributes:
    srcAccessOrder: Any = None


class CallFailed(Exception):
    """Ends a call with that error."""

    def __init__(self, code: int) -> None:
        super().__init__(cudaError_t(code).name)
        self.code = cudaError_t(code)


class DeviceFault(Exception):
    """Raised by work on the device: from then on every call answers `code`."""

    def __init__(self, code: int = cudaError_t.cudaErrorIllegalAddress) -> None:
        super().__init__(cudaError_t(code).name)
        self.code = cudaError_t(code)


class Copy(NamedTuple):
    """A copy that was enqueued; addresses and bytes."""

    to_device: bool
    host: int
    device: int
    size: int
    batched: bool


Work = Callable[[], None]
_numbers = itertools.count(0x5000)


class Handle:
    """A stream, an event or a graph, which `int()` gives as CUDA would."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.alive = True

    def __int__(self) -> int:
        return self.number


class Event(Handle):
    """`of` is the last record of it: the stream, and how many pieces of work came before its end there.

    Whether it `blocks` decides how a thread waits for it: asleep, or spinning.
    """

    def __init__(self, *, blocks: bool = True) -> None:
        super().__init__()
        self.blocks = blocks
        self.of: tuple[Stream, int] | None = None
        self.time_ns = 0


class Graph(Handle):
    """What was captured."""

    def __init__(self, work: list[Work]) -> None:
        super().__init__()
        self.work = work


class GraphExec(Handle):
    """A graph that can be launched; `in_flight` counts the launches that have not ended."""

    def __init__(self, work: list[Work]) -> None:
        super().__init__()
        self.work = work
        self.in_flight = 0


class Device(Protocol):
    """What a stream needs of its device, which is a `fake_cuda.FakeRuntime`."""

    threads: bool
    held: bool
    broken: int
    misuses: list[str]

    def tick_ns(self) -> int: ...


class Stream(Handle):
    """A queue of work.

    Attributes:
        put, done: how many pieces of work were ever enqueued, and done.
        capture: what was captured so far, None outside of a capture.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.queue: collections.deque[Work] = collections.deque()
        self.put = self.done = 0
        self.capture: list[Work] | None = None
        self.capture_thread = 0
        self.capture_void = False
        self.changed = threading.Condition()
        self.held = device.held
        self.thread: threading.Thread | None = None
        if device.threads:
            self.thread = threading.Thread(target=self._serve, name=f"stream-{self.number:x}", daemon=True)
            self.thread.start()

    def enqueue(self, work: Work) -> None:
        """Put work on the stream, or into its capture."""
        if self.capture is not None:
            self.capture.append(work)
            return
        with self.changed:
            self.queue.append(work)
            self.put += 1
            self.changed.notify_all()

    def wait(self, upto: int) -> None:
        """Until `upto` pieces of work are done."""
        with self.changed:
            if self.thread is not None:
                assert self.changed.wait_for(lambda: self.done >= upto, NET_S), "the stream stands still"
                return
            while self.done < upto:
                self._step()

    def go(self) -> None:
        """Let a stream that was held go on."""
        with self.changed:
            self.held = False
            self.changed.notify_all()

    def _step(self) -> None:
        """Do the next piece of work; nothing once the device has failed."""
        work = self.queue.popleft()
        device = self.device
        device.tick_ns()
        if not device.broken:
            try:
                work()
            except DeviceFault as fault:
                device.broken = fault.code
            except Exception as error:  # noqa: BLE001  # a thread would take it to its grave
                device.misuses.append(f"work failed: {error!r}")
                device.broken = cudaError_t.cudaErrorIllegalAddress
        self.done += 1

    def _serve(self) -> None:
        with self.changed:
            while True:
                self.changed.wait_for(lambda: not self.held and (self.queue or not self.alive))
                if not self.queue:
                    return
                self._step()
                self.changed.notify_all()


def host_memory(address: int, size: int) -> npt.NDArray[np.uint8]:
    """Bytes at an address, of shape ``(size,)``."""
    memory: Any = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(memory, np.uint8)
