"""`workers.cuda` on the fake, the fake on its own promises, and both against the real bindings where they are."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.workers.fake_cuda import FakeRuntime
from tests.workers.fake_device import Copy, DeviceFault, cudaError_t, host_memory
from trtpool.ipc.errors import DeviceUnavailable, MissingExtra
from trtpool.workers import cuda as cuda_module
from trtpool.workers.cuda import Cuda, CudaError

USED = {
    name
    for node in ast.walk(ast.parse(Path(cuda_module.__file__).read_text()))
    for name in [node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)]
    if isinstance(name, str) and re.fullmatch(r"cuda[A-Z]\w+", name)
}
"""Every name of CUDA's that `workers.cuda` mentions."""

CALLS = sorted(name for name in USED if inspect.isroutine(getattr(FakeRuntime(), name, None)))


@pytest.fixture(params=[False, True], ids=["lazy", "threads"])
def runtime(request):
    return FakeRuntime(threads=request.param)


@pytest.fixture
def cuda(runtime):
    return Cuda(runtime)


# --- The real bindings ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bindings():
    return pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)


def test_the_names_that_we_use_were_found():
    assert len(CALLS) > 25
    assert {"cudaMemcpyAsync", "cudaMemcpyBatchAsync", "cudaGetDeviceCount", "cudaGraphLaunch"} <= {*CALLS}


@pytest.mark.parametrize("name", sorted(USED))
def test_the_real_bindings_and_the_fake_have_every_name_that_we_use(name, bindings):
    for where in (bindings, FakeRuntime()):
        owners = [
            where,
            *(getattr(where, enum) for enum in sorted(USED) if inspect.isclass(getattr(where, enum, None))),
        ]
        assert any(hasattr(owner, name) for owner in owners)


@pytest.mark.parametrize("name", CALLS)
def test_calls_take_and_answer_what_the_real_ones_do(name, bindings):
    documented = getattr(bindings, name).__doc__
    (given,) = re.findall(rf"^{name}\((.*)\)\n", documented)
    given = re.sub(r"\[[^]]*\]", "", given)  # commas in types
    parameters = [re.sub(r":.*", "", each).split()[-1] for each in given.split(", ") if each]
    assert [*inspect.signature(getattr(FakeRuntime(), name)).parameters] == parameters
    # In the docstring's "Returns" each value is a line of its own, and what it is is indented.
    returns = re.split(r"\n[A-Z][\w ]+\n-+\n", documented.split("Returns\n-------\n")[1])[0]
    answers = len(re.findall(r"^\S", returns, re.MULTILINE))
    if name == "cudaMemcpyBatchAsync":
        assert answers in (1, 2)  # CUDA 12.9 also answers which copy failed
    else:
        assert answers == (2 if name.startswith("cudaGetError") else 1 + values(name))


def values(name: str) -> int:
    """How many values the fake has for a call, by its answer on a broken device."""
    runtime = FakeRuntime()
    runtime.break_device()
    call = getattr(runtime, name)
    return len(call(*[0] * len(inspect.signature(call).parameters))) - 1


@pytest.mark.parametrize("code", [name for name in vars(cuda_module) if name.startswith("ERROR_")])
def test_our_error_codes_are_the_real_ones(code, bindings):
    words = code.removeprefix("ERROR_").replace("ALREADY", "HOST_MEMORY_ALREADY").split("_")
    assert getattr(bindings.cudaError_t, "cudaError" + "".join(map(str.capitalize, words))) == getattr(
        cuda_module, code
    )


@pytest.mark.parametrize("error", [*cudaError_t], ids=lambda error: error.name)
def test_the_fake_has_the_real_error_codes(error, bindings):
    assert getattr(bindings.cudaError_t, error.name) == error


# --- The device ----------------------------------------------------------------------------------


def test_the_device_is_described(cuda):
    assert (cuda.device_name(), cuda.pci_bus_id()) == ("Fake GPU", "0000:3b:00.0")
    address = cuda.malloc(1 << 20)
    assert cuda.memory() == ((1 << 30) - (1 << 20), 1 << 30)
    cuda.free(address)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count_error": 35}, "there is no NVIDIA driver here, or it is older than the CUDA of cuda-python; install a"),
        ({"count_error": 100}, "no GPU is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES"),
        ({"devices": 0}, "no GPU is visible"),
        ({"count_error": 2}, "the GPU's memory is full"),
        (
            {"count_error": 401},
            r"the GPU cannot be used: cudaGetDeviceCount: text of cudaErrorIllegalState \(.*, 401\)",
        ),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(options, words):
    with pytest.raises(DeviceUnavailable, match=words):
        Cuda(FakeRuntime(**options))


@pytest.mark.parametrize("code", [cudaError_t.cudaErrorMemoryAllocation, cudaError_t.cudaErrorDevicesUnavailable])
def test_a_device_that_is_full_or_in_use_by_another_is_refused(code):
    runtime = FakeRuntime()
    runtime.fail("cudaSetDevice", code)
    with pytest.raises(DeviceUnavailable, match="memory is full, or another process has it for itself"):
        Cuda(runtime)


def test_without_cuda_python_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trtpool\[cu13\]' or 'trtpool\[cu12\]'"):
        Cuda()


def test_an_error_names_its_call_and_code(cuda):
    with pytest.raises(CudaError) as caught:
        cuda.malloc(1 << 40)
    assert (caught.value.call, caught.value.code) == ("cudaMalloc", 2)
    assert str(caught.value) == "cudaMalloc: text of cudaErrorMemoryAllocation (cudaErrorMemoryAllocation, 2)"


# --- Work ----------------------------------------------------------------------------------------


class Buffers:
    """A host array and a device buffer of as many bytes, on a stream."""

    def __init__(self, cuda: Cuda, size: int = 64) -> None:
        self.cuda = cuda
        self.host = np.arange(size, dtype=np.uint8)
        self.address = self.host.ctypes.data
        self.device = cuda.malloc(size)
        self.stream = cuda.new_stream()
        cuda.zero(self.device, size)

    def on_device(self) -> list[int]:
        return [*map(int, host_memory(self.device, len(self.host)))]

    def close(self) -> None:
        self.cuda.destroy_stream(self.stream)
        self.cuda.free(self.device)


@pytest.fixture
def buffers(cuda, runtime):
    made = Buffers(cuda)
    yield made
    made.close()
    runtime.check()


def test_copies_run_in_order(cuda, buffers):
    cuda.copy_in(buffers.device, buffers.address, 64, buffers.stream)
    cuda.copy_in(buffers.device, buffers.address + 32, 8, buffers.stream)
    cuda.copy_out(buffers.address + 60, buffers.device, 4, buffers.stream)
    cuda.synchronize(buffers.stream)
    assert buffers.on_device() == [*range(32, 40), *range(8, 64)]
    assert buffers.host[60:].tolist() == [32, 33, 34, 35]


def test_a_lazy_stream_works_up_to_the_event_that_is_waited_for():
    cuda = Cuda(runtime := FakeRuntime())
    buffers = Buffers(cuda)
    event = cuda.new_event()
    cuda.copy_in(buffers.device, buffers.address, 8, buffers.stream)
    cuda.record(event, buffers.stream)
    cuda.copy_in(buffers.device, buffers.address + 8, 8, buffers.stream)
    assert buffers.on_device()[:2] == [0, 0]
    cuda.wait_event(event)
    assert buffers.on_device()[:2] == [0, 1]
    cuda.synchronize(buffers.stream)
    assert buffers.on_device()[:2] == [8, 9]
    cuda.destroy_event(event)
    buffers.close()
    runtime.check()


def test_a_stream_that_is_held_works_when_it_may():
    cuda = Cuda(runtime := FakeRuntime(threads=True, held=True))
    buffers = Buffers(cuda)
    cuda.copy_in(buffers.device, buffers.address, 8, buffers.stream)
    waited = threading.Thread(target=cuda.synchronize, args=[buffers.stream])
    waited.start()
    assert buffers.on_device()[1] == 0
    runtime.go()
    waited.join()
    assert buffers.on_device()[1] == 1
    buffers.close()


def test_events_measure_time(cuda, buffers):
    events = [cuda.new_event() for _ in range(3)]
    for event in events:
        cuda.record(event, buffers.stream)
        cuda.copy_in(buffers.device, buffers.address, 8, buffers.stream)
    cuda.wait_event(events[2])
    first, second = cuda.elapsed_ns(*events[:2]), cuda.elapsed_ns(*events[1:])
    assert min(first, second) > 0
    assert cuda.elapsed_ns(events[0], events[2]) == pytest.approx(first + second, abs=2)
    for event in events:
        cuda.destroy_event(event)


def test_times_of_events_that_have_not_happened_are_refused():
    cuda = Cuda(FakeRuntime())
    events, stream = [cuda.new_event(), cuda.new_event()], cuda.new_stream()
    with pytest.raises(CudaError, match="InvalidResourceHandle"):
        cuda.elapsed_ns(*events)
    for event in events:
        cuda.record(event, stream)
    with pytest.raises(CudaError, match="NotReady"):
        cuda.elapsed_ns(*events)


def test_whether_an_event_has_happened_is_asked_without_waiting():
    cuda = Cuda(runtime := FakeRuntime(threads=True, held=True))
    event, stream = cuda.new_event(), cuda.new_stream()
    assert cuda.ended(event), "it was never recorded"
    cuda.record(event, stream)
    assert not cuda.ended(event)
    assert runtime.last_error == cudaError_t.cudaErrorNotReady
    cuda.clear_error()
    assert not runtime.last_error
    runtime.go()
    cuda.synchronize(stream)
    assert cuda.ended(event)


def test_an_event_that_is_asked_in_a_capture_makes_it_void(cuda, runtime, buffers):
    event = cuda.new_event()
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureUnsupported"):
        cuda.capture(lambda: cuda.ended(event) and None, buffers.stream)
    asked = []

    def meanwhile() -> None:
        thread = threading.Thread(target=lambda: asked.append(cuda.ended(event)))
        thread.start()
        thread.join()

    cuda.destroy_graph(cuda.capture(meanwhile, buffers.stream))
    assert asked == [True], "other threads may ask"
    cuda.destroy_event(event)


def test_the_fake_notices_a_thread_that_spins():
    cuda = Cuda(runtime := FakeRuntime())
    cuda.wait_event(cuda.new_event())
    assert not runtime.misuses
    cuda.wait_event(cuda.new_event(blocks=False))
    assert runtime.misuses == ["a thread spins on an event"]


@pytest.mark.parametrize("fail_index", [False, True], ids=["13", "12.9"])
def test_batched_copies_go_both_ways(fail_index):
    cuda = Cuda(runtime := FakeRuntime(fail_index=fail_index))
    buffers = Buffers(cuda)
    assert cuda.copies_batches
    hosts, devices = [buffers.address, buffers.address + 16], [buffers.device + 32, buffers.device]
    cuda.copy_batch(devices, hosts, [16, 8], buffers.stream)
    cuda.synchronize(buffers.stream)
    assert buffers.on_device() == [*range(16, 24), *[0] * 24, *range(16), *[0] * 16]
    cuda.copy_batch([buffers.address], [buffers.device + 32], [4], buffers.stream)
    cuda.synchronize(buffers.stream)
    assert runtime.copies == [
        Copy(True, hosts[0], devices[0], 16, batched=True),
        Copy(True, hosts[1], devices[1], 8, batched=True),
        Copy(False, buffers.address, buffers.device + 32, 4, batched=True),
    ]
    with pytest.raises(CudaError, match="cudaMemcpyBatchAsync"):
        cuda.copy_batch([buffers.device], [buffers.address], [65], buffers.stream)


def test_rows_are_copied_side_by_side_and_back(cuda, runtime, buffers):
    buffers.host[:] = range(64)
    cuda.copy_rows(buffers.address, 10, buffers.device, 4, 3, buffers.stream, to_device=True)
    cuda.synchronize(buffers.stream)
    assert buffers.on_device()[:13] == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23, 0]
    cuda.copy_rows(buffers.address + 31, 10, buffers.device, 4, 3, buffers.stream, to_device=False)
    cuda.synchronize(buffers.stream)
    assert buffers.host[31:56].tolist() == [
        0, 1, 2, 3, *range(35, 41), 10, 11, 12, 13, *range(45, 51), 20, 21, 22, 23, 55,
    ]  # fmt: skip
    with pytest.raises(CudaError, match="cudaMemcpy2DAsync"):
        cuda.copy_rows(buffers.address, 3, buffers.device, 4, 3, buffers.stream, to_device=True)


@pytest.mark.parametrize("options", [{"copies_batches": False}, {"driver": 12070}], ids=str)
def test_an_old_cuda_copies_no_batches(options):
    assert not Cuda(FakeRuntime(**options)).copies_batches


def test_a_capture_runs_when_it_is_launched(cuda, runtime, buffers):
    graph = cuda.capture(lambda: cuda.copy_in(buffers.device, buffers.address, 8, buffers.stream), buffers.stream)
    cuda.synchronize(buffers.stream)
    assert buffers.on_device()[7] == 0
    for number in (70, 71):
        buffers.host[7] = number
        cuda.launch(graph, buffers.stream)
        cuda.synchronize(buffers.stream)
        assert buffers.on_device()[7] == number
    assert runtime.left()["graphexec"] == 1
    cuda.destroy_graph(graph)


def synchronized(buffers: Buffers) -> None:
    buffers.cuda.synchronize(buffers.stream)


def allocated(buffers: Buffers) -> None:
    buffers.cuda.malloc(8)


def batched(buffers: Buffers) -> None:
    buffers.cuda.copy_batch([buffers.device], [buffers.address], [8], buffers.stream)


def ignored(buffers: Buffers) -> None:
    """A library that goes on after a refusal: the capture is void all the same."""
    with pytest.raises(CudaError, match="900"):
        batched(buffers)


def interrupted(buffers: Buffers) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("spoil", [synchronized, allocated, batched, ignored, interrupted])
def test_after_a_failed_capture_the_stream_is_as_before(spoil, cuda, runtime, buffers):
    with pytest.raises((CudaError, KeyboardInterrupt)):
        cuda.capture(lambda: spoil(buffers), buffers.stream)
    assert not runtime.last_error
    cuda.copy_in(buffers.device, buffers.address, 8, buffers.stream)
    cuda.synchronize(buffers.stream)
    assert buffers.on_device()[7] == 7


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_capture_that_cuda_refuses_leaves_no_graph(call, cuda, runtime, buffers):
    runtime.fail(call, cudaError_t.cudaErrorMemoryAllocation)
    with pytest.raises(CudaError, match=call):
        cuda.capture(lambda: None, buffers.stream)
    assert not {"graph", "graphexec"} & {*runtime.left()}
    runtime.stream(buffers.stream).capture = None  # the failure that we asked for left it capturing


@pytest.mark.parametrize(
    "call",
    [
        lambda cuda, b: cuda.copy_in(b.device, b.address, 65, b.stream),
        lambda cuda, b: cuda.copy_in(b.device + 60, b.address, 5, b.stream),
        lambda cuda, b: cuda.copy_out(b.address, b.address, 4, b.stream),
        lambda cuda, b: cuda.zero(b.device + 1, 64),
        lambda cuda, b: cuda.free(b.device + 256),
        lambda cuda, b: cuda.malloc(0),
    ],
    ids=["too long", "beyond the end", "not on the device", "zero beyond the end", "never allocated", "nothing"],
)
def test_memory_that_is_not_the_devices_is_refused(call, cuda, buffers):
    with pytest.raises(CudaError, match="cudaErrorInvalidValue"):
        call(cuda, buffers)


def test_a_fault_is_told_by_every_call_after_it(cuda, runtime):
    stream, event = cuda.new_stream(), cuda.new_event()

    def fault() -> None:
        raise DeviceFault

    runtime.stream(stream).enqueue(fault)
    cuda.record(event, stream)
    for call in (
        lambda: cuda.wait_event(event),
        lambda: cuda.ended(event),
        lambda: cuda.malloc(8),
        cuda.memory,
        lambda: cuda.synchronize(stream),
    ):
        with pytest.raises(CudaError, match="cudaErrorIllegalAddress, 700"):
            call()
    cuda.clear_error()
    with pytest.raises(CudaError, match="700"):
        cuda.memory()


# --- What the fake notices -----------------------------------------------------------------------


def spent(cuda: Cuda, handle: Any, other: Any) -> None:
    cuda.destroy_event(other)
    cuda.record(other, handle)


def swapped(cuda: Cuda, handle: Any, other: Any) -> None:
    cuda.record(handle, other)


@pytest.mark.parametrize("misuse", [spent, swapped])
def test_the_fake_notices_handles_that_are_none(misuse):
    cuda = Cuda(runtime := FakeRuntime())
    with pytest.raises(CudaError, match="InvalidResourceHandle"):
        misuse(cuda, cuda.new_stream(), cuda.new_event())
    with pytest.raises(AssertionError):
        runtime.check()


def test_the_fake_notices_a_graph_that_is_used_while_it_runs():
    cuda = Cuda(runtime := FakeRuntime())
    stream = cuda.new_stream()
    graph = cuda.capture(lambda: None, stream)
    cuda.launch(graph, stream)
    assert not runtime.misuses
    cuda.launch(graph, stream)
    cuda.destroy_graph(graph)
    assert runtime.misuses == ["a graph was launched while it ran", "a graph was destroyed while it ran"]


def test_the_fake_notices_what_is_left():
    cuda = Cuda(runtime := FakeRuntime())
    host = np.zeros(8192, np.uint8)
    cuda.new_stream()
    cuda.new_event()
    cuda.malloc(1)
    cuda.host_register(host.ctypes.data, 8192)
    assert runtime.left() == {"stream": 1, "event": 1, "memory": 1, "registration": 1}


def test_copies_across_the_bound_of_a_registration_are_refused():
    cuda = Cuda(FakeRuntime())
    buffers = Buffers(cuda, 4096)
    cuda.host_register(buffers.address, 1024)
    cuda.host_register(buffers.address + 1024, 1024)
    for start, size, fits in ((0, 1024, True), (1024, 8, True), (1020, 8, False), (2040, 9, False), (2048, 99, True)):
        if fits:
            cuda.copy_in(buffers.device, buffers.address + start, size, buffers.stream)
        else:
            with pytest.raises(CudaError, match="cudaErrorInvalidValue"):
                cuda.copy_in(buffers.device, buffers.address + start, size, buffers.stream)
    with pytest.raises(CudaError, match="712"):
        cuda.host_register(buffers.address + 2000, 100)


def test_the_fake_can_be_imported_in_place_of_the_bindings(monkeypatch):
    runtime: Any = FakeRuntime()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    assert importlib.import_module("cuda.bindings.runtime") is runtime
    assert Cuda().device_name() == "Fake GPU"
