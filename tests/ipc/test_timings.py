"""Where the time of a request went."""

from __future__ import annotations

import time

import hypothesis.strategies as st
import msgspec
import numpy as np
from hypothesis import given

from tests.ipc.fake_pool import BAD, NET_S, until
from trtpool.ipc import messages as m
from trtpool.ipc.errors import Cancelled, EngineFailed
from trtpool.ipc.timings import PHASES, Timings, timings_of

u63 = st.integers(0, 2**63 - 1)
u50 = st.integers(0, 2**50)  # two weeks, as an honest clock may say


def done(queue: int = 0, copy_in: int = 0, compute: int = 0, copy_out: int = 0, ended: int = 0) -> m.Done:
    return m.Done(1, 0, 1, 0, m.OK, queue, copy_in, compute, copy_out, "", ended)


def test_each_phase():
    timings = timings_of(7, 1_000, 1_010, done(100, 1, 20, 3, 1_200), 1_240)
    assert timings == Timings(7, 10, 100, 66, 1, 20, 3, 40)
    assert timings.total_ns == 7 + 1_240 - 1_000
    assert timings.latency_ns == 1_240 - 1_010


def test_without_the_end_at_the_worker_the_way_back_counts_as_the_way_there():
    assert timings_of(0, 0, 10, done(100, 1, 20, 3, 0), 240) == Timings(0, 10, 100, 106, 1, 20, 3, 0)


@given(u50, u50, u50, u63, u63, u63, u63, u63)
def test_no_phase_is_negative_whatever_a_worker_claims(fill, queue, took, copy_in, compute, copy_out, ended, lease):
    timings = timings_of(lease, 5, 5 + fill, done(queue, copy_in, compute, copy_out, ended), 5 + fill + took)
    assert min(msgspec.structs.astuple(timings)) >= 0
    if queue + copy_in + compute + copy_out <= took:
        assert timings.latency_ns == took


def test_phases_are_the_fields_in_order():
    assert Timings.__struct_fields__ == tuple(f"{name}_ns" for name in PHASES)


def test_timings_say_themselves_in_milliseconds():
    assert str(Timings(1_000_000, 0, 2_500_000, 0, 0, 0, 0, 40)) == (
        "lease 1.000, fill 0.000, queue 2.500, dispatch 0.000, copy in 0.000, compute 0.000, copy out 0.000, "
        "delivery 0.000 ms"
    )


# --- In a pool -----------------------------------------------------------------------------------


def test_the_times_of_a_request_add_up_to_what_passed(pool, client):
    before_ns = time.monotonic_ns()
    with client.lease() as lease:
        lease.inputs["x"][...] = 1
        submitted = lease.submit()
        assert submitted.timings is None
        result = submitted.result(NET_S)
    after_ns = time.monotonic_ns()
    timings = result.timings
    assert (timings.copy_in_ns, timings.compute_ns, timings.copy_out_ns) == (1, 2, 3), "as the worker measured them"
    assert min(timings.lease_ns, timings.fill_ns, timings.dispatch_ns, timings.delivery_ns) > 0
    assert 0 < timings.latency_ns < timings.total_ns <= after_ns - before_ns
    assert submitted.timings == timings


def test_a_client_that_does_not_read_has_a_long_delivery(pool, client):
    with client.lease() as lease:
        lease.inputs["x"][...] = 1
        submitted = lease.submit()
        until(pool.connect(), lambda now: now.done == 1)
        seen_ns = time.monotonic_ns()
        until(pool.connect(), lambda now: now.done == 1)
        reads_ns = time.monotonic_ns()
        timings = submitted.result(NET_S).timings
    assert timings.delivery_ns > reads_ns - seen_ns


def test_work_that_waits_for_a_worker_has_a_long_queue(pool, client):
    with pool.held(), client.lease_many(12) as leases:  # more than a worker is sent
        submitted = [lease.submit() for lease in leases.slots()]
        other = pool.connect()
        until(other, lambda now: now.queued + now.running == len(submitted))
        queued_ns = time.monotonic_ns()
        until(other, lambda now: now.queued > 0)
        waited_ns = time.monotonic_ns() - queued_ns
        pool.go()
        timings = [one.result(NET_S).timings for one in submitted]
        for one in submitted:
            one.release()
    assert max(one.queue_ns for one in timings) > waited_ns
    assert timings[0].lease_ns == timings[-1].lease_ns > 0, "they were leased together"


def test_slots_granted_in_advance_were_not_waited_for(pool, client):
    """From the third in a rhythm on."""
    timings = []
    for _ in range(5):
        with client.lease() as lease:
            lease.inputs["x"][...] = 1
            timings.append(lease.submit().result(NET_S).timings)
    assert timings[-1].lease_ns == 0
    assert timings[-1].fill_ns > 0


def test_failed_work_has_the_times_that_it_got_to(pool, client):
    with client.lease() as lease:
        lease.inputs["x"][...] = BAD
        submitted = lease.submit()
        assert isinstance(submitted.exception(NET_S), EngineFailed)
    timings = submitted.timings
    assert timings is not None
    assert timings.queue_ns > 0
    assert timings.compute_ns == 0


def test_cancelled_work_waited_in_the_queue(pool, client):
    with pool.held(), client.lease_many(12) as leases:
        runs = [lease.submit() for lease in leases.slots()]
        until(pool.connect(), lambda now: now.running > 0)
        runs[-1].cancel()
        assert isinstance(runs[-1].exception(NET_S), Cancelled)
        timings = runs[-1].timings
        assert timings is not None
        assert timings.queue_ns > 0
        pool.go()
        for run in runs:
            run.release()


def test_map_fills_each_run_once(pool, client):
    """A run that is submitted in parts, as it fills: no part's `fill` has the writes of the one before."""

    def write(item, inputs):
        started = time.monotonic_ns()
        while time.monotonic_ns() - started < 2_000_000:
            pass
        inputs["x"][...] = item

    started_ns = time.monotonic_ns()
    timings = [result.timings for _, result in client.map(write, range(6), window=16)]
    passed_ns = time.monotonic_ns() - started_ns
    assert all(one.fill_ns >= 2_000_000 for one in timings)
    assert sum(one.fill_ns for one in timings) <= passed_ns


def test_results_of_one_run_share_its_times(pool, client):
    with client.lease_many(3) as leases:
        (run,) = leases
        run.inputs["x"][...] = np.ones((3, 4), np.float32)
        result = run.submit().result(NET_S)
        assert result.at(2).timings == result.timings
