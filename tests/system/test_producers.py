"""Producers as processes: many at once, and each way in which one can leave."""

from __future__ import annotations

import os
import pickle
import signal

import pytest

import trtpool
from tests.system.rig import (
    StartedPool,
    answer,
    figures,
    hold,
    producer,
    submit,
    wait_all_free,
    wait_until,
    watching,
)

# --- Many ----------------------------------------------------------------------------------------

STREAM = """
    me, count, ordered = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "ordered"

    def write(item, inputs):
        inputs["x"][...] = me, item, me * item, 1

    wait("connected")
    seen = []
    for item, result in pool.map(write, range(count), window=8, ordered=ordered):
        assert result.outputs["y"].tolist() == [-me, -item, -me * item, -1], (me, item, result.outputs["y"])
        seen.append(item)
        if item == count // 2:
            print("half", flush=True)
    assert (seen if ordered else sorted(seen)) == list(range(count))
    pool.close()
    print("done")
"""


def test_many_producers_get_each_its_own_results_though_workers_are_killed(negate, run_dir):
    with StartedPool(negate, run_dir=run_dir, workers=2, slots=32, max_batch=8) as pool, pool.connect() as client:
        orders = ("ordered", "unordered", "ordered", "unordered")
        transports = ("lifeline", "lifeline", "zmq", "zmq")
        producers = [
            producer(pool, STREAM, me, 500, order, transport=transport)
            for me, order, transport in zip(range(1, 5), orders, transports, strict=True)
        ]
        try:
            for one in producers:
                one.wait_for_line("connected")
            for one in producers:
                one.say()
            for one, victim in zip(producers, pool.pids("trtpool.workers"), strict=False):
                one.wait_for_line("half")
                os.kill(victim, signal.SIGKILL)
            for one in producers:
                assert one.succeed().endswith("done\n")
        finally:
            for one in producers:
                one.__exit__(None, None, None)
        wait_all_free(client)
        report = client.status()
        assert (report.models[0].items, report.models[0].failed_items, report.violations) == (2000, 0, 0)
        wait_until(lambda: len(client.status().workers) == 2, "both workers back")
        assert client.status().producers == 1


def test_models_do_not_mix(pool, client):
    before = figures(client), figures(client, 1)
    with (
        producer(
            pool, "for i in range(100): assert pool.infer(x=np.int64(i % 4), model='picky')['y'] == i % 4"
        ) as picky,
        producer(
            pool, "for i in range(100): assert pool.infer(x=np.full(4, i, 'f4'), model='negate')['y'].sum() == -4 * i"
        ) as negate,
    ):
        picky.succeed()
        negate.succeed()
    after = figures(client), figures(client, 1)
    assert [now.items - then.items for now, then in zip(after, before, strict=True)] == [100, 100]
    with pytest.raises(trtpool.InvalidInput, match="negate, picky, slow"):
        client.lease()


# --- Leaving -------------------------------------------------------------------------------------

HOLD = """
    slot = pool.lease(model="negate")
    view = slot.inputs["x"]
    view[...] = 7
"""
SUBMIT = (
    HOLD
    + """
    submitted = slot.submit()
"""
)
DONE = (
    SUBMIT
    + """
    submitted.result()
"""
)
THERE = """
    wait("there")
"""


def test_a_producer_killed_with_a_lease_leaves_nothing(pool, client):
    with client.lease(model="negate") as mine, producer(pool, HOLD + THERE) as victim:
        victim.wait_for_line("there")
        wait_until(lambda: figures(client).leased == 2)
        victim.kill()
        wait_until(lambda: figures(client).leased == 1)
        mine.inputs["x"][...] = 3
        assert mine.submit().result(timeout_s=60).outputs["y"].tolist() == [-3] * 4


def test_a_producer_killed_with_work_in_the_queue_leaves_nothing(pool, client):
    with pool.stopped_worker():
        work = hold(client, [1, 2])
        with producer(pool, SUBMIT + THERE) as victim:
            victim.wait_for_line("there")
            wait_until(lambda: figures(client).free == figures(client).slots - 3)
            victim.kill()
            victim.wait()
            assert figures(client).free == figures(client).slots - 2  # though the worker stands still
    assert [answer(one) for one in work] == [-1, -2]


def test_a_producer_killed_with_running_work_leaves_nothing_once_it_has_run(pool, client):
    with pool.stopped_worker(), producer(pool, SUBMIT + THERE) as victim:
        wait_until(lambda: figures(client).running == 1)
        victim.kill()
        victim.wait()
        # Its slot is not free: a device may still be writing to it.
        assert (figures(client).running, figures(client).free) == (1, figures(client).slots - 1)
        work = submit(client, 5)
    assert answer(work) == -5


def test_a_producer_killed_with_a_result_leaves_nothing(pool, client):
    with producer(pool, DONE + THERE) as victim:
        victim.wait_for_line("there")
        wait_until(lambda: figures(client).done == 1)
        victim.kill()
        wait_until(lambda: figures(client).done == 0)


def test_a_producer_killed_while_it_waits_for_slots_is_forgotten(pool, client):
    with client.lease_many(client.session.models[0].cap, model="negate"), pool.connect() as other:
        rest = other.lease_many(figures(client).free, model="negate")
        with producer(pool, "print('asks', flush=True); pool.lease(model='negate')") as victim:
            wait_until(lambda: figures(client).waiting == 1)
            victim.kill()
            wait_until(lambda: figures(client).waiting == 0)
        rest.release()


def test_a_producer_that_ends_without_a_word(pool, client):
    for end in ("os._exit(3)", "sys.exit(3)"):
        with producer(pool, f"pool.lease(model='negate').submit(); slot = pool.lease(model='negate'); {end}") as one:
            assert one.wait() == 3
        wait_all_free(client)
    assert client.status().producers == 1


def test_work_of_a_producer_that_leaves_is_dropped_or_done(pool, client):
    """Submitting and leaving in order: what has not started is dropped, and nothing of it stays."""
    with pool.stopped_worker():
        with producer(pool, "w = [pool.lease(model='negate').submit() for _ in range(8)]; pool.close()") as one:
            assert one.wait() == 0
        wait_until(lambda: figures(client).queued == 0)
    wait_all_free(client)


FORKS = (
    HOLD
    + """
    child = os.fork()
    if not child:
        try:
            pool.lease(model="negate")
        except trtpool.ForkedClient:
            wait(f"child {os.getpid()}")
        os._exit(0)
    wait("parent")
"""
)


@pytest.mark.parametrize("transport", ["lifeline", "zmq"])
def test_a_forked_child_that_lives_on_keeps_no_slots(transport, pool, client):
    with producer(pool, FORKS, transport=transport) as parent:
        # Parent and child print in any order.
        words = {parent.line(), parent.line()}
        (child,) = (int(word.split()[1]) for word in words if word.startswith("child"))
        assert figures(client).leased == 1
        parent.kill()
        parent.wait()
        wait_all_free(client)  # the child lives, and has the arena mapped
        with watching([child]) as wait:
            assert parent.popen.stdin is not None
            parent.popen.stdin.close()
            wait()


def test_a_client_that_closes_its_lifeline_and_lives_on_keeps_its_slots(pool, client):
    """An end of file is no end of a process, which may still write: its slots are kept until it ends."""
    code = (
        HOLD
        + """
    pool.session.link._lifeline.close()
    wait("closed")
    view[...] = 8
    wait("wrote")
"""
    )
    with producer(pool, code) as one:
        one.wait_for_line("closed")
        one.say()
        one.wait_for_line("wrote")
        assert figures(client).leased == 1
        one.kill()
    wait_all_free(client)


def test_a_handle_works_in_processes_that_know_nothing_of_the_parent(pool, client):
    code = """
    import pickle
    handle = pickle.loads(bytes.fromhex(sys.argv[2]))
    assert handle.infer(x=np.full(4, 2, "f4"), model="negate")["y"].tolist() == [-2] * 4
"""
    with producer(pool, code, pickle.dumps(client.handle()).hex()) as one:
        assert one.succeed() == ""
