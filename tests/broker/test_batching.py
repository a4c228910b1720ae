from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.broker.core_rig import MS, Rig, layouts
from trtpool.broker import events as e
from trtpool.broker.batching import MAX_PASSED, Work, WorkQueue, halves, rows_of
from trtpool.broker.invariants import validate
from trtpool.broker.records import LeaseRecord, Model, Producer
from trtpool.ipc import messages as m


def works_at(places: list[tuple[int, int, int]], items_per_slot: int, slots: int = 4096) -> list[Work]:
    """One work for each ``(first, count, items in its last slot)``, oldest first."""
    model = Model(0, layouts((slots, items_per_slot, items_per_slot))[0], slots)
    lease = LeaseRecord(1, Producer(1, 1), model, 0, slots)
    return [
        Work(lease, first, count, (count - 1) * items_per_slot + last, seq, seq, 0, 0)
        for seq, (first, count, last) in enumerate(places)
    ]


def slots_of(works: list[Work]) -> list[int]:
    return [slot for work in works for slot in range(work.first, work.first + work.count)]


@st.composite
def loads(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Items per slot, the largest batch, and works that lie apart, in any order of arrival."""
    items_per_slot = draw(st.integers(1, 4))
    max_items = items_per_slot * draw(st.integers(1, 6)) + draw(st.integers(0, items_per_slot - 1))
    first = 0
    places = []
    for _ in range(draw(st.integers(1, 40))):
        first += draw(st.sampled_from([0, 0, 0, 1, 5]))
        count = draw(st.sampled_from([1, 1, 1, 2, 3, 9]))
        places.append((first, count, draw(st.integers(1, items_per_slot))))
        first += count
    return items_per_slot, max_items, draw(st.permutations(places))


@given(loads())
def test_a_queue_comes_out_once_oldest_first_and_nobody_is_passed_for_ever(load):
    items_per_slot, max_items, places = load
    queue = WorkQueue(items_per_slot)
    works = works_at(places, items_per_slot)
    all_slots, all_items = sorted(slots_of(works)), sum(work.items for work in works)
    for work in works:
        queue.add(work)
    seen: list[int] = []
    seen_items = 0
    while len(queue):
        oldest = queue.oldest.first
        before = queue.items
        batch = queue.take(max_items)
        taken = sum(work.items for work in batch)
        assert 0 < taken <= max_items
        assert taken == before - queue.items
        assert oldest in slots_of(batch), "the oldest slot is in the batch"
        assert all(work.passed <= MAX_PASSED for work in queue)
        assert queue.items == sum(work.items for work in queue)
        assert queue.slots == sum(work.count for work in queue)
        assert [work.first for work in batch] == sorted(work.first for work in batch)
        assert all((w.count - 1) * items_per_slot < w.items <= w.count * items_per_slot for w in batch)
        seen += slots_of(batch)
        seen_items += taken
    assert sorted(seen) == all_slots
    assert seen_items == all_items


@given(loads())
def test_a_batch_is_full_or_the_next_work_did_not_fit(load):
    """Work-conserving: a slot of room is left only if the work that comes next has a partial slot there."""
    items_per_slot, max_items, places = load
    queue = WorkQueue(items_per_slot)
    for work in works_at(places, items_per_slot):
        queue.add(work)
    while queue.items > max_items:
        taken = sum(work.items for work in queue.take(max_items))
        assert max_items - taken < items_per_slot


@given(loads())
def test_rows_are_as_few_as_they_can_be(load):
    items_per_slot, _, places = load
    batch = sorted(works_at(places, items_per_slot), key=lambda work: work.first)
    rows = rows_of(batch, items_per_slot, segment=0)
    assert [slot for row in rows for slot in range(row.first, row.first + row.count)] == slots_of(batch)
    assert sum(row.items for row in rows) == sum(work.items for work in batch)

    # What lies in a slot is told by full slots before the last: each slot's items are the same in rows as in works.
    def items_by_slot(parts):
        return {
            part.first + i: min(items_per_slot, part.items - i * items_per_slot)
            for part in parts
            for i in range(part.count)
        }

    assert items_by_slot(rows) == items_by_slot(batch)
    for before, after in itertools.pairwise(rows):
        touching = before.first + before.count == after.first
        assert not (touching and before.items == before.count * items_per_slot), "two rows that could be one"


@given(loads())
def test_halves_are_all_of_it_and_differ_by_at_most_a_slot(load):
    items_per_slot, _, places = load
    batch = sorted(works_at(places, items_per_slot), key=lambda work: work.first)
    slots, items = slots_of(batch), sum(work.items for work in batch)
    groups = halves(batch, items_per_slot)
    assert [slot for group in groups for slot in slots_of(group)] == slots
    assert sum(work.items for group in groups for work in group) == items
    if len(slots) == 1:
        assert groups == [batch]
    else:
        left, right = (len(slots_of(group)) for group in groups)
        assert right - left in (0, 1)
        assert all((w.count - 1) * items_per_slot < w.items for group in groups for w in group)


def test_neighbours_of_the_oldest_go_with_it():
    queue = WorkQueue(1)
    for work in works_at([(10, 1, 1), (50, 1, 1), (12, 1, 1), (11, 1, 1), (30, 1, 1)], 1):
        queue.add(work)
    assert slots_of(queue.take(3)) == [10, 11, 12]
    assert [(work.first, work.passed) for work in queue] == [(50, 1), (30, 0)]


def test_the_next_slot_is_no_neighbour_of_one_that_is_not_full():
    queue = WorkQueue(4)
    for work in works_at([(10, 1, 1), (50, 1, 4), (11, 1, 4)], 4):
        queue.add(work)
    assert slots_of(queue.take(5)) == [10, 50], "10 and 11 would be two runs too, so who came first goes first"


def test_a_chain_longer_than_a_batch_begins_so_that_its_oldest_is_in_and_the_batch_is_full():
    queue = WorkQueue(1)
    for work in works_at([(17, 1, 1), *[(slot, 1, 1) for slot in range(10, 17)], (18, 1, 1)], 1):
        queue.add(work)
    assert slots_of(queue.take(4)) == [15, 16, 17, 18]


def test_one_who_was_passed_over_often_is_next_in_order_of_arrival():
    """30 works lie far apart, each gets young neighbours enough for a batch, and another waits behind the 30."""
    queue = WorkQueue(1)
    places = [(100 * index, 1, 1) for index in range(31)]
    *apart, waiting = works_at(places, 1)
    for work in [*apart, waiting]:
        queue.add(work)
    rounds = 0
    while waiting in list(queue):
        beside = queue.oldest.first
        for young in works_at([(beside + offset, 1, 1) for offset in range(1, 16)], 1):
            queue.add(young)
        batch = queue.take(16)
        rounds += 1
        if rounds <= MAX_PASSED:
            assert slots_of(batch) == list(range(beside, beside + 16)), "a slice, while nobody has waited too long"
    assert waiting.passed == MAX_PASSED
    assert rounds == MAX_PASSED + 2, "the 23 before it, which were passed as often, fill more than a batch"


def test_partial_slots_end_a_row():
    batch = works_at([(0, 2, 3), (2, 1, 4), (3, 1, 4)], 4)
    assert rows_of(batch, 4) == [m.Rows(0, 0, 2, 7), m.Rows(0, 2, 2, 8)]


def test_a_work_larger_than_a_batch_is_cut_at_full_slots():
    queue = WorkQueue(4)
    queue.add(works_at([(8, 5, 1)], 4)[0])
    batches = [queue.take(8) for _ in range(3)]
    assert [[(w.first, w.at, w.count, w.items) for w in batch] for batch in batches] == [
        [(8, 8, 2, 8)], [(10, 10, 2, 8)], [(12, 12, 1, 1)],
    ]  # fmt: skip
    assert (queue.items, queue.slots, len(queue)) == (0, 0, 0)


def test_only_the_last_part_of_a_work_asks_again():
    (work,) = works_at([(0, 4, 1)], 1)
    work.again, work.passed, work.attempts = 4, 3, 1
    head = work.split(3, 1)
    assert (head.again, head.passed, head.attempts, head.count) == (0, 3, 1, 3)
    assert (work.again, work.passed, work.attempts, work.count) == (4, 3, 1, 1)


def test_remove_takes_them_out_wherever_they_stand():
    queue = WorkQueue(1)
    works = works_at([(slot, 1, 1) for slot in range(5)], 1)
    for work in works:
        queue.add(work)
    queue.remove({works[0], works[3]})
    assert list(queue) == [works[1], works[2], works[4]]
    assert (queue.items, queue.slots) == (3, 3)


class Load:
    """Producers that keep slots in flight, and a worker with three lanes; time is simulated, and all chance is seeded.

    A producer writes one slot after the other, gives each back as soon as its result is there, and goes on with
    what the pool granted `again`; where it granted none, it asks.
    """

    def __init__(self, producers: int, in_flight: int, max_batch: int, slots: int, seed: int) -> None:
        self.rig = Rig((slots, 1, max_batch))
        self.random = random.Random(seed)
        self.ready: list[tuple[int, int, e.Received]] = []  # when, a number, and what a peer says then
        self.number = 0
        self.free_lane_ns = [0, 0, 0]
        self.idle_ns = [0] * (producers + 1)
        self.writing_ns = MS * producers // max_batch // 4  # together four times as fast as the worker
        self.rig.join(*range(1, producers + 1))
        self.rig.worker(1000, lanes=3)
        for peer in range(1, producers + 1):
            self.take_in(self.rig.say(peer, *[m.Lease(1, 0, 1, None)] * in_flight))
        self.take_in(self.rig.turn())
        assert len(self.ready) == producers * in_flight

    def later(self, delay_ns: int, peer: int, message: m.ToBroker) -> None:
        self.number += 1
        heapq.heappush(self.ready, (self.rig.now_ns + delay_ns, self.number, e.Received(peer, message)))

    def take_in(self, actions: list[e.Action]) -> None:
        """Do what the peers do when they get these messages."""
        granted: Counter[int] = Counter()
        done: list[tuple[int, m.Done]] = []
        for action in actions:
            assert isinstance(action, e.Send)
            peer, message = action
            if isinstance(message, m.Grant):
                granted[peer] += message.request == 0
                for lease_id, run in message.leases:
                    begin_ns = max(self.rig.now_ns, self.idle_ns[peer])
                    self.idle_ns[peer] = begin_ns + int(self.writing_ns * self.random.uniform(0.7, 1.3))
                    self.later(
                        self.idle_ns[peer] - self.rig.now_ns,
                        peer,
                        m.Submit(lease_id, 0, run.count, 0, run.count, None, 1),
                    )
            elif isinstance(message, m.Run):
                lane = self.free_lane_ns.index(min(self.free_lane_ns))
                items = sum(rows.items for rows in message.rows)
                begin_ns = max(self.rig.now_ns, self.free_lane_ns[lane])
                self.free_lane_ns[lane] = begin_ns + MS + items * MS // 32
                self.later(
                    self.free_lane_ns[lane] - self.rig.now_ns,
                    peer,
                    m.Finished(message.batch, message.attempt, 1, 1, 1, 0),
                )
            elif isinstance(message, m.Done):
                assert message.status == m.OK
                done.append((peer, message))
        for peer, message in done:
            self.say(peer, m.Release(message.lease, message.first, message.count))
            if granted[peer]:
                granted[peer] -= 1
            else:
                self.say(peer, m.Lease(1, 0, 1, None))

    def say(self, peer: int, message: m.ToBroker) -> None:
        self.take_in(self.rig.core.handle(e.Received(peer, message), self.rig.now_ns))

    def step(self) -> None:
        """Go on to what happens next."""
        when, _, event = heapq.heappop(self.ready)
        self.rig.now_ns = when
        for now in (event, e.TurnEnded()):
            self.take_in(self.rig.core.handle(now, when))
        if self.number % 64 == 0:  # every time would be most of the time
            validate(self.rig.core)


@pytest.mark.parametrize(("producers", "in_flight"), [(64, 2), (16, 8), (4, 32)])
@pytest.mark.parametrize("spare", [32, 64])
def test_under_load_batches_are_slices(producers, in_flight, spare):
    load = Load(producers, in_flight, max_batch=32, slots=producers * in_flight + spare, seed=1)
    totals = load.rig.core.models[0].totals
    while totals.batches < 50:
        load.step()
    batches, items, runs = totals.batches, totals.items, totals.runs
    while totals.batches < 200:
        load.step()
    batches = totals.batches - batches
    assert (totals.items - items) / batches > 24, "the load must make batches worth the name"
    assert (totals.runs - runs) / batches <= 2


@settings(max_examples=10)
@given(st.integers(0, 2**32))
def test_a_load_goes_on_for_ever(seed):
    """No slot gets stuck: each of those in flight is granted, written, run and given back, over and over."""
    load = Load(6, 2, max_batch=4, slots=24, seed=seed)
    for _ in range(300):
        load.step()
    assert load.rig.figures().items > 100
    assert load.rig.figures().failed_items == 0
    assert len(load.ready) > 0
