"""An engine that reads its inputs from pinned host memory in place, beside one whose inputs are copied: a hint.

::

    copied     planes --copy--> device --engine-->
    in place   planes ---------------- engine -->      over the bus, as often as its first layers read them

Pinned memory has addresses on the device, which TensorRT takes like any others.  What is read once may arrive sooner
that way, and what is read again crosses the bus again.  A pool always copies.  Both run without a graph, one batch at
a time; outputs stay on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from time import perf_counter_ns
from typing import Any, NamedTuple

from trtpool.ipc.profiling import Phases, ProfileRequest

from .contexts import Context, Dims
from .cuda import Cuda
from .plans import Plan
from .profile_planes import Arena, Sample, Say, in_series


class _Marks(NamedTuple):
    """The stream, and events around its two parts."""

    stream: Any
    began: Any
    copied: Any
    computed: Any


def measure_mapped(
    request: ProfileRequest, batches: tuple[int, ...], cuda: Cuda, planes: Arena, say: Say
) -> dict[int, tuple[Phases, Phases]]:
    """By batch size, with inputs copied and with inputs in place; without sizes that the plan would fill up.

    Nothing for plans whose items differ in shape or share an input, and for those with several profiles.

    Args:
        request: the plan, and how long to measure.
        batches: the sizes.
        cuda: the device.
        planes: pinned memory that holds the largest batch, in one registration.
        say: called with what is being done.

    Raises:
        EngineError, CudaError: a batch failed.
    """
    found: dict[int, tuple[Phases, Phases]] = {}
    with contextlib.ExitStack() as stack:
        plan = stack.enter_context(contextlib.closing(Plan(request.source, request.engine, cuda)))
        if not plan.spec.is_uniform or len(plan.description.profiles) > 1:
            return {}
        (profile,) = plan.description.profiles
        stream = cuda.new_stream()
        stack.callback(cuda.destroy_stream, stream)
        events = [cuda.new_event() for _ in range(3)]
        for event in events:
            stack.callback(cuda.destroy_event, event)
        marks = _Marks(stream, *events)
        context = stack.enter_context(contextlib.closing(plan.new_context(stream, profile.number)))
        inputs = {tensor.name: planes.inputs[tensor.name].ctypes.data for tensor in plan.spec.inputs}
        device = {}
        for tensor in (*plan.spec.inputs, *plan.spec.outputs):
            device[tensor.name] = cuda.malloc(batches[-1] * tensor.item_bytes)
            stack.callback(cuda.free, device[tensor.name])
            context.bind(tensor.name, device[tensor.name])
        stack.callback(cuda.synchronize, stream)  # before anything is freed
        for items in batches:
            if items < profile.least:
                continue
            shapes = plan.description.set_shapes(profile, items)
            say(f"batches of {items}, with inputs in place")
            copies = [(device[one.name], inputs[one.name], items * one.item_bytes) for one in plan.spec.inputs]

            def copy(copies: list[tuple[int, int, int]] = copies) -> None:
                for target, host, size in copies:
                    cuda.copy_in(target, host, size, stream)

            copied = _series(cuda, context, shapes, marks, copy, request.seconds)
            for name, host in inputs.items():
                context.bind(name, cuda.device_address(host))
            in_place = _series(cuda, context, shapes, marks, lambda: None, request.seconds)
            for name in inputs:
                context.bind(name, device[name])
            found[items] = copied, in_place
    return found


def _series(
    cuda: Cuda, context: Context, shapes: Mapping[str, Dims], marks: _Marks, copy: Callable[[], None], seconds: float
) -> Phases:
    stream, handle = marks.stream, int(marks.stream)

    def run() -> Sample:
        cuda.clear_error()
        began_ns = perf_counter_ns()
        cuda.record(marks.began, stream)
        copy()
        cuda.record(marks.copied, stream)
        context.enqueue(shapes, handle)
        cuda.record(marks.computed, stream)
        enqueued_ns = perf_counter_ns()
        cuda.wait_event(marks.computed)
        ended_ns = perf_counter_ns()
        into, compute = cuda.elapsed_ns(marks.began, marks.copied), cuda.elapsed_ns(marks.copied, marks.computed)
        return Sample(enqueued_ns - began_ns, into, compute, 0, ended_ns - began_ns)

    return in_series(run, seconds)
