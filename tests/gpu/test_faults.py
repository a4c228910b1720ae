"""What goes wrong on a GPU: workers that die while their GPU writes, and too little memory."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Collection, Iterator

import numpy as np
import pytest

import trtpool
from tests.gpu.harness import Work, given_back, is_poisoned, poison, standing_still
from tests.gpu.zoo import POISON, Array
from tests.system.rig import (
    CLI,
    Process,
    StartedPool,
    family,
    figures,
    wait_until,
    watching,
)
from trtpool.ipc.errors import DeviceUnavailable, EngineFailed

pytestmark = [pytest.mark.gpu, pytest.mark.system]

# --- Workers that die ----------------------------------------------------------------------------

WORKERS = 3
ITEMS = 12
PROBES = 128
"""Words of each output that are looked at to see whether it is being written."""

LATE_S = 2.0
"""For so long nothing may be written any more."""


@pytest.fixture(scope="module")
def crowd(zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedPool]:
    """PP-OCR detection, whose outputs take 16 MB an item, on three workers that share a GPU."""
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, limits[1]))  # a crash here is on purpose
    try:
        run_dir = tmp_path_factory.mktemp("crowd") / "run"
        plan = zoo.plan("ppocr_det")
        with StartedPool(
            plan, run_dir=run_dir, gpus=0, workers_per_gpu=WORKERS, lanes=2, max_batch=2, slots=20
        ) as pool:
            yield pool
            with watching(process.pid for process in family(pool.pid)) as wait:
                pool.kill(signal.SIGTERM)
                assert pool.wait() == 0
                wait()
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limits)


@pytest.fixture
def crowd_client(crowd: StartedPool, request: pytest.FixtureRequest) -> Iterator[trtpool.Client]:
    """A client of that pool."""
    with given_back(crowd):
        with crowd.connect() as connected:
            yield connected
        request.node.funcargs.pop("crowd_client", None)  # as with `client`


def workers_ready(client: trtpool.Client, ended: Collection[int] = ()) -> list[int]:
    """Wait until all workers are ready, none of them one of `ended`; their pids."""

    def ready() -> list[int]:
        pids = [worker.pid for worker in client.status().workers]
        return pids if len(pids) == WORKERS and not set(pids) & set(ended) else []

    return wait_until(ready, "all workers are ready", client.status)


def wait_for_copy_out(y: Array, rows: list[int], patience_s: float) -> list[int]:
    """Spin until some of `rows` are written in part, and return those; none when `patience_s` passed first."""
    words = y.reshape(len(y), -1).view(np.uint32)
    probes = words[:, :: words.shape[1] // PROBES]
    poisoned = np.uint32(0x01010101 * POISON)
    watched = np.array(rows)
    deadline = time.monotonic() + patience_s
    while watched.size and time.monotonic() < deadline:
        written = probes[watched] != poisoned
        partly = written.any(axis=1) & ~written.all(axis=1)
        if partly.any():
            return [int(row) for row in watched[partly]]
        watched = watched[~written.all(axis=1)]
    return []


def check_aftermath(work: Work, suspects: list[int]) -> None:
    """Results are right, and stay; over `suspects`, which a dead worker's GPU may have been writing, nothing comes."""
    work.check()
    poison(work.y, suspects)
    kept = {row: work.y[row].tobytes() for row in work.rows if row not in suspects}
    time.sleep(LATE_S)  # the point is that nothing changes
    assert [row for row in suspects if not is_poisoned(work.y, row)] == []
    assert [row for row, outputs in kept.items() if work.y[row].tobytes() != outputs] == []


@contextlib.contextmanager
def all_accounted_for(client: trtpool.Client, items: int) -> Iterator[None]:
    """So many items are run meanwhile, all with a result."""
    before = figures(client)
    yield
    after = figures(client)
    assert (after.items - before.items, after.failed_items - before.failed_items) == (items, 0)


def test_a_worker_killed_in_copy_out_spoils_nothing(zoo, crowd_client, rng):
    """Its batches are retried at once by workers that stood still until then, into the same rows."""
    samples = zoo.samples("ppocr_det")
    killed: list[int] = []
    for _ in range(8):
        victim, *others = workers_ready(crowd_client, killed)
        retries = figures(crowd_client).retries
        with (
            all_accounted_for(crowd_client, ITEMS),
            Work(crowd_client, "ppocr_det", samples, samples.choose(rng, ITEMS)) as work,
        ):
            with standing_still(others):
                work.submit()
                suspects = wait_for_copy_out(work.y, work.rows, patience_s=1)
                if suspects:
                    os.kill(victim, signal.SIGKILL)
            if not suspects:  # it was too quick for us
                work.check()
                continue
            check_aftermath(work, suspects)
        assert figures(crowd_client).retries > retries
        killed.append(victim)
        if len(killed) == 3:
            break
    assert killed


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_workers_that_die_at_any_moment_are_replaced(number, zoo, crowd, crowd_client, rng):
    """Two at a time, each at a moment of its own."""
    samples = zoo.samples("ppocr_det")
    before = workers_ready(crowd_client)
    victims = rng.permutation(before)[:2].tolist()
    with (
        all_accounted_for(crowd_client, ITEMS),
        Work(crowd_client, "ppocr_det", samples, samples.choose(rng, ITEMS)) as work,
        watching(victims) as wait,
    ):
        work.submit()
        for victim in victims:
            select.select([], [], [], rng.uniform(0, 0.04))
            os.kill(victim, number)
        wait()
        check_aftermath(work, [])
    for _ in victims:
        crowd.wait_for_line(f"ended: {number.name}", 2)
    assert set(before) - set(workers_ready(crowd_client, victims)) == set(victims)
    with Work(crowd_client, "ppocr_det", samples, samples.choose(rng, ITEMS)) as work:
        work.submit()
        work.check()


# --- A GPU that fails ----------------------------------------------------------------------------

SPOILER = """
import os, sys, threading, time

def spoil():
    while True:  # whoever removes the file is the one to fail
        try:
            os.unlink(os.environ["TRTPOOL_TEST_SPOIL"])
            break
        except FileNotFoundError:
            time.sleep(0.002)
    from cuda.bindings import driver, runtime
    runtime.cudaSetDevice(0)  # this thread joins the context that TensorRT works in
    error, module = driver.cuModuleLoadData(PTX)
    assert not error, error
    error, kernel = driver.cuModuleGetFunction(module, b"spoil")
    assert not error, error
    (error,) = driver.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0)
    assert not error, error

PTX = b'''
.version 7.0
.target sm_70
.address_size 64
.visible .entry spoil() {
    .reg .u64 %address;
    mov.u64 %address, 16;
    st.global.u64 [%address], %address;
    ret;
}
\\0'''
if sys.orig_argv[1:3] == ["-m", "trtpool.workers"]:
    threading.Thread(target=spoil, daemon=True).start()
"""
"""A `sitecustomize` that makes one worker's GPU write to an address that is not there, while a file says so."""


def test_a_gpu_that_faults_is_reported_and_its_work_done_by_another_worker(zoo, rng, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SPOILER)
    spoil = tmp_path / "spoil"
    env = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]),
        "TRTPOOL_TEST_SPOIL": str(spoil),
    }
    samples = zoo.samples("mlp")
    with StartedPool(zoo.plan("mlp"), run_dir=tmp_path / "run", env=env, gpus=0, slots=512) as pool:
        with pool.connect() as client:
            (before,) = client.status().workers
            spoil.touch()
            ended: list[int] = []
            while not ended:  # work goes on until the worker is another one
                with Work(client, "mlp", samples, samples.choose(rng, 64)) as work:
                    work.submit()
                    work.check()
                ended = [worker.pid for worker in client.status().workers if worker.pid != before.pid]
            assert not spoil.exists()
            (model,) = client.status().models
            assert (model.failed_items, model.free) == (0, model.slots)
        said = pool.wait_for_line("another is started", 2)
        assert "illegal" in said, "the cause is told"
        assert f"exit code {EngineFailed.exit_code}" in said
        with watching(process.pid for process in family(pool.pid)) as wait:
            pool.kill(signal.SIGTERM)
            assert pool.wait() == 0
            wait()


# --- Too little memory ---------------------------------------------------------------------------

HOG = """
import sys
from cuda.bindings import runtime

left = int(sys.argv[1])
while True:
    error, free, _ = runtime.cudaMemGetInfo()
    assert not error, error
    if free - left < 8 << 20:
        break
    error, _ = runtime.cudaMalloc(min(free - left, 4 << 30))
    if error:  # what is free is in pieces
        break
print("full", flush=True)
sys.stdin.readline()
"""
"""Takes all memory of the GPU but so many bytes, and keeps it."""


@pytest.mark.parametrize(
    ("left_bytes", "cause", "remedy"),
    [(3 << 30, "memory is too small", "lower --lanes"), (32 << 20, "memory is full", "nvidia-smi")],
    ids=["enough for some lanes", "not enough to start"],
)
def test_a_gpu_without_memory_is_said_so(left_bytes, cause, remedy, zoo, tmp_path):
    """16 lanes of `reduce1600x2560` take 16 * 8 * 47 MiB, which is 6 GiB."""
    command = [*CLI, "start", zoo.plan("reduce1600x2560"), "--gpus=0", "--lanes=16", "--slots=16"]
    with Process(sys.executable, "-c", HOG, str(left_bytes)) as hog:
        hog.wait_for_line("full")
        with Process(*command, f"--run-dir={tmp_path / 'run'}") as start:
            out, err = start.rest(1), start.rest(2)
            assert (start.wait(), out) == (DeviceUnavailable.exit_code, ""), err
        hog.say()
        assert hog.wait() == 0
    (line,) = (line for line in err.splitlines() if line.startswith("trtpool: "))
    assert cause in line
    assert remedy in line
    assert not (tmp_path / "run").exists()
