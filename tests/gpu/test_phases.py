"""Faults while a GPU is in a certain phase of a batch: copying in, computing, copying out.

A kernel holds the stream there: it says that it runs, and runs until it is told to end, or its process has ended.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import trtpool
from tests.gpu.harness import is_poisoned, planes_of, poison
from tests.gpu.test_faults import LATE_S
from tests.gpu.zoo import Array, Samples, Zoo
from tests.system.rig import PATIENCE_S, StartedPool, figures, producer, wait_until, watching

pytestmark = [pytest.mark.gpu, pytest.mark.system]

PHASES = ["copy in", "compute", "copy out"]
ITEMS = 8

HOLD = """
import os, sys

if sys.orig_argv[-1] == "trtpool.workers":
    import ctypes, threading, time
    from trtpool.workers import lanes

    folder = os.environ["TRTPOOL_TEST_PHASE"]

    def armed(phase):
        try:
            os.unlink(os.path.join(folder, phase))  # once
            return True
        except FileNotFoundError:
            return False

    def watch(words):
        while not words[0]:
            time.sleep(0.001)
        open(os.path.join(folder, "reached"), "w").close()
        while not os.path.exists(os.path.join(folder, "go on")):
            time.sleep(0.001)
        words[1] = 1

    class Lane(lanes.Lane):
        kernel = None

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            if Lane.kernel is None:
                from cuda.bindings import driver, runtime

                # Beforehand, since loading may wait for what runs.
                error, module = driver.cuModuleLoadData(PTX)
                assert not error, error
                error, Lane.kernel = driver.cuModuleGetFunction(module, b"hold")
                assert not error, error
                mapped = runtime.cudaHostAllocMapped | runtime.cudaHostAllocPortable
                error, address = runtime.cudaHostAlloc(8, mapped)
                assert not error, error
                Lane.address = int(address)
                words = (ctypes.c_uint32 * 2).from_address(Lane.address)
                words[0] = words[1] = 0
                threading.Thread(target=watch, args=(words,), daemon=True).start()

        def hold(self):
            from cuda.bindings import driver, runtime

            runtime.cudaSetDevice(0)  # this thread joins the context that TensorRT works in
            arguments = ((self.address,), (ctypes.c_void_p,))
            stream = driver.CUstream(self._handle)
            (error,) = driver.cuLaunchKernel(Lane.kernel, 1, 1, 1, 1, 1, 1, 0, stream, arguments, 0)
            assert not error, error

        def _copy_run_in(self, buffers, first, items):
            if armed("copy in"):
                super()._copy_run_in(buffers, first, 1)
                self.hold()
            super()._copy_run_in(buffers, first, items)

        def _copy_run_out(self, buffers, first, items):
            if armed("copy out"):
                super()._copy_run_out(buffers, first, 1)
                self.hold()
            super()._copy_run_out(buffers, first, items)

        def _compute(self, step):
            if armed("compute"):
                self.hold()
            super()._compute(step)

    lanes.Lane = Lane

    PTX = b'''
.version 7.0
.target sm_70
.address_size 64
.visible .entry hold(.param .u64 words) {
    .reg .u64 %at;
    .reg .u32 %word;
    .reg .pred %wait;
    ld.param.u64 %at, [words];
    mov.u32 %word, 1;
    st.volatile.u32 [%at], %word;
    membar.sys;
again:
    ld.volatile.u32 %word, [%at+4];
    setp.eq.u32 %wait, %word, 0;
    @%wait bra again;
    ret;
}
\\0'''
"""
"""A `sitecustomize` that holds a batch in the phase that a file names: of copies, when one item has been copied."""


class Held:
    """A pool whose worker holds a batch of `ITEMS` in a phase.

    Attributes:
        pool: of one worker on GPU 0.
        client: whose batch it is.
        y: the output plane.
        rows: the batch's rows of it, poisoned but for what was copied.
        worker: its pid.
    """

    def __init__(self, pool: StartedPool, client: trtpool.Client, folder: Path, samples: Samples, chosen: list[int]):
        self.pool, self.client, self._folder = pool, client, folder
        self._samples, self._chosen = samples, chosen
        (self._lease,) = client.lease_many(ITEMS, timeout_s=PATIENCE_S)
        (place,) = self._lease.inputs.values()
        place[...] = samples.inputs[chosen]
        first = self._lease._claim.first
        self.rows = list(range(first, first + ITEMS))
        self.y: Array = planes_of(client, "mlp")[1]
        poison(self.y, self.rows)
        self.worker = pool.worker

    def arm(self, phase: str) -> None:
        """Have the next batch held."""
        (self._folder / phase).touch()

    def wait_reached(self) -> None:
        wait_until((self._folder / "reached").exists, "the phase")

    def submit(self, phase: str) -> None:
        """Submit all as one batch, and wait until the GPU is in the phase, which it does not leave."""
        self.arm(phase)
        self._submitted = self._lease.submit()
        self.wait_reached()
        now = figures(self.client)
        assert (now.running, now.batches) == (ITEMS, 0)
        assert [is_poisoned(self.y, row) for row in self.rows] == [phase != "copy out", *[True] * (ITEMS - 1)]

    def go_on(self) -> None:
        """Let the GPU leave the phase."""
        (self._folder / "go on").touch()

    def check(self, *, retried: bool) -> None:
        """All items are right and were counted once; nothing is written to their rows later."""
        with self._submitted.result(timeout_s=PATIENCE_S) as result:
            (output,) = result.outputs.values()
            self._samples.check(self._chosen, output)
            del output  # a slot with views goes back to nobody
            now = figures(self.client)
            assert (now.items, now.failed_items, now.retries > 0) == (ITEMS, 0, retried)
            poison(self.y, self.rows)
            time.sleep(LATE_S)  # the point is that nothing changes
            assert all(is_poisoned(self.y, row) for row in self.rows)

    def release(self) -> None:
        self._lease.release()


@pytest.fixture
def held(zoo: Zoo, rng: np.random.Generator, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Held]:
    """A batch that is about to be submitted; pool and slots are at rest in the end."""
    (tmp_path / "sitecustomize.py").write_text(HOLD)
    folder = tmp_path / "phase"
    folder.mkdir()
    env = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]),
        "TRTPOOL_TEST_PHASE": str(folder),
    }
    samples = zoo.samples("mlp")
    with StartedPool(
        zoo.plan("mlp"), run_dir=tmp_path / "run", env=env, gpus=0, slots=64, max_batch=16, lanes=2
    ) as pool:
        with pool.connect() as client:
            one = Held(pool, client, folder, samples, samples.choose(rng, ITEMS))
            try:
                yield one
            finally:
                one.go_on()
            one.release()
            # Else pytest would hold it, and it the arena, when leaks are looked for.
            request.node.funcargs.pop("held", None)
            del one
        pool.check_at_rest()
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


def kill(*pids: int) -> None:
    with watching(pids) as wait:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait()


@pytest.mark.parametrize("phase", PHASES)
def test_a_worker_killed_in_each_phase(phase: str, held: Held) -> None:
    """The next one does the batch, whose inputs are still there; what the first GPU had begun comes no more."""
    held.submit(phase)
    kill(held.worker)
    held.check(retried=True)
    assert held.pool.worker != held.worker


@pytest.mark.parametrize("phase", PHASES)
def test_a_worker_that_stands_still_in_each_phase_goes_on(phase: str, held: Held) -> None:
    held.submit(phase)
    os.kill(held.worker, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(held.worker).status() == psutil.STATUS_STOPPED, "it stands still")
    held.go_on()
    os.kill(held.worker, signal.SIGCONT)
    held.check(retried=False)
    assert held.pool.worker == held.worker


@pytest.mark.parametrize("phase", PHASES)
def test_a_broker_killed_under_a_gpu_in_each_phase(phase: str, held: Held) -> None:
    """The worker keeps its batch, and the next broker hears what came of it."""
    held.submit(phase)
    kill(held.pool.broker)
    assert held.client.status().epoch == 2
    assert figures(held.client).running == ITEMS
    held.go_on()
    held.check(retried=False)
    assert held.pool.worker == held.worker


@pytest.mark.parametrize("phase", PHASES)
def test_worker_and_broker_killed_together_in_each_phase(phase: str, held: Held) -> None:
    held.submit(phase)
    kill(held.worker, held.pool.broker)
    held.check(retried=True)
    assert held.client.status().epoch == 2


PRODUCER = """
    (slots,) = pool.lease_many(8)
    slots.inputs["x"][...] = 1
    work = slots.submit()
    wait("submitted")
"""


@pytest.mark.parametrize("phase", PHASES)
def test_a_producer_killed_in_each_phase_of_its_batch(phase: str, held: Held) -> None:
    """Its slots stay taken until the GPU has written what it writes."""
    held.arm(phase)
    with producer(held.pool, PRODUCER) as victim:
        victim.wait_for_line("submitted")
        held.wait_reached()
        free = figures(held.client).free
        victim.kill()
        victim.wait()
        held.client.status()  # what the broker hears after this comes after the end of that process
        assert (figures(held.client).running, figures(held.client).free) == (8, free)
        held.go_on()
        wait_until(lambda: figures(held.client).free == free + 8, "they come back", held.client.status)
