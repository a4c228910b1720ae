"""The CUDA runtime calls that a worker makes, each turned into an exception when it fails.

Everything goes through one `Cuda` object, so that tests can put a recorder or a device of their own in its place.
Addresses are ints, sizes are bytes, and streams, events and graphs are the bindings' own handles, made once: a call
then costs some 0.5 us beyond CUDA's own time.

See the CUDA Runtime API; `cuda-python` 12.9 and 13 have the same calls under the same names.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from trtpool.ipc.errors import DeviceUnavailable, MissingExtra

ERROR_INVALID_VALUE: Final = 1
ERROR_MEMORY_ALLOCATION: Final = 2
ERROR_INSUFFICIENT_DRIVER: Final = 35
ERROR_DEVICES_UNAVAILABLE: Final = 46
ERROR_NO_DEVICE: Final = 100
ERROR_NOT_READY: Final = 600
ERROR_ALREADY_REGISTERED: Final = 712
ERROR_NOT_SUPPORTED: Final = 801


class CudaError(Exception):
    """A CUDA call failed.

    Attributes:
        call: its name.
        code: the `cudaError_t`.
    """

    def __init__(self, call: str, code: int, name: str, text: str) -> None:
        super().__init__(f"{call}: {text} ({name}, {code})")
        self.call = call
        self.code = code


def load_bindings(name: str) -> Any:
    """The module `cuda.bindings.NAME`.

    Raises:
        MissingExtra: cuda-python is not installed.
    """
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise MissingExtra(
            f"cuda-python cannot be imported ({error}); install it for the CUDA that the driver runs, which nvidia-smi "
            "shows: pip install 'trtpool[cu13]' or 'trtpool[cu12]'"
        ) from error


def load_runtime() -> Any:
    """The module `cuda.bindings.runtime`; see `load_bindings`."""
    return load_bindings("runtime")


class Cuda:
    """The current device of this process: the first that it sees.

    Args:
        runtime: the module to call; `cuda.bindings.runtime` by default.

    Raises:
        MissingExtra: cuda-python is not installed.
        DeviceUnavailable: there is no driver, or no GPU.
    """

    def __init__(self, runtime: Any = None) -> None:
        rt = self._rt = load_runtime() if runtime is None else runtime
        # Without a driver some TensorRT runtimes crash the process: so ask here, before one is made.
        try:
            (count,) = self._call("cudaGetDeviceCount")
            if not count:
                raise DeviceUnavailable("no GPU is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES")
            self._call("cudaSetDevice", 0)
        except CudaError as error:
            raise DeviceUnavailable(_no_device(error)) from error
        kinds = rt.cudaMemcpyKind
        self.h2d, self.d2h = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._thread_local = rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        # The hot calls, looked up once; whoever calls them raises `error` of what they answer.
        self.memcpy_async: Callable[..., Any] = rt.cudaMemcpyAsync
        self.graph_launch: Callable[..., Any] = rt.cudaGraphLaunch
        self._event_record: Callable[..., Any] = rt.cudaEventRecord
        self._event_query: Callable[..., Any] = rt.cudaEventQuery
        self._event_synchronize: Callable[..., Any] = rt.cudaEventSynchronize
        self._event_elapsed: Callable[..., Any] = rt.cudaEventElapsedTime
        self._batch_attributes = self._make_batch_attributes()

    # ------------------------------------------------------------------ the device

    def device_name(self) -> str:
        """Such as ``"NVIDIA H100 80GB HBM3"``."""
        (properties,) = self._call("cudaGetDeviceProperties", 0)
        name: bytes | str = properties.name
        return name.decode() if isinstance(name, bytes) else name

    def pci_bus_id(self) -> str:
        """Such as ``"0000:1b:00.0"``."""
        (raw,) = self._call("cudaDeviceGetPCIBusId", 32, 0)
        return str(raw.split(b"\0", 1)[0].decode()).lower()

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of device memory."""
        free, total = self._call("cudaMemGetInfo")
        return free, total

    # ------------------------------------------------------------------ host memory

    def host_register(self, address: int, size: int) -> None:
        """Pin `size` bytes of host memory at `address`, for all contexts of this process."""
        rt = self._rt
        self._call("cudaHostRegister", address, size, rt.cudaHostRegisterPortable | rt.cudaHostRegisterMapped)

    def host_unregister(self, address: int) -> None:
        """Undo `host_register` of the memory that begins at `address`."""
        self._call("cudaHostUnregister", address)

    def device_address(self, address: int) -> int:
        """Where the device sees pinned host memory."""
        (mapped,) = self._call("cudaHostGetDevicePointer", address, 0)
        return int(mapped)

    def clear_error(self) -> None:
        """Forget the last error of this thread, which a library that asks for it would take for its own."""
        self._rt.cudaGetLastError()

    # ------------------------------------------------------------------ device memory

    def malloc(self, size: int) -> int:
        """Allocate `size` bytes of device memory, aligned to 256 at least."""
        (address,) = self._call("cudaMalloc", size)
        return int(address)

    def free(self, address: int) -> None:
        """Free device memory."""
        self._call("cudaFree", address)

    def zero(self, address: int, size: int) -> None:
        """Fill device memory with zeros."""
        self._call("cudaMemset", address, 0, size)

    # ------------------------------------------------------------------ copies

    def copy_in(self, device: int, host: int, size: int, stream: Any) -> None:
        """Enqueue a copy of `size` bytes to the device."""
        (error,) = self.memcpy_async(device, host, size, self.h2d, stream)
        if error:
            raise self.error("cudaMemcpyAsync", error)

    def copy_out(self, host: int, device: int, size: int, stream: Any) -> None:
        """Enqueue a copy of `size` bytes from the device."""
        (error,) = self.memcpy_async(host, device, size, self.d2h, stream)
        if error:
            raise self.error("cudaMemcpyAsync", error)

    def copy_rows(
        self, host: int, pitch: int, device: int, width: int, height: int, stream: Any, *, to_device: bool
    ) -> None:
        """Enqueue a copy of `height` rows of `width` bytes, `pitch` apart on the host, side by side on the device."""
        ends = (device, width, host, pitch) if to_device else (host, pitch, device, width)
        (error,) = self._rt.cudaMemcpy2DAsync(*ends, width, height, self.h2d if to_device else self.d2h, stream)
        if error:
            raise self.error("cudaMemcpy2DAsync", error)

    @property
    def copies_batches(self) -> bool:
        """Whether `copy_batch` can be used."""
        return self._batch_attributes is not None

    def copy_batch(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: Any) -> None:
        """Enqueue several copies as one call, in no order among themselves; to or from the device, by address."""
        error, *_ = self._rt.cudaMemcpyBatchAsync(
            targets, sources, sizes, len(sizes), self._batch_attributes, [0], 1, stream
        )
        if error:
            raise self.error("cudaMemcpyBatchAsync", error)

    def _make_batch_attributes(self) -> Any:
        rt = self._rt
        if not hasattr(rt, "cudaMemcpyBatchAsync"):  # CUDA 12.8 brought it
            return None
        (driver,) = self._call("cudaDriverGetVersion")
        if driver < 12080:
            return None
        attributes = rt.cudaMemcpyAttributes()
        attributes.srcAccessOrder = rt.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
        return [attributes]

    # ------------------------------------------------------------------ streams, events, graphs

    def new_stream(self) -> Any:
        """A stream that does not wait for the default one."""
        (stream,) = self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking)
        return stream

    def synchronize(self, stream: Any) -> None:
        """Wait until all of a stream is done."""
        self._call("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream; what is in it still runs."""
        self._call("cudaStreamDestroy", stream)

    def new_event(self, *, blocks: bool = True) -> Any:
        """An event with a time; threads wait for it without spinning, or, unless it `blocks`, need not wait for it."""
        rt = self._rt
        (event,) = self._call("cudaEventCreateWithFlags", rt.cudaEventBlockingSync if blocks else rt.cudaEventDefault)
        return event

    def destroy_event(self, event: Any) -> None:
        """Destroy an event."""
        self._call("cudaEventDestroy", event)

    def record(self, event: Any, stream: Any) -> None:
        """Enqueue an event."""
        (error,) = self._event_record(event, stream)
        if error:
            raise self.error("cudaEventRecord", error)

    def wait_event(self, event: Any) -> None:
        """Block until the event has happened; other threads of Python run meanwhile.

        Raises:
            CudaError: also for anything that failed on the device before.
        """
        (error,) = self._event_synchronize(event)
        if error:
            raise self.error("cudaEventSynchronize", error)

    def ended(self, event: Any) -> bool:
        """Whether the event has happened.

        If not, CUDA keeps this answer as its last error: see `clear_error`.

        Raises:
            CudaError: also for anything that failed on the device before.
        """
        (error,) = self._event_query(event)
        if not error:
            return True
        if error != ERROR_NOT_READY:
            raise self.error("cudaEventQuery", error)
        return False

    def elapsed_ns(self, start: Any, end: Any) -> int:
        """Nanoseconds between two events that have happened, to some 0.5 us."""
        error, milliseconds = self._event_elapsed(start, end)
        if error:
            raise self.error("cudaEventElapsedTime", error)
        return int(milliseconds * 1e6)

    def recorder(self, event: Any, stream: Any) -> Callable[[], Any]:
        """`cudaEventRecord` of an event on a stream, for hot paths: see `error`."""
        return functools.partial(self._event_record, event, stream)

    def stopwatch(self, start: Any, end: Any) -> Callable[[], Any]:
        """`cudaEventElapsedTime` between two events, for hot paths: see `error`."""
        return functools.partial(self._event_elapsed, start, end)

    def capture(self, enqueue: Callable[[], None], stream: Any) -> Any:
        """What `enqueue` puts on `stream`, as an executable graph; nothing of it runs.

        Raises:
            CudaError: something in it cannot be captured; the stream can be used as before.
        """
        try:
            return self._capture(enqueue, stream)
        except BaseException:
            self.clear_error()
            raise

    def _capture(self, enqueue: Callable[[], None], stream: Any) -> Any:
        self._call("cudaStreamBeginCapture", stream, self._thread_local)
        try:
            enqueue()
        except BaseException:
            # End the capture, which is void, so that the stream is a stream again.
            _, graph = self._rt.cudaStreamEndCapture(stream)
            if graph is not None and int(graph):
                self._rt.cudaGraphDestroy(graph)
            raise
        (graph,) = self._call("cudaStreamEndCapture", stream)
        try:
            (executable,) = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._rt.cudaGraphDestroy(graph)
        return executable

    def launch(self, graph: Any, stream: Any) -> None:
        """Enqueue a graph."""
        (error,) = self.graph_launch(graph, stream)
        if error:
            raise self.error("cudaGraphLaunch", error)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy a graph that is not running."""
        self._call("cudaGraphExecDestroy", graph)

    # ------------------------------------------------------------------ errors

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        error, *values = getattr(self._rt, name)(*arguments)
        if error:
            raise self.error(name, error)
        return tuple(values)

    def error(self, call: str, error: Any) -> CudaError:
        """What to raise for an error that a call answered."""
        rt = self._rt
        _, name = rt.cudaGetErrorName(error)
        _, text = rt.cudaGetErrorString(error)
        return CudaError(call, int(error), name.decode(), text.decode())


def _no_device(error: CudaError) -> str:
    if error.code == ERROR_NO_DEVICE:
        return "no GPU is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES"
    if error.code == ERROR_INSUFFICIENT_DRIVER:
        return (
            "there is no NVIDIA driver here, or it is older than the CUDA of cuda-python; install a driver, or the "
            "cuda-python for its CUDA (nvidia-smi shows it): pip install 'trtpool[cu12]'"
        )
    if error.code in (ERROR_MEMORY_ALLOCATION, ERROR_DEVICES_UNAVAILABLE):  # the second was seen with 32 MiB free
        return (
            "the GPU's memory is full, or another process has it for itself; end what else uses it (nvidia-smi shows "
            "what)"
        )
    return f"the GPU cannot be used: {error}"
