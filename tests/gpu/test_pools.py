"""Pools on a GPU: right answers from every engine, whatever the batches, and inputs that nobody copies."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import trtpool
from tests.gpu.harness import Work, planes_of, poison, standing_still
from tests.gpu.zoo import KINDS, POISON, Array, Samples
from tests.system.rig import (
    PATIENCE_S,
    StartedPool,
    family,
    figures,
    producer,
    wait_until,
    watching,
)

pytestmark = [pytest.mark.gpu, pytest.mark.system]

IMAGE_BYTES = 3 * 1600 * 2560 * 4
"""An input of `reduce1600x2560`."""


# --- Answers -------------------------------------------------------------------------------------


def run_lease(client: trtpool.Client, name: str, samples: Samples, chosen: list[int]) -> list[int]:
    """Submit `chosen` as the runs of one `lease_many`, and check the results; returns the slots that were used."""
    used: list[int] = []
    left = list(chosen)
    plane = planes_of(client, name)[1]
    with client.lease_many(len(chosen), model=name, timeout_s=PATIENCE_S) as leases:
        work = []
        for lease in leases:
            mine, left = left[: lease.count], left[lease.count :]
            rows = range(lease._claim.first, lease._claim.first + lease.count)
            (place,) = lease.inputs.values()
            place[...] = samples.inputs[mine]
            poison(plane, rows)
            used += rows
            work.append((mine, lease.submit()))
        for mine, submitted in work:
            (output,) = submitted.result(timeout_s=PATIENCE_S).outputs.values()
            samples.check(mine, output)
    return used


@pytest.mark.parametrize("name", KINDS)
def test_every_engine_answers_in_batches_of_all_sizes(name, zoo, client, rng):
    samples = zoo.samples(name)
    plane = planes_of(client, name)[1]
    poison(plane)
    used: set[int] = set()
    for size in KINDS[name].sizes:
        used.update(run_lease(client, name, samples, samples.choose(rng, size)))
    others = [row for row in range(len(plane)) if row not in used]
    assert (plane[others].reshape(-1).view(np.uint8) == POISON).all()


@pytest.mark.parametrize("name", KINDS)
def test_scattered_slots_are_answered_together(name, zoo, client, rng):
    """Every other slot, submitted in no order to a worker that stands still, so that batches get large."""
    samples, count = zoo.samples(name), KINDS[name].max_batch
    before = figures(client, client.model_index(name))
    with Work(client, name, samples, samples.choose(rng, 2 * count)) as work:
        places = 2 * rng.permutation(count)
        work.keep(places.tolist())
        with standing_still([client.status().workers[0].pid]):
            work.submit()
            wait_until(lambda: figures(client, client.model_index(name)).leased == 0, "they are submitted")
        work.check()
    after = figures(client, client.model_index(name))
    assert (after.items - before.items, after.failed_items) == (count, before.failed_items)
    assert after.runs - before.runs > after.batches - before.batches


def test_engines_in_flight_together_do_not_mix(zoo, client, rng):
    for _ in range(3):
        held = []
        try:
            for name in rng.permutation([model.spec.name for model in client.models]).tolist():
                samples = zoo.samples(name)
                count = int(rng.integers(1, KINDS[name].max_batch + 1))
                held.append(Work(client, name, samples, samples.choose(rng, count)))
            for work in held:
                work.submit()
            for work in held:
                work.check()
        finally:
            for work in held:
                work.release()


def test_slots_of_several_items_may_be_filled_in_part(zoo, rng, tmp_path):
    """What is behind the last item is not written."""
    names, per_slot = ("mlp", "resnet50_u8"), 5
    plans = [zoo.plan(name) for name in names]
    with trtpool.Pool(plans, gpus=0, items_per_slot=per_slot, run_dir=tmp_path / "run") as pool:
        for name, count in itertools.product(names, (1, 2, 3, 12)):
            with pool.lease_many(count, model=name, timeout_s=PATIENCE_S) as leases:
                for lease in leases:
                    items = lease.count * per_slot - int(rng.integers(per_slot))
                    run_in_part(pool, name, lease, zoo.samples(name), zoo.samples(name).choose(rng, items))


def run_in_part(client: trtpool.Client, name: str, lease: trtpool.Lease, samples: Samples, chosen: list[int]) -> None:
    """Submit slots that `chosen` fill but for the end of the last, and check the results."""
    (place,) = lease.inputs.values()
    place.reshape(-1, *place.shape[2:])[: len(chosen)] = samples.inputs[chosen]
    poison(planes_of(client, name)[1], range(lease._claim.first, lease._claim.first + lease.count))
    result = lease.submit(items=len(chosen)).result(timeout_s=PATIENCE_S)
    (output,) = result.outputs.values()
    items = output.reshape(-1, *output.shape[2:])
    assert result.items == len(chosen)
    samples.check(chosen, items[: len(chosen)])
    assert (items[len(chosen) :].reshape(-1).view(np.uint8) == POISON).all()


def test_a_pool_with_one_lane_without_graphs(zoo, rng, tmp_path):
    """On huge pages if this host has any."""
    samples = zoo.samples("resnet50_fp16_io16")
    plan = zoo.plan("resnet50_fp16_io16")
    with trtpool.Pool(
        f"net={plan}",
        gpus=["0"],
        run_dir=tmp_path / "run",
        lanes=1,
        graphs=False,
        huge_pages=True,
        max_batch=16,
        slots=48,
    ) as pool:
        (worker,) = pool.status().workers
        assert (worker.gpu, worker.lanes) == (0, 1)
        for count in (1, 5, 48, 64):
            chosen = samples.choose(rng, count)
            samples.check(chosen, pool.infer(images=samples.inputs[chosen])["logits"])


# --- Four producers ------------------------------------------------------------------------------

MLP = """
    me, count, seed = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    weights = np.load(sys.argv[5])
    x = np.random.default_rng([seed, me]).standard_normal((count, 256), dtype=np.float32)
    x[:, 0], x[:, 1] = me, np.arange(count) / count  # whose it is, and which

    def write(item, inputs):
        inputs["x"][...] = x[item]

    wait("connected")
    seen, got = [], np.full((count, 16), np.nan)
    for item, result in pool.map(write, range(count), model="mlp", window=200, ordered=me % 2 == 0):
        seen.append(item)
        got[item] = result.outputs["y"]
    assert sorted(seen) == list(range(count))
    wanted = np.maximum(x.astype(np.float64) @ weights["first"], 0) @ weights["second"]
    wrong = np.flatnonzero(~(np.linalg.norm(got - wanted, axis=1) < 1e-2 * np.linalg.norm(wanted, axis=1)))
    assert not wrong.size, (me, wrong, got[wrong[:3]], wanted[wrong[:3]])
    assert np.linalg.norm(got - wanted) < 2e-3 * np.linalg.norm(wanted)
    pool.close()
    print("done")
"""

REDUCE = """
    me, count = int(sys.argv[2]), int(sys.argv[3])
    factors = np.array([1, -1, 2])  # of the channels

    def write(item, inputs):
        for channel, factor in enumerate(factors):
            inputs["image"][channel] = factor * (100 * me + item)

    wait("connected")
    seen = []
    for item, result in pool.map(write, range(count), model="reduce1600x2560", window=8, ordered=me % 2 == 0):
        seen.append(item)
        means = result.outputs["means"] / factors
        assert (np.abs(means / (100 * me + item) - 1) < 1e-3).all(), (me, item, means)
    assert sorted(seen) == list(range(count))
    pool.close()
    print("done")
"""


def run_producers(pool: StartedPool, client: trtpool.Client, model: str, code: str, count: int, *more: object) -> None:
    """Four at once, each with `count` items that are its own."""
    before = figures(client, client.model_index(model))
    producers = [
        producer(pool, code, me, count, *more, transport=transport)
        for me, transport in enumerate(("lifeline", "zmq", "lifeline", "lifeline"), 1)
    ]
    try:
        for one in producers:
            one.wait_for_line("connected")
        for one in producers:
            one.say()
        for one in producers:
            assert one.succeed().endswith("done\n")
    finally:
        for one in producers:
            one.__exit__(None, None, None)
    after = figures(client, client.model_index(model))
    assert (after.items - before.items, after.failed_items, client.status().violations) == (
        4 * count,
        before.failed_items,
        0,
    )


def test_four_producers_of_small_items_get_each_its_own(zoo, every_engine, client, tmp_path):
    first, second = zoo.mlp_weights()
    np.savez(tmp_path / "weights.npz", first=first, second=second)
    run_producers(every_engine, client, "mlp", MLP, 3000, zoo.seed, tmp_path / "weights.npz")


def test_four_producers_of_large_items_get_each_its_own(every_engine, client):
    run_producers(every_engine, client, "reduce1600x2560", REDUCE, 13)


# --- Pinning to a GPU ----------------------------------------------------------------------------


def test_work_is_pinned_to_a_gpu_that_is_there(zoo, client, rng):
    samples = zoo.samples("mlp")
    (worker,) = client.status().workers
    assert (worker.gpu, worker.lanes) == (0, 3)
    with Work(client, "mlp", samples, samples.choose(rng, 9)) as work:
        work.submit(gpu=0)
        work.check()
    with client.lease(model="mlp") as lease:
        lease.inputs["x"][...] = samples.inputs[5]
        for gpu in (1, -1, 2**40):
            with pytest.raises(trtpool.InvalidInput, match=f"no GPU {gpu}"):
                lease.submit(gpu=gpu)
        # It was not spent by that.
        samples.check([5], lease.submit(gpu=0).result(timeout_s=PATIENCE_S).outputs["y"][None])


# --- P1: one write -------------------------------------------------------------------------------


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is no file's and nobody else's: where a copy of an input would be."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


def minor_faults(pid: int) -> int:
    """Pages that a process touched for the first time."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def test_a_worker_keeps_no_copy_of_inputs(client):
    """Of 200 inputs of 47 MiB it allocates not as much as one."""
    (worker,) = client.status().workers

    def write(level: int, inputs: dict[str, Array]) -> None:
        inputs["image"].reshape(3, -1)[:] = np.array([[level], [-level], [2 * level]])

    def serve(levels: range) -> None:
        for level, result in client.map(write, levels, model="reduce1600x2560", window=16):
            np.testing.assert_allclose(result.outputs["means"], [level, -level, 2 * level], rtol=1e-3)

    serve(range(1, 21))
    before = anonymous_bytes(worker.pid), minor_faults(worker.pid)
    serve(range(21, 221))
    after = anonymous_bytes(worker.pid), minor_faults(worker.pid)
    assert [now.pid for now in client.status().workers] == [worker.pid]
    assert after[0] - before[0] < IMAGE_BYTES // 4
    assert 4096 * (after[1] - before[1]) < IMAGE_BYTES // 4


# --- Pinned memory comes back --------------------------------------------------------------------


def shared_memory_bytes() -> int:
    """What memfds, and nothing much else, take on this machine."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:"))
    return 1024 * int(line.split()[1])


def test_the_memory_of_a_killed_pool_comes_back(zoo, cuda, tmp_path):
    """The host's, though it was pinned, and the GPU's; nothing in this process maps the arena."""
    slots = 48
    arena = slots * IMAGE_BYTES
    shared, (free, _) = shared_memory_bytes(), cuda.memory()
    with StartedPool(zoo.plan("reduce1600x2560"), run_dir=tmp_path / "run", gpus=0, slots=slots) as pool:
        status = Path(f"/proc/{pool.worker}/status").read_text()
        pinned = sum(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmPin:"))
        assert pinned == 0 or pinned >= arena  # not all drivers tell the kernel
        assert shared_memory_bytes() > shared + arena * 9 // 10
        assert cuda.memory()[0] < free
        processes = family(pool.pid)
        with watching([pool.pid, *(process.pid for process in processes)]) as wait:
            pool.kill()
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            wait()
        wait_until(lambda: shared_memory_bytes() < shared + arena // 10, "it is given back", shared_memory_bytes)
        wait_until(lambda: cuda.memory()[0] > free - (64 << 20), "the GPU's is free", cuda.memory)
