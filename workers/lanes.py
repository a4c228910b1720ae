"""A lane: one batch at a time from the arena through the GPU and back.

::

    stream of the lane, in order
    began | copy in | copied | engine: graph or enqueue | computed | copy out | done
            |                  |                                     |
            planes -> device   device buffers, bound once            device -> planes

Everything is made when the engine is bound; a launch allocates nothing on the device and waits for nothing.  Several
lanes overlap: while one computes, the next copies in and the one before copies out.  Each run of adjacent slots is one
copy straight from the plane, at the bus' full speed; several runs go as one `cudaMemcpyBatchAsync` where CUDA has it,
which pays from about three copies on (seen on an H100: 3 us for each call from Python).  What depends on the shapes of
items is worked out once for each (`forms`).

The engine's work for a batch size is captured into a CUDA graph when that size comes for the second time:
`execute_async_v3` costs the CPU 13 us for a tiny network and 270 to 525 us for ResNet-50, a graph launch 5 to 70 (seen
on an H100).  A graph freezes shapes and addresses, so the copies, whose addresses change, stay outside.  Where items
differ in shape, sizes and shapes together must come more often before one is made, since a capture takes longer than it
saves at once.

An output whose shape depends on the data is told while the batch is enqueued, for which TensorRT waits for the device,
and the lane's thread with it; there are no graphs then.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Final

from .contexts import Context
from .copies import BATCH_COPIES, Buffer, Copies
from .cuda import ERROR_MEMORY_ALLOCATION, Cuda, CudaError
from .engine import Batch, BatchRefused, EngineError, Shapes, Times
from .forms import Form, Forms, HostTensor, Step
from .plans import Plan

log = logging.getLogger("trtpool.worker")

MAX_GRAPHS: Final = 64
"""Graphs kept by a lane, one for a batch size, or for that and a shape; beyond that the least recently used goes."""

OFTEN: Final = 8
"""How often a batch size must come in one shape, where items differ, until it is captured."""

MAX_COUNTED: Final = 4096
"""Sizes and shapes whose batches a lane counts."""

TOLD_BYTES: Final = 256 * 2**20
"""Most memory for an output whose shape depends on the data, beyond what its rows need: TensorRT may want room for the
most that there could be, before it knows how much there is."""


class Lane:
    """See the module's docstring.

    Args:
        cuda: the device.
        plan: the engine.
        inputs, outputs: the planes.
        items_per_slot: of the planes.
        max_batch: items in the largest batch.
        bounds: host addresses that no copy may cross.
        graphs: whether to capture the engine's work.
        blocks: whether `block` is used; else nothing is prepared for it.

    Raises:
        EngineError: the plan allows no more lanes, or does not run.
        CudaError: among others when the device's memory is too small.
        DeviceUnavailable: the device's memory is too small for the engine's own scratch.
    """

    def __init__(
        self,
        cuda: Cuda,
        plan: Plan,
        inputs: Sequence[HostTensor],
        outputs: Sequence[HostTensor],
        items_per_slot: int,
        max_batch: int,
        bounds: Sequence[int],
        *,
        graphs: bool,
        blocks: bool,
    ) -> None:
        self._cuda = cuda
        self._bounds = bounds
        self._plan = plan.description
        self._max_batch = max_batch
        self._graphs: OrderedDict[Hashable, Any] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._often = OFTEN if any(tensor.spec.least is not None for tensor in inputs) else 2
        self._capture = graphs and not self._plan.told
        self._shapes: Shapes = ()
        self._filled = 0
        self._is_closed = False
        with contextlib.ExitStack() as stack:
            self._stream = cuda.new_stream()
            stack.callback(cuda.destroy_stream, self._stream)
            self._handle = int(self._stream)
            began, copied, computed = (self._event(stack, blocks=False) for _ in range(3))
            self._done = self._event(stack, blocks=blocks)
            self._record_began, self._record_copied, self._record_computed, self._record_done = (
                cuda.recorder(event, self._stream) for event in (began, copied, computed, self._done)
            )
            self._phases = (
                cuda.stopwatch(began, copied), cuda.stopwatch(copied, computed), cuda.stopwatch(computed, self._done),
            )  # fmt: skip
            contexts: dict[int, Context] = {}
            for profile in self._plan.profiles:
                contexts[profile.number] = plan.new_context(self._stream, profile.number)
                stack.callback(contexts[profile.number].close)
            devices = {tensor.spec.name: self._allocate(contexts, tensor, stack) for tensor in (*inputs, *outputs)}
            # One run is the usual batch, and these are few copies.
            few = -1 if bounds else BATCH_COPIES - 1 if cuda.copies_batches else len(devices)
            self._forms = Forms(self._plan, contexts, inputs, outputs, devices, items_per_slot, few)
            self._uniform = None if self._often == OFTEN else self._forms.find(())
            stack.callback(self._drop_graphs)
            self._run_first()
            self._stack = stack.pop_all()

    def _event(self, stack: contextlib.ExitStack, *, blocks: bool) -> Any:
        event = self._cuda.new_event(blocks=blocks)
        stack.callback(self._cuda.destroy_event, event)
        return event

    def _allocate(self, contexts: dict[int, Context], tensor: HostTensor, stack: contextlib.ExitStack) -> int:
        """Device memory for a batch of `tensor`, bound to the contexts and zeroed."""
        spec = tensor.spec
        room = 1 if spec.shared else max(self._max_batch, *(profile.least for profile in self._plan.profiles))
        size = room * spec.item_bytes
        told = spec.name in self._plan.told
        most = min(TOLD_BYTES, max(self._most_bytes(contexts, spec.name))) if told else 0
        try:
            address = self._cuda.malloc(max(size, most))
        except CudaError as error:
            if most <= size or error.code != ERROR_MEMORY_ALLOCATION:
                raise
            self._cuda.clear_error()
            most, address = 0, self._cuda.malloc(size)
        size = max(size, most)
        stack.callback(self._cuda.free, address)
        self._cuda.zero(address, size)
        for context in contexts.values():
            if told:
                context.bind_within(spec.name, address, size)
            else:
                context.bind(spec.name, address)
        return address

    def _most_bytes(self, contexts: dict[int, Context], name: str) -> Iterator[int]:
        """The most that an output may need, as each context says for the largest shapes of its profile."""
        for profile in self._plan.profiles:
            context = contexts[profile.number]
            context.set_shapes(self._plan.set_shapes(profile, max(profile.least, min(profile.most, self._max_batch))))
            yield context.most_bytes(name)

    def _run_first(self) -> None:
        """Run batches of zeros, so that modules are loaded and the first request is not the slowest."""
        for profile in self._plan.profiles:
            for items in sorted({min(profile.least, self._max_batch), min(profile.most, self._max_batch)}):
                with contextlib.suppress(BatchRefused):  # real items may have other answers than zeros
                    self._run_once(self._forms.find(self._plan.best_shapes(profile)), items)

    def _run_once(self, form: Form, items: int) -> None:
        step = self._forms.step(form, items)
        if step.key in self._seen:
            return
        self._seen[step.key] = 1
        self._compute(step)
        self._cuda.synchronize(self._stream)

    def warm_up(self, items: int, shapes: Shapes | None = None) -> None:
        """Run a batch size, and capture it, unless that was done.

        Where items differ in shape it is run in the best ones, and not captured; in `shapes`, as often as it takes.

        Raises:
            EngineError, CudaError: it does not run.
        """
        if shapes:
            step = self._forms.step(self._forms.find(shapes), items)
            for _ in range(self._often):
                if step.key not in self._graphs:
                    self._compute(step)
            self._cuda.synchronize(self._stream)
            return
        for profile in self._plan.profiles:
            if items <= profile.most:
                self._run_once(self._forms.find(self._plan.best_shapes(profile)), items)

    def has_graph(self, items: int, shapes: Shapes = ()) -> bool:
        """Whether a batch of `items` items launches a CUDA graph, as it stands."""
        return self._forms.step(self._forms.find(shapes), items).key in self._graphs

    def launch(self, batch: Batch, items: int, shapes: Shapes = ()) -> None:
        """Enqueue a batch of `items` items, which fits the planes; see `LaneEngine.launch`.

        Raises:
            BatchRefused: it, or its answer, does not fit; nothing of it runs any more.
            EngineError, CudaError: nothing of it runs any more.
        """
        if self._is_closed:
            raise EngineError("the engine was closed")
        form = self._uniform
        if form is None or shapes:
            form = self._forms.find(shapes)
        step = form.steps.get(items)
        if step is None:
            step = self._forms.step(form, items)
        single = len(batch) == 1
        try:
            self._record(self._record_began)
            if single and form.few_inputs:
                self._copy_run_in(form.inputs, batch[0].first, items)
            else:
                self._copy_in(form, batch, step.items - items)
            self._record(self._record_copied)
            self._compute(step)
            self._record(self._record_computed)
            self._shapes = form.shapes
            if single and form.few_outputs:
                self._copy_run_out(form.outputs, batch[0].first, items)
            else:
                self._copy_out(form, step, batch)
            self._record(self._record_done)
        except BaseException:
            with contextlib.suppress(CudaError):
                self._cuda.synchronize(self._stream)
            raise

    def poll(self) -> Times | None:
        """The batch's times if it has ended; see `LaneEngine.poll`."""
        if not self._cuda.ended(self._done):
            return None
        copy_in, compute, copy_out = self._phases
        took = self._elapsed_ns(copy_in), self._elapsed_ns(compute), self._elapsed_ns(copy_out)
        return Times(*took, 0, self._shapes, self._filled)

    def ended(self) -> bool:
        """Whether the batch has ended; see `LaneEngine.ended`."""
        return self._cuda.ended(self._done)

    def block(self) -> None:
        """Wait until the batch has ended; see `LaneEngine.block`."""
        self._cuda.wait_event(self._done)

    def _elapsed_ns(self, phase: Callable[[], Any]) -> int:
        error, milliseconds = phase()
        if error:
            raise self._cuda.error("cudaEventElapsedTime", error)
        return int(milliseconds * 1e6)

    def close(self) -> None:
        """Wait for what runs and free everything.  Again: nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._cuda.synchronize(self._stream)
            self._stack.close()
        except CudaError as error:  # after a fault nothing can be freed, and nothing needs to be
            self._cuda.clear_error()
            log.debug("a lane was not freed: %s", error)

    # ------------------------------------------------------------------ parts of a launch

    def _record(self, recorder: Callable[[], Any]) -> None:
        (error,) = recorder()
        if error:
            raise self._cuda.error("cudaEventRecord", error)

    def _copy_run_in(self, buffers: Sequence[Buffer], first: int, items: int) -> None:
        """Copies to the device of one run of items that fill their rows, with no bounds."""
        cuda, stream = self._cuda, self._stream
        for address, item_bytes, slot_bytes, device, _ in buffers:
            (error,) = cuda.memcpy_async(device, address + first * slot_bytes, items * item_bytes, cuda.h2d, stream)
            if error:
                raise cuda.error("cudaMemcpyAsync", error)

    def _copy_run_out(self, buffers: Sequence[Buffer], first: int, items: int) -> None:
        """Copies from the device of one run of items that fill their rows, with no bounds."""
        cuda, stream = self._cuda, self._stream
        for address, item_bytes, slot_bytes, device, _ in buffers:
            (error,) = cuda.memcpy_async(address + first * slot_bytes, device, items * item_bytes, cuda.d2h, stream)
            if error:
                raise cuda.error("cudaMemcpyAsync", error)

    def _copy_in(self, form: Form, batch: Batch, missing: int) -> None:
        """Copies of any batch to the device; `missing` items more are run."""
        copies = Copies(self._bounds)
        # What lies on the device fills up a batch, unless the shape of the answer may depend on it.
        self._filled = filled = missing if self._plan.told else 0
        for buffer in form.shared:
            copies.add_shared(buffer, batch)
        for buffer in form.inputs:
            end = copies.add(buffer, batch)
            if filled:
                copies.add_last_again(buffer, batch, end, filled)
        copies.enqueue(self._cuda, self._stream, to_device=True)

    def _copy_out(self, form: Form, step: Step, batch: Batch) -> None:
        """Copies of any batch from the device; notes the shapes of outputs that only the run told."""
        outputs = form.outputs
        if self._plan.told:
            outputs, self._shapes = self._forms.told(form, step)
        copies = Copies(self._bounds)
        for buffer in outputs:
            copies.add(buffer, batch)
        copies.enqueue(self._cuda, self._stream, to_device=False)

    def _compute(self, step: Step) -> None:
        graph = self._graphs.get(step.key)
        if graph is not None:
            self._graphs.move_to_end(step.key)
            (error,) = self._cuda.graph_launch(graph, self._stream)
            if error:
                raise self._cuda.error("cudaGraphLaunch", error)
            return
        self._cuda.clear_error()  # `poll` leaves "not ready" behind
        step.context.enqueue(step.shapes, self._handle)
        if not self._capture:
            return
        # A capture needs a plain run at the same shape just before it: that was it.
        seen = self._seen.pop(step.key, 0) + 1
        if seen >= self._often:
            self._capture_graph(step)
        elif len(self._seen) >= MAX_COUNTED:
            self._seen.popitem(last=False)
        self._seen[step.key] = seen

    def _capture_graph(self, step: Step) -> None:
        if not step.context.can_capture(self._handle):
            self._capture = False
            return
        try:
            graph = self._cuda.capture(lambda: step.context.enqueue(step.shapes, self._handle), self._stream)
        except (CudaError, EngineError) as error:
            self._capture = False
            log.info("CUDA graphs are not used, since this engine cannot be captured: %s", error)
            return
        if len(self._graphs) >= MAX_GRAPHS:
            key, oldest = self._graphs.popitem(last=False)
            self._seen.pop(key, None)  # to be captured again it must come as often again
            self._cuda.destroy_graph(oldest)
        self._graphs[step.key] = graph

    def _drop_graphs(self) -> None:
        while self._graphs:
            _, graph = self._graphs.popitem()
            self._cuda.destroy_graph(graph)
