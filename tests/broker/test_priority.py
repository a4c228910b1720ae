"""Interactive requests go first, and bulk ones keep their share."""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.broker.core_rig import MS, Rig, sent
from tests.broker.test_core import filled, grants, run_of
from trtpool.broker import events as e
from trtpool.broker.batching import MAX_WORKS, take_both
from trtpool.broker.records import OVERTAKES, Line
from trtpool.ipc import messages as m
from trtpool.ipc.settings import BULK, INTERACTIVE, MAX_ATTEMPTS


def slots_of(run: m.Run) -> list[int]:
    return [slot for rows in run.rows for slot in range(rows.first, rows.first + rows.count)]


def submitted(
    rig: Rig,
    peer: int,
    count: int,
    priority: int,
    model: int = 0,
    gpu: int | None = None,
    deadline_ns: int | None = None,
) -> list[int]:
    """Submit `count` works of one slot, one after the other in time, without a turn; returns the slots."""
    slots = []
    for _ in range(count):
        rig.now_ns += 1
        (grant,) = sent(rig.say(peer, m.Lease(1, model, 1, 0, priority)), m.Grant)
        ((lease, run),) = grant.leases
        assert rig.say(peer, m.Submit(lease, 0, 1, 0, 1, None, 0, gpu, priority)) == []
        slots.append(run.first)
    return slots


# --- In the queue --------------------------------------------------------------------------------


@pytest.fixture
def busy() -> Rig:
    """32 slots, batches of 4, one worker of one lane that has a batch and one ahead."""
    rig = Rig((32, 1, 4))
    rig.join(1, 2)
    submitted(rig, 1, 8, BULK)
    rig.worker()
    assert len(sent(rig.turn(), m.Run)) == 2
    return rig


def next_run(rig: Rig) -> m.Run:
    """What the worker is sent when it has finished its oldest batch."""
    batch = next(iter(rig.core.workers[10].batches.values()))
    rig.say(10, m.Finished(batch.id, batch.attempt, 1, 2 * MS, 3, 0))
    return run_of(rig.turn())


def test_interactive_work_leads_the_next_batch_and_bulk_fills_the_rest(busy):
    bulk = submitted(busy, 1, 6, BULK)
    urgent = submitted(busy, 2, 1, INTERACTIVE)
    assert sorted(slots_of(next_run(busy))) == sorted(urgent + bulk[:3])
    assert slots_of(next_run(busy)) == bulk[3:]


def test_interactive_work_alone_is_in_order_of_arrival(busy):
    urgent = submitted(busy, 2, 6, INTERACTIVE)
    assert slots_of(next_run(busy)) == urgent[:4]
    assert slots_of(next_run(busy)) == urgent[4:]


def test_a_slice_is_made_of_both(busy):
    """The neighbours of what leads are in another class, and make one run with it."""
    rows = submitted(busy, 1, 3, BULK) + submitted(busy, 2, 1, INTERACTIVE)
    run = next_run(busy)
    assert slots_of(run) == rows
    assert len(run.rows) == 1


def test_interactive_work_goes_before_bulk_work_of_another_model():
    rig = Rig((32, 1, 4), (32, 1, 4))
    rig.join(1, 2)
    submitted(rig, 1, 8, BULK, model=0)
    urgent = submitted(rig, 2, 1, INTERACTIVE, model=1)
    rig.worker()
    runs = sent(rig.turn(), m.Run)
    assert [run.model for run in runs] == [1, 0], "the younger, interactive one first"
    assert slots_of(runs[0]) == urgent


def test_interactive_work_takes_the_place_ahead_of_the_lanes():
    """A bulk batch would be sent ahead; the interactive one, which is not full, is in its stead."""
    rig = Rig((64, 1, 4), (32, 1, 4))
    rig.join(1, 2)
    rig.worker(lanes=3)
    submitted(rig, 1, 32, BULK, model=0)
    runs = sent(rig.turn(), m.Run)
    assert [run.model for run in runs] == [0] * 4, "three lanes and one ahead"
    submitted(rig, 2, 1, INTERACTIVE, model=1)
    assert rig.turn() == []
    rig.finish(10, runs[0])
    assert run_of(rig.turn()).model == 1


@pytest.mark.parametrize(("priority", "batches"), [(BULK, 2), (INTERACTIVE, 3)])
def test_a_batch_with_interactive_work_may_use_any_free_lane_though_it_is_not_full(priority, batches):
    rig = Rig((32, 1, 4))
    rig.join(1)
    rig.worker(lanes=3)
    for _ in range(5):
        submitted(rig, 1, 1, priority)
        rig.turn()
    assert len(rig.core.workers[10].batches) == batches


def test_a_short_batch_of_a_worker_with_one_lane_grows_while_it_waits():
    """A lane that is not free is no place for it: it had better wait here for others of its kind."""
    rig = Rig((32, 1, 4))
    rig.join(1)
    rig.worker()
    rig.core.models[0].run_ns = 1000
    submitted(rig, 1, 1, INTERACTIVE)
    run = run_of(rig.turn())
    submitted(rig, 1, 2, INTERACTIVE)
    assert rig.turn() == []
    rig.finish(10, run, compute_ns=1000)
    assert len(slots_of(run_of(rig.turn()))) == 2


def test_interactive_work_is_not_held_back_for_a_batch_to_fill():
    rig = Rig((32, 1, 4), max_delay_us=1000)
    rig.join(1, 2)
    rig.worker(lanes=3)
    held = submitted(rig, 1, 1, BULK)
    assert rig.turn() == []
    urgent = submitted(rig, 2, 1, INTERACTIVE)
    assert sorted(slots_of(run_of(rig.turn()))) == sorted(held + urgent), "and takes along what was"


def test_a_pin_holds_for_interactive_work():
    rig = Rig((32, 1, 4), gpus=2)
    rig.join(1, 2)
    rig.worker(10, gpu=0)
    urgent = submitted(rig, 2, 1, INTERACTIVE, gpu=1)
    bulk = submitted(rig, 1, 1, BULK)
    assert slots_of(run_of(rig.turn(), 10)) == bulk
    rig.worker(11, gpu=1)
    assert slots_of(run_of(rig.turn(), 11)) == urgent


def test_a_deadline_and_a_cancel_hold_for_interactive_work(busy):
    late = busy.submit(2, deadline_ns=MS, priority=INTERACTIVE)
    gone = busy.submit(2, priority=INTERACTIVE)
    (cancelled,) = sent(busy.say(2, m.Cancel(gone, 0, 1)), m.Done)
    assert (cancelled.lease, cancelled.status) == (gone, m.CANCELLED)
    (expired,) = sent(busy.turn(MS), m.Done)
    assert (expired.lease, expired.status) == (late, m.DEADLINE)
    assert busy.core.books.urgent == 0


def test_the_work_of_one_who_leaves_is_dropped(busy):
    submitted(busy, 2, 3, INTERACTIVE)
    busy.do(e.ProducerClosed(2))
    assert busy.core.books.urgent == 0
    busy.do(e.ProducerEnded(2))
    assert busy.figures().queued == 0


@pytest.mark.parametrize("deadly", [True, False])
def test_what_is_tried_again_keeps_its_class(deadly):
    rig = Rig((16, 1, 4))
    rig.join(1, 2)
    worker = 10
    rig.worker(worker)
    bulk, urgent = rig.submit(1, 1), rig.submit(2, 1, priority=INTERACTIVE)
    ended: list[m.Done] = []
    for _ in range(20):
        rig.turn()
        now = rig.figures()
        waiting = [work.priority for work in rig.core.models[0].lines[0].waiting()]
        assert now.interactive.queued == waiting.count(INTERACTIVE)
        assert now.bulk.queued == waiting.count(BULK)
        if deadly:
            ended += sent(rig.do(e.WorkerEnded(worker, "SIGSEGV")), m.Done)
            worker += 1
            rig.worker(worker)
        else:
            batch = next(iter(rig.core.workers[worker].batches.values()))
            ended += sent(rig.say(worker, m.Failed(batch.id, batch.attempt, "no")), m.Done)
        if len(ended) == 2:
            break
    assert {done.lease for done in ended} == {bulk, urgent}
    assert all(f"tried alone {MAX_ATTEMPTS} times" in done.text for done in ended)


def test_the_figures_of_each_class(busy):
    submitted(busy, 2, 2, INTERACTIVE)
    submitted(busy, 1, 1, BULK)
    now = busy.figures()
    assert (now.interactive.queued, now.bulk.queued, now.queued) == (2, 1, 3)
    busy.now_ns += 5 * MS
    next_run(busy)
    for batch in list(busy.core.workers[10].batches.values()):
        busy.say(10, m.Finished(batch.id, batch.attempt, 1, 1, 1, 0))
    now = busy.figures()
    assert (now.interactive.items, now.bulk.items, now.items) == (2, 9, 11)
    assert now.interactive.queue_ns == 2 * (5 * MS) + 2 + 1, "from the arrival of each"
    assert now.interactive.queue_ns + now.bulk.queue_ns == now.queue_ns


# --- Batches of both -----------------------------------------------------------------------------


def line_with(bulk: int, urgent: int, slots: int = 16384) -> Line:
    rig = Rig((slots, 1, slots))
    rig.join(1, 2)
    for _ in range(max(bulk, urgent)):
        for peer, wanted, priority in ((1, bulk, BULK), (2, urgent, INTERACTIVE)):
            if wanted > 0:
                (grant,) = sent(rig.core.handle(e.Received(peer, m.Lease(1, 0, 1, 0)), 1), m.Grant)
                ((lease, _),) = grant.leases
                rig.core.handle(e.Received(peer, m.Submit(lease, 0, 1, 0, 1, priority=priority)), 1)
        bulk, urgent = bulk - 1, urgent - 1
    return rig.core.models[0].lines[0]


def test_a_frame_has_room_for_a_batch_of_both():
    line = line_with(3000, 3000)
    batch, is_filled = take_both(line.urgent, line.queue, 16384)
    assert len(batch) == MAX_WORKS
    assert is_filled
    assert [work.first for work in batch] == sorted(work.first for work in batch)
    assert sum(work.priority for work in batch) == 3000


def test_a_batch_that_is_full_takes_nothing_along():
    line = line_with(5, 5)
    batch, is_filled = take_both(line.urgent, line.queue, 4)
    assert [work.priority for work in batch] == [INTERACTIVE] * 4
    assert not is_filled


# --- Bulk's share --------------------------------------------------------------------------------


def test_bulk_begins_every_fifth_batch_while_interactive_work_saturates():
    rig = Rig((64, 1, 4), max_delay_us=0)
    rig.join(1, 2, 3)
    rig.worker()
    bulk = submitted(rig, 1, 16, BULK)
    kinds = []
    submitted(rig, 2, 8, INTERACTIVE)
    rig.turn()
    for _ in range(40):
        batch = next(iter(rig.core.workers[10].batches.values()))
        kinds.append({work.priority for work in batch.works})
        for done in sent(rig.say(10, m.Finished(batch.id, batch.attempt, 1, 2 * MS, 1, 0)), m.Done):
            rig.say(1 if done.lease in rig.core.producers[1].leases else 2, m.Release(done.lease, 0, 1))
        submitted(rig, 2, 4, INTERACTIVE)
        rig.turn()
    assert len(bulk) == 16
    places = [index for index, kind in enumerate(kinds) if BULK in kind]
    assert [b - a for a, b in pairwise(places)] == [OVERTAKES + 1] * 3, "16 works, 4 a batch"


class Arrivals:
    """Any arrivals on any workers; counts by itself how often bulk work is overtaken."""

    def __init__(self, gpus: int, lanes: list[int]) -> None:
        self.rig = Rig((64, 1, 4), (48, 2, 4), gpus=gpus)
        self.rig.join(1, 2)
        self.workers = {10 + index: index % gpus if gpus else None for index in range(len(lanes))}
        for (peer, gpu), count in zip(self.workers.items(), lanes, strict=True):
            self.rig.worker(peer, count, gpu)
        self.queued: dict[tuple[int, int], tuple[int, int | None]] = {}  # bulk slots: their age and pin
        self.runs: dict[int, deque[m.Run]] = {peer: deque() for peer in self.workers}
        self.overtaken: Counter[int] = Counter()
        self.age = 0

    def arrive(self, model: int, priority: int, count: int, gpu: int | None) -> None:
        self.rig.now_ns += 1
        self.age += 1
        asked = self.rig.say(1 + priority, m.Lease(1, model, count, 0))
        for grant in sent(asked, m.Grant):
            for lease, run in grant.leases:
                items = run.count * self.rig.core.models[model].items_per_slot
                self.rig.say(1 + priority, m.Submit(lease, 0, run.count, 0, items, gpu=gpu, priority=priority))
                if priority == BULK:
                    for slot in range(run.first, run.first + run.count):
                        self.queued[model, slot] = self.age, gpu

    def turn(self) -> None:
        for action in self.rig.turn(1):
            if isinstance(action, e.Send) and isinstance(action.message, m.Run):
                self.look_at(action.peer, action.message)

    def look_at(self, peer: int, run: m.Run) -> None:
        mine = {slot: age for slot, (age, pin) in self.queued.items() if pin in (None, self.workers[peer])}
        taken = {(run.model, slot) for slot in slots_of(run)}
        if not mine:
            self.overtaken[peer] = 0
        else:
            ages = [
                min((age, slot) for slot, age in mine.items() if slot[0] == model) for model in {one for one, _ in mine}
            ]
            oldest = {slot for slot, age in mine.items() if age in {age for age, _ in ages}}  # of each model
            self.overtaken[peer] = 0 if oldest & taken else self.overtaken[peer] + 1
            assert self.overtaken[peer] <= OVERTAKES, "bulk work was overtaken once more than it may be"
        self.runs[peer].append(run)
        for slot in taken & self.queued.keys():
            del self.queued[slot]

    def finish(self, peer: int) -> None:
        if self.runs[peer]:
            for action in self.rig.finish(peer, self.runs[peer].popleft()):
                assert isinstance(action, e.Send)
                done = action.message
                assert isinstance(done, m.Done)
                self.rig.say(action.peer, m.Release(done.lease, done.first, done.count))


arrivals = st.tuples(
    st.sampled_from([0, 0, 1]), st.sampled_from([BULK, *[INTERACTIVE] * 3]), st.integers(1, 9), st.integers(0, 3)
)
steps = st.lists(st.one_of(arrivals, arrivals, st.integers(0, 2)), min_size=10, max_size=80)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([0, 2]), st.lists(st.integers(1, 3), min_size=2, max_size=3), steps)
def test_whatever_arrives_bulk_work_is_overtaken_by_few_batches(gpus, lanes, steps):
    world = Arrivals(gpus, lanes)
    for step in steps:
        if isinstance(step, int):
            world.finish(list(world.workers)[step % len(world.workers)])
            world.turn()
        else:
            model, priority, count, pin = step
            world.arrive(model, priority, count, pin if pin < gpus else None)
            if pin % 2:
                world.turn()
    while any(world.runs.values()) or world.rig.core.books.urgent or world.queued:
        world.turn()
        for peer in world.workers:
            world.finish(peer)
    assert world.rig.figures().queued == world.rig.figures(1).queued == 0


def saturated(urgent_class: int) -> list[int]:
    """How long single items wait in the queue, in batches of 1 ms, beside bulk that always has 64 items queued."""
    rig = Rig((128, 1, 8), cap=120)
    rig.join(1, 2)
    rig.worker(lanes=1)
    lease = rig.lease(1, 64)
    for at in range(64):
        rig.say(1, m.Submit(lease, at, 1, at, 1))
    rig.turn()
    waits = []
    for round_ in range(400):
        rig.now_ns += MS
        if round_ % 7 == 0:
            rig.submit(2, priority=urgent_class)
        batch = next(iter(rig.core.workers[10].batches.values()))
        actions = rig.say(10, m.Finished(batch.id, batch.attempt, 0, MS, 0, 0))
        for action in actions:
            assert isinstance(action, e.Send)
            done = action.message
            assert isinstance(done, m.Done)
            rig.say(action.peer, m.Release(done.lease, done.first, done.count))
            if action.peer == 2:
                waits.append(done.queue_ns)
            else:
                rig.submit(1)
        rig.turn()
    return waits


def test_interactive_items_wait_for_a_batch_and_not_for_the_queue():
    bulk, urgent = saturated(BULK), saturated(INTERACTIVE)
    assert len(urgent) > 50
    assert max(urgent) == 0, "each goes with the very next batch"
    assert median(bulk) >= 5 * MS


def test_bulk_loses_no_throughput_to_interactive_work_of_its_model():
    """The worker's batches stay full, since bulk fills those that interactive work leads."""
    rig = Rig((64, 1, 4))
    rig.join(1, 2)
    submitted(rig, 1, 24, BULK)
    submitted(rig, 2, 4, INTERACTIVE)
    rig.worker()
    sizes = [len(slots_of(run)) for run in sent(rig.turn(), m.Run)]
    sizes += [len(slots_of(next_run(rig))) for _ in range(5)]
    assert sizes == [4] * 7


# --- Leases --------------------------------------------------------------------------------------


def test_interactive_requests_are_granted_first():
    rig, (lease, _) = filled()
    for peer, request, priority in ((3, 31, BULK), (4, 41, INTERACTIVE), (4, 42, INTERACTIVE)):
        rig.say(peer, m.Lease(request, 0, 1, None, priority))
    rig.turn()
    now = rig.figures()
    assert (now.interactive.waiting, now.bulk.waiting, now.waiting) == (2, 1, 3)
    rig.say(1, m.Release(lease, 0, 3))
    assert grants(rig.turn()) == [(4, 41), (4, 42), (3, 31)]


def test_every_fifth_grant_is_bulk_while_both_wait():
    rig, (lease, _) = filled()
    rig.say(3, *[m.Lease(30 + n, 0, 1, None) for n in range(2)])
    rig.turn()
    order = []
    held = deque((1, lease, at) for at in range(6))
    for n in range(12):
        rig.say(4, m.Lease(40 + n, 0, 1, None, INTERACTIVE), m.Lease(70 + n, 0, 1, None, INTERACTIVE))
        peer, mine, at = held.popleft()
        rig.say(peer, m.Release(mine, at, 1))
        for action in rig.turn():
            if isinstance(action, e.Send) and isinstance(action.message, m.Grant):
                order.append(action.peer)
                held += [(action.peer, one, 0) for one, _ in action.message.leases]
    assert order == [4, 4, 4, 4, 3, 4, 4, 4, 4, 3, 4, 4]


def test_a_large_bulk_request_gets_its_turn_though_interactive_ones_fit():
    rig, (lease, _) = filled()
    rig.say(3, m.Lease(31, 0, 4, None))
    granted = []
    for n in range(OVERTAKES + 4):
        rig.say(4, m.Lease(40 + n, 0, 1, None, INTERACTIVE))
        rig.turn()
    for at in range(6):
        rig.say(1, m.Release(lease, at, 1))
        granted += grants(rig.turn())
    assert granted == [(4, 40 + n) for n in range(OVERTAKES)], "then all that comes free is kept for the large one"
    mine = list(rig.core.producers[4].leases)
    for one in mine[:2]:
        rig.say(4, m.Release(one, 0, 1))
    assert grants(rig.turn()) == [(3, 31)]


def test_an_interactive_request_at_its_own_cap_holds_nobody_up():
    rig, (lease, other) = filled()
    rig.say(1, m.Lease(11, 0, 1, None, INTERACTIVE))
    rig.say(3, m.Lease(31, 0, 1, None))
    rig.turn()
    rig.say(2, m.Release(other, 0, 1))
    assert grants(rig.turn()) == [(3, 31)]
    rig.say(1, m.Release(lease, 0, 1))
    assert grants(rig.turn()) == [(1, 11)]


def test_now_or_never_passes_by_bulk_in_its_turn():
    rig, (lease, _) = filled()
    rig.say(3, m.Lease(31, 0, 6, None))
    rig.turn()
    rig.say(1, m.Release(lease, 0, 5))
    for n in range(OVERTAKES):
        assert grants(rig.say(4, m.Lease(40 + n, 0, 1, 0, INTERACTIVE))) == [(4, 40 + n)]
    assert sent(rig.turn(), m.Recall, 4), "others wait: it must not use again what it was granted"
    rig.refused(4, m.Lease(50, 0, 1, 0, INTERACTIVE), m.BUSY)
    rig.refused(4, m.Lease(51, 0, 1, 0), m.BUSY)


def test_an_interactive_request_times_out_and_those_of_one_who_left_are_forgotten():
    rig, (lease, _) = filled()
    rig.say(3, m.Lease(31, 0, 1, MS, INTERACTIVE))
    rig.say(4, m.Lease(41, 0, 1, None, INTERACTIVE))
    rig.turn()
    assert [error.request for error in sent(rig.turn(MS), m.Error, 3)] == [31]
    rig.do(e.ProducerEnded(4))
    assert rig.figures().waiting == 0
    rig.say(1, m.Release(lease, 0, 1))
    assert grants(rig.turn()) == []


def test_a_pool_that_stops_answers_interactive_requests_too():
    rig, _ = filled()
    rig.say(3, m.Lease(31, 0, 1, None, INTERACTIVE))
    rig.turn()
    assert [error.code for error in sent(rig.do(e.Drain()), m.Error, 3)] == [m.CLOSING]


def test_a_pool_that_stops_runs_interactive_work_first():
    rig = Rig()
    rig.join(1)
    rig.submit(1, priority=INTERACTIVE)
    assert e.Drained() not in rig.do(e.Drain()) + rig.turn()
    rig.worker()
    run = run_of(rig.turn())
    rig.finish(10, run)
    assert e.Drained() in rig.turn()
