"""Producers beside each other: those that hold slots and do nothing while others wait, and those of two classes."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import trtpool
from tests.system.rig import (
    PATIENCE_S,
    Process,
    StartedPool,
    figures,
    ones,
    producer,
    wait_all_free,
    wait_until,
)

HOLDS = """
    slots = pool.lease_many(int(sys.argv[2]))
    slots[0].inputs["x"][...] = 7
    wait("there")
    for slot in slots:
        assert (slot.submit().result().outputs["y"] <= 0).any()
    slots.release()
    print("done", flush=True)
"""

# Streams until it is told to stop, a few items at a time, and checks them all.
BUSY = """
    stop = sys.argv[2]
    seen = 0
    while not os.path.exists(stop):
        for item, result in pool.map(lambda item, inputs: inputs["x"].fill(item), range(20), window=2):
            assert (result.outputs["y"] == -item).all()
            seen += 1
        if seen == 20:
            print("streams", flush=True)
    print(f"done {seen}", flush=True)
"""


def start(model: Path, run_dir: Path, *flags: str) -> StartedPool:
    """8 slots, of which one client may hold 6."""
    return StartedPool(model, *flags, run_dir=run_dir, slots=8, max_batch=2, recall_timeout_s=0.3)


def there(pool: StartedPool, slots: int) -> Process:
    """A process that holds slots and does nothing."""
    one = producer(pool, HOLDS, slots)
    one.wait_for_line("there")
    return one


def is_killed(one: Process) -> bool:
    return one.popen.poll() == -signal.SIGKILL


def test_one_who_holds_what_others_wait_for_is_reported_and_lives(negate, run_dir):
    with start(negate, run_dir) as pool, pool.connect() as client, pool.connect() as other, there(pool, 6) as idle:
        session = other.session
        waiting = session.requests.ask(0, 4, None)
        said = pool.wait_for_line("idle slots", 2)
        assert f"process {idle.pid} holds 6 idle slots of model 'negate' (6 leased, 0 done" in said
        assert "start the pool with --evict" in said
        (holder,) = client.status().holders
        assert (holder.pid, holder.model, holder.leased, holder.overdue) == (idle.pid, "negate", 6, True)
        with pytest.raises(trtpool.PoolBusy, match=rf"; process {idle.pid} holds 6 idle slots since [0-9.]+ s; "):
            client.lease_many(3, timeout_s=0.01)
        assert figures(client).overdue == 1
        idle.say()
        assert idle.succeed() == "done\n"
        assert session.requests.answer(waiting)
        assert figures(client).evicted == 0


def test_with_evict_it_is_killed_and_nobody_else_loses_anything(negate, run_dir, tmp_path):
    stop = tmp_path / "stop"
    with (
        start(negate, run_dir, "--evict") as pool,
        pool.connect() as client,
        producer(pool, BUSY, stop) as busy,
    ):
        busy.wait_for_line("streams")
        with there(pool, 5) as idle:
            with client.lease_many(5, timeout_s=PATIENCE_S) as leases:
                wait_until(lambda: is_killed(idle))
                for lease in leases:
                    lease.inputs["x"][...] = 3
                for work in leases.submit():
                    assert (work.result(timeout_s=60).outputs["y"] == -3).all()
            said = pool.wait_for_line("was killed", 2)
            assert f"process {idle.pid} was killed (--evict): process {idle.pid} holds 5 idle slots" in said
        before = figures(client).items
        wait_until(lambda: figures(client).items > before + 40, "the busy one goes on")
        stop.touch()
        done = re.fullmatch(r"(?:streams\n)?done (\d+)\n", busy.succeed())
        assert done
        wait_all_free(client)
        now = figures(client)
        assert (now.evicted, now.failed_items) == (1, 0)
        assert now.items == int(done[1]) + 5


def test_of_two_idle_ones_only_one_is_killed_for_one_slot(negate, run_dir):
    with (
        start(negate, run_dir, "--evict") as pool,
        pool.connect() as client,
        there(pool, 4) as first,
        there(pool, 4) as second,
    ):
        with client.lease(timeout_s=PATIENCE_S):
            wait_until(lambda: is_killed(first) or is_killed(second))
            survivor = second if is_killed(first) else first
            assert survivor.popen.poll() is None
            assert figures(client).evicted == 1
        survivor.say()
        assert survivor.succeed() == "done\n"


@pytest.mark.parametrize("evict", [False, True])
def test_a_stopped_producer_starves_nobody_beyond_its_cap(evict, negate, run_dir):
    """Others go on with the rest; with --evict it is killed as soon as that is not enough for somebody."""
    flags = ["--evict"] if evict else []
    with start(negate, run_dir, *flags) as pool, pool.connect() as client, there(pool, 6) as stopped:
        stopped.kill(signal.SIGSTOP)
        for item in range(50):
            assert (client.infer(x=ones(item))["y"] == -item).all()
        assert stopped.popen.poll() is None, "who gets what it asks for waits for nobody"
        if evict:
            client.lease_many(6, timeout_s=PATIENCE_S).release()
            wait_until(lambda: is_killed(stopped))
        else:
            with pytest.raises(trtpool.PoolBusy, match=f"process {stopped.pid} holds 6 idle slots"):
                client.lease_many(6, timeout_s=0.5)
            stopped.kill(signal.SIGCONT)
            stopped.say()
            assert stopped.succeed() == "done\n"
        wait_all_free(client)


EMBEDS = """
import os, sys
import trtpool

with trtpool.Pool(
    model=sys.argv[1], run_dir=sys.argv[2], slots=8, max_batch=2, recall_timeout_s=0.1, evict=True
) as pool:
    mine = pool.lease_many(6)
    print("there", os.getpid(), flush=True)
    sys.stdin.readline()
    mine.release()
    print("evicted", pool.status().models[0].evicted, flush=True)
"""


def test_the_process_that_embeds_a_pool_is_never_killed(negate, run_dir):
    with Process(sys.executable, "-c", EMBEDS, negate, run_dir) as owner:
        assert owner.wait_for_line("there") == f"there {owner.pid}"
        with trtpool.connect(run_dir=run_dir) as client:
            session = client.session
            waiting = session.requests.ask(0, 4, None)
            assert "never evicted" in owner.wait_for_line("idle slots", 2)
            (holder,) = [one for one in client.status().holders if one.pid == owner.pid]
            assert (holder.leased, holder.overdue) == (6, True)
            owner.say()
            assert session.requests.answer(waiting)
            assert owner.line() == "evicted 0"


# --- Classes -------------------------------------------------------------------------------------

LOG = """
with open(os.environ["RAN"], "a") as file:
    file.write(" ".join(str(int(row[0])) for part in inputs for row in part) + chr(10))
"""

BULK = """
    first, count = int(sys.argv[2]), int(sys.argv[3])
    slots = pool.lease_many(count).slots()
    work = []
    for index, slot in enumerate(slots):
        slot.inputs["x"][...] = first + index
        work.append(slot.submit())
    print("there", flush=True)
    for index, one in enumerate(work):
        assert (one.result().outputs["y"] == -(first + index)).all()
    print("done", flush=True)
"""


@pytest.fixture
def logged(
    negate: Path, run_dir: Path, tmp_path: Path, worker_does: Callable[..., dict[str, str]]
) -> tuple[StartedPool, Path]:
    """A pool with batches of 4, not yet entered, and the file where its worker writes down each batch that it runs."""
    ran = tmp_path / "ran"
    pool = StartedPool(
        negate, run_dir=run_dir, slots=96, max_batch=4, env={**worker_does(run=LOG), "RAN": os.fspath(ran)}
    )
    return pool, ran


def batches(ran: Path) -> list[list[int]]:
    return [[int(word) for word in line.split()] for line in ran.read_text().splitlines()]


def test_interactive_items_overtake_the_bulk_of_other_processes(logged):
    pool, ran = logged
    with pool, pool.connect() as client:
        with pool.stopped_worker(), producer(pool, BULK, 100, 20) as one, producer(pool, BULK, 200, 20) as two:
            one.wait_for_line("there")
            two.wait_for_line("there")
            wait_until(lambda: figures(client).queued + figures(client).running == 40)
            before = figures(client)
            with client.lease_many(2, priority="interactive") as urgent:
                for index, slot in enumerate(slots := urgent.slots()):
                    slot.inputs["x"][...] = 900 + index
                work = [slot.submit() for slot in slots]
                wait_until(lambda: figures(client).interactive.queued == 2)
                os.kill(pool.worker, signal.SIGCONT)
                for item in work:
                    item.result(timeout_s=60)
                for slot in slots:
                    slot.release()
            assert one.succeed() == two.succeed() == "done\n"
        order = batches(ran)
        (place,) = [index for index, batch in enumerate(order) if 900 in batch]
        assert sum(map(len, order[:place])) == before.running, "only what the worker had already went before"
        assert sorted(order[place])[2:] == [900, 901]
        assert len(order[place]) == 4, "bulk fills the rest of the batch"
        assert sorted(item for batch in order for item in batch) == [*range(100, 120), *range(200, 220), 900, 901]


def test_bulk_goes_on_beside_interactive_items_that_never_end(logged):
    """Batches of interactive items enough to keep the worker busy: every fifth batch is bulk all the same."""
    pool, ran = logged
    with pool, pool.connect() as client:
        with pool.stopped_worker(), producer(pool, BULK, 100, 8) as bulk:  # all of these, or half, run first
            bulk.wait_for_line("there")
            wait_until(lambda: figures(client).queued + figures(client).running == 8)
            had = figures(client).running
            with producer(pool, BULK, 200, 8) as more, client.lease_many(48, priority="interactive") as urgent:
                more.wait_for_line("there")
                for index, slot in enumerate(slots := urgent.slots()):
                    slot.inputs["x"][...] = 900 + index
                work = [slot.submit() for slot in slots]
                wait_until(lambda: figures(client).interactive.queued == 48)
                os.kill(pool.worker, signal.SIGCONT)
                for item in work:
                    item.result(timeout_s=60)
                    item.release()
                assert more.succeed() == "done\n"
            assert bulk.succeed() == "done\n"
        later = [{item // 900 for item in batch} for batch in batches(ran)]
        first = next(index for index, kinds in enumerate(later) if 1 in kinds)
        assert sum(map(len, batches(ran)[:first])) == had
        assert [index - first for index, kinds in enumerate(later) if 0 in kinds and index > first][:2] == [4, 9]
