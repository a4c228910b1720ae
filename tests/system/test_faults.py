"""Faults that a pool survives, under load, with every item accounted for; test_life and test_producers have more."""

from __future__ import annotations

import os
import signal

import pytest

import trtpool
from tests.system.rig import (
    CLI,
    Process,
    StartedPool,
    answer,
    figures,
    hold,
    wait_all_free,
    wait_until,
)

# --- Workers that hang ---------------------------------------------------------------------------


def test_a_worker_that_hangs_is_killed_and_its_work_done_by_the_next(negate, run_dir):
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=4, slots=16, batch_timeout_s=0.5) as pool,
        pool.connect() as client,
    ):
        with pool.stopped_worker() as worker:
            work = hold(client, [1, 2, 3, 4, 5, 6])
            # Nobody kills it but the pool, and until it does nothing comes of the work.
            assert [answer(one) for one in work] == [-1, -2, -3, -4, -5, -6]
            assert pool.worker != worker
        line = pool.wait_for_line("worker 1 ended", 2)
        assert "it hung: a batch ran for more than 0.5 s, so the pool killed it; if batches" in line
        assert line.endswith("longer --batch-timeout-s (SIGKILL from the pool); another is started")
        wait_all_free(client)
        client.close()
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


def test_an_input_that_hangs_workers_fails_alone(negate, run_dir, worker_does):
    env = worker_does(run="if any((items == 13).any() for items in inputs): os.kill(os.getpid(), signal.SIGSTOP)")
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=4, slots=16, env=env, batch_timeout_s=0.3) as pool,
        pool.connect() as client,
        client.lease_many(4) as leases,
    ):
        work = []
        for index, slot in enumerate(leases.slots()):
            slot.inputs["x"][...] = 13 if index == 2 else index
            work.append(slot.submit())
        with pytest.raises(trtpool.WorkerDied, match=r"it hung: a batch ran for more than 0\.3 s"):
            work[2].result(timeout_s=60)
        assert [answer(work[index]) for index in (0, 1, 3)] == [0, -1, -3]
        work[2].release()
        wait_all_free(client)
        client.close()
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


def test_a_worker_that_never_becomes_ready_fails_the_start(negate, run_dir, worker_does):
    env = worker_does(load="os.kill(os.getpid(), signal.SIGSTOP)")
    command = [*CLI, "start", negate, f"--run-dir={run_dir}", "--start-timeout-s=0.5"]
    with Process(*command, env=env) as start:
        assert start.wait() == 15
        (line,) = start.rest(2).splitlines()
        assert line.startswith("trtpool: worker 1: it was not ready after 0.5 s, so the pool killed it; if loading")
    assert not run_dir.exists()


def test_a_worker_that_never_becomes_ready_again_is_started_until_it_does(negate, run_dir, worker_does, tmp_path):
    stuck = tmp_path / "stuck"
    env = worker_does(load=f"if os.path.exists({str(stuck)!r}): os.kill(os.getpid(), signal.SIGSTOP)")
    # Long enough for a worker to start on a busy machine, and the time that this test takes.
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=1, env=env, start_timeout_s=10) as pool,
        pool.connect() as client,
    ):
        with pool.stopped_worker() as worker:
            work = hold(client, [1, 2, 3])
            stuck.touch()
            os.kill(worker, signal.SIGKILL)
        pool.wait_for_line("worker 1 ended: SIGKILL", 2)
        pool.wait_for_line("worker 1 ended: it was not ready after 10 s, so the pool killed it", 2)
        stuck.unlink()
        assert [answer(one) for one in work] == [-1, -2, -3]
        wait_until(lambda: figures(client).running == 0)
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0
