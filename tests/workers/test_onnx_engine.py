"""What only the ONNX engine promises: by address, gathered where it pays, errors that are noticed."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from tests.models import ADD, LIAR, MEAN, MODELS, PICKY, parse, save
from trtpool.ipc.errors import DeviceUnavailable, MissingExtra
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.ipc.tensors import ModelSpec, TensorSpec
from trtpool.workers import onnx_engine
from trtpool.workers.engine import EngineError, Rows
from trtpool.workers.onnx_engine import BoundMemory, OnnxEngine

Load = Callable[..., OnnxEngine]
SCATTERED = [Rows(first, 1, 1) for first in (9, 0, 5, 7, 2)]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a model with the settings given by keyword."""

    def load_it(model: Any, cpus_per_worker: int = 1, **settings: Any) -> OnnxEngine:
        path = save(model, tmp_path)
        return OnnxEngine(ModelSource(str(path), "m"), EngineSettings(**settings), cpus_per_worker)

    return load_it


def bind(engine: OnnxEngine, slots: int = 10, max_batch: int = 8) -> dict[str, npt.NDArray[Any]]:
    """Bind `engine` to planes of one item a slot, in one mapping as in the arena; returns them by name."""
    tensors = engine.spec.inputs + engine.spec.outputs
    arena = mmap.mmap(-1, len(tensors) * (1 << 16))
    planes: dict[str, npt.NDArray[Any]] = {
        tensor.name: np.ndarray((slots, 1, *tensor.shape), tensor.numpy_dtype, arena, index << 16)
        for index, tensor in enumerate(tensors)
    }
    inputs = {tensor.name: planes[tensor.name] for tensor in engine.spec.inputs}
    outputs = {tensor.name: planes[tensor.name] for tensor in engine.spec.outputs}
    engine.bind(inputs, outputs, max_batch)
    return planes


# --- By address ----------------------------------------------------------------------------------


def test_onnxruntime_is_given_the_address_of_the_rows(load, monkeypatch):
    bound = []
    for role in ("bind_input", "bind_output"):
        original = getattr(onnxruntime.IOBinding, role)

        def record(self, *args, original=original):
            name, device, device_id, _dtype, shape, address = args
            bound.append((name, device, device_id, tuple(shape), address))
            original(self, *args)

        monkeypatch.setattr(onnxruntime.IOBinding, role, record)
    engine = load(ADD)
    planes = bind(engine)
    engine.run([Rows(3, 4, 4)])
    assert bound == [(name, "cpu", 0, (4, 3), planes[name][3:].ctypes.data) for name in ("a", "b", "sum")]


def test_inputs_are_read_when_the_batch_runs_not_when_it_was_bound(load):
    engine = load(ADD)
    planes = bind(engine)
    for value in (1, 2, 3):
        planes["a"][2], planes["b"][2] = value, 10
        engine.run([Rows(2, 1, 1)])
        assert planes["sum"][2].tolist() == [[value + 10] * 3]


def test_the_oldest_binding_is_bound_anew_when_there_are_many(load, monkeypatch):
    monkeypatch.setattr(onnx_engine, "MAX_BINDINGS", 3)
    engine = load(ADD)
    planes = bind(engine)
    planes["a"][:, 0] = np.arange(30).reshape(10, 3)
    made = []
    original = onnxruntime.InferenceSession.io_binding

    def make(self):
        made.append(original(self))
        return made[-1]

    monkeypatch.setattr(onnxruntime.InferenceSession, "io_binding", make)
    for first in (0, 1, 2, 3, 4, 0, 3, 4, 2, 1):
        planes["sum"][...] = -1
        engine.run([Rows(first, 2, 2)])
        written = (planes["sum"] != -1).any(axis=(1, 2))
        assert np.flatnonzero(written).tolist() == [first, first + 1]
        np.testing.assert_array_equal(planes["sum"][written], planes["a"][written])
    assert len(made) == 3


def test_an_output_that_onnxruntime_put_elsewhere_is_noticed():
    model = parse("g (float[N,4] x) => (float[N,4] x) { y = Neg(x) }")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    tensor = TensorSpec("x", "float32", (4,))
    given, poisoned = np.ones((2, 4), np.float32), np.full((2, 4), 7, np.float32)
    memory = BoundMemory(
        session,
        ModelSpec("m", "/m", (tensor,), (tensor,)),
        [given.reshape(-1).view("V16")],
        [poisoned.reshape(-1).view("V16")],
    )
    for _ in range(2):  # and it is not taken for good the second time
        with pytest.raises(EngineError, match="did not write output 'x'"):
            memory.run(0, 2)
    assert (poisoned == 7).all()


# --- Gathered ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "add", "many_dtypes", "scalar"])
def test_gathered_and_by_address_agree_to_the_bit(load, monkeypatch, name):
    engine = load(MODELS[name].model)
    planes = bind(engine)
    random = np.random.default_rng(1)
    for tensor in engine.spec.inputs:
        planes[tensor.name][...] = random.integers(0, 9, planes[tensor.name].shape)
    results = []
    for above_runs, gathered in ((2, 5), (100, 0)):
        monkeypatch.setattr(onnx_engine, "GATHER_ABOVE_RUNS", above_runs)
        for tensor in engine.spec.outputs:
            planes[tensor.name][...] = 0
        times = engine.run(SCATTERED)
        assert times.gathered_items == gathered
        assert (times.copy_in_ns > 0) == (times.copy_out_ns > 0) == (gathered > 0)
        results.append([planes[tensor.name].tobytes() for tensor in engine.spec.outputs])
    assert results[0] == results[1]


def test_two_runs_are_never_gathered(load):
    engine = load(MEAN)
    bind(engine)
    assert engine.run(SCATTERED[:2]).gathered_items == 0
    assert engine.run(SCATTERED[:3]).gathered_items == 3


def test_long_runs_are_not_gathered(load, monkeypatch):
    engine = load(MEAN)
    monkeypatch.setattr(onnx_engine, "GATHER_RUN_BYTES", engine.spec.item_bytes)
    bind(engine)
    assert engine.run(SCATTERED[:3]).gathered_items == 3
    assert engine.run([Rows(0, 2, 2), Rows(4, 1, 1), Rows(7, 1, 1)]).gathered_items == 0


def test_items_too_large_to_gather_take_no_scratch_memory(load, monkeypatch):
    engine = load(MEAN)
    monkeypatch.setattr(onnx_engine, "GATHER_RUN_BYTES", engine.spec.item_bytes - 1)
    bind(engine)
    assert engine._scratch is None
    assert engine.run(SCATTERED).gathered_items == 0


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [[Rows(2, 1, 1)], SCATTERED], ids=["by address", "gathered"])
def test_a_batch_that_fails_says_why_and_the_next_one_runs(load, batch):
    engine = load(PICKY)
    planes = bind(engine)
    planes["x"][...] = 3
    engine.run(batch)
    planes["x"][2] = 99
    with pytest.raises(EngineError, match="idx=99 must be within") as caught:
        engine.run(batch)
    assert "\n" not in str(caught.value)
    assert ".h:" not in str(caught.value), "source lines of onnxruntime mean nothing to its users"
    planes["x"][2] = 1
    engine.run(batch)
    assert planes["y"][2] == 1


def test_an_output_of_another_shape_than_declared_is_an_error(load):
    engine = load(LIAR)
    planes = bind(engine)
    planes["x"][0] = [1, 0]
    engine.run([Rows(0, 1, 1)])
    assert planes["y"][0].tolist() == [[0, 0]]
    planes["x"][0] = [1, 1]
    with pytest.raises(EngineError):
        engine.run([Rows(0, 1, 1)])


# --- Loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "cpus", "expected"), [(3, 1, 3), (0, 2, 2), (0, 1, 1)])
def test_threads_are_as_asked_and_do_not_spin(load, threads, cpus, expected):
    options = load(ADD, cpus, threads=threads)._session.get_session_options()
    assert options.intra_op_num_threads == expected
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_spec_has_the_absolute_path_and_the_name(tmp_path, monkeypatch):
    path = save(ADD, tmp_path)
    monkeypatch.chdir(tmp_path)
    spec = OnnxEngine(ModelSource(path.name, "adder"), EngineSettings()).spec
    assert (spec.name, spec.path) == ("adder", str(path))


def test_an_unknown_device_is_refused(load):
    with pytest.raises(DeviceUnavailable, match="--device cpu"):
        load(ADD, device="cuda:0")


def test_without_onnxruntime_the_extra_is_named(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trtpool\[cpu\]'"):
        load(ADD)
