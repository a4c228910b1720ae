"""The GPU engine: a TensorRT plan on a few lanes, fed straight out of the arena."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from trtpool.ipc.arena import format_bytes
from trtpool.ipc.errors import DeviceUnavailable
from trtpool.ipc.layout import row_items
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.ipc.tensors import ModelSpec, TensorSpec

from .cuda import ERROR_MEMORY_ALLOCATION, Cuda, CudaError
from .engine import Batch, EngineError, Planes, Shapes, Times
from .forms import HostTensor
from .lanes import Lane
from .planes import check_planes
from .plans import Plan

log = logging.getLogger("trtpool.worker")


class TensorrtEngine:
    """A plan on this process's GPU; implements `trtpool.workers.engine.LaneEngine`.

    Args:
        source: the plan, and the model's name.
        settings: `lanes`, `graphs`, `flavour` and `host_code` are its own; for what counts of the rest see
            `plan_describe`.
        cuda: the device.
        busy_poll: nobody is to `block`; see `WorkerConfig`.

    Raises:
        ModelError: the file cannot be served; the text says what to change.
        MissingExtra: cuda-python, or the TensorRT that it needs, is not installed.
        DeviceUnavailable: there is no GPU, or its memory is too small.
    """

    def __init__(
        self, source: ModelSource, settings: EngineSettings, cuda: Cuda | None = None, *, busy_poll: bool = False
    ) -> None:
        self._cuda = cuda or Cuda()
        self._blocks = not busy_poll
        self._settings = settings
        try:
            self._plan = Plan(source, settings, self._cuda)
        except CudaError as error:
            raise DeviceUnavailable(f"{source.path} cannot be loaded: {error}") from error
        self._lanes: list[Lane] = []
        self._items_per_slot = self._slots = self._max_batch = 0

    @property
    def spec(self) -> ModelSpec:
        return self._plan.spec

    @property
    def lanes(self) -> int:
        return len(self._lanes)

    def bind(self, inputs: Planes, outputs: Planes, max_batch: int, bounds: Sequence[int] = ()) -> None:
        """Bind to planes of shape ``(slots, items_per_slot, *item_shape)``, and make the lanes; see `Engine.bind`.

        Args:
            inputs, outputs: the planes, in memory that a `Registration` has pinned: without that it works, slowly.
            max_batch: items in the largest batch.
            bounds: host addresses that no copy may cross, see `Registration.bounds`.

        Raises:
            DeviceUnavailable: the GPU's memory is too small.
        """
        spec = self._plan.spec
        if not 1 <= max_batch <= spec.batch_limit:
            raise ValueError(f"max_batch must be from 1 to {spec.batch_limit}, got {max_batch}")
        self._drop_lanes()
        self._items_per_slot = check_planes(spec, inputs, outputs)
        self._slots = len(inputs[spec.inputs[0].name])
        self._max_batch = max_batch
        hosts = self._hosts(spec.inputs, inputs), self._hosts(spec.outputs, outputs)
        for number in range(self._settings.lanes):
            try:
                lane = Lane(
                    self._cuda, self._plan, *hosts, self._items_per_slot, max_batch, bounds,
                    graphs=self._settings.graphs, blocks=self._blocks,
                )  # fmt: skip
            except EngineError as error:
                self._cuda.clear_error()
                if not self._lanes:
                    raise DeviceUnavailable(f"{spec.path} does not run on this GPU: {error}") from error
                # In TensorRT 8.6 contexts share a profile only if the plan was built for it.
                log.warning(
                    "%s runs on %d lanes instead of %d (%s); build it again with `trtpool build` for more",
                    spec.path, number, self._settings.lanes, error,
                )  # fmt: skip
                return
            except DeviceUnavailable:
                self._cuda.clear_error()
                self._drop_lanes()
                raise
            except CudaError as error:
                self._cuda.clear_error()
                self._drop_lanes()
                raise DeviceUnavailable(self._explain(error, number)) from error
            self._lanes.append(lane)

    def warm_up(self, items: int, shapes: Shapes | None = None) -> None:
        """Run a batch of zeros, or what lies on the device, on each lane until its graph is captured.

        Where items differ in shape that is never, unless `shapes` are given.

        Raises:
            EngineError: the engine refuses it.
            CudaError: the device failed.
        """
        for lane in self._lanes:
            lane.warm_up(items, shapes)

    def uses_graph(self, items: int, shapes: Shapes = ()) -> bool:
        """Whether batches of `items` items launch a CUDA graph, once they are warmed up."""
        return bool(self._lanes) and self._lanes[0].has_graph(items, shapes)

    def launch(self, lane: int, batch: Batch, shapes: Shapes = ()) -> None:
        """Enqueue a batch; see `LaneEngine.launch`."""
        if not self._lanes:
            raise EngineError(f"model {self._plan.spec.name!r} is not bound to planes, or was closed")
        items, per_slot, slots = 0, self._items_per_slot, self._slots
        for rows in batch:
            first, count, held = rows.first, rows.count, rows.items
            items += held
            full = count * per_slot
            if first < 0 or first + count > slots or not full - per_slot < held <= full:
                raise EngineError(f"{rows} are not within the {slots} slots of the planes")
        if not 0 < items <= self._max_batch:
            raise EngineError(f"a batch of {items} items is not from 1 to max_batch {self._max_batch}")
        try:
            self._lanes[lane].launch(batch, items, shapes)
        except CudaError as error:
            raise EngineError(str(error)) from error

    def poll(self, lane: int) -> Times | None:
        """The times of the batch on `lane` if it has ended; see `LaneEngine.poll`."""
        try:
            return self._lanes[lane].poll()
        except CudaError as error:
            raise EngineError(str(error)) from error

    def ended(self, lane: int) -> bool:
        """Whether the batch on `lane` has ended; see `LaneEngine.ended`."""
        try:
            return self._lanes[lane].ended()
        except CudaError as error:
            raise EngineError(str(error)) from error

    def block(self, lane: int) -> None:
        """Wait until the batch on `lane` has ended; see `LaneEngine.block`."""
        try:
            self._lanes[lane].block()
        except CudaError as error:
            raise EngineError(str(error)) from error

    def wait(self, lane: int) -> Times:
        """Wait until the batch on `lane` has ended, and return its times.

        Raises:
            EngineError: it failed; the outputs are undefined.
        """
        self.block(lane)
        times = self.poll(lane)
        assert times is not None  # nobody else launches on this lane meanwhile
        return times

    def run(self, batch: Batch, shapes: Shapes = ()) -> Times:
        """Run a batch on lane 0, and wait for it."""
        self.launch(0, batch, shapes)
        return self.wait(0)

    def close(self) -> None:
        self._drop_lanes()
        self._plan.close()

    def _hosts(self, tensors: Sequence[TensorSpec], planes: Planes) -> list[HostTensor]:
        return [
            HostTensor(one, planes[one.name].ctypes.data, row_items(one, self._items_per_slot) * one.item_bytes)
            for one in tensors
        ]

    def _drop_lanes(self) -> None:
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.close()

    def _explain(self, error: CudaError, number: int) -> str:
        spec = self._plan.spec
        if error.code != ERROR_MEMORY_ALLOCATION:
            return f"{spec.path} does not run on this GPU: {error}"
        free, total = self._cuda.memory()
        return (
            f"the GPU's memory is too small for lane {number + 1} of {self._settings.lanes} of {spec.path}, whose "
            f"inputs and outputs take {format_bytes(self._max_batch * spec.item_bytes)}: {format_bytes(free)} of "
            f"{format_bytes(total)} are free; lower --lanes, --max-batch or --workers-per-gpu, or end what else uses "
            "the GPU (nvidia-smi shows what)"
        )
