"""Items of several shapes, shared inputs, one batch size, no batch axis: the answers are onnxruntime's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models import BFLOAT16, COUNTED, FIXED_BATCH, SHARED, VARYING, save
from tests.workers.runs import batches
from trtpool.ipc.errors import MissingExtra, ModelError
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.workers.engine import Batch, EngineError, Rows, Shapes, Times
from trtpool.workers.onnx_calls import Calls
from trtpool.workers.onnx_engine import OnnxEngine

SLOTS, PER_SLOT, MAX_BATCH = 6, 2, 7


class Bench:
    """An engine bound to planes of SLOTS slots, and onnxruntime beside it."""

    def __init__(self, folder: Path, model: str, per_slot: int = PER_SLOT, max_batch: int = MAX_BATCH, **options: Any):
        path = save(model, folder)
        self.engine = OnnxEngine(ModelSource(str(path), "m"), EngineSettings(**options))
        self.direct = onnxruntime.InferenceSession(str(path))
        self.per_slot = per_slot
        spec = self.engine.spec
        self.planes: dict[str, npt.NDArray[Any]] = {
            one.name: np.zeros((SLOTS, 1 if one.shared else per_slot, *one.shape), one.numpy_dtype)
            for one in spec.inputs + spec.outputs
        }
        inputs, outputs = ({t.name: self.planes[t.name] for t in part} for part in (spec.inputs, spec.outputs))
        self.engine.bind(inputs, outputs, max_batch)

    def items(self, name: str, rows: Rows, shape: tuple[int, ...]) -> list[npt.NDArray[Any]]:
        """Views of a run's items, dense from the start of each row."""
        size = int(np.prod(shape))
        plane = self.planes[name].reshape(SLOTS, -1)
        return [
            plane[rows.first + at // self.per_slot][at % self.per_slot * size :][:size].reshape(shape)
            for at in range(rows.items)
        ]

    def answers(self, **arrays: npt.NDArray[Any]) -> Mapping[str, npt.NDArray[Any]]:
        names = [output.name for output in self.direct.get_outputs()]
        return dict(zip(names, self.direct.run(None, arrays), strict=True))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(batch=batches(SLOTS, PER_SLOT, MAX_BATCH), size=st.integers(1, 5))
def test_any_batch_of_any_shape(tmp_path, batch, size):
    bench = Bench(tmp_path, VARYING, shapes={"x": (2, (1, 5))})
    random = np.random.default_rng(size)
    for plane in bench.planes.values():
        plane[...] = 77
    given_items = [item for rows in batch for item in bench.items("x", rows, (2, size))]
    for item in given_items:
        item[...] = random.integers(-9, 9, item.shape)
    before = bench.planes["x"].copy()
    times = bench.engine.run(batch, ((2, size),))
    wanted = bench.answers(x=np.stack(given_items))
    assert times.shapes == ((2, size), (size,))
    written = 0
    for name, shape in (("y", (2, size)), ("s", (size,)), ("m", (1,))):
        got = [item for rows in batch for item in bench.items(name, rows, shape)]
        np.testing.assert_array_equal(np.stack(got), wanted[name])
        written = sum(item.size for item in got)
        assert (bench.planes[name] == 77).sum() >= bench.planes[name].size - written, "rows of others were written"
    np.testing.assert_array_equal(bench.planes["x"], before)


def test_a_run_of_the_largest_shape_is_read_where_it_lies(tmp_path):
    bench = Bench(tmp_path, VARYING, shapes={"x": (2, (1, 5))})
    assert bench.engine.run([Rows(1, 3, 6)], ((2, 5),)).gathered_items == 0
    assert bench.engine.run([Rows(1, 1, 2)], ((2, 3),)).gathered_items == 0
    assert bench.engine.run([Rows(1, 2, 3)], ((2, 3),)).gathered_items == 3


@pytest.mark.parametrize("shapes", [(), ((2, 6),), ((2, 0),), ((2,),), ((2, 3), (2, 3))])
def test_a_shape_that_the_rows_do_not_hold_is_an_error(tmp_path, shapes):
    bench = Bench(tmp_path, VARYING, shapes={"x": (2, (1, 5))})
    with pytest.raises(EngineError, match=r"shapes for 1 inputs|takes items of"):
        bench.engine.run([Rows(0, 1, 1)], shapes)


def test_shared_inputs_are_those_of_the_batchs_first_row(tmp_path):
    bench = Bench(tmp_path, SHARED)
    assert [(one.name, one.shape, one.shared) for one in bench.engine.spec.inputs] == [
        ("x", (3,), False), ("k", (), True), ("b", (2, 3), True),
    ]  # fmt: skip
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    bench.planes["x"].reshape(-1, 3)[[2, 3, 4, 8, 9, 10]] = x
    for slot in (1, 2, 4, 5):
        bench.planes["k"][slot] = 3
        bench.planes["b"][slot] = [[1, 2, 3], [9, 8, 7]]
    batch = [Rows(1, 2, 3), Rows(4, 2, 3)]
    bench.engine.run(batch)
    got = np.stack([item for rows in batch for item in bench.items("y", rows, (3,))])
    wanted = bench.answers(x=x, k=np.array(3, np.float32), b=bench.planes["b"][1, 0])
    np.testing.assert_array_equal(got, wanted["y"])


def test_a_batch_that_is_not_full_is_filled_up_where_only_one_size_will_do(tmp_path):
    bench = Bench(tmp_path, FIXED_BATCH, per_slot=4, max_batch=20)
    spec = bench.engine.spec
    assert (spec.batch_least, spec.batch_limit, spec.whole_slots) == (20, 20, False)
    bench.planes["x"][...] = np.random.default_rng(1).random(bench.planes["x"].shape, np.float32)
    bench.planes["y"][...] = 5
    assert bench.engine.run([Rows(0, 5, 20)]).gathered_items == 0
    np.testing.assert_array_equal(bench.planes["y"][:5], -bench.planes["x"][:5])
    bench.planes["y"][...] = 5
    assert bench.engine.run([Rows(1, 1, 3)]).gathered_items == 3
    np.testing.assert_array_equal(bench.planes["y"][1, :3], -bench.planes["x"][1, :3])
    assert (bench.planes["y"] == 5).sum() == bench.planes["y"].size - 3 * 4


def test_whole_batches_only_are_slots(tmp_path):
    engine = OnnxEngine(ModelSource(str(save(FIXED_BATCH, tmp_path)), "m"), EngineSettings(partial="refuse"))
    assert engine.spec.whole_slots


def counted(folder: Path, most: int) -> Bench:
    return Bench(folder, COUNTED, 1, 1, shapes={"x": ((1, 8),), "y": (most,)}, no_batch=("m",))


@pytest.mark.parametrize("x", [[1, 0, 2], [0], [5] * 8])
def test_an_output_whose_size_depends_on_the_data(tmp_path, x):
    bench = counted(tmp_path, 8)
    (item,) = bench.items("x", Rows(2, 1, 1), (len(x),))
    item[...] = x
    times: Times = bench.engine.run([Rows(2, 1, 1)], ((len(x),),))
    wanted = np.flatnonzero(x)
    assert times.shapes == (wanted.shape,)
    np.testing.assert_array_equal(bench.items("y", Rows(2, 1, 1), wanted.shape)[0], wanted)


def test_an_output_beyond_its_bound_is_an_error_that_names_the_option(tmp_path):
    bench = counted(tmp_path, 2)
    bench.planes["x"][...] = 1
    with pytest.raises(EngineError, match=r"output 'y' has shape \(3,\) .* hold items of \(0 to 2\).* --shape y="):
        bench.engine.run([Rows(0, 1, 1)], ((3,),))
    assert (bench.planes["y"] == 0).all()
    assert bench.engine.run([Rows(0, 1, 1)], ((2,),)).shapes == ((2,),)


def test_without_a_bound_such_an_output_is_refused(tmp_path):
    path = save(COUNTED, tmp_path)
    with pytest.raises(ModelError, match=r"give the largest with --shape y=|item of it is empty"):
        OnnxEngine(ModelSource(str(path), "m"), EngineSettings(shapes={"x": (8,)}, no_batch=("m",)))


RESHAPED = "r (float[4] x, int64[1] n) => (float[K] y, float[4] z) { y = Reshape<allowzero = 1>(x, n) z = Neg(x) }"


def test_a_model_that_fails_on_zeros_is_served_once_its_outputs_are_given(tmp_path, capfd):
    source = ModelSource(str(save(RESHAPED, tmp_path)), "m")
    with pytest.raises(ModelError, match=r"fails on zeros, so .* give the largest item of each: --shape y=\.\.\.$"):
        OnnxEngine(source, EngineSettings(no_batch=("m",)))
    assert capfd.readouterr() == ("", ""), "what onnxruntime says itself, on lines of its own, is in our error"
    bench = Bench(tmp_path, RESHAPED, 1, 1, no_batch=("m",), shapes={"y": (4,)})
    bench.planes["x"][0], bench.planes["n"][0] = np.arange(4), 4
    assert bench.engine.run([Rows(0, 1, 1)], ()).shapes == ((4,),)
    np.testing.assert_array_equal(bench.planes["y"][0, 0], np.arange(4))


def test_dtypes_of_ml_dtypes_need_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trtpool\[dtypes\]'"):
        OnnxEngine(ModelSource(str(save(BFLOAT16, tmp_path)), "m"), EngineSettings())


def test_bfloat16_items_may_differ_in_shape_too(tmp_path):
    bench = Bench(tmp_path, "b (bfloat16[N,T] x) => (bfloat16[N,T] y) { y = Identity(x) }", shapes={"x": ((1, 8),)})
    items = bench.items("x", Rows(1, 2, 4), (3,))
    for number, item in enumerate(items):
        item[...] = np.arange(3) + number / 2
    bench.engine.run([Rows(1, 2, 4)], ((3,),))
    got = bench.items("y", Rows(1, 2, 4), (3,))
    assert got[0].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(np.stack(got), np.stack(items))


@pytest.mark.parametrize("given_shape", [(3, (1, 5)), ((1, 2), 5), (2,)])
def test_a_range_that_does_not_fit_the_model_is_refused(tmp_path, given_shape):
    path = save(VARYING, tmp_path)
    with pytest.raises(ModelError, match=r"--shape x=.* does not fit it"):
        OnnxEngine(ModelSource(str(path), "m"), EngineSettings(shapes={"x": given_shape}))


@pytest.mark.parametrize(
    ("model", "options"),
    [(VARYING, {"shapes": {"x": (2, (1, 5))}}), (SHARED, {}), (FIXED_BATCH, {}), (BFLOAT16, {})],
    ids=["varying", "shared", "fixed batch", "bfloat16"],
)
def test_a_warm_up_leaves_the_planes_as_they_are(model, options, tmp_path):
    bench = Bench(tmp_path, model, per_slot=1, max_batch=4, **options)
    for plane in bench.planes.values():
        plane.view(np.uint8)[...] = 77
    for items in (4, 1):
        bench.engine.warm_up(items)
    assert all((plane.view(np.uint8) == 77).all() for plane in bench.planes.values())


def test_a_warm_up_is_of_the_largest_items(tmp_path, monkeypatch):
    bench = Bench(tmp_path, VARYING, shapes={"x": (2, (1, 5))})
    seen = []
    run = Calls.run

    def noting(self: Calls, batch: Batch, shapes: Shapes) -> Times:
        seen.append((batch, shapes))
        return run(self, batch, shapes)

    monkeypatch.setattr(Calls, "run", noting)
    bench.engine.warm_up(3)
    assert seen == [([Rows(0, 1, 3)], ((2, 5),))]
