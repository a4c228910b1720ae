"""A TensorRT engine on a fake GPU, bound to the planes of a pinned arena as in a worker."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tests.workers.fake_cuda import FakeRuntime
from tests.workers.fake_tensorrt import FUNCTIONS, VERSIONS, Tensor, installed, make_module, neg, write_plan
from trtpool.ipc.arena import create_segment, map_segment
from trtpool.ipc.layout import ModelPlan, plan, plane_array
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.ipc.tensors import TensorSpec
from trtpool.workers.cuda import Cuda
from trtpool.workers.engine import Rows
from trtpool.workers.lanes import Lane
from trtpool.workers.registration import CHUNK_BYTES, Registration
from trtpool.workers.tensorrt_engine import TensorrtEngine

POISON: Final = 0xA5

HOT: Final = {
    "cudaEventRecord", "cudaEventSynchronize", "cudaEventQuery", "cudaEventElapsedTime", "cudaMemcpyAsync",
    "cudaMemcpyBatchAsync", "cudaMemcpy2DAsync", "cudaGraphLaunch", "execute_async_v3",
}  # fmt: skip
"""Calls that allocate nothing and wait for nothing but an event."""


class GpuRig:
    """A context manager, at whose end nothing may be left on the device.

    Args:
        folder: where the plan is written.
        model: what to give `write_plan`: function, inputs and outputs.
        runtime: the device.
        flavour: which TensorRT.
        lanes, graphs, shapes: see `EngineSettings`.
        busy_poll: see `WorkerConfig`.
        slots, items_per_slot, max_batch: of the planes.
        chunk_bytes: of the registration.
        bind: whether to bind the engine to the planes.
        options: see `write_plan`.
    """

    def __init__(
        self,
        folder: Path,
        model: tuple[str, Sequence[Tensor], Sequence[Tensor]] | None = None,
        *,
        runtime: FakeRuntime | None = None,
        flavour: str = "tensorrt",
        lanes: int = 3,
        graphs: bool = True,
        busy_poll: bool = False,
        slots: int = 32,
        items_per_slot: int = 1,
        max_batch: int = 8,
        chunk_bytes: int = CHUNK_BYTES,
        bind: bool = True,
        shapes: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.runtime = runtime or FakeRuntime()
        self.items_per_slot = items_per_slot
        self.max_batch = max_batch
        model = model or neg()
        self.answer = FUNCTIONS[model[0]]
        magic = b"vtrt" if flavour == "rtx" else b"ftrt"
        version = [*map(int, VERSIONS[flavour].split("."))]
        self.path = write_plan(folder / "rig.plan", *model, magic=magic, version=version, **options)
        cuda = Cuda(self.runtime)
        with installed(make_module(flavour, self.runtime)):
            settings = EngineSettings(device="gpu", lanes=lanes, graphs=graphs, shapes=dict(shapes or {}))
            self.engine = TensorrtEngine(ModelSource(str(self.path), "rig"), settings, cuda, busy_poll=busy_poll)
        layout = plan([ModelPlan(self.engine.spec, slots, items_per_slot, max_batch)])
        self._fd = create_segment(layout.segment_bytes)
        segment = map_segment(self._fd, layout.segment_bytes)
        (of_model,) = layout.models
        self.inputs, self.outputs = (
            {plane.spec.name: plane_array(segment, of_model, plane) for plane in planes}
            for planes in (of_model.inputs, of_model.outputs)
        )
        address = np.frombuffer(segment, np.uint8).ctypes.data
        self.registration = Registration(cuda, address, layout.segment_bytes, self._fd, chunk_bytes)
        self.random = np.random.default_rng(3)
        for plane in self.inputs.values():
            plane[...] = self.random.integers(0, 100, plane.shape)
        self.poison()
        if bind:
            self.bind()

    def bind(self) -> None:
        self.engine.bind(self.inputs, self.outputs, self.max_batch, self.registration.bounds)

    @property
    def lanes(self) -> list[Lane]:
        return self.engine._lanes

    def poison(self) -> None:
        """Make the outputs what no engine answers."""
        for plane in self.outputs.values():
            plane.view(np.uint8)[...] = POISON

    def items(self, tensors: Iterable[str], rows: Rows) -> dict[str, npt.NDArray[Any]]:
        """The items of `rows`, by tensor."""
        first = rows.first * self.items_per_slot
        planes = {**self.inputs, **self.outputs}
        return {name: planes[name].reshape(-1, *planes[name].shape[2:])[first:][: rows.items] for name in tensors}

    def check(self, *batches: Sequence[Rows]) -> None:
        """The outputs of `batches` are right, and all others are as they were poisoned."""
        expected = {name: plane.copy() for name, plane in self.outputs.items()}
        for name, plane in expected.items():
            plane.view(np.uint8)[...] = POISON
            items = plane.reshape(-1, *plane.shape[2:])
            for rows in [rows for batch in batches for rows in batch]:
                first = rows.first * self.items_per_slot
                items[first : first + rows.items] = self.answer(self.items(self.inputs, rows))[name]
        for name, plane in self.outputs.items():
            np.testing.assert_array_equal(plane.view(np.uint8), expected[name].view(np.uint8))

    def run(self, batch: Sequence[Rows], lane: int = 0) -> collections.Counter[str]:
        """Run a batch, check it, and return how often CUDA and TensorRT were called for it."""
        self.poison()
        before = self.runtime.calls.copy()
        self.engine.launch(lane, batch)
        self.engine.wait(lane)
        self.check(batch)
        return self.runtime.calls - before

    def addresses(self, tensors: Sequence[TensorSpec], batch: Sequence[Rows]) -> list[tuple[int, int]]:
        """Address and bytes of each run of a batch in the planes of `tensors`."""
        planes = {**self.inputs, **self.outputs}
        return [
            (planes[tensor.name][rows.first :].ctypes.data, rows.items * tensor.item_bytes)
            for tensor in tensors
            for rows in batch
        ]

    def __enter__(self) -> GpuRig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.close()
        self.registration.close()
        os.close(self._fd)
        if kind is None and not self.runtime.broken:
            self.runtime.check()


def batch_of(items: int, first: int = 0) -> list[Rows]:
    """One run of slots of one item."""
    return [Rows(first, items, items)]
