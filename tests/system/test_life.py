"""How pools end, and what they survive: signals, `kill -9` of each process, inputs that fail or kill."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from concurrent.futures import wait as wait_futures

import numpy as np
import pytest

import trtpool
from tests.system.rig import (
    CLI,
    StartedPool,
    answer,
    family,
    figures,
    hold,
    ones,
    only_the_third_ends_workers,
    submit,
    wait_all_free,
    wait_until,
    watching,
)

# --- Signals -------------------------------------------------------------------------------------


def test_a_drain_finishes_what_is_in_flight_and_grants_nothing_more(negate, run_dir):
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=1, slots=8) as pool,
        pool.connect() as client,
        pool.connect("zmq") as other,
    ):
        unsubmitted = client.lease()
        with pool.stopped_worker():
            work = [*hold(client, [1, 2, 3]), submit(other, 4)]
            wait_until(lambda: figures(client).leased == 1)
            pool.kill(signal.SIGTERM)
            wait_until(lambda: client.status().draining, "draining")
            for one in (client, other):
                with pytest.raises(trtpool.PoolClosed, match="is stopping and grants no more slots"):
                    one.infer(x=ones())
            unsubmitted.inputs["x"][...] = 5  # a lease that is held already may still be submitted
            work.append(unsubmitted.submit())
            wait_until(lambda: figures(client).leased == 0)
        assert [answer(one) for one in work] == [-1, -2, -3, -4, -5]
        pool.succeed()
        with pytest.raises(trtpool.PoolClosed, match="was stopped"):
            client.lease()
    assert not run_dir.exists()


def test_a_second_signal_ends_a_drain_at_once(negate, run_dir):
    with StartedPool(negate, run_dir=run_dir, max_batch=1, slots=8) as pool, pool.connect() as client:
        with pool.stopped_worker():  # for good: nothing in flight can finish
            work = hold(client, [1, 2, 3])
            stop = [*CLI, "stop", f"--run-dir={run_dir}", "--timeout-s=0"]
            with watching(process.pid for process in family(pool.pid)) as wait:
                first = subprocess.run(stop, check=False, capture_output=True, text=True)
                assert first.returncode == 13
                assert "run `trtpool stop` again" in first.stderr
                wait_until(lambda: client.status().draining, "draining")
                subprocess.run(stop, check=False, capture_output=True)
                assert pool.wait() == 1
                wait()
        assert "stopped with work in flight" in pool.rest(2)
        for one in work:
            with pytest.raises(trtpool.PoolClosed):
                one.result(timeout_s=60)
    assert not run_dir.exists()


def test_a_drain_that_takes_too_long_ends_by_itself(negate, run_dir):
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=1, slots=8, drain_timeout_s=0.2) as pool,
        pool.connect() as client,
        pool.stopped_worker(),
    ):
        (work,) = hold(client, [1])
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 1
        with pytest.raises(trtpool.PoolClosed):
            work.result(timeout_s=60)


# --- kill -9 -------------------------------------------------------------------------------------


def test_without_its_supervisor_a_pool_ends_and_another_can_follow(negate, run_dir):
    with StartedPool(negate, run_dir=run_dir, max_batch=1, slots=8) as pool, pool.connect() as client:
        with watching([pool.broker, pool.worker]) as wait:
            with pool.stopped_worker():
                work = hold(client, [1, 2, 3])
                pool.kill()
                assert pool.wait() == -signal.SIGKILL
            wait()
        for one in work:
            with pytest.raises(trtpool.PoolClosed, match="ended unexpectedly; see its log"):
                one.result(timeout_s=60)
        with pytest.raises(trtpool.PoolClosed):
            client.lease()
        assert pool.rest(2) == ""
    assert (run_dir / "lock").exists()
    with pytest.raises(trtpool.PoolNotFound):
        trtpool.connect(run_dir=run_dir)
    for command in ("stop", "status"):
        assert (
            subprocess.run([*CLI, command, f"--run-dir={run_dir}"], check=False, capture_output=True).returncode == 11
        )
    with StartedPool(negate, run_dir=run_dir) as pool:
        with pool.connect() as client:
            assert client.infer(x=ones())["y"].tolist() == [-1] * 4
        pool.stop()
    assert not run_dir.exists()


def test_the_work_of_a_killed_worker_is_done_by_the_next(small):
    with small.connect() as client:
        with small.stopped_worker() as worker:
            work = hold(client, [1, 2, 3, 4, 5, 6])
            os.kill(worker, signal.SIGKILL)
            assert [answer(one) for one in work] == [-1, -2, -3, -4, -5, -6]
        assert small.worker != worker
        assert figures(client).retries > 0
    small.wait_for_line("worker 1 ended: SIGKILL", 2)


def test_a_worker_is_started_until_it_can_load(negate, run_dir, worker_does, tmp_path):
    cannot = tmp_path / "cannot"
    env = worker_does(f"if os.path.exists({str(cannot)!r}): raise errors.ModelError('no disk')")
    with StartedPool(negate, run_dir=run_dir, max_batch=1, env=env) as pool, pool.connect() as client:
        with pool.stopped_worker() as worker:
            work = hold(client, [1, 2, 3])
            cannot.touch()
            os.kill(worker, signal.SIGKILL)
            pool.wait_for_line("worker 1 ended: SIGKILL", 2)
            pool.wait_for_line("no disk", 2)
            pool.wait_for_line("worker 1 ended: no disk (exit code 4); another is started", 2)
            assert figures(client).running == 0
            cannot.unlink()
            assert [answer(one) for one in work] == [-1, -2, -3]
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


# --- Inputs that fail, or kill -------------------------------------------------------------------


def test_an_input_that_the_engine_refuses_fails_alone(pool, client):
    before = figures(client, 1)
    with client.lease_many(12, model="picky") as leases:
        slots = leases.slots()
        for index, slot in enumerate(slots):
            slot.inputs["x"][...] = 9 if index in (3, 8) else index % 4
        with pool.stopped_worker():  # so that batches are full
            work = [slot.submit() for slot in slots]
            wait_until(lambda: figures(client, 1).queued + figures(client, 1).running == 12)
        for index, one in enumerate(work):
            if index in (3, 8):
                with pytest.raises(trtpool.EngineFailed, match="tried alone 3 times"):
                    one.result(timeout_s=60)
            else:
                with one.result(timeout_s=60) as result:
                    assert result.outputs["y"] == index % 4
            one.release()
    after = figures(client, 1)
    assert (after.items - before.items, after.failed_items - before.failed_items) == (10, 2)


def test_some_slots_of_a_run_fail(client):
    """The good slots of a run that was submitted together can be read all the same."""
    (lease,) = client.lease_many(6, model="picky")
    with lease:
        lease.inputs["x"][...] = [0, 1, 9, 3, 2, 1]
        submitted = lease.submit()
        with pytest.raises(trtpool.EngineFailed) as raised:
            submitted.result(timeout_s=60)
        assert raised.value.slots == range(2, 3)
        result = submitted.result(timeout_s=60, partial=True)
        assert list(result.errors) == [2]
        assert [float(result.at(row).outputs["y"]) for row in (0, 1, 3, 4, 5)] == [0, 1, 3, 2, 1]


def test_an_input_that_kills_workers_fails_alone(negate, run_dir, worker_does):
    env = worker_does(run="if any((items == 13).any() for items in inputs): os.kill(os.getpid(), signal.SIGSEGV)")
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=4, slots=16, env=env) as pool,
        pool.connect() as client,
    ):
        only_the_third_ends_workers(client, r"SIGSEGV \(a crash in native code")
        client.close()
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


# --- Deadlines, delay, partly filled slots -------------------------------------------------------


def test_a_deadline_counts_only_in_the_queue(pool, client):
    with pool.stopped_worker():
        running = hold(client, [1, 2])
        late = [submit(client, value, deadline_s=0.01) for value in (3, 4)]
        for one in late:  # while the worker stands still
            with pytest.raises(trtpool.DeadlineExceeded, match="ms in the queue"):
                one.result(timeout_s=60)
            one.release()
        patient = submit(client, 5, deadline_s=1000)
        cancelled = submit(client, 6)
        assert not cancelled.cancel()
        with pytest.raises(trtpool.Cancelled):
            cancelled.result(timeout_s=60)
        cancelled.release()
    assert [answer(one) for one in (*running, patient)] == [-1, -2, -5]


def test_a_slow_engine_meets_deadlines_that_it_can_meet(client):
    """On one worker, in batches of 4 of some hundredths of a second each, 24 items take far more than the deadline.

    Each has its own, which counts from its arrival: of a batch that ends just then, the last to come may still go on.
    """
    deadline_ms = 50
    with client.lease_many(24, model="slow") as leases:
        work = []
        for index, slot in enumerate(leases.slots()):
            slot.inputs["x"][...] = index
            work.append(slot.submit(deadline_s=deadline_ms / 1e3))
        wait_futures(work, timeout=60)
        errors = [one.exception(0) for one in work]
        assert errors != [None] * 24
        assert errors[0] is None  # it was dispatched at once
        for index, (one, error) in enumerate(zip(work, errors, strict=True)):
            if error is None:
                result = one.result(0)
                assert result.outputs["y"] == index
                assert result.timings.queue_ns < deadline_ms * 1e6
            else:
                assert isinstance(error, trtpool.DeadlineExceeded)
                waited = re.search(r"after ([\d.]+) ms in the queue", str(error))
                assert waited is not None
                assert float(waited[1]) >= deadline_ms
            one.release()


def test_a_run_that_a_slow_engine_cannot_finish_in_time_is_late_from_some_slot_on(client):
    """The same in one submission, and so with one deadline for all."""
    (lease,) = client.lease_many(24, model="slow")
    lease.inputs["x"][...] = np.arange(24)[:, None]
    with lease.submit(deadline_s=0.05).result(timeout_s=60, partial=True) as result:
        late = sorted(result.errors)
        assert late[-1] == 23
        assert late == list(range(late[0], 24))
        assert 0 not in late  # it was dispatched at once
        assert all(isinstance(error, trtpool.DeadlineExceeded) for error in result.errors.values())
        assert result.outputs["y"][: late[0], 0].tolist() == list(range(late[0]))


@pytest.mark.parametrize("delay_us", [0, 2000])
def test_slots_of_several_items(negate, run_dir, delay_us):
    with StartedPool(negate, run_dir=run_dir, items_per_slot=4, max_batch=16, slots=16, max_delay_us=delay_us) as pool:
        with pool.connect() as client:
            for count in (1, 3, 4, 5, 17, 200):
                x = np.arange(4 * count, dtype=np.float32).reshape(count, 4)
                np.testing.assert_array_equal(client.infer(x=x)["y"], -x)

            def write(numbers: list[int], inputs) -> int:
                inputs["x"][: len(numbers)] = np.array(numbers)[:, None]
                return len(numbers)

            chunks = [list(range(first, first + 1 + first % 4)) for first in range(0, 400, 4)]
            for numbers, result in client.map(write, chunks):
                assert result.outputs["y"][: len(numbers), 0].tolist() == [-number for number in numbers]
            one = figures(client)
            wait_all_free(client)
            assert one.items == 230 + sum(map(len, chunks))
        pool.stop()


def test_a_delay_fills_batches(negate, run_dir):
    """With a delay of a minute nothing runs before a batch is full, and then at once."""
    with StartedPool(negate, run_dir=run_dir, max_batch=4, slots=16, max_delay_us=60_000_000) as pool:
        with pool.connect() as client:
            work = [submit(client, value) for value in (1, 2, 3)]
            assert figures(client).queued == 3
            work.append(submit(client, 4))
            assert [answer(one) for one in work] == [-1, -2, -3, -4]
            assert figures(client).batches == 1
            work = [submit(client, 5)]
            pool.kill(signal.SIGTERM)  # a drain does not wait for it
            assert answer(work[0]) == -5
        pool.succeed()
