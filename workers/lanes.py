"""A lane: one batch at a time from the arena through the GPU and back.

::

    stream of the lane, in order
    began | copy in | copied | engine: graph or enqueue | computed | copy out | done
            |                  |                                     |
            planes -> device   device buffers, bound once            device -> planes

Everything is made when the engine is bound; a launch allocates nothing on the device and waits for nothing.  Several
lanes overlap: while one computes, the next copies in and the one before copies out.  Each run of adjacent slots is one
copy straight from the plane, at the bus' full speed; several runs go as one `cudaMemcpyBatchAsync` where CUDA has it,
which pays from about three copies on (seen on an H100: 3 us for each call from Python).

The engine's work for a batch size is captured into a CUDA graph when that size comes for the second time:
`execute_async_v3` costs the CPU 13 us for a tiny network and 270 to 525 us for ResNet-50, a graph launch 5 to 70 (seen
on an H100).  A graph freezes shapes and addresses, so the copies, whose addresses change, stay outside.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from .cuda import Cuda, CudaError
from .engine import Batch, EngineError, Times
from .plans import Context, Plan
from .registration import pieces

log = logging.getLogger("trtpool.worker")

MAX_GRAPHS: Final = 64
"""Graphs kept by a lane, one for a batch size; beyond that the least recently used is dropped."""

BATCH_COPIES: Final = 3
"""Copies from which one batched call costs less than one call each."""


class HostTensor(NamedTuple):
    """Where a tensor's plane lies in host memory, and the bytes of one item of it."""

    name: str
    address: int
    item_bytes: int


class _Buffer(NamedTuple):
    """A tensor in host memory, and where a batch of it lies on the device; `slot_bytes` is one slot of its plane."""

    address: int
    item_bytes: int
    slot_bytes: int
    device: int


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
        self._min_batch = plan.min_batch
        self._graphs: OrderedDict[int, Any] = OrderedDict()
        self._capture = graphs
        self._seen: set[int] = set()
        self._context: Context | None = None
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
            context = self._context = plan.new_context(self._stream)
            stack.callback(context.close)
            self._inputs, self._outputs = (
                [
                    _Buffer(
                        tensor.address, tensor.item_bytes, items_per_slot * tensor.item_bytes,
                        self._allocate(context, tensor, max_batch, stack),
                    )
                    for tensor in tensors
                ]
                for tensors in (inputs, outputs)
            )  # fmt: skip
            # One run is the usual batch, and these are few copies.
            self._few_inputs, self._few_outputs = (
                not bounds and (len(tensors) < BATCH_COPIES or not cuda.copies_batches) for tensors in (inputs, outputs)
            )
            stack.callback(self._drop_graphs)
            for items in sorted({self._min_batch, max(self._min_batch, max_batch)}):
                self._run_once(items)
            self._stack = stack.pop_all()

    def _event(self, stack: contextlib.ExitStack, *, blocks: bool) -> Any:
        event = self._cuda.new_event(blocks=blocks)
        stack.callback(self._cuda.destroy_event, event)
        return event

    def _allocate(self, context: Context, tensor: HostTensor, max_batch: int, stack: contextlib.ExitStack) -> int:
        """Device memory for a batch of `tensor`, bound to the context and zeroed."""
        size = max(max_batch, self._min_batch) * tensor.item_bytes
        address = self._cuda.malloc(size)
        stack.callback(self._cuda.free, address)
        self._cuda.zero(address, size)
        context.bind(tensor.name, address)
        return address

    def _run_once(self, items: int) -> None:
        """Run a batch of zeros, so that modules are loaded and the first request is not the slowest."""
        self._seen.add(items)
        self._compute(items)
        self._cuda.synchronize(self._stream)

    def warm_up(self, items: int) -> None:
        """Run a batch size, and capture it, unless that was done.

        Raises:
            EngineError, CudaError: it does not run.
        """
        items = max(self._min_batch, items)
        if items not in self._seen:
            self._run_once(items)

    def has_graph(self, items: int) -> bool:
        """Whether a batch of `items` items launches a CUDA graph, as it stands."""
        return max(self._min_batch, items) in self._graphs

    def launch(self, batch: Batch, items: int) -> None:
        """Enqueue a batch of `items` items, which fits the planes; see `LaneEngine.launch`.

        Raises:
            EngineError, CudaError: nothing of it runs any more.
        """
        if self._context is None:
            raise EngineError("the engine was closed")
        single = len(batch) == 1
        try:
            self._record(self._record_began)
            if single and self._few_inputs:
                self._copy_run_in(batch[0].first, items)
            else:
                self._copy(self._inputs, batch, to_device=True)
            self._record(self._record_copied)
            self._compute(max(self._min_batch, items))
            self._record(self._record_computed)
            if single and self._few_outputs:
                self._copy_run_out(batch[0].first, items)
            else:
                self._copy(self._outputs, batch, to_device=False)
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
        return Times(self._elapsed_ns(copy_in), self._elapsed_ns(compute), self._elapsed_ns(copy_out))

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
        if self._context is None:
            return
        self._context = None
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

    def _copy_run_in(self, first: int, items: int) -> None:
        """`_copy` to the device of one run, with no bounds."""
        cuda, stream = self._cuda, self._stream
        for address, item_bytes, slot_bytes, device in self._inputs:
            (error,) = cuda.memcpy_async(device, address + first * slot_bytes, items * item_bytes, cuda.h2d, stream)
            if error:
                raise cuda.error("cudaMemcpyAsync", error)

    def _copy_run_out(self, first: int, items: int) -> None:
        """`_copy` from the device of one run, with no bounds."""
        cuda, stream = self._cuda, self._stream
        for address, item_bytes, slot_bytes, device in self._outputs:
            (error,) = cuda.memcpy_async(address + first * slot_bytes, device, items * item_bytes, cuda.d2h, stream)
            if error:
                raise cuda.error("cudaMemcpyAsync", error)

    def _copy(self, buffers: list[_Buffer], batch: Batch, *, to_device: bool) -> None:
        """Enqueue the copies of a batch: for each tensor and run one, in the batch's order."""
        hosts: list[int] = []
        devices: list[int] = []
        sizes: list[int] = []
        for address, item_bytes, slot_bytes, device in buffers:
            for rows in batch:
                size = rows.items * item_bytes
                start = address + rows.first * slot_bytes
                parts = pieces(start, size, self._bounds) if self._bounds else ((start, size),)
                for host, part in parts:
                    hosts.append(host)
                    devices.append(device)
                    sizes.append(part)
                    device += part  # noqa: PLW2901  # items lie dense on the device
        cuda, stream = self._cuda, self._stream
        if len(sizes) >= BATCH_COPIES and cuda.copies_batches:
            if to_device:
                cuda.copy_batch(devices, hosts, sizes, stream)
            else:
                cuda.copy_batch(hosts, devices, sizes, stream)
            return
        for host, device, size in zip(hosts, devices, sizes, strict=True):
            if to_device:
                cuda.copy_in(device, host, size, stream)
            else:
                cuda.copy_out(host, device, size, stream)

    def _compute(self, items: int) -> None:
        graph = self._graphs.get(items)
        if graph is not None:
            self._graphs.move_to_end(items)
            (error,) = self._cuda.graph_launch(graph, self._stream)
            if error:
                raise self._cuda.error("cudaGraphLaunch", error)
            return
        assert self._context is not None
        self._cuda.clear_error()  # `poll` leaves "not ready" behind
        self._context.enqueue(items, self._handle)
        # A capture needs a plain run at the same shape just before it: that was it.
        if self._capture and items in self._seen:
            self._capture_graph(self._context, items)
        else:
            self._seen.add(items)

    def _capture_graph(self, context: Context, items: int) -> None:
        if not context.can_capture(self._handle):
            self._capture = False
            return
        try:
            graph = self._cuda.capture(lambda: context.enqueue(items, self._handle), self._stream)
        except (CudaError, EngineError) as error:
            self._capture = False
            log.info("CUDA graphs are not used, since this engine cannot be captured: %s", error)
            return
        if len(self._graphs) >= MAX_GRAPHS:
            size, oldest = self._graphs.popitem(last=False)
            self._seen.discard(size)  # to be captured again it must come twice again
            self._cuda.destroy_graph(oldest)
        self._graphs[items] = graph

    def _drop_graphs(self) -> None:
        while self._graphs:
            _, graph = self._graphs.popitem()
            self._cuda.destroy_graph(graph)
