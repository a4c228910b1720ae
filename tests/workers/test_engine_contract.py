"""What every engine promises, asked of each: right answers in the batch's rows, no byte changed elsewhere.

To put another engine to it, add a case to `CASES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import MODELS, Good, save
from tests.workers.fake_cuda import FakeRuntime
from tests.workers.fake_engine import Answer, negate
from tests.workers.fake_tensorrt import FUNCTIONS, VERSIONS, Tensor, batched, installed, make_module, neg, write_plan
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.ipc.tensors import ModelSpec, TensorSpec
from trtpool.workers.cuda import Cuda
from trtpool.workers.engine import Engine, EngineError, Rows
from trtpool.workers.onnx_engine import OnnxEngine
from trtpool.workers.plan_describe import DTYPES
from trtpool.workers.tensorrt_engine import TensorrtEngine

POISON = 0xA5


class Case(NamedTuple):
    """How to make an engine, and what it must answer."""

    make: Callable[[Path], Engine]
    answer: Answer


def onnx_case(name: str, good: Good) -> Case:
    def make(folder: Path) -> Engine:
        path = save(good.model, folder, name)
        return OnnxEngine(ModelSource(str(path), name), EngineSettings(shapes=dict(good.shapes), **good.settings))

    return Case(make, good.answer)


class FakeTensorrtEngine(TensorrtEngine):
    """The engine on a device that must be as it was found when the engine is closed."""

    def __init__(self, source: ModelSource, settings: EngineSettings, runtime: FakeRuntime) -> None:
        super().__init__(source, settings, Cuda(runtime))
        self._runtime = runtime

    def close(self) -> None:
        super().close()
        self._runtime.check()


Graph = tuple[str, Sequence[Tensor], Sequence[Tensor]]


def tensorrt_case(
    model: Graph, *, flavour: str = "tensorrt", lanes: int = 3, graphs: bool = True, **device: Any
) -> Case:
    """An engine on a fake device; `model` is what `write_plan` takes."""

    def make(folder: Path) -> Engine:
        runtime = FakeRuntime(**device)
        magic = b"vtrt" if flavour == "rtx" else b"ftrt"
        version = [*map(int, VERSIONS[flavour].split("."))]
        path = write_plan(folder / "a.plan", *model, magic=magic, version=version)
        with installed(make_module(flavour, runtime)):
            settings = EngineSettings(device="gpu", lanes=lanes, graphs=graphs)
            return FakeTensorrtEngine(ModelSource(str(path), "a"), settings, runtime)

    return Case(make, FUNCTIONS[model[0]])


TWO_IN_TWO_OUT: Graph = (
    "sum",
    [batched("a", (3,)), batched("b", (3,))],
    [Tensor("sum", ("N", 3)), Tensor("twice", ("N", 3))],
)
ALL_DTYPES: Graph = (
    "same",
    [batched(f"{dtype}_in", (2, 3), dtype) for dtype in reversed(DTYPES)],
    [Tensor(f"{dtype}_out", ("N", 2, 3), dtype=dtype) for dtype in reversed(DTYPES)],
)


def fixed(batch: int) -> Graph:
    return "neg", [Tensor("x", (batch, 4))], [Tensor("y", (batch, 4))]


CASES = {
    "fake": Case(lambda _folder: negate(), lambda given: {"y": -given["x"]}),
    **{f"onnx-{name}": onnx_case(name, good) for name, good in MODELS.items()},
    "tensorrt-graphs": tensorrt_case(neg()),
    "tensorrt-no-graphs": tensorrt_case(neg(), graphs=False, lanes=1),
    "tensorrt-threads": tensorrt_case(neg(), threads=True),
    "tensorrt-two-in-two-out": tensorrt_case(TWO_IN_TWO_OUT),
    "tensorrt-single-copies": tensorrt_case(TWO_IN_TWO_OUT, copies_batches=False, lanes=1),
    "tensorrt-cuda-12.9": tensorrt_case(TWO_IN_TWO_OUT, fail_index=True, driver=12090),
    "tensorrt-all-dtypes": tensorrt_case(ALL_DTYPES),
    "tensorrt-padded": tensorrt_case(neg(least=5)),
    "tensorrt-fixed-batch-one": tensorrt_case(fixed(1)),
    "tensorrt-fixed-batch": tensorrt_case(fixed(16)),
    "tensorrt-lean": tensorrt_case(neg(), flavour="lean"),
    "tensorrt-rtx": tensorrt_case(neg(), flavour="rtx"),
}

# Name: slots, items_per_slot, max_batch, and the batches to run on such planes.
LAYOUTS: dict[str, tuple[int, int, int, list[list[Rows]]]] = {
    "one item a slot": (
        12,
        1,
        8,
        [
            [Rows(0, 1, 1)],
            [Rows(11, 1, 1)],
            [Rows(2, 8, 8)],
            [Rows(3, 5, 5)],
            [Rows(1, 2, 2), Rows(6, 3, 3)],
            [Rows(9, 1, 1), Rows(0, 2, 2), Rows(5, 1, 1), Rows(11, 1, 1)],
            [Rows(first, 1, 1) for first in (10, 8, 6, 4, 2, 0, 1, 3)],
        ],
    ),
    "three items a slot": (
        6,
        3,
        9,
        [
            [Rows(0, 1, 3)],
            [Rows(5, 1, 1)],
            [Rows(1, 2, 4)],
            [Rows(2, 3, 9)],
            [Rows(4, 1, 2), Rows(0, 1, 3), Rows(2, 2, 4)],
            [Rows(5, 1, 1), Rows(3, 1, 1), Rows(1, 1, 1), Rows(0, 1, 2)],
        ],
    ),
}


def planes(tensors: Sequence[TensorSpec], slots: int, items_per_slot: int) -> dict[str, npt.NDArray[Any]]:
    return {t.name: np.zeros((slots, items_per_slot, *t.shape), t.numpy_dtype) for t in tensors}


class Bench:
    """An engine bound to planes of random inputs and poisoned outputs."""

    def __init__(self, engine: Engine, answer: Answer, slots: int, items_per_slot: int, max_batch: int) -> None:
        self.engine = engine
        self.answer = answer
        self.items_per_slot = items_per_slot
        self.inputs = planes(engine.spec.inputs, slots, items_per_slot)
        self.outputs = planes(engine.spec.outputs, slots, items_per_slot)
        self.random = np.random.default_rng(7)
        engine.bind(self.inputs, self.outputs, max_batch)

    def run(self, batch: list[Rows]) -> None:
        """Run `batch` on new inputs and check every byte of all planes."""
        for plane in self.inputs.values():
            plane[...] = self.random.integers(0, 9, plane.shape)
        for plane in self.outputs.values():
            plane.view(np.uint8)[...] = POISON
        given = {name: plane.copy() for name, plane in self.inputs.items()}
        times = self.engine.run(batch)

        assert times.compute_ns > 0
        assert min(times[:4]) >= 0
        items = {name: plane.reshape(-1, *plane.shape[2:]) for name, plane in given.items()}
        answers = self.answer(items)
        ran = np.zeros(len(next(iter(items.values()))), bool)
        for rows in batch:
            first = rows.first * self.items_per_slot
            ran[first : first + rows.items] = True
        for name, plane in self.outputs.items():
            got = plane.reshape(-1, *plane.shape[2:])
            np.testing.assert_array_equal(got[ran], answers[name][ran])
            assert (got[~ran].view(np.uint8) == POISON).all(), f"{name}: rows outside of {batch} were written"
        for name, plane in self.inputs.items():
            np.testing.assert_array_equal(plane, given[name])


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def engine(case: Case, tmp_path: Path) -> Iterator[Engine]:
    engine = case.make(tmp_path)
    yield engine
    engine.close()


def layout_for(spec: ModelSpec, name: str) -> tuple[int, int, int, list[list[Rows]]]:
    """The layout `name`, cut down to what an engine with a batch limit is ever asked."""
    slots, items_per_slot, max_batch, batches = LAYOUTS[name]
    if spec.batch_limit == 1:
        return slots, 1, 1, [[Rows(first, 1, 1)] for first in (0, 11 % slots, 3)]
    assert spec.batch_limit == 0 or spec.batch_limit >= max_batch
    return slots, items_per_slot, max_batch, batches


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_written_to_the_rows_of_the_batch_and_nowhere_else(engine, case, layout):
    slots, items_per_slot, max_batch, batches = layout_for(engine.spec, layout)
    bench = Bench(engine, case.answer, slots, items_per_slot, max_batch)
    for batch in batches * 2:  # again, for engines that keep something between runs
        bench.run(batch)


@st.composite
def scattered(draw: st.DrawFn, slots: int, items_per_slot: int, max_batch: int) -> list[Rows]:
    """Runs that do not overlap, in any order, of at most `max_batch` items; any may end in part of a slot."""
    batch: list[Rows] = []
    first = draw(st.integers(0, slots - 1))
    left = max_batch
    while first < slots and left:
        items = draw(st.integers(1, min(left, (slots - first) * items_per_slot)))
        count = -(-items // items_per_slot)
        batch.append(Rows(first, count, items))
        left -= items
        first += count + draw(st.integers(0, 3))
    return draw(st.permutations(batch))


def test_any_scattered_batch(engine, case):
    slots, items_per_slot = (16, 1) if engine.spec.batch_limit == 1 else (16, 3)
    max_batch = min(engine.spec.batch_limit or 20, 20)
    bench = Bench(engine, case.answer, slots, items_per_slot, max_batch)

    @settings(max_examples=30)
    @given(batch=scattered(slots, items_per_slot, max_batch))
    def check(batch: list[Rows]) -> None:
        bench.run(batch)

    check()


def test_a_warm_up_leaves_the_planes_as_they_are(engine, case):
    max_batch = min(engine.spec.batch_limit or 8, 8)
    bench = Bench(engine, case.answer, 12, 1, max_batch)
    for plane in (*bench.inputs.values(), *bench.outputs.values()):
        plane.view(np.uint8)[...] = POISON
    for items in (max_batch, 1):
        engine.warm_up(items)
    for plane in (*bench.inputs.values(), *bench.outputs.values()):
        assert (plane.view(np.uint8) == POISON).all()
    bench.run([Rows(2, max_batch, max_batch)])


def test_spec_describes_tensors_by_item(engine, case):
    spec = engine.spec
    items = {t.name: np.zeros((1, *t.shape), t.numpy_dtype) for t in spec.inputs}
    answers = case.answer(items)
    assert {t.name: ((1, *t.shape), t.dtype) for t in spec.outputs} == {
        name: (answer.shape, answer.dtype.name) for name, answer in answers.items()
    }


def wrong_shape(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.zeros((*plane.shape, 2), plane.dtype)


def wrong_dtype(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return plane.astype("float16" if plane.dtype != "float16" else "float32")


def strided(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.zeros((plane.shape[0] * 2, *plane.shape[1:]), plane.dtype)[::2]


def flat(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return plane.reshape(-1)[:3]


def empty(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return plane[:0]


def fewer_slots(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return plane[:-1]


def unaligned(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.frombuffer(bytearray(plane.nbytes + 1), np.uint8)[1:].view(plane.dtype).reshape(plane.shape)


@pytest.mark.parametrize("role", ["inputs", "outputs"])
@pytest.mark.parametrize("spoil", [wrong_shape, wrong_dtype, strided, flat, empty, fewer_slots, unaligned])
def test_planes_that_do_not_fit_are_refused(engine, role, spoil):
    inputs, outputs = planes(engine.spec.inputs, 4, 1), planes(engine.spec.outputs, 4, 1)
    spoiled = inputs if role == "inputs" else outputs
    name = next(reversed(spoiled))
    spoiled[name] = spoil(spoiled[name])
    with pytest.raises(ValueError, match="plane"):
        engine.bind(inputs, outputs, 1)


def no_items_axis(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return plane[:, 0]


@pytest.mark.parametrize("spoil", [empty, no_items_axis])
def test_planes_that_fit_each_other_and_not_the_model_are_refused(engine, spoil):
    inputs, outputs = (
        {name: spoil(plane) for name, plane in planes(tensors, 4, 1).items()}
        for tensors in (engine.spec.inputs, engine.spec.outputs)
    )
    with pytest.raises(ValueError, match="must have shape"):
        engine.bind(inputs, outputs, 1)


@pytest.mark.parametrize("role", ["inputs", "outputs"])
def test_missing_and_surplus_planes_are_refused(engine, role):
    for change in ("missing", "surplus"):
        given = {
            "inputs": planes(engine.spec.inputs, 4, 1),
            "outputs": planes(engine.spec.outputs, 4, 1),
        }
        plane = given[role].popitem()[1] if change == "missing" else np.zeros((4, 1), np.float32)
        if change == "surplus":
            given[role]["surplus"] = plane
        with pytest.raises(ValueError, match="planes for the"):
            engine.bind(given["inputs"], given["outputs"], 1)


def test_outputs_that_cannot_be_written_are_refused(engine):
    inputs, outputs = planes(engine.spec.inputs, 4, 1), planes(engine.spec.outputs, 4, 1)
    for plane in outputs.values():
        plane.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        engine.bind(inputs, outputs, 1)


def test_max_batch_beyond_the_limit_is_refused(engine):
    bound = planes(engine.spec.inputs, 4, 1), planes(engine.spec.outputs, 4, 1)
    for max_batch in (0, -1, *([engine.spec.batch_limit + 1] if engine.spec.batch_limit else [])):
        with pytest.raises(ValueError, match="max_batch"):
            engine.bind(*bound, max_batch)


def test_inputs_may_be_read_only(engine):
    inputs, outputs = planes(engine.spec.inputs, 4, 1), planes(engine.spec.outputs, 4, 1)
    for plane in inputs.values():
        plane.flags.writeable = False
    engine.bind(inputs, outputs, 1)
    assert engine.run([Rows(3, 1, 1)]).compute_ns > 0


@pytest.mark.parametrize(
    "batch",
    [
        [Rows(4, 1, 1)],
        [Rows(-1, 1, 1)],
        [Rows(3, 2, 2)],
        [Rows(0, 1, 0)],
        [Rows(0, 1, 1), Rows(1, 1, 1), Rows(2, 1, 1), Rows(4, 1, 1)],
        [Rows(0, 1, 1), Rows(1, 1, 1), Rows(2, 1, 1), Rows(-1, 1, 1)],
        [Rows(0, 1, 1), Rows(1, 1, 1), Rows(2, 1, 1), Rows(3, 1, 0)],
        [Rows(0, 4, 4), Rows(0, 4, 4)],
    ],
    ids=str,
)
def test_rows_that_are_not_there_are_refused(engine, batch):
    bound = planes(engine.spec.inputs, 4, 1), planes(engine.spec.outputs, 4, 1)
    engine.bind(*bound, min(engine.spec.batch_limit or 4, 4))
    with pytest.raises(EngineError):
        engine.run(batch)


def test_nothing_runs_before_bind_and_after_close(engine):
    bound = planes(engine.spec.inputs, 4, 1), planes(engine.spec.outputs, 4, 1)
    with pytest.raises(EngineError):
        engine.run([Rows(0, 1, 1)])
    engine.bind(*bound, 1)
    engine.close()
    engine.close()
    with pytest.raises(EngineError):
        engine.run([Rows(0, 1, 1)])
