"""TensorRT engines on real memory, without a pool: right answers, and not one copy or allocation too many."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.gpu.harness import Bound, Copy, RecordingRuntime, poison
from tests.gpu.zoo import KINDS
from trtpool.workers.cuda import Cuda, CudaError, load_runtime
from trtpool.workers.engine import Rows

pytestmark = pytest.mark.gpu

ROUNDS = 3
"""Of each batch size: the first run is enqueued, the second captured, the third is a graph, with other addresses."""


def scattered(rng: np.random.Generator, slots: int, count: int) -> list[Rows]:
    """`count` slots of one item, each by itself, in no order."""
    return [Rows(slot, 1, 1) for slot in rng.permutation(slots)[:count].tolist()]


def adjacent(rng: np.random.Generator, slots: int, count: int) -> list[Rows]:
    """`count` slots of one item side by side."""
    return [Rows(int(rng.integers(slots - count + 1)), count, count)]


@pytest.mark.parametrize("name", KINDS)
def test_items_are_answered_wherever_they_lie(name, zoo, cuda, rng):
    samples, slots = zoo.samples(name), 2 * KINDS[name].max_batch
    with Bound(cuda, zoo.plan(name), slots) as bound:
        assert (bound.engine.lanes, bound.max_batch) == (3, KINDS[name].max_batch)
        for size in KINDS[name].sizes:
            for _ in range(ROUNDS):
                for place in (adjacent, scattered):
                    batch, chosen = place(rng, slots, size), samples.choose(rng, size)
                    bound.write(batch, samples, chosen)
                    poison(bound.y)
                    times = bound.engine.run(batch)
                    bound.check(batch, samples, chosen)
                    assert min(times[:3]) >= 0 < sum(times[:3])  # CUDA's clock ticks each 0.5 us


@pytest.mark.parametrize(("name", "graphs"), [("mlp", True), ("mlp", False), ("resnet50_u8", True)])
def test_slots_of_several_items_may_be_filled_in_part(name, graphs, zoo, cuda, rng):
    samples, per_slot, slots = zoo.samples(name), 5, 24
    with Bound(cuda, zoo.plan(name), slots, items_per_slot=per_slot, max_batch=60, graphs=graphs) as bound:
        for _ in range(20):
            batch = []
            places = rng.permutation(slots // 4)[:4] * 4  # four runs of at most three slots, with a gap behind each
            for first in places.tolist():
                count = int(rng.integers(1, 4))
                batch.append(Rows(first, count, count * per_slot - int(rng.integers(per_slot))))
            chosen = samples.choose(rng, sum(rows.items for rows in batch))
            bound.write(batch, samples, chosen)
            poison(bound.y)
            bound.engine.run(batch)
            bound.check(batch, samples, chosen)


@pytest.mark.parametrize("name", ["mlp", "resnet50_fp16_io16", "reduce1600x2560"])
def test_lanes_in_flight_together_do_not_mix(name, zoo, cuda, rng):
    samples, max_batch = zoo.samples(name), min(16, KINDS[name].max_batch)
    with Bound(cuda, zoo.plan(name), 3 * max_batch, max_batch=max_batch) as bound:
        for _ in range(6):
            poison(bound.y)
            slots = rng.permutation(3 * max_batch).tolist()
            flights = []
            for lane in range(3):
                mine = slots[lane * max_batch : (lane + 1) * max_batch][: int(rng.integers(1, max_batch + 1))]
                flights.append([Rows(slot, 1, 1) for slot in mine])
            batch = [rows for flight in flights for rows in flight]
            chosen = samples.choose(rng, len(batch))
            bound.write(batch, samples, chosen)
            for lane, flight in enumerate(flights):
                bound.engine.launch(lane, flight)
            for lane in rng.permutation(3).tolist():
                bound.engine.wait(lane)
            bound.check(batch, samples, chosen)


# --- P1: one write -------------------------------------------------------------------------------


@pytest.fixture
def recorder(cuda: Cuda) -> RecordingRuntime:
    return RecordingRuntime(load_runtime())


def address(plane: np.ndarray[Any, Any], rows: Rows) -> int:
    """Where the producer writes the first of `rows`, as NumPy tells."""
    return int(plane[rows.first : rows.first + rows.count].ctypes.data)


@pytest.mark.parametrize("name", ["mlp", "resnet50_fp16_io16", "reduce1600x2560"])
def test_copies_read_and_write_the_very_rows(name, recorder, zoo, cuda, rng):
    """And nothing else is asked of CUDA: no other copy, no memory, no new event, stream or graph."""
    slots, samples = 16, zoo.samples(name)
    max_batch = min(8, KINDS[name].max_batch)
    with Bound(Cuda(recorder), zoo.plan(name), slots, max_batch=max_batch, lanes=1) as bound:
        host = range(bound.address, bound.address + bound.size)
        batches = [
            [Rows(4, 6, 6)],
            [Rows(9, 2, 2), Rows(1, 4, 4)],
            [Rows(14, 1, 1), Rows(2, 2, 2), Rows(11, 1, 1), Rows(0, 1, 1), Rows(7, 1, 1)],
        ]
        for _ in range(ROUNDS):
            for batch in batches:
                bound.engine.run(batch)
        free, _ = cuda.memory()
        for batch in batches:
            chosen = samples.choose(rng, 6)
            bound.write(batch, samples, chosen)
            poison(bound.y)
            recorder.clear()
            bound.engine.run(batch)
            bound.check(batch, samples, chosen)
            assert recorder.copies(host) == [
                Copy(direction, address(plane, rows), rows.items * plane[0, 0].nbytes)
                for direction, plane in (("in", bound.x), ("out", bound.y))
                for rows in batch
            ]
            assert set(recorder.calls) <= {
                "cudaMemcpyAsync", "cudaMemcpyBatchAsync", "cudaGraphLaunch", "cudaEventRecord", "cudaEventSynchronize",
                "cudaEventQuery", "cudaEventElapsedTime",
            }  # fmt: skip
            assert recorder.calls.count("cudaGraphLaunch") == 1
        assert cuda.memory()[0] >= free


def test_no_host_memory_of_an_inputs_size_is_allocated(zoo, cuda):
    """What NumPy allocates is traced too."""
    with Bound(cuda, zoo.plan("reduce1600x2560"), 8, max_batch=4) as bound:
        bound.x[...] = 1
        batch = [Rows(0, 1, 1), Rows(2, 1, 1), Rows(5, 2, 2)]
        bound.engine.run(batch)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(20):
                bound.engine.run(batch)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak - before < bound.x[0].nbytes // 100
        np.testing.assert_allclose(bound.y[[0, 2, 5, 6]], 1, rtol=1e-4)


# --- Registration --------------------------------------------------------------------------------


def test_the_arena_is_pinned_until_it_is_closed(zoo, cuda):
    runtime = load_runtime()
    unregistered, of_host = runtime.cudaMemoryType.cudaMemoryTypeUnregistered, runtime.cudaMemoryType.cudaMemoryTypeHost

    def kind(place: int) -> Any:
        error, attributes = runtime.cudaPointerGetAttributes(place)
        assert not error
        return attributes.type

    with Bound(cuda, zoo.plan("mlp"), 5000, chunk_bytes=1 << 20) as bound:
        last = bound.address + bound.size - 1
        assert len(bound.registration.bounds) == 5
        for place in (bound.address, bound.x[2500].ctypes.data, *bound.registration.bounds, bound.y.ctypes.data, last):
            assert kind(place) == of_host
        bound.engine.close()
        bound.registration.close()
        assert {kind(place) for place in (bound.address, bound.y.ctypes.data, last)} == {unregistered}
        bound.registration.close()


@pytest.mark.parametrize(
    ("name", "slots", "per_slot", "chunk_bytes"), [("mlp", 300, 3, 4096), ("reduce1600x2560", 6, 1, 32 << 20)]
)
def test_copies_are_cut_where_two_registrations_meet(name, slots, per_slot, chunk_bytes, recorder, zoo, cuda, rng):
    samples = zoo.samples(name)
    shape = {"items_per_slot": per_slot, "chunk_bytes": chunk_bytes, "lanes": 1}
    with Bound(Cuda(recorder), zoo.plan(name), slots, **shape) as bound:
        count = min(slots, bound.max_batch // per_slot)
        batch = [Rows(slots - 2, 2, 2 * per_slot), Rows(0, count - 2, (count - 2) * per_slot)]
        chosen = samples.choose(rng, count * per_slot)
        bound.write(batch, samples, chosen)
        poison(bound.y)
        recorder.clear()
        bound.engine.run(batch)
        bound.check(batch, samples, chosen)
        copies = recorder.copies(range(bound.address, bound.address + bound.size))
        bounds = bound.registration.bounds
        assert not [copy for copy in copies if any(copy.address < edge < copy.address + copy.size for edge in bounds)]
        assert len(copies) > 4
        for direction, plane in (("in", bound.x), ("out", bound.y)):
            size = sum(copy.size for copy in copies if copy.direction == direction)
            assert size == len(chosen) * plane[0, 0].nbytes


def test_memory_that_is_not_there_cannot_be_pinned(cuda):
    """The call fails, and leaves no error behind for the next."""
    with pytest.raises(CudaError, match="cudaHostRegister"):
        cuda.host_register(1 << 46, 1 << 20)
    cuda.clear_error()
    stream = cuda.new_stream()
    cuda.synchronize(stream)
    cuda.destroy_stream(stream)


# --- Sanitizer -----------------------------------------------------------------------------------


def test_compute_sanitizer_finds_nothing(zoo):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    # What calls return is checked by ours; cuda-python's search for calls that a driver lacks is no error.
    command = [sanitizer, "--tool=memcheck", "--report-api-errors=no", "--error-exitcode=9", sys.executable, "-m"]
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    ran = subprocess.run(
        [*command, "tests.gpu.sanitized", zoo.plan("mlp")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if "Device not supported" in ran.stdout:
        pytest.skip("compute-sanitizer does not work on this machine")
    assert ran.returncode == 0, f"{ran.stdout[-8000:]}\n{ran.stderr[-2000:]}"
    assert "done" in ran.stdout.splitlines()
    assert "ERROR SUMMARY: 0 errors" in ran.stdout
