"""Plans whose items differ, on a real GPU: each answer is onnxruntime's on the CPU for the same model.

The plans are built here, by `trtpool build`, of the small models of `tests.models`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.gpu.harness import RecordingRuntime
from tests.gpu.zoo import Zoo
from tests.models import FIXED_BATCH, SHARED, VARYING, save
from trtpool.ipc.arena import create_segment, map_segment
from trtpool.ipc.layout import ModelPlan, plan, plane_array
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.ipc.tensors import TensorSpec
from trtpool.workers.cuda import Cuda, load_runtime
from trtpool.workers.engine import BatchRefused, Rows
from trtpool.workers.lanes import OFTEN
from trtpool.workers.registration import Registration
from trtpool.workers.tensorrt_engine import TensorrtEngine

pytestmark = pytest.mark.gpu

Array = npt.NDArray[Any]
SLOTS, POISON = 24, 0xA5

COUNTED = "counted (float[N,T] x) => (int64[M,K] y) { y = NonZero(x) }"  # (2, how many): no axis of it is the batch
CONV = (
    "conv (float[N,4,H,W] x) => (float[N,4,H,W] y) { s = Mul(x, x) y = Neg(s) }"  # whole numbers stay exact in float16
)


class Bench:
    """An engine on pinned planes of its own, whose bytes are all looked at.

    Args:
        path: the plan.
        max_batch: by default as many as the plan takes.
        settings: fields of `EngineSettings`.
    """

    def __init__(self, path: Path, max_batch: int = 0, runtime: Any = None, **settings: Any) -> None:
        cuda = Cuda(runtime)
        with contextlib.ExitStack() as stack:
            self.engine = TensorrtEngine(
                ModelSource(os.fspath(path), "m"), EngineSettings(device="gpu", **settings), cuda
            )
            spec = self.spec = self.engine.spec
            max_batch = max_batch or spec.batch_limit
            layout = plan([ModelPlan(spec, SLOTS, 1, max_batch)])
            fd = create_segment(layout.segment_bytes)
            stack.callback(os.close, fd)
            segment = map_segment(fd, layout.segment_bytes)
            (model,) = layout.models
            inputs, outputs = (
                {one.spec.name: plane_array(segment, model, one) for one in planes}
                for planes in (model.inputs, model.outputs)
            )
            self.planes = {**inputs, **outputs}
            address = np.frombuffer(segment, np.uint8).ctypes.data
            registration = Registration(cuda, address, layout.segment_bytes, fd)
            stack.callback(registration.close)
            stack.callback(self.engine.close)
            self.engine.bind(inputs, outputs, max_batch, registration.bounds)
            self._stack = stack.pop_all()

    def run(self, batch: list[Rows], given: Mapping[str, Any], answers: Mapping[str, Any]) -> None:
        """Run `given`, by input ``(items, *item_shape)``, or whole where it is shared, and check every byte."""
        planes = self.answer(batch, given)
        wanted = {name: np.full_like(plane.view(np.uint8), POISON).view(plane.dtype) for name, plane in planes.items()}
        self._write(wanted, batch, self.spec.inputs, given)
        self._write(wanted, batch, self.spec.outputs, answers)
        for name, plane in planes.items():
            np.testing.assert_array_equal(plane.view(np.uint8), wanted[name].view(np.uint8), name)

    def answer(self, batch: list[Rows], given: Mapping[str, Any]) -> dict[str, Array]:
        """Run `given` on lane 0, in planes that are poisoned before; returns all of them."""
        for plane in self.planes.values():
            plane.reshape(-1).view(np.uint8)[...] = POISON
        self._write(self.planes, batch, self.spec.inputs, given)
        varying, _ = self.spec.varying
        self.engine.run(batch, tuple(given[one.name].shape[self._lead(one) :] for one in varying))
        return self.planes

    def _lead(self, one: TensorSpec) -> int:
        return int(self.spec.batched and not one.shared)

    def _write(
        self, planes: Mapping[str, Array], batch: list[Rows], tensors: tuple[TensorSpec, ...], arrays: Mapping[str, Any]
    ) -> None:
        slots = [slot for rows in batch for slot in range(rows.first, rows.first + rows.count)]
        for one in tensors:
            rows, array = planes[one.name].reshape(SLOTS, -1), arrays[one.name]
            for slot, item in zip(slots, array if self._lead(one) else [array] * len(slots), strict=True):
                rows[slot, : item.size] = item.reshape(-1)

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def build(zoo: Zoo, tmp_path: Path) -> Callable[..., Path]:
    """Builds a model with options of `trtpool build`, as soon as may be."""
    return lambda model, *options: zoo.built(save(model, tmp_path), "--optimization-level=0", *options)


def whole(rng: np.random.Generator, *shape: int) -> Array:
    """Small whole numbers: exact whatever the order of sums."""
    return rng.integers(-9, 10, shape).astype(np.float32)


def answer_varying(x: Array) -> dict[str, Array]:
    return {"y": -x, "s": x.sum(1), "m": x.max((1, 2))[:, None]}


PLACES = {
    "adjacent": lambda count: [Rows(3, count, count)],
    "scattered": lambda count: [Rows(2 * at, 1, 1) for at in reversed(range(count))],
}


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_items_of_any_shape(place, graphs, build, rng):
    """Shapes take turns, as graphs too: what one left behind in a context must not show in another."""
    with contextlib.closing(Bench(build(VARYING, "--shapes=x=1x2x1:4x2x8:8x2x16"), graphs=graphs)) as bench:
        for _ in range(OFTEN + 3):
            for count, size in ((1, 1), (8, 16), (8, 5), (3, 5), (8, 1), (2, 16)):
                x = whole(rng, count, 2, size)
                bench.run(PLACES[place](count), {"x": x}, answer_varying(x))
        assert bench.engine.uses_graph(8, ((2, 5),)) == graphs


def test_only_the_bytes_that_are_there_cross_the_bus(build, rng):
    runtime = RecordingRuntime(load_runtime())
    with contextlib.closing(Bench(build(VARYING, "--shapes=x=1x2x1:4x2x8:8x2x16"), runtime=runtime)) as bench:
        x = whole(rng, 6, 2, 5)
        for _ in range(2):
            runtime.clear()
            bench.run([Rows(3, 6, 6)], {"x": x}, answer_varying(x))
        assert runtime.calls.count("cudaMemcpy2DAsync") == 3
        assert "cudaMalloc" not in runtime.calls


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_batch_takes_the_profile_that_covers_it(lanes, build, rng):
    path = build(VARYING, "--shapes=x=1x2x1:8x2x4:8x2x8", "--shapes=x=1x2x16:8x2x16:8x2x32")
    with contextlib.closing(Bench(path, lanes=lanes)) as bench:
        assert bench.spec.describe_profiles() == "x (2, 1 to 8) or x (2, 16 to 32)"
        assert bench.engine.lanes == lanes
        for _ in range(3):
            for count, size in ((1, 1), (8, 32), (8, 8), (3, 16)):
                x = whole(rng, count, 2, size)
                bench.run([Rows(3, count, count)], {"x": x}, answer_varying(x))
        with pytest.raises(BatchRefused, match="takes items of"):
            bench.engine.run([Rows(0, 1, 1)], ((2, 12),))


def test_shared_inputs(build, rng):
    with contextlib.closing(Bench(build(SHARED, "--shapes=x=1:4:8"))) as bench:
        for count in (1, 8, 8, 5):
            x, k, b = whole(rng, count, 3), np.float32(rng.integers(2, 9)), whole(rng, 2, 3)
            bench.run([Rows(4, count, count)], {"x": x, "k": k, "b": b}, {"y": x * k + b.max(0)})


def test_a_batch_of_the_only_size_is_filled_up(build, rng):
    with contextlib.closing(Bench(build(FIXED_BATCH))) as bench:
        for count in (20, 3, 1):
            x = whole(rng, count, 4)
            bench.run([Rows(2, count, count)], {"x": x}, {"y": -x})


@pytest.mark.parametrize("most", [64, 5])
def test_an_output_that_depends_on_the_data(most, build, rng):
    """Beyond its bound a batch fails, and the next is right."""
    path = build(COUNTED, "--shapes=x=1x1:2x8:4x16")
    with contextlib.closing(
        Bench(path, no_batch=("m",), shapes={"x": ((1, 4), (1, 16)), "y": (2, most)}, lanes=2)
    ) as bench:
        for count, size in ((4, 16), (1, 3), (2, 2), (4, 16), (1, 5)):
            x = np.ones((count, size), np.float32)
            x[0, 0] = 0
            wanted = np.array(np.nonzero(x), np.int64)
            if wanted.shape[1] > most:
                with pytest.raises(BatchRefused, match="output 'y'"):
                    bench.run([Rows(2, 1, 1)], {"x": x}, {"y": wanted})
            else:
                bench.run([Rows(2, 1, 1)], {"x": x}, {"y": wanted})


@pytest.mark.parametrize(("word", "together"), [("chw2", 2), ("chw4", 4), ("chw16", 16), ("chw32", 32), ("hwc8", 8)])
def test_formats(word, together, build, rng):
    path = build(CONV, "--fp16", f"--io=fp16:{word}", "--shapes=x=1x4x2x2:4x4x8x8:8x4x8x8")
    with contextlib.closing(Bench(path)) as bench:
        (spec,) = bench.spec.inputs
        assert spec.format == word
        for count, size in ((8, 8), (3, 5), (1, 2)):
            x = whole(rng, count, 4, size, size).astype(np.float16)
            y = bench.answer([Rows(1, count, count)], {"x": packed(x, word, together)})["y"]
            real = packed(np.ones_like(x), word, together) == 1  # what is in channels that there are not is nobody's
            got = y.reshape(SLOTS, -1)[1 : count + 1, : real[0].size].reshape(real.shape)
            np.testing.assert_array_equal(got[real], packed(-x * x, word, together)[real])


def packed(x: Array, word: str, together: int) -> Array:
    """``(N, C, H, W)`` as it lies in memory, with zeros for the channels that there are not."""
    items, channels, height, width = x.shape
    padded = np.zeros((items, -(-channels // together) * together, height, width), x.dtype)
    padded[:, :channels] = x
    if word.startswith("hwc"):
        return np.ascontiguousarray(padded.transpose(0, 2, 3, 1))
    return np.ascontiguousarray(padded.reshape(items, -1, together, height, width).transpose(0, 1, 3, 4, 2))
