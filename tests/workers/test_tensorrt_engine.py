"""The engine around the lanes: how many it gets, what it refuses, and what it says about memory."""

from __future__ import annotations

import logging

import pytest

from tests.workers.fake_cuda import FakeRuntime
from tests.workers.fake_device import cudaError_t
from tests.workers.fake_tensorrt import installed, make_module, neg, write_plan
from tests.workers.gpu_rig import GpuRig, batch_of
from trtpool.ipc.errors import DeviceUnavailable, ModelError
from trtpool.ipc.settings import EngineSettings, InspectRequest, ModelSource
from trtpool.workers import cuda as cuda_module
from trtpool.workers.engine import EngineError, Rows
from trtpool.workers.loading import load


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_it_has_as_many_lanes_as_asked(lanes, tmp_path):
    with GpuRig(tmp_path, lanes=lanes, bind=False) as rig:
        assert rig.engine.lanes == 0
        rig.bind()
        assert rig.engine.lanes == lanes
        left = rig.runtime.left()
        assert (left["stream"], left["event"], left["memory"]) == (lanes, 4 * lanes, 2 * lanes)


def test_bound_again_it_gives_back_what_it_had(tmp_path):
    with GpuRig(tmp_path) as rig:
        left = rig.runtime.left()
        rig.bind()
        assert rig.runtime.left() == left
        rig.run(batch_of(8))


@pytest.mark.parametrize("where", ["select", "enqueue"])
def test_a_plan_whose_profile_is_not_shared_gets_one_lane(where, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "trtpool.worker")
    with GpuRig(tmp_path, unshared=where) as rig:
        assert rig.engine.lanes == 1
        assert f"{rig.path} runs on 1 lanes instead of 3 (" in caplog.text
        assert "build it again with `trtpool build` for more" in caplog.text
        left = rig.runtime.left()
        assert (left["stream"], left["event"], left["memory"]) == (1, 4, 2)
        for _ in range(3):
            rig.run(batch_of(3))


def test_a_plan_that_does_not_run_is_refused(tmp_path):
    with GpuRig(tmp_path, refused=[1], bind=False) as rig:
        with pytest.raises(DeviceUnavailable, match=r"rig.plan does not run on this GPU: .*no kernel for a batch of 1"):
            rig.bind()
        assert rig.engine.lanes == 0
        assert rig.runtime.left() == {"registration": 1}


@pytest.mark.parametrize("fits", [1, 2])
def test_lanes_that_do_not_fit_into_memory_are_told(fits, tmp_path):
    buffers = 2 * 8 * 16  # x and y, batches of 8 items of 16 bytes
    runtime = FakeRuntime(memory_bytes=fits * buffers + buffers // 2)
    with GpuRig(tmp_path, runtime=runtime, bind=False) as rig:
        with pytest.raises(DeviceUnavailable) as caught:
            rig.bind()
        assert (
            f"the GPU's memory is too small for lane {fits + 1} of 3 of {rig.path}, whose inputs and outputs take 256 B"
            in str(caught.value)
        )
        assert "are free; lower --lanes, --max-batch or --workers-per-gpu" in str(caught.value)
        assert rig.engine.lanes == 0
        assert rig.runtime.left() == {"registration": 1}


def test_scratch_that_does_not_fit_into_memory_is_told(tmp_path):
    runtime = FakeRuntime(memory_bytes=10_000)
    with GpuRig(tmp_path, runtime=runtime, bind=False, scratch_bytes=4000) as rig:
        with pytest.raises(DeviceUnavailable, match=f"memory is too small for {rig.path}: .* are free; lower --lanes"):
            rig.bind()
        assert rig.engine.lanes == 0


@pytest.mark.parametrize("call", ["cudaStreamCreateWithFlags", "cudaGetDeviceCount"])
def test_a_device_that_fails_while_the_plan_is_loaded_is_told(call, tmp_path, monkeypatch):
    runtime = FakeRuntime()
    runtime.fail(call, cudaError_t.cudaErrorIllegalState)
    path = write_plan(tmp_path / "a.plan", *neg())
    monkeypatch.setattr(cuda_module, "load_runtime", lambda: runtime)
    request = InspectRequest(ModelSource(str(path), "a"), EngineSettings(device="gpu"))
    with installed(make_module("tensorrt", runtime)), pytest.raises(DeviceUnavailable, match=call):
        load(request, 1)
    with installed(make_module("tensorrt", runtime)):
        engine = load(request, 1)
    assert engine.spec.batch_limit == 64
    engine.close()
    runtime.check()


def test_a_file_that_cannot_be_served_leaves_nothing_on_the_device(tmp_path):
    runtime = FakeRuntime()
    (tmp_path / "rig.plan").touch()
    with pytest.raises(ModelError), installed(make_module("tensorrt", runtime)):
        GpuRig(tmp_path, neg(least=9, most=8), runtime=runtime)
    runtime.check()


@pytest.mark.parametrize("max_batch", [0, 65])
def test_a_batch_that_the_plan_does_not_take_is_refused(max_batch, tmp_path):
    with GpuRig(tmp_path) as rig, pytest.raises(ValueError, match="max_batch must be from 1 to 64"):
        rig.engine.bind(rig.inputs, rig.outputs, max_batch)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([Rows(0, 9, 9)], "a batch of 9 items is not from 1 to max_batch 8"),
        ([], "a batch of 0 items"),
        ([Rows(31, 2, 2)], "not within the 32 slots"),
        ([Rows(-1, 2, 2)], "not within the 32 slots"),
        ([Rows(0, 3, 2)], "not within the 32 slots"),
        ([Rows(0, 2, 3)], "not within the 32 slots"),
    ],
)
def test_a_batch_that_does_not_fit_the_planes_is_refused_and_nothing_is_enqueued(batch, words, tmp_path):
    with GpuRig(tmp_path) as rig:
        before = rig.runtime.calls.copy()
        with pytest.raises(EngineError, match=words):
            rig.engine.launch(1, batch)
        assert rig.runtime.calls == before


def test_it_can_be_closed_at_any_time_and_again(tmp_path):
    for bind in (True, False):
        with GpuRig(tmp_path, bind=bind) as rig:
            rig.engine.close()
            rig.engine.close()
            with pytest.raises(EngineError, match="not bound to planes, or was closed"):
                rig.engine.launch(0, batch_of(1))


def test_nothing_is_left_when_the_device_failed_and_close_says_nothing(tmp_path):
    with GpuRig(tmp_path) as rig:
        rig.runtime.break_device()
        rig.engine.close()
        assert rig.engine.lanes == 0
