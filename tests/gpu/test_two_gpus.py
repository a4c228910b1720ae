"""One pool on two GPUs: pinned work goes where it should, and what befalls one GPU does not touch the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

import trtpool
from tests.gpu.harness import Work, given_back, standing_still
from tests.gpu.zoo import KINDS, Zoo
from tests.system.rig import StartedPool, family, figures, wait_until, watching

pytestmark = [pytest.mark.gpu, pytest.mark.gpu2, pytest.mark.system]

NAMES = ("mlp", "resnet50_u8", "reduce1600x2560")


@pytest.fixture(scope="module")
def pair(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedPool]:
    """A pool on GPUs 0 and 1."""
    plans = [zoo.plan(name) for name in NAMES]
    run_dir = tmp_path_factory.mktemp("pair") / "run"
    with StartedPool(*plans, run_dir=run_dir, gpus="0,1") as pool:
        yield pool
        with watching(process.pid for process in family(pool.pid)) as wait:
            pool.kill(signal.SIGTERM)
            assert pool.wait() == 0
            wait()


@pytest.fixture
def pair_client(pair: StartedPool, request: pytest.FixtureRequest) -> Iterator[trtpool.Client]:
    with given_back(pair):
        with pair.connect() as connected:
            yield connected
        request.node.funcargs.pop("pair_client", None)  # as with `client`


def workers(client: trtpool.Client) -> dict[int, int]:
    """The pid of the worker on each GPU, when both are ready."""
    wait_until(lambda: len(client.status().workers) == 2, "both workers are ready", client.status)
    return {worker.gpu: worker.pid for worker in client.status().workers if worker.gpu is not None}


def in_flight(client: trtpool.Client) -> dict[int | None, int]:
    """Batches on each GPU."""
    return {worker.gpu: worker.batches_in_flight for worker in client.status().workers}


def test_each_worker_has_a_gpu_of_its_own(pair, pair_client):
    assert set(workers(pair_client)) == {0, 1}
    uuids = {line.partition("(GPU-")[2][:36] for line in pair.announced.splitlines() if line.startswith("GPU ")}
    assert len(uuids) == 2


@pytest.mark.parametrize("gpu", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_pinned_work_goes_to_its_gpu(name, gpu, zoo, pair_client, rng):
    """It runs while the other GPU's worker stands still, and only then."""
    samples, count = zoo.samples(name), KINDS[name].max_batch
    here, there = workers(pair_client)[gpu], workers(pair_client)[1 - gpu]
    with Work(pair_client, name, samples, samples.choose(rng, count)) as work, standing_still([there]):
        work.submit(gpu=gpu)
        work.check()
    with Work(pair_client, name, samples, samples.choose(rng, count)) as work:
        with standing_still([here]):
            work.submit(gpu=gpu)
            wait_until(lambda: in_flight(pair_client)[gpu], "it is with its worker", pair_client.status)
            assert in_flight(pair_client)[1 - gpu] == 0
            assert not any(submitted.done() for submitted in work.submitted)
        work.check()


@pytest.mark.parametrize("name", NAMES)
def test_work_that_is_not_pinned_uses_both_gpus(name, zoo, pair_client, rng):
    samples, count = zoo.samples(name), 4 * KINDS[name].max_batch
    pids = workers(pair_client)
    with Work(pair_client, name, samples, samples.choose(rng, count)) as work:
        with standing_still(pids.values()):
            work.submit()
            wait_until(lambda: all(in_flight(pair_client).values()), "both have work", pair_client.status)
        work.check()


def test_a_worker_killed_on_one_gpu_does_not_touch_the_other(zoo, pair_client, rng):
    """Work pinned to the dead worker's GPU waits for the next worker there."""
    samples, name = zoo.samples("resnet50_u8"), "resnet50_u8"
    before = workers(pair_client)
    failed = figures(pair_client, pair_client.model_index(name)).failed_items
    with (
        Work(pair_client, name, samples, samples.choose(rng, 64)) as pinned,
        Work(pair_client, name, samples, samples.choose(rng, 64)) as other,
        Work(pair_client, name, samples, samples.choose(rng, 64)) as free,
    ):
        with standing_still([before[1]]):
            pinned.submit(gpu=1)
            wait_until(lambda: in_flight(pair_client)[1], "it is with its worker", pair_client.status)
            os.kill(before[1], signal.SIGKILL)
        other.submit(gpu=0)
        free.submit()
        other.check()
        free.check()
        pinned.check()
    after = workers(pair_client)
    assert (after[0], after[1] == before[1]) == (before[0], False)
    assert figures(pair_client, pair_client.model_index(name)).failed_items == failed
