"""Profiles: the figures of an engine on the CPU and of one on a fake GPU, and `python -m trtpool.workers.profile`."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.models import ADD, BAD_MODELS, MODELS, SHARED, VARYING, save
from tests.workers.fake_cuda import MAPPED, FakeRuntime
from tests.workers.fake_tensorrt import VERSIONS, Tensor, installed, make_module, make_packages, neg, write_plan
from trtpool.ipc.arena import create_segment
from trtpool.ipc.errors import ConfigError, DeviceUnavailable, ModelError
from trtpool.ipc.profiling import BatchFigures, Measured, Phases, ProfileLine, ProfileRequest, Spread, spread
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.ipc.tensors import ModelSpec, TensorSpec
from trtpool.workers import profile_gpu, profile_planes
from trtpool.workers.contexts import Context
from trtpool.workers.cuda import Cuda
from trtpool.workers.profile import answer
from trtpool.workers.profile_planes import LEAST_RUNS, MOST_RUNS, WARM_UP_RUNS, Sample, in_series


def request(path: Path, batches: tuple[int, ...] = (1, 4), *, strict: bool = False, **engine: Any) -> ProfileRequest:
    return ProfileRequest(
        source=ModelSource(str(path), "m"), engine=EngineSettings(**engine), batches=batches, strict=strict, seconds=0,
        cpus=2,
    )  # fmt: skip


def ask(asked: ProfileRequest) -> tuple[ProfileLine, list[str]]:
    said: list[str] = []
    return answer(msgspec.json.encode(asked), said.append), said


def measured(asked: ProfileRequest) -> Measured:
    line, _ = ask(asked)
    assert line.refusal is None
    assert line.measured is not None
    return line.measured


def phases_of(figures: BatchFigures) -> list[Phases]:
    every = (figures.series, figures.plain, figures.pageable, figures.one_thread)
    return [phases for phases in every if phases is not None]


# --- Times ---------------------------------------------------------------------------------------


def test_a_spread_of_times():
    found = spread([*range(1, 102)])
    assert found == Spread(101, 1, 51, 51, 91, 96, 100, float(np.std(range(1, 102))))
    assert found.variation == found.deviation_ns / 51


def test_batches_in_series_are_warmed_up_and_at_least_so_many():
    samples = [Sample(number, 0, 2 * number, 0, 3 * number) for number in range(LEAST_RUNS + WARM_UP_RUNS)]
    calls = iter(samples)
    phases = in_series(lambda: next(calls), 0)
    assert phases.enqueue.count == phases.end_to_end.count == LEAST_RUNS
    assert phases.enqueue.min_ns == WARM_UP_RUNS
    assert phases.compute.median_ns == 2 * phases.enqueue.median_ns


def test_batches_in_series_are_at_most_so_many(monkeypatch):
    monkeypatch.setattr(profile_planes, "MOST_RUNS", 25)
    assert in_series(lambda: Sample(1, 1, 1, 1, 1), 3600).compute.count == 25 < MOST_RUNS


# --- Inputs and sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "low", "high", "varied"),
    [("float32", 0, 1, True), ("float16", 0, 1, True), ("uint8", 0, 255, True), ("int64", 0, 0, False),
     ("bfloat16", 0, 1, True), ("bool", 0, 1, True)],
)  # fmt: skip
def test_inputs_hold_what_any_model_takes(dtype, low, high, varied):
    tensor = TensorSpec("x", dtype, (100,))
    inputs = {"x": np.full((2, 1, 100), 7).astype(tensor.numpy_dtype)}
    profile_planes.fill(ModelSpec("m", "/m", (tensor,), (tensor,)), inputs)
    values = inputs["x"].astype(np.float64)
    assert low <= values.min() <= values.max() <= high
    assert (len(np.unique(values)) > 1) == varied
    np.testing.assert_array_equal(values[0], values[1])


def test_sizes_that_the_model_does_not_take(tmp_path):
    path = write_plan(tmp_path / "m.plan", *neg(least=2, most=8), version=version())
    with installed(make_module("tensorrt", runtime := FakeRuntime())):
        said: list[str] = []
        found = profile_gpu.measure(request(path, (64, 1, 8), device="gpu"), said.append, Cuda(runtime))
        assert [figures.items for figures in found.batches] == [1, 8]
        assert [figures.in_place is None for figures in found.batches] == [True, False]
        assert "batches of 64 are left out, since the model takes at most 8" in said
        assert "batches of fewer than 2 are filled up to that, so they cost as much" in said
        for asked in (request(path, (1, 64), device="gpu", strict=True), request(path, (64,), device="gpu")):
            with pytest.raises(ConfigError, match=r"at most 8, so --batch 64 is too large; lower it, or build"):
                profile_gpu.measure(asked, said.append, Cuda(runtime))
    runtime.check()


def test_more_memory_than_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(profile_planes, "create_segment", functools.partial(create_segment, limit_bytes=8192))
    line, _ = ask(request(save(ADD, tmp_path), (1000,)))
    assert line.refusal.kind == "ArenaTooLarge"
    assert "need 36.0 KiB, which is more than can be had here; profile smaller ones with --batch" in line.refusal.text


# --- On the CPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "add", "many_dtypes"])
def test_a_model_on_the_cpu(name, tmp_path):
    found = measured(request(save(MODELS[name].model, tmp_path)))
    assert (found.device, found.lanes, found.threads, found.bus) == ("CPU", 1, 2, ())
    for figures, items in zip(found.batches, (1, 4), strict=True):
        assert figures.items == items
        assert figures.in_bytes == items * sum(tensor.item_bytes for tensor in found.spec.inputs)
        assert figures.one_thread is not None
        for phases in phases_of(figures):
            assert phases.copy_in.mean_ns == phases.copy_out.mean_ns == 0
            assert 0 < phases.compute.mean_ns < phases.end_to_end.mean_ns
            assert phases.enqueue.mean_ns + phases.compute.mean_ns == pytest.approx(phases.end_to_end.mean_ns)
        assert not any((figures.graph, figures.overlaps, figures.plain, figures.pageable))


def test_one_thread_is_not_measured_twice(tmp_path):
    found = measured(request(save(ADD, tmp_path), threads=1))
    assert found.threads == 1
    assert all(figures.one_thread is None for figures in found.batches)


@pytest.mark.parametrize(("model", "shapes"), [(VARYING, {"x": (2, (1, 6))}), (SHARED, {})])
def test_models_whose_items_differ_or_share(model, shapes, tmp_path):
    found = measured(request(save(model, tmp_path), shapes=shapes))
    first, second = found.batches
    apart, shared = [sum(t.item_bytes for t in found.spec.inputs if t.shared == which) for which in (False, True)]
    assert (first.in_bytes, second.in_bytes) == (apart + shared, 4 * apart + shared)


# --- On a fake GPU -------------------------------------------------------------------------------


def version() -> list[int]:
    return [*map(int, VERSIONS["tensorrt"].split("."))]


def on_fake(tmp_path: Path, runtime: FakeRuntime, **engine: Any) -> Measured:
    path = write_plan(tmp_path / "m.plan", *neg(), version=version())
    with installed(make_module("tensorrt", runtime)):
        return profile_gpu.measure(request(path, device="gpu", **engine), lambda _: None, Cuda(runtime))


def test_each_way_is_measured_and_nothing_is_left_on_the_gpu(tmp_path):
    runtime = FakeRuntime()
    found = on_fake(tmp_path, runtime, lanes=2)
    runtime.check()
    assert not runtime.registrations
    assert (found.device, found.lanes, found.threads) == ("Fake GPU", 2, 0)
    for figures in found.batches:
        assert figures.graph
        assert [overlap.lanes for overlap in figures.overlaps] == [1, 2, 3]
        assert [overlap.batches for overlap in figures.overlaps] == [LEAST_RUNS, 2 * LEAST_RUNS, 3 * LEAST_RUNS]
        assert figures.plain_overlap.lanes == 3
        assert len(phases_of(figures)) == 3
        for phases in phases_of(figures):
            assert phases.end_to_end.mean_ns >= phases.enqueue.mean_ns > 0
            assert phases.copy_in.mean_ns > 0 < phases.copy_out.mean_ns
    assert runtime.calls["cudaGraphLaunch"] > 0
    assert runtime.calls["execute_async_v3"] > LEAST_RUNS * 2 * 4  # without graphs, two sizes on four ways


def test_items_that_differ_are_measured_at_their_largest(tmp_path):
    runtime = FakeRuntime()
    x = Tensor("x", (-1, -1), [[(1, 1), (4, 2), (8, 4)], [(1, 6), (4, 6), (8, 9)]])
    path = write_plan(tmp_path / "m.plan", "neg", [x], [Tensor("y", ("N", "x.1"))], version=version())
    with installed(make_module("tensorrt", runtime)):
        found = profile_gpu.measure(request(path, device="gpu"), lambda _: None, Cuda(runtime))
    runtime.check()
    assert all(figures.graph and figures.in_place is None for figures in found.batches)
    assert [figures.in_bytes for figures in found.batches] == [36, 144]


def test_an_engine_reads_its_inputs_in_place(tmp_path, monkeypatch):
    runtime = FakeRuntime()
    bound: list[bool] = []
    real = Context.enqueue

    def watched(context: Any, shapes: Any, stream: int) -> None:
        bound.append(context._raw._addresses["x"] >= MAPPED)
        real(context, shapes, stream)

    monkeypatch.setattr(Context, "enqueue", watched)
    found = on_fake(tmp_path, runtime)
    runtime.check()
    a_way = [False] * (LEAST_RUNS + WARM_UP_RUNS) + [True] * (LEAST_RUNS + WARM_UP_RUNS)
    first = bound.index(True) - len(a_way) // 2
    assert bound[first : first + 2 * len(a_way)] == 2 * a_way
    assert sum(bound) == len(a_way)
    for figures in found.batches:
        assert figures.in_place.compute.count == figures.copied.compute.count == LEAST_RUNS
        assert figures.copied.copy_in.mean_ns > figures.in_place.copy_in.mean_ns > 0  # events are a tick apart


def test_pinned_and_pageable_memory_are_what_they_are_called(tmp_path, monkeypatch):
    runtime = FakeRuntime()
    seen: list[bool] = []
    real = profile_gpu.run

    def watched(engine: Any, items: int) -> Sample:
        before = len(runtime.copies)
        sample = real(engine, items)
        pinned = [
            any(start <= copy.host < start + size for start, size in runtime.registrations.items())
            for copy in runtime.copies[before:]
        ]
        assert len(set(pinned)) == 1
        seen.append(pinned[0])
        return sample

    monkeypatch.setattr(profile_gpu, "run", watched)
    on_fake(tmp_path, runtime)
    a_way = 2 * (LEAST_RUNS + WARM_UP_RUNS)
    assert seen == [True] * 2 * a_way + [False] * a_way


def test_lanes_work_on_slots_of_their_own_and_all_end(tmp_path):
    runtime = FakeRuntime(threads=True)
    on_fake(tmp_path, runtime, lanes=3)
    runtime.check()
    hosts = {copy.host for copy in runtime.copies if copy.to_device and copy.size == 16}
    assert len(hosts) >= 4  # batches of one item on three lanes and one more, apart from bare copies


def test_bare_copies_leave_the_arena_as_it_is(tmp_path):
    runtime = FakeRuntime()
    cuda = Cuda(runtime)
    spec = ModelSpec("m", "/m", (TensorSpec("x", "uint8", (100_000,)),), (TensorSpec("y", "uint8", (10,)),))
    with profile_planes.arena(spec, 1) as planes:
        before = planes.inputs["x"].copy()
        bound = planes.address + 5000
        points = profile_gpu.measure_bus(cuda, planes, [bound])
        np.testing.assert_array_equal(planes.inputs["x"], before)
    assert [point.size for point in points] == [4096, 65536]
    assert all(point.in_ns > 0 < point.out_ns for point in points)
    assert all(copy.host + copy.size <= bound or copy.host >= bound for copy in runtime.copies)
    runtime.check()


def test_an_engine_that_cannot_be_captured(tmp_path):
    runtime = FakeRuntime()
    runtime.fail("cudaGraphInstantiate", 900, 1)
    for nth in range(2, 20):
        runtime.fail("cudaGraphInstantiate", 900, nth)
    found = on_fake(tmp_path, runtime)
    runtime.check()
    assert all(not (figures.graph or figures.plain or figures.plain_overlap) for figures in found.batches)


def test_a_gpu_that_fails_is_said_in_a_line(tmp_path):
    runtime = FakeRuntime()
    runtime.fail("cudaMalloc", 2)
    with pytest.raises(DeviceUnavailable, match="the GPU failed during the profile: cudaMalloc"):
        on_fake(tmp_path, runtime)
    assert not runtime.registrations


def test_a_batch_that_fails_is_a_refusal(tmp_path, monkeypatch):
    runtime = FakeRuntime()
    monkeypatch.setattr(profile_gpu, "Cuda", lambda: Cuda(runtime))
    path = write_plan(tmp_path / "m.plan", *neg(), version=version())
    with installed(make_module("tensorrt", runtime)):
        runtime.fail("cudaGraphLaunch", 700, 5)
        line, _ = ask(request(path, device="gpu"))
    assert line.refusal.kind == "ModelError"
    assert line.refusal.text.startswith("the engine failed on a batch of the profile: cudaGraphLaunch")
    assert not runtime.registrations


# --- The process ---------------------------------------------------------------------------------


def child(raw: bytes, **env: str) -> list[ProfileLine]:
    """The lines that the process answers `raw` with; its exit code must be 0."""
    ended = subprocess.run(
        [sys.executable, "-m", "trtpool.workers.profile"], input=raw, capture_output=True, env={**os.environ, **env},
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr.decode()
    return [msgspec.json.decode(line, type=ProfileLine) for line in ended.stdout.splitlines()]


@pytest.mark.system
def test_the_process_on_the_cpu(tmp_path):
    path = save(MODELS["mlp"].model, tmp_path)
    *saying, last = child(msgspec.json.encode(request(path)))
    assert [figures.items for figures in last.measured.batches] == [1, 4]
    assert saying[0].said == f"loading {path}"
    assert all(line.said for line in saying)


@pytest.mark.system
def test_the_process_on_a_fake_gpu(tmp_path):
    path = write_plan(tmp_path / "m.plan", *neg(), version=version())
    env = make_packages(tmp_path / "packages")
    last = child(msgspec.json.encode(request(path, device="gpu")), **env)[-1]
    assert last.measured.device == "Fake GPU"
    assert last.measured.batches[0].graph


@pytest.mark.system
def test_a_refusal_is_an_answer(tmp_path):
    model, text = BAD_MODELS["open item"]
    (*_, last) = child(msgspec.json.encode(request(save(model, tmp_path, "bad"))))
    assert (last.refusal.kind, last.refusal.text) == (ModelError.__name__, text)
    (last,) = child(b"{}")
    assert last.refusal.kind == "ProtocolError"


@pytest.mark.system
def test_a_gpu_with_too_little_memory_is_a_refusal(tmp_path):
    path = write_plan(tmp_path / "m.plan", *neg(), version=version())
    env = make_packages(tmp_path / "packages", memory_bytes=1000)
    last = child(msgspec.json.encode(request(path, device="gpu")), **env)[-1]
    assert last.refusal.kind == "DeviceUnavailable"
