"""What every engine promises of models whose items differ: the other half of `test_engine_contract`.

Items of several shapes, shared inputs, one batch size, no batch axis, outputs that depend on the data: the same tests
for onnxruntime and for TensorRT on a fake GPU.  To put another engine to it, add cases to `MAKERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models import COUNTED, FIXED_BATCH, NO_BATCH, SHARED, VARYING, save
from tests.workers.fake_cuda import FakeRuntime
from tests.workers.fake_tensorrt import FUNCTIONS, VERSIONS, Tensor, batched, installed, make_module, write_plan
from tests.workers.runs import batches
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.workers.cuda import Cuda
from trtpool.workers.engine import Engine, EngineError, Rows
from trtpool.workers.onnx_engine import OnnxEngine
from trtpool.workers.tensorrt_engine import TensorrtEngine

Array = npt.NDArray[Any]

SLOTS, PER_SLOT, MAX_BATCH = 7, 3, 8
POISON = 77


class Model(NamedTuple):
    """A model for each kind of engine.

    Attributes:
        onnx: the graph.
        plan: what `write_plan` takes; its function is what both compute.
    """

    onnx: str
    plan: tuple[str, list[Tensor], list[Tensor]]


# An item and a batch as long as the data says; ONNX has no batch of such, so the axis of the items is the data's.
UPTO = (
    "upto (float[N,T] x) => (float[N,K] y, float[N,1] n) "
    "<int64[1] zero = {0}, int64[1] one = {1}, int64[1] any = {-1}> "
    "{ n = Slice(x, zero, one, one) m = ReduceMax<keepdims=0>(n) i = Cast<to=7>(m) k = Reshape(i, any)"
    " y = Slice(x, zero, k, one) }"
)
SQUARE = [(1, 2, 1), (4, 2, 3), (16, 2, 5)]

MODELS: Mapping[str, Model] = {
    "varying": Model(
        VARYING,
        (
            "varying",
            [Tensor("x", (-1, 2, -1), [SQUARE])],
            [Tensor("y", ("N", 2, "x.2")), Tensor("s", ("N", "x.2")), Tensor("m", ("N", 1))],
        ),
    ),
    "shared": Model(
        SHARED, ("shared", [batched("x", (3,)), Tensor("k", ()), Tensor("b", (2, 3))], [Tensor("y", ("N", 3))])
    ),
    "fixed": Model(FIXED_BATCH, ("neg", [Tensor("x", (20, 4))], [Tensor("y", (20, 4))])),
    "no batch": Model(NO_BATCH, ("whole", [Tensor("x", (2, 3))], [Tensor("y", ()), Tensor("z", (2,))])),
    "counted": Model(
        COUNTED, ("nonzero", [Tensor("x", (-1,), [[(1,), (4,), (8,)]])], [Tensor("y", ("?",), dtype="INT64")])
    ),
    "upto": Model(
        UPTO,
        (
            "upto",
            [Tensor("x", (-1, -1), [[(2, 1), (4, 4), (16, 6)]])],
            [Tensor("y", ("N", "?")), Tensor("n", ("N", 1))],
        ),
    ),
}

Maker = Callable[[Path, Model, EngineSettings], tuple[Engine, Callable[[], None]]]
"""Makes an engine of a model called "m", and what checks at the end that nothing is left of it."""


def make_onnx(folder: Path, model: Model, options: EngineSettings) -> tuple[Engine, Callable[[], None]]:
    path = save(model.onnx, folder)
    return OnnxEngine(ModelSource(str(path), "m"), options), lambda: None


def make_tensorrt(flavour: str, **device: Any) -> Maker:
    def make(folder: Path, model: Model, options: EngineSettings) -> tuple[Engine, Callable[[], None]]:
        runtime = FakeRuntime(**device)
        version = [*map(int, VERSIONS[flavour].split("."))]
        path = write_plan(
            folder / "m.plan", *model.plan, magic=b"vtrt" if flavour == "rtx" else b"ftrt", version=version
        )
        with installed(make_module(flavour, runtime)):
            return TensorrtEngine(ModelSource(str(path), "m"), options, Cuda(runtime)), runtime.check

    return make


MAKERS: Mapping[str, tuple[str, Maker]] = {
    "onnx": ("cpu", make_onnx),
    "tensorrt": ("gpu", make_tensorrt("tensorrt")),
    "tensorrt-single-copies": ("gpu", make_tensorrt("tensorrt", copies_batches=False)),
    "tensorrt-rtx": ("gpu", make_tensorrt("rtx")),
    "tensorrt-lean": ("gpu", make_tensorrt("lean", threads=True)),
}


class Bench:
    """An engine bound to planes, whose bytes are all looked at after each batch."""

    def __init__(self, engine: Engine, answer: str, per_slot: int, max_batch: int) -> None:
        self.engine = engine
        self.answer = FUNCTIONS[answer]
        self.per_slot = per_slot
        spec = self.spec = engine.spec
        self.planes: dict[str, Array] = {
            one.name: np.zeros((SLOTS, 1 if one.shared else per_slot, *one.shape), one.numpy_dtype)
            for one in spec.inputs + spec.outputs
        }
        inputs, outputs = ({t.name: self.planes[t.name] for t in part} for part in (spec.inputs, spec.outputs))
        engine.bind(inputs, outputs, max_batch)

    def items(self, name: str, rows: Rows, shape: tuple[int, ...], planes: Mapping[str, Array]) -> list[Array]:
        """Views of a run's items, dense from the start of each row."""
        size = int(np.prod(shape))
        plane = planes[name].reshape(SLOTS, -1)
        return [
            plane[rows.first + at // self.per_slot][at % self.per_slot * size :][:size].reshape(shape)
            for at in range(rows.items)
        ]

    def run(self, batch: list[Rows], given: Mapping[str, Array]) -> tuple[tuple[int, ...], ...]:
        """Run a batch of `given` items, by input: ``(items, *item_shape)``, without items for what is shared.

        Checks answers, and every byte of all planes.

        Returns:
            The shapes that the engine tells.
        """
        for plane in self.planes.values():
            plane.view(np.uint8)[...] = POISON
        self.write(batch, given)
        before = {name: plane.copy() for name, plane in self.planes.items()}
        varying, told = self.spec.varying
        shapes = tuple(given[one.name].shape[0 if one.shared or not self.spec.batched else 1 :] for one in varying)
        if not self.spec.batched:
            shapes = tuple(given[one.name].shape for one in varying)
        times = self.engine.run(batch, shapes)
        assert times.compute_ns > 0
        answers = self.answer(given)
        for one in self.spec.outputs:
            answer = np.asarray(answers[one.name]) if self.spec.batched else np.asarray(answers[one.name])[None]
            if one in told:
                assert times.shapes[told.index(one)] == answer.shape[1:]
            places = [item for rows in batch for item in self.items(one.name, rows, answer.shape[1:], before)]
            for place, item in zip(places, answer, strict=True):
                place[...] = item
        for name, plane in self.planes.items():
            np.testing.assert_array_equal(plane.view(np.uint8), before[name].view(np.uint8), name)
        return times.shapes

    def write(self, batch: list[Rows], given: Mapping[str, Array]) -> None:
        for one in self.spec.inputs:
            if one.shared:
                for rows in batch:
                    for slot in range(rows.first, rows.first + rows.count):
                        self.planes[one.name][slot, 0] = given[one.name]
                continue
            items = given[one.name] if self.spec.batched else given[one.name][None]
            places = [item for rows in batch for item in self.items(one.name, rows, items.shape[1:], self.planes)]
            for place, item in zip(places, items, strict=True):
                place[...] = item


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    device, maker = MAKERS[request.param]
    made: list[tuple[Engine, Callable[[], None]]] = []

    def bench(name: str, per_slot: int = PER_SLOT, max_batch: int = MAX_BATCH, **options: Any) -> Bench:
        engine, check = maker(tmp_path, MODELS[name], EngineSettings(device=device, **options))
        made.append((engine, check))
        return Bench(engine, MODELS[name].plan[0], per_slot, max_batch)

    yield bench
    for engine, check in made:
        engine.close()
        check()


def numbers(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).integers(-9, 9, shape).astype(np.float32)


def count(batch: list[Rows]) -> int:
    return sum(rows.items for rows in batch)


ANY = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


# --- Items of several shapes ---------------------------------------------------------------------


def test_any_batch_of_any_shape(make):
    bench = make("varying", shapes={"x": (2, (1, 5))})
    assert bench.spec.inputs[0].least == (2, 1)

    @ANY
    @given(batch=batches(SLOTS, PER_SLOT, MAX_BATCH), size=st.integers(1, 5))
    def check(batch: list[Rows], size: int) -> None:
        assert bench.run(batch, {"x": numbers(size, count(batch), 2, size)}) == ((2, size), (size,))

    check()


def test_shapes_in_turn(make):
    """Whatever an engine keeps of a shape is that shape's; some come often enough for a CUDA graph."""
    bench = make("varying", shapes={"x": (2, (1, 5))})
    for turn in range(12):
        for size, batch in ((5, [Rows(1, 2, 6)]), (2, [Rows(0, 3, 8)]), (2, [Rows(2, 1, 1)]), (5, [Rows(3, 1, 2)])):
            bench.run(batch, {"x": numbers(turn, count(batch), 2, size)})


@pytest.mark.parametrize("shapes", [(), ((2, 6),), ((2, 0),), ((2,),), ((2, 3), (2, 3))])
def test_a_shape_that_the_rows_do_not_hold_is_an_error_and_the_next_batch_runs(make, shapes):
    bench = make("varying", shapes={"x": (2, (1, 5))})
    with pytest.raises(EngineError, match=r"shapes for 1 inputs|takes items of"):
        bench.engine.run([Rows(0, 1, 1)], shapes)
    bench.run([Rows(0, 1, 1)], {"x": numbers(1, 1, 2, 3)})


def test_a_warm_up_leaves_the_planes_of_items_that_differ_as_they_are(make):
    bench = make("varying", shapes={"x": (2, (1, 5))})
    for plane in bench.planes.values():
        plane.view(np.uint8)[...] = POISON
    for items in (8, 1):
        bench.engine.warm_up(items)
    assert all((plane.view(np.uint8) == POISON).all() for plane in bench.planes.values())
    bench.run([Rows(0, 3, 8)], {"x": numbers(1, 8, 2, 4)})


# --- Shared inputs, one size, no batch -----------------------------------------------------------


def test_shared_inputs_are_those_of_the_batchs_first_row(make):
    bench = make("shared")
    assert [(one.name, one.shape, one.shared) for one in bench.spec.inputs] == [
        ("x", (3,), False), ("k", (), True), ("b", (2, 3), True),
    ]  # fmt: skip

    @ANY
    @given(batch=batches(SLOTS, PER_SLOT, MAX_BATCH), k=st.integers(-3, 3))
    def check(batch: list[Rows], k: int) -> None:
        bench.run(batch, {"x": numbers(k + 9, count(batch), 3), "k": np.float32(k), "b": numbers(k + 5, 2, 3)})

    check()


def test_a_batch_that_is_not_full_is_filled_up_where_only_one_size_will_do(make):
    bench = make("fixed", max_batch=20)
    assert (bench.spec.batch_least, bench.spec.batch_limit, bench.spec.whole_slots) == (20, 20, False)
    for turn in range(3):
        for batch in ([Rows(0, 7, 20)], [Rows(1, 1, 3)], [Rows(5, 2, 5), Rows(0, 1, 1)]):
            bench.run(batch, {"x": numbers(turn, count(batch), 4)})


def test_whole_batches_only_are_slots(make):
    assert make("fixed", 20, 20, partial="refuse").spec.whole_slots


def test_without_a_batch_axis_an_item_is_a_call(make):
    bench = make("no batch", 1, 1, no_batch=("m",))
    assert (bench.spec.batched, bench.spec.batch_limit) == (False, 1)
    for slot in (6, 0, 3, 3):
        bench.run([Rows(slot, 1, 1)], {"x": numbers(slot, 2, 3)})


# --- Outputs that depend on the data -------------------------------------------------------------


@pytest.mark.parametrize("x", [[1, 0, 2], [0], [5] * 8, [0, 0, 3, 0, 0, 0, 0, 3]])
def test_an_output_whose_size_depends_on_the_data(make, x):
    bench = make("counted", 1, 1, shapes={"x": ((1, 8),), "y": (8,)}, no_batch=("m",))
    for slot in (2, 2, 5):
        assert bench.run([Rows(slot, 1, 1)], {"x": np.array(x, np.float32)}) == ((np.count_nonzero(x),),)


def test_an_output_beyond_its_bound_is_an_error_that_names_the_option(make):
    bench = make("counted", 1, 1, shapes={"x": ((1, 8),), "y": (2,)}, no_batch=("m",))
    for _ in range(2):
        bench.write([Rows(0, 1, 1)], {"x": np.ones(3, np.float32)})
        bench.planes["y"][...] = POISON
        with pytest.raises(EngineError, match=r"output 'y' has shape \(3,\) .* hold items of \(0 to 2\).* --shape y="):
            bench.engine.run([Rows(0, 1, 1)], ((3,),))
        assert (bench.planes["y"] == POISON).all()
        assert bench.run([Rows(0, 1, 1)], {"x": np.ones(2, np.float32)}) == ((2,),)


def test_what_fills_a_batch_up_does_not_change_the_shape_of_its_answer(make):
    bench = make("upto", shapes={"x": ((1, 6),), "y": (6,)})
    batch = [Rows(0, 3, 8)]
    bench.run(batch, {"x": np.full((8, 6), 6, np.float32)})  # what lies in the device's memory then asks for 6
    x = numbers(3, 1, 4)
    x[:, 0] = 2
    assert bench.run([Rows(4, 1, 1)], {"x": x}) == ((2,),)


def test_any_batch_whose_answer_depends_on_the_data(make):
    bench = make("upto", shapes={"x": ((1, 6),), "y": (6,)})

    @ANY
    @given(batch=batches(SLOTS, PER_SLOT, MAX_BATCH), size=st.integers(1, 6), data=st.data())
    def check(batch: list[Rows], size: int, data: st.DataObject) -> None:
        x = numbers(size, count(batch), size)
        x[:, 0] = data.draw(st.lists(st.integers(1, size), min_size=len(x), max_size=len(x)))
        assert bench.run(batch, {"x": x}) == ((int(x[:, 0].max()),),)

    check()
