"""The core, told lists of events.  `Rig.do` checks every invariant after each; `Rig.refused` that nothing changed."""

from __future__ import annotations

import itertools
from collections import Counter

import msgspec
import pytest

from tests.broker.core_rig import MS, Rig, everything, layouts, sent
from trtpool.broker import core as core_module
from trtpool.broker import events as e
from trtpool.broker.dispatch import BRIEF_NS, MAX_TOGETHER
from trtpool.broker.leasing import SURPLUS
from trtpool.broker.records import producer_cap
from trtpool.broker.timers import PRUNE_TIMERS
from trtpool.ipc import messages as m
from trtpool.ipc.report import PoolReport
from trtpool.ipc.settings import INTERACTIVE, MAX_ATTEMPTS

ZEROS = (0, 0, 0, 0)

HUGE = 2**31 - 1
FREE, LEASED, QUEUED, RUNNING, DONE = range(5)


@pytest.fixture
def rig() -> Rig:
    """16 slots of one item, batches of 4; producers 1 and 2, worker 10 with one lane."""
    rig = Rig()
    rig.join(1, 2)
    rig.worker()
    return rig


@pytest.mark.parametrize(
    ("slots", "per_slot", "max_batch", "asked", "cap"),
    [
        (16, 1, 4, 0, 12),  # a quarter is left over
        (4096, 1, 256, 0, 3072),
        (12, 1, 4, 0, 8),  # a batch, which is more
        (64, 16, 256, 0, 48),  # of slots
        (8, 1, 8, 0, 4),  # half, though no batch is
        (1, 1, 1, 0, 1),
        (16, 1, 4, 16, 16),
        (16, 1, 4, 99, 16),
        (16, 1, 4, 1, 1),
    ],
)
def test_what_one_producer_may_hold(slots, per_slot, max_batch, asked, cap):
    assert producer_cap(layouts((slots, per_slot, max_batch))[0], asked) == cap


def run_of(actions: list[e.Action], peer: int = 10) -> m.Run:
    (run,) = sent(actions, m.Run, peer)
    return run


# --- A slot's life -------------------------------------------------------------------------------


def test_from_lease_to_release(rig):
    lease = rig.lease(1, 3)
    assert rig.states() == (13, 3, 0, 0, 0)
    assert rig.say(1, m.Submit(lease, 0, 3, 7, 3)) == []
    assert rig.states() == (13, 0, 3, 0, 0)
    run = run_of(rig.turn(5 * MS))
    assert run == m.Run(run.batch, 0, 0, [m.Rows(0, 0, 3, 3)])
    assert rig.states() == (13, 0, 0, 3, 0)
    assert rig.finish(10, run, compute_ns=2) == [e.Send(1, m.Done(lease, 0, 3, 7, m.OK, 5 * MS, 1, 2, 3))]
    assert rig.states() == (13, 0, 0, 0, 3)
    assert rig.say(1, m.Release(lease, 0, 3)) == []
    assert rig.states() == (16, 0, 0, 0, 0)
    figures = rig.figures()
    assert (figures.items, figures.batches, figures.runs, figures.failed_items) == (3, 1, 1, 0)
    assert (figures.queue_ns, figures.copy_in_ns, figures.compute_ns, figures.copy_out_ns) == (15 * MS, 1, 2, 3)


def test_parts_of_a_lease_go_their_own_ways(rig):
    lease = rig.lease(1, 4)
    rig.say(1, m.Release(lease, 1, 1), m.Submit(lease, 2, 2, 0, 2), m.Submit(lease, 0, 1, 1, 1))
    run = run_of(rig.turn())
    assert run.rows == [m.Rows(0, 0, 1, 1), m.Rows(0, 2, 2, 2)]
    assert [done.first for done in sent(rig.finish(10, run), m.Done)] == [0, 2]
    rig.say(1, m.Release(lease, 2, 1), m.Release(lease, 0, 1))
    assert rig.states() == (15, 0, 0, 0, 1)
    rig.refused(1, m.Release(lease, 0, 1))
    rig.say(1, m.Release(lease, 3, 1))
    assert rig.states() == (16, 0, 0, 0, 0)
    rig.refused(1, m.Release(lease, 3, 1))


def test_what_was_never_submitted_may_be_released(rig):
    rig.say(1, m.Release(rig.lease(1, 2), 0, 2))
    assert rig.states() == (16, 0, 0, 0, 0)


def test_lease_ids_are_never_used_again(rig):
    seen = []
    for _ in range(20):
        seen.append(rig.lease(1))
        rig.say(1, m.Release(seen[-1], 0, 1))
    assert len(set(seen)) == 20


def test_a_partial_last_slot(rig):
    rig = Rig((8, 4, 8))
    rig.join(1)
    rig.worker()
    lease = rig.lease(1, 2)
    for items in (0, 4, 9, HUGE):
        if items:  # 0 is refused when it is decoded
            rig.refused(1, m.Submit(lease, 0, 2, 0, items))
    rig.say(1, m.Submit(lease, 0, 2, 0, 5))
    assert run_of(rig.turn()).rows == [m.Rows(0, 0, 2, 5)]


# --- What is illegal is answered, and changes nothing --------------------------------------------


def producers_slots(rig: Rig) -> dict[str, int]:
    """Leases of producer 1 in each state, by its name; `done` was submitted with seq 5."""
    leases = {"done": rig.lease(1, 2)}
    rig.say(1, m.Submit(leases["done"], 0, 2, 5, 2))
    rig.finish(10, run_of(rig.turn()))
    for name in ("running", "running too", "queued"):  # one lane, and one batch to come
        leases[name] = rig.submit(1, 2)
        rig.turn()
    leases["leased"] = rig.lease(1, 2)
    leases["released"] = rig.lease(1, 2)
    rig.say(1, m.Release(leases["released"], 0, 2))
    assert rig.states() == (6, 2, 2, 4, 2)
    return leases


@pytest.mark.parametrize("state", ["running", "queued", "released"])
def test_a_spent_slot_cannot_be_submitted(rig, state):
    lease = producers_slots(rig)[state]
    rig.refused(1, m.Submit(lease, 0, 1, 9, 1))
    rig.refused(1, m.Submit(lease, 0, 2, 9, 2))


@pytest.mark.parametrize("state", ["running", "queued", "released"])
def test_what_is_under_way_or_gone_cannot_be_released(rig, state):
    lease = producers_slots(rig)[state]
    rig.refused(1, m.Release(lease, 0, 2))
    rig.refused(1, m.Release(lease, 1, 1))


@pytest.mark.parametrize(
    "illegal",
    [
        lambda lease: m.Submit(lease, 0, 3, 0, 3),
        lambda lease: m.Submit(lease, 2, 1, 0, 1),
        lambda lease: m.Submit(lease, 1, 2, 0, 2),
        lambda lease: m.Submit(lease, HUGE, HUGE, 0, HUGE),
        lambda lease: m.Submit(lease, 0, HUGE, 0, HUGE),
        lambda lease: m.Submit(lease, 0, 2, 0, 1),
        lambda lease: m.Submit(lease, 0, 2, 0, 3),
        lambda lease: m.Submit(lease, 0, 2, 0, HUGE),
        lambda lease: m.Submit(lease, 0, 2, 0, 2, None, 13),
        lambda lease: m.Submit(lease, 0, 2, 0, 2, None, HUGE),
        lambda lease: m.Submit(lease + 1000, 0, 2, 0, 2),
        lambda lease: m.Submit(2**63 - 1, 0, 2, 0, 2),
        lambda lease: m.Release(lease, 0, 3),
        lambda lease: m.Release(lease, HUGE, HUGE),
        lambda lease: m.Release(0, 0, 1),
        lambda lease: m.Lease(1, 1, 1, None),
        lambda lease: m.Lease(1, HUGE, 1, None),
    ],
)
def test_bounds(rig, illegal):
    rig.refused(1, illegal(rig.lease(1, 2)))


@pytest.mark.parametrize("stale", [0, 4, 5])
def test_a_stale_seq(rig, stale):
    lease = rig.lease(1, 3)
    rig.say(1, m.Submit(lease, 0, 1, 5, 1))
    rig.refused(1, m.Submit(lease, 1, 1, stale, 1))
    assert rig.say(1, m.Submit(lease, 1, 1, 6, 1)) == []


def test_a_refused_submit_does_not_use_up_its_seq(rig):
    lease = rig.lease(1, 2)
    rig.refused(1, m.Submit(lease, 0, 3, 8, 3))
    assert rig.say(1, m.Submit(lease, 0, 2, 8, 2)) == []


def test_leases_of_others(rig):
    lease = rig.lease(1, 2)
    rig.refused(2, m.Submit(lease, 0, 2, 0, 2))
    rig.refused(2, m.Release(lease, 0, 2))
    rig.say(1, m.Submit(lease, 0, 2, 0, 2))
    before = everything(rig.core)
    assert rig.say(2, m.Cancel(lease, 0, 2)) == []
    assert everything(rig.core) == before


@pytest.mark.parametrize(
    "message",
    [
        m.Ready("cpu", 1), m.Finished(1, 0, 0, 0, 0, 0), m.Failed(1, 0, ""), m.Hello(1, bytes(40)),
    ],
)  # fmt: skip
def test_a_producer_may_not_say_what_a_worker_says(rig, message):
    producers_slots(rig)
    rig.refused(1, message)


@pytest.mark.parametrize(
    "message",
    [
        m.Lease(1, 0, 1, None), m.Submit(1, 0, 1, 0, 1), m.Release(1, 0, 1), m.Cancel(1, 0, 1), m.Status(1),
        m.Hello(1, bytes(40)), m.Ready("cpu", 2),
    ],
)  # fmt: skip
def test_a_worker_may_not_say_what_a_producer_says_nor_be_ready_twice(rig, message):
    producers_slots(rig)
    rig.refused(10, message)


@pytest.mark.parametrize("kind", ["finished", "failed"])
def test_only_the_worker_that_has_a_batch_answers_for_it_once(rig, kind):
    def answer(batch: int, attempt: int) -> m.Finished | m.Failed:
        return m.Finished(batch, attempt, 0, 0, 0, 0) if kind == "finished" else m.Failed(batch, attempt, "no")

    rig.worker(11)
    rig.submit(1)
    run = run_of(rig.turn())
    rig.refused(11, answer(run.batch, run.attempt))
    rig.refused(10, answer(run.batch, run.attempt + 1))
    rig.refused(10, answer(run.batch + 1, run.attempt))
    rig.refused(10, answer(2**63 - 1, HUGE))
    rig.say(10, answer(run.batch, run.attempt))
    rig.refused(10, answer(run.batch, run.attempt))


def test_a_peer_that_is_not_known_is_not_answered(rig):
    before = everything(rig.core)
    assert rig.say(99, m.Lease(1, 0, 1, None), m.Finished(1, 0, 0, 0, 0, 0)) == []
    for event in (e.ProducerClosed(99), e.ProducerEnded(99), e.WorkerEnded(99, "")):
        assert rig.do(event) == []
    assert everything(rig.core) == before


def test_a_producers_bye_is_courtesy(rig):
    before = everything(rig.core)
    assert rig.say(1, m.Bye("thanks")) == []
    assert everything(rig.core) == before
    rig.submit(1)
    assert sent(rig.turn(), m.Run)


# --- Leases that wait ----------------------------------------------------------------------------


def grants(actions: list[e.Action]) -> list[tuple[int, int]]:
    """``(peer, request)`` of each Grant, in order."""
    return [(a.peer, a.message.request) for a in actions if isinstance(a, e.Send) and isinstance(a.message, m.Grant)]


def filled(producers: int = 4) -> tuple[Rig, list[int]]:
    """8 slots of which the first producer holds 6 and the second 2, and the leases."""
    rig = Rig((8, 1, 2))
    rig.join(*range(1, producers + 1))
    return rig, [rig.lease(1, 6), rig.lease(2, 2)]


def test_who_waits_is_served_in_order_and_in_whole():
    rig, (lease, _) = filled()
    assert grants(rig.say(3, m.Lease(31, 0, 3, None)) + rig.say(4, m.Lease(41, 0, 1, None)) + rig.turn()) == []
    rig.say(1, m.Release(lease, 0, 2))
    assert grants(rig.turn()) == [], "two are free: the first wants three, and the second comes after it"
    assert rig.figures().waiting == 2
    rig.say(1, m.Release(lease, 2, 2))
    assert grants(rig.turn()) == [(3, 31), (4, 41)]
    assert rig.figures().waiting == 0


def test_one_at_its_own_cap_holds_nobody_up():
    rig, (lease, other) = filled()
    assert grants(rig.say(1, m.Lease(11, 0, 1, None)) + rig.turn()) == []
    rig.say(2, m.Release(other, 0, 2))
    assert grants(rig.say(3, m.Lease(31, 0, 1, None)) + rig.turn()) == [(3, 31)]
    assert grants(rig.say(4, m.Lease(41, 0, 1, 0))) == [(4, 41)], "nor one who does not wait"
    rig.say(1, m.Release(lease, 0, 1))
    assert grants(rig.turn()) == [(1, 11)]


def test_more_than_the_cap_is_refused_for_good():
    rig, _ = filled()
    assert rig.refused(3, m.Lease(31, 0, 7, None), m.TOO_LARGE).request == 31
    assert rig.refused(3, m.Lease(32, 0, HUGE, 0), m.TOO_LARGE).request == 32


def test_a_cap_that_was_asked_for():
    rig = Rig(cap=3)
    (welcome,) = sent(rig.do(e.ProducerJoined(1)), m.Welcome)
    assert welcome.caps == [3]
    rig.refused(1, m.Lease(1, 0, 4, None), m.TOO_LARGE)
    rig.lease(1, 3)


def test_now_or_never():
    rig, (lease, _) = filled()
    error = rig.refused(3, m.Lease(31, 0, 1, 0), m.BUSY)
    assert (error.request, rig.figures().waiting) == (31, 0)
    rig.say(1, m.Release(lease, 0, 1))
    assert grants(rig.say(3, m.Lease(32, 0, 1, 0))) == [(3, 32)]


def test_now_or_never_does_not_overtake():
    rig, (lease, _) = filled()
    rig.say(3, m.Lease(31, 0, 3, None))
    rig.turn()
    rig.say(1, m.Release(lease, 0, 2))
    rig.refused(4, m.Lease(41, 0, 1, 0), m.BUSY)
    rig.say(1, m.Release(lease, 2, 1))
    answer = rig.say(4, m.Lease(42, 0, 1, 0))
    assert grants(answer) == [(3, 31)]
    assert [error.request for error in sent(answer, m.Error, 4)] == [42]


def test_a_wait_is_bounded():
    rig, (lease, _) = filled()
    rig.say(3, m.Lease(31, 0, 1, 5 * MS))
    rig.say(4, m.Lease(41, 0, 1, None))
    rig.turn()
    assert rig.core.next_timer_ns() == rig.now_ns + 5 * MS
    assert rig.turn(5 * MS - 1) == []
    actions = rig.turn(1)
    assert [(error.code, error.request) for error in sent(actions, m.Error)] == [(m.BUSY, 31)]
    assert sent(actions, m.Error, 3)
    rig.say(1, m.Release(lease, 0, 6))
    assert grants(rig.turn()) == [(4, 41)], "and what timed out is not granted"
    assert rig.core.next_timer_ns() is None


def test_a_granted_wait_does_not_time_out():
    rig, (lease, _) = filled()
    rig.say(3, m.Lease(31, 0, 1, 5 * MS))
    rig.turn()
    rig.say(1, m.Release(lease, 0, 1))
    assert grants(rig.turn()) == [(3, 31)]
    assert rig.turn(6 * MS) == []


def test_recall_goes_once_to_those_who_hold_slots():
    rig, _ = filled()
    rig.say(3, m.Lease(31, 0, 1, None))
    assert sorted(a.peer for a in rig.turn()) == [1, 2]
    assert rig.turn() == []
    rig.say(4, m.Lease(41, 0, 1, None))
    assert rig.turn() == [], "the first in line has asked already"


def test_recall_does_not_go_to_the_one_who_waits_nor_for_another_model():
    rig = Rig((8, 1, 2), (8, 1, 2))
    rig.join(1, 2, 3)
    rig.lease(1, 6, model=1)
    rig.lease(2, 2, model=1)
    rig.lease(3, 4, model=0)
    rig.say(2, m.Lease(21, 1, 1, None))
    assert rig.turn() == [e.Send(1, m.Recall(1))]


def test_a_request_of_one_who_left_is_forgotten():
    rig, (lease, _) = filled()
    rig.say(3, m.Lease(31, 0, 3, 5 * MS))
    rig.say(4, m.Lease(41, 0, 1, None))
    rig.turn()
    assert rig.do(e.ProducerEnded(3)) == [e.Forget(3)]
    assert rig.figures().waiting == 1
    rig.say(1, m.Release(lease, 0, 1))
    assert grants(rig.turn()) == [(4, 41)]
    assert rig.turn(9 * MS) == []


def test_timers_of_what_is_over_do_not_pile_up(rig):
    """Work with far deadlines that ended long ago must hold no memory; a timer that is due must survive."""
    kept = rig.submit(1, deadline_ns=3 * MS)
    rig.do(e.WorkerEnded(10, ""))
    due_ns = rig.now_ns + 3 * MS
    handle = rig.core.handle  # without `validate`, for there are many
    for _ in range(3 * PRUNE_TIMERS):
        (grant,) = sent(handle(e.Received(1, m.Lease(1, 0, 1, 0)), rig.now_ns), m.Grant)
        ((lease, _),) = grant.leases
        for message in (m.Submit(lease, 0, 1, 0, 1, 2**62), m.Cancel(lease, 0, 1), m.Release(lease, 0, 1)):
            handle(e.Received(1, message), rig.now_ns)
    assert len(rig.core.timers.heap) <= PRUNE_TIMERS
    assert rig.core.next_timer_ns() == due_ns
    assert [done.lease for done in sent(rig.turn(3 * MS), m.Done)] == [kept]


# --- Batches -------------------------------------------------------------------------------------


def test_a_free_worker_takes_what_there_is_and_batches_grow_while_it_is_busy(rig):
    lease = rig.lease(1, 8)
    runs = []
    for at in range(8):
        rig.say(1, m.Submit(lease, at, 1, at, 1))
        runs += sent(rig.turn(), m.Run)
    while rig.states()[DONE] < 8:
        rig.finish(10, runs[-1])
        runs += sent(rig.turn(), m.Run)
        if len(rig.core.workers[10].batches) == 1 and runs[0].batch in rig.core.workers[10].batches:
            rig.finish(10, runs[0])
    assert [sum(rows.items for rows in run.rows) for run in runs] == [1, 1, 4, 2]


def test_credit_is_the_lanes_and_one(rig):
    rig = Rig((32, 1, 2))
    rig.join(1)
    rig.worker(10, lanes=2)
    lease = rig.lease(1, 20)
    for at in range(20):
        rig.say(1, m.Submit(lease, at, 1, at, 1))
    runs = sent(rig.turn(), m.Run)
    assert len(runs) == 3
    assert sent(rig.turn(), m.Run) == []
    rig.finish(10, runs[1])
    assert len(sent(rig.turn(), m.Run)) == 1


def test_batches_go_to_the_worker_with_the_fewest(rig):
    rig.worker(11, lanes=3)
    seen = []
    for _ in range(4):
        rig.submit(1, 1)
        seen += [action.peer for action in rig.turn() if isinstance(action, e.Send)]
    assert seen == [10, 11, 10, 11]


def test_with_several_lanes_only_full_batches_go_beyond_the_two_that_a_device_works_on(rig):
    rig = Rig((32, 2, 8))
    rig.join(1)
    rig.worker(lanes=3)
    for _ in range(2):
        rig.submit(1, 1)
        assert run_of(rig.turn()).rows[0].items == 2
    rig.submit(1, 3)
    assert rig.turn() == [], "it had better grow"
    lease = rig.lease(1)
    rig.say(1, m.Submit(lease, 0, 1, 0, 1))
    third = run_of(rig.turn())
    assert third.rows[0].items == 7, "one item more would fit, and a slot more would not"
    rig.submit(1, 5)
    fourth = run_of(rig.turn())
    assert (fourth.rows[0].items, rig.states()[QUEUED]) == (8, 1), "one ahead of the lanes"
    rig.submit(1, 4)
    assert rig.turn() == []
    rig.finish(10, third)
    assert run_of(rig.turn()).rows[0].items == 8
    rig.finish(10, fourth)
    assert rig.turn() == [], "three lanes are busy, and the batch is not full"


@pytest.mark.parametrize(("run_ns", "two"), [(BRIEF_NS // 2, False), (BRIEF_NS // 2 + 1, True)])
def test_a_brief_batch_that_is_not_full_grows_until_the_worker_is_done_with_the_last(run_ns, two):
    rig = Rig((32, 1, 4))
    rig.join(1)
    rig.worker(lanes=3)
    rig.core.models[0].run_ns = run_ns
    rig.submit(1, 2)
    first = run_of(rig.turn())
    rig.submit(1, 1)
    assert bool(sent(rig.turn(), m.Run)) is two
    rig.core.models[0].run_ns = 1000
    rig.submit(1, 4 if two else 3)
    assert run_of(rig.turn()).rows[0].items == 4, "a full one goes to any lane"
    rig.submit(1, 2)
    rig.finish(10, first, compute_ns=1000)
    assert sent(rig.turn(), m.Run) == [], "the worker has others"


def test_a_worker_that_is_not_ready_gets_nothing(rig):
    rig = Rig()
    rig.join(1)
    rig.do(e.WorkerJoined(10, 1))
    rig.submit(1)
    assert rig.turn() == []
    rig.say(10, m.Ready("cpu", 1))
    assert sent(rig.turn(), m.Run, 10)


def test_a_full_batch_does_not_wait_and_a_small_one_waits_its_time():
    rig = Rig(max_delay_us=1000)
    rig.join(1)
    rig.worker(lanes=4)
    rig.submit(1, 2)
    assert rig.turn() == []
    assert rig.core.next_timer_ns() == rig.now_ns + MS
    assert rig.turn(MS - 1) == []
    assert run_of(rig.turn(1)).rows == [m.Rows(0, 0, 2, 2)]
    rig.submit(1, 3)
    assert rig.turn() == []
    lease = rig.lease(1)
    rig.say(1, m.Submit(lease, 0, 1, 0, 1))
    full = run_of(rig.turn())
    assert full.rows == [m.Rows(0, 2, 4, 4)]
    rig.finish(10, full)
    rig.submit(1, 1)
    rig.do(e.Drain())
    assert sent(rig.turn(), m.Run), "a pool that stops waits for nobody"


def test_two_models_are_never_in_one_batch_and_the_older_goes_first():
    rig = Rig((8, 1, 4), (8, 2, 4))
    rig.join(1)
    second = rig.submit(1, 2, model=1)
    rig.now_ns += 1
    first = rig.submit(1, 2, model=0)
    rig.worker(lanes=2)
    runs = sent(rig.turn(), m.Run)
    assert [(run.model, run.rows) for run in runs] == [(1, [m.Rows(0, 0, 2, 4)]), (0, [m.Rows(0, 0, 2, 2)])]
    assert [done.lease for run in runs for done in sent(rig.finish(10, run), m.Done)] == [second, first]
    assert [rig.figures(model).items for model in (0, 1)] == [2, 4]


def test_a_submission_larger_than_a_batch_ends_in_parts(rig):
    lease = rig.submit(1, 10)
    ended = []
    for _ in range(3):
        ended += [done for run in sent(rig.turn(), m.Run) for done in sent(rig.finish(10, run), m.Done)]
    assert [(done.first, done.count) for done in ended] == [(0, 4), (4, 4), (8, 2)]
    assert {(done.lease, done.seq, done.status) for done in ended} == {(lease, 0, m.OK)}


# --- Deadlines and cancelling --------------------------------------------------------------------


def test_a_deadline_ends_what_is_queued_and_nothing_else(rig):
    for _ in range(2):
        rig.submit(1, deadline_ns=MS)
        rig.turn()
    late = rig.submit(1, deadline_ns=MS)
    rig.submit(1, deadline_ns=MS + 1)
    rig.turn()
    assert rig.core.next_timer_ns() == rig.now_ns + MS
    (done,) = sent(rig.turn(MS), m.Done)
    assert (done.lease, done.status) == (late, m.DEADLINE)
    assert "1.0 ms" in done.text
    assert rig.states() == (12, 0, 1, 2, 1)
    assert (rig.figures().failed_items, rig.figures().items) == (1, 0)


def test_a_deadline_that_passed_never_reaches_a_worker(rig):
    rig = Rig()
    rig.join(1)
    rig.submit(1, 3, deadline_ns=0)
    rig.worker()
    (action,) = rig.turn(1)
    assert isinstance(action, e.Send)
    assert (action.peer, action.message.status, action.message.count) == (1, m.DEADLINE, 3)


def test_a_deadline_holds_for_what_waits_to_be_tried_again(rig):
    rig.submit(1, 4, deadline_ns=10 * MS)
    rig.say(10, m.Failed(run_of(rig.turn()).batch, 0, "no"))
    rig.do(e.WorkerEnded(10, "exit code 1"))
    rig.turn()
    assert rig.states() == (12, 0, 4, 0, 0)
    done = sent(rig.turn(10 * MS), m.Done)
    assert sorted((d.first, d.count, d.status) for d in done) == [(0, 2, m.DEADLINE), (2, 2, m.DEADLINE)]
    assert not rig.core.books.suspects


def test_cancel_ends_what_is_queued(rig):
    leases = producers_slots(rig)
    for state in ("done", "running", "leased", "released"):
        before = everything(rig.core)
        assert rig.say(1, m.Cancel(leases[state], 0, 2)) == []
        assert everything(rig.core) == before
    assert rig.say(1, m.Cancel(leases["queued"], 1, HUGE)) == [], "a part of a submission is not cancelled"
    (done,) = sent(rig.say(1, m.Cancel(leases["queued"], 0, HUGE)), m.Done)
    assert (done.lease, done.count, done.status) == (leases["queued"], 2, m.CANCELLED)
    assert rig.say(1, m.Cancel(leases["queued"], 0, 2)) == []
    rig.say(1, m.Release(leases["queued"], 0, 2))


def test_cancel_ends_what_waits_to_be_tried_again(rig):
    lease = rig.submit(1, 4)
    rig.say(10, m.Failed(run_of(rig.turn()).batch, 0, "no"))
    assert [done.status for done in sent(rig.say(1, m.Cancel(lease, 0, 4)), m.Done)] == [m.CANCELLED] * 2
    assert not rig.core.books.suspects
    rig.submit(1)
    assert sent(rig.turn(), m.Run), "no worker is kept for suspects that are gone"


# --- Again ---------------------------------------------------------------------------------------


def test_a_short_batch_is_not_sent_ahead(rig):
    """The worker's one lane is busy: what runs briefly had better grow to a batch meanwhile."""
    for _ in range(30):
        lease = rig.submit(1, 1)
        rig.finish(10, run_of(rig.turn()), compute_ns=1000)
        rig.say(1, m.Release(lease, 0, 1))
    rig.submit(1, 1)
    run_of(rig.turn())
    rig.submit(1, 1)
    assert sent(rig.turn(), m.Run) == []
    rig.submit(1, 3)  # a full batch is worth it
    assert sum(rows.items for rows in run_of(rig.turn()).rows) == 4


def test_what_is_done_may_be_submitted_again(rig):
    """In place of being released, as often as its producer likes; what was not run yet may not."""
    lease = rig.lease(1, 4)
    for seq in range(3):
        rig.say(1, m.Submit(lease, 0, 4, seq, 4))
        assert rig.states() == (12, 0, 4, 0, 0)
        rig.refused(1, m.Submit(lease, 0, 4, seq + 10, 4))
        run = run_of(rig.turn())
        rig.refused(1, m.Submit(lease, 0, 4, seq + 10, 4))
        (done,) = sent(rig.finish(10, run), m.Done, 1)
        assert (done.seq, done.count, done.status) == (seq, 4, m.OK)
        assert rig.states() == (12, 0, 0, 0, 4)
    assert "seq 2 after 2" in rig.refused(1, m.Submit(lease, 0, 4, 2, 4)).text
    rig.say(1, m.Release(lease, 0, 1), m.Submit(lease, 1, 2, 3, 2))
    rig.refused(1, m.Submit(lease, 0, 4, 4, 4))  # one was released
    (done,) = sent(rig.finish(10, run_of(rig.turn())), m.Done, 1)
    assert (done.first, done.count) == (1, 2)
    rig.say(1, m.Release(lease, 1, 3))
    assert rig.states() == (16, 0, 0, 0, 0)


def test_again_grants_when_the_work_is_done(rig):
    lease = rig.lease(1, 2)
    rig.say(1, m.Submit(lease, 0, 2, 0, 2, None, 2))
    actions = rig.finish(10, run_of(rig.turn()))
    assert [type(a.message) for a in actions] == [m.Done, m.Grant]
    (grant,) = sent(actions, m.Grant, 1)
    assert (grant.request, [run.count for _, run in grant.leases]) == (0, [2])


def again(rig: Rig) -> list[m.Grant]:
    """The grants that one slot of producer 1, submitted with `again`, brings when it is done."""
    rig.say(1, m.Submit(rig.lease(1), 0, 1, 0, 1, None, 1))
    return sent(rig.finish(10, run_of(rig.turn())), m.Grant)


@pytest.mark.parametrize(("held_by_another", "granted"), [(10, 1), (11, 0)])
def test_again_leaves_a_surplus(rig, held_by_another, granted):
    assert 16 // SURPLUS == 4
    rig.lease(2, held_by_another)  # and one by the producer itself: 5 or 4 are free
    assert len(again(rig)) == granted


def test_again_never_goes_before_one_who_waits():
    rig = Rig((16, 1, 4))
    rig.join(1, 2, 3)
    rig.worker()
    lease = rig.lease(1, 1)
    rig.say(1, m.Submit(lease, 0, 1, 0, 1, None, 1))
    run = run_of(rig.turn())
    rig.lease(2, 6)
    rig.say(3, m.Lease(31, 0, 12, None))
    rig.turn()
    assert sent(rig.finish(10, run), m.Grant) == []


def test_who_asks_in_this_turn_and_finds_room_keeps_nobody_from_slots_in_advance(rig):
    """Else one that asks has another ask, and in the end all do."""
    lease = rig.lease(1)
    rig.say(1, m.Submit(lease, 0, 1, 0, 1, None, 1))
    run = run_of(rig.turn())
    rig.say(2, m.Lease(21, 0, 4, None))
    assert [(grant.request, grant.model) for grant in sent(rig.finish(10, run), m.Grant, 1)] == [(0, 0)]
    assert [grant.request for grant in sent(rig.turn(), m.Grant, 2)] == [21]


@pytest.mark.parametrize(("cap", "granted"), [(1, 0), (2, 1)])
def test_again_stops_at_the_cap(cap, granted):
    """Results that were not read count."""
    rig = Rig(cap=cap)
    rig.join(1)
    rig.worker()
    assert len(again(rig)) == granted


def test_again_is_for_results_only_and_not_while_stopping(rig):
    lease = rig.lease(1)
    rig.say(1, m.Submit(lease, 0, 1, 0, 1, None, 1))
    assert sent(rig.say(1, m.Cancel(lease, 0, 1)), m.Grant) == []
    lease = rig.lease(1)
    rig.say(1, m.Submit(lease, 0, 1, 0, 1, None, 1))
    run = run_of(rig.turn())
    rig.do(e.Drain())
    assert [type(a.message) for a in rig.finish(10, run)] == [m.Done]


# --- Workers that end, and items that end them ---------------------------------------------------


def test_a_workers_end_puts_its_batches_back(rig):
    lease = rig.lease(1, 8)
    rig.say(1, m.Submit(lease, 0, 8, 0, 8))
    assert len(sent(rig.turn(), m.Run)) == 2
    rig.worker(11)
    assert rig.do(e.WorkerEnded(10, "SIGKILL")) == [e.Forget(10)]
    assert rig.states() == (8, 0, 8, 0, 0)
    assert rig.figures().retries == 2
    seen = []
    while rig.states()[DONE] < 8:
        run = run_of(rig.turn(), 11)
        assert run.attempt == 1
        seen += run.rows
        assert {done.status for done in sent(rig.finish(11, run), m.Done)} == {m.OK}
    assert seen == [m.Rows(0, first, 2, 2) for first in (0, 2, 4, 6)], "halves of either, one at a time"


def test_a_worker_that_ends_idle_or_unready_loses_nothing(rig):
    rig.do(e.WorkerJoined(11, 1))
    before = rig.states()
    assert rig.do(e.WorkerEnded(10, "")) == [e.Forget(10)]
    assert rig.do(e.WorkerEnded(11, "")) == [e.Forget(11)]
    assert rig.do(e.WorkerEnded(11, "")) == []
    assert rig.states() == before


def poisoned(poison: set[int], slots: int, *, deadly: bool, workers: int, items_per_slot: int = 1) -> Rig:
    """Run `slots` slots of which some are poison until all have ended; look at what ended how."""
    rig = Rig((32, items_per_slot, 8 * items_per_slot))
    rig.join(1)
    peers = itertools.count(10)
    for _ in range(workers):
        rig.worker(next(peers))
    lease = rig.submit(1, slots)
    ended: Counter[int] = Counter()
    failed: dict[int, str] = {}
    tried_alone: Counter[int] = Counter()
    for _ in range(500):
        for action in rig.turn():
            if not isinstance(action, e.Send) or not isinstance(action.message, m.Run):
                continue
            worker, run = action.peer, action.message
            if worker not in rig.core.workers:
                continue  # it ended meanwhile, with an earlier batch of this turn
            inside = {slot for rows in run.rows for slot in range(rows.first, rows.first + rows.count)}
            answers: list[e.Action]
            if inside & poison:
                worker_record = rig.core.workers[worker]
                if len(inside) == 1 and (worker_record.batches[run.batch].alone or not deadly):
                    tried_alone[min(inside)] += 1
                if deadly:
                    answers = rig.do(e.WorkerEnded(worker, "SIGSEGV"))
                    rig.worker(next(peers))
                else:
                    answers = rig.say(worker, m.Failed(run.batch, run.attempt, "bad input"))
            else:
                answers = rig.finish(worker, run)
            for done in sent(answers, m.Done, 1):
                for at in range(done.first, done.first + done.count):
                    ended[at] += 1
                    if done.status != m.OK:
                        assert done.status == (m.WORKER_DIED if deadly else m.ENGINE_FAILED)
                        failed[at] = done.text
        if rig.states()[DONE] == slots:
            break
    assert ended == Counter(range(slots)), "each ends exactly once"
    assert set(failed) == poison
    assert all(f"tried alone {MAX_ATTEMPTS} times" in text for text in failed.values())
    assert tried_alone == Counter(dict.fromkeys(poison, MAX_ATTEMPTS))
    assert rig.figures().failed_items == len(poison) * items_per_slot
    assert not rig.core.books.suspects
    rig.say(1, m.Release(lease, 0, slots))
    assert rig.states() == (32, 0, 0, 0, 0)
    return rig


def brief(*sizes: tuple[int, int, int], workers: int = 1) -> Rig:
    """A pool whose model runs in 10 us."""
    rig = Rig(*sizes)
    rig.join(1, 2)
    for worker in range(10, 10 + workers):
        rig.worker(worker)
    while rig.core.models[0].run_ns > 10_100:
        rig.submit(1)
        (run,) = sent(rig.turn(), m.Run)
        rig.say(10, m.Finished(run.batch, 0, 1_000, 8_000, 1_000, 0))
        for producer in rig.core.producers.values():
            for lease in list(producer.leases.values()):
                rig.say(producer.peer, m.Release(lease.id, 0, 1))
    return rig


def test_brief_batches_go_to_a_worker_together():
    rig = brief((64, 2, 8))
    before = rig.figures()
    rig.submit(1, 16)
    (run,) = sent(rig.turn(), m.Run, 10)
    assert [(rows.count, rows.items) for rows in run.rows] == [(16, 32)]
    actions = rig.say(10, m.Finished(run.batch, 0, 4_000, 32_000, 4_000, 0, 4))
    (done,) = sent(actions, m.Done, 1)
    assert (done.count, done.status) == (16, m.OK)
    after = rig.figures()
    assert (after.batches - before.batches, after.runs - before.runs) == (4, 4)
    assert rig.core.models[0].run_ns < 10_100  # of a batch, not of all of them


@pytest.mark.parametrize(
    ("run_ns", "together"), [(0, MAX_TOGETHER), (10_000, MAX_TOGETHER), (BRIEF_NS // 3, 3), (BRIEF_NS // 2 + 1, 1)]
)
def test_as_many_batches_go_together_as_take_no_longer_than_a_message_is_worth(run_ns, together):
    rig = brief((2048, 1, 4))
    rig.core.models[0].run_ns = run_ns
    rig.submit(1, 1024)
    run, *_ = sent(rig.turn(), m.Run, 10)
    assert sum(rows.items for rows in run.rows) == together * 4


def test_brief_batches_are_shared_among_the_workers():
    rig = brief((512, 1, 4), workers=2)
    rig.submit(1, 128)
    actions = rig.turn()
    one, other = ([sum(rows.items for rows in run.rows) for run in sent(actions, m.Run, peer)] for peer in (10, 11))
    assert one == [32, 16]
    assert other == [24, 12]


def test_interactive_work_waits_for_one_batch_and_not_for_several():
    rig = brief((64, 1, 4))
    bulk, urgent = rig.lease(1, 16), rig.lease(2)
    rig.say(1, m.Submit(bulk, 0, 16, 0, 16))
    rig.say(2, m.Submit(urgent, 0, 1, 0, 1, priority=INTERACTIVE))
    run, *_ = sent(rig.turn(), m.Run, 10)
    assert sum(rows.items for rows in run.rows) == 4


def test_of_several_brief_batches_a_poison_item_fails_alone():
    rig = brief((64, 1, 4))
    poison = 21
    failed: list[int] = []
    done: list[int] = []
    lease = rig.core.producers[1].leases[rig.submit(1, 32)]
    actions = rig.turn()
    while runs := sent(actions, m.Run, 10):
        (run,) = runs
        slots = {rows.first - lease.first + at for rows in run.rows for at in range(rows.count)}
        ended = (
            m.Failed(run.batch, run.attempt, "no") if poison in slots else m.Finished(run.batch, run.attempt, *ZEROS)
        )
        actions = rig.say(10, ended) + rig.turn()
        for one in sent(actions, m.Done, 1):
            (failed if one.status else done).extend(range(one.first, one.first + one.count))
    assert failed == [poison]
    assert sorted(done) == [at for at in range(32) if at != poison]


@pytest.mark.parametrize("deadly", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("poison", [{0}, {5}, {7}, {0, 7}, {1, 9, 12}, set(range(8))])
def test_a_poison_item_fails_alone_and_all_others_succeed(poison, workers, deadly):
    poisoned(poison, 16, deadly=deadly, workers=workers)


def test_a_poison_slot_of_several_items():
    poisoned({3}, 12, deadly=True, workers=2, items_per_slot=4)


def test_dying_with_others_is_no_evidence(rig):
    """A single slot that was on a worker beside a poison one has no attempt counted against it."""
    innocent = rig.submit(1)
    rig.turn()
    rig.submit(2)
    rig.turn()
    for peer in range(11, 11 + 2 * MAX_ATTEMPTS):
        rig.do(e.WorkerEnded(peer - 1, "SIGKILL"))
        rig.worker(peer)
        run = run_of(rig.turn(), peer)
        if run.rows[0].first == 0:
            (done,) = sent(rig.finish(peer, run), m.Done)
            assert (done.lease, done.status) == (innocent, m.OK)
            return
    pytest.fail("it was never run alone")


def test_only_a_death_alone_counts(rig):
    rig.submit(1)
    deaths = 0
    done: list[m.Done] = []
    while not done:
        run_of(rig.turn(), 10 + deaths)
        done = sent(rig.do(e.WorkerEnded(10 + deaths, "SIGSEGV")), m.Done)
        deaths += 1
        rig.worker(10 + deaths)
    assert deaths == 1 + MAX_ATTEMPTS, "the first time it was not kept apart from others"
    assert (done[0].status, done[0].text) == (
        m.WORKER_DIED, f"the worker ended: SIGSEGV (tried alone {MAX_ATTEMPTS} times)",
    )  # fmt: skip


def test_what_a_worker_said_is_why_its_work_failed(rig):
    rig.submit(1)
    done: list[m.Done] = []
    for peer in itertools.count(10):
        run_of(rig.turn(), peer)
        assert rig.say(peer, m.Bye("the GPU is lost"), m.Bye("again")) == []
        done = sent(rig.do(e.WorkerEnded(peer, "exit code 5")), m.Done)
        if done:
            break
        rig.worker(peer + 1)
    text = f"the worker ended: the GPU is lost (exit code 5) (tried alone {MAX_ATTEMPTS} times)"
    assert (done[0].status, done[0].text) == (m.WORKER_DIED, text)


def test_a_worker_that_has_said_why_it_must_end_gets_no_more_and_what_it_finished_counts(rig):
    rig.submit(1, 1)
    run = run_of(rig.turn())
    rig.say(10, m.Bye("the GPU is lost"))
    rig.submit(1, 4)
    assert rig.turn() == []
    assert sent(rig.finish(10, run), m.Done)
    assert rig.turn() == []
    rig.worker(11)
    assert run_of(rig.turn(), 11).rows == [m.Rows(0, 1, 4, 4)]
    assert rig.do(e.WorkerEnded(10, "exit code 5")) == [e.Forget(10)]
    rig.do(e.WorkerJoined(12, 1))
    rig.say(12, m.Bye("no memory"), m.Ready("cpu", 1))
    rig.submit(1, 4)
    assert {action.peer for action in rig.turn() if isinstance(action, e.Send)} == {11}


S = 1000 * MS


@pytest.fixture
def impatient() -> Rig:
    """16 slots of one item, batches of 4, which may take 10 s; producer 1, worker 10 with one lane."""
    rig = Rig(batch_timeout_s=10)
    rig.join(1)
    rig.worker()
    return rig


def hangs(actions: list[e.Action]) -> list[int]:
    """The workers that are to be killed."""
    return [action.peer for action in actions if isinstance(action, e.Hung)]


def test_a_worker_whose_batch_runs_for_too_long_is_to_be_killed_once(impatient):
    rig = impatient
    rig.submit(1, 4)
    run_of(rig.turn())
    assert rig.core.next_timer_ns() == rig.now_ns + 10 * S
    assert rig.turn(10 * S - 1) == []
    (hung,) = rig.turn(1)
    assert hung == e.Hung(
        10,
        "it hung: a batch ran for more than 10 s, so the pool killed it; "
        "if batches may take that long, start the pool with a longer --batch-timeout-s",
    )
    rig.submit(1, 4)
    assert rig.turn(100 * S) == [], "it gets nothing more, and is not killed twice"
    assert rig.states() == (8, 0, 4, 4, 0), "its device may write until it has ended"
    rig.worker(11)
    rig.do(e.WorkerEnded(10, "SIGKILL"))
    assert rig.states() == (8, 0, 8, 0, 0)
    while rig.states()[DONE] < 8:
        rig.finish(11, run_of(rig.turn(), 11))


def test_an_input_that_hangs_workers_fails_alone_with_the_reason(impatient):
    rig = impatient
    rig.submit(1)
    done: list[m.Done] = []
    for peer in itertools.count(10):
        run_of(rig.turn(), peer)
        assert hangs(rig.turn(10 * S)) == [peer]
        done = sent(rig.do(e.WorkerEnded(peer, "SIGKILL from the pool")), m.Done)
        if done:
            break
        rig.worker(peer + 1)
    assert done[0].status == m.WORKER_DIED
    assert done[0].text.startswith("the worker ended: it hung: a batch ran for more than 10 s")


def test_the_time_of_a_batch_counts_from_the_end_of_the_one_before(impatient):
    """One that was sent ahead waits in the worker for its turn."""
    rig = impatient
    rig.submit(1, 8)
    first, second = sent(rig.turn(), m.Run)
    rig.turn(9 * S)
    rig.finish(10, first)
    assert hangs(rig.turn(1 * S)) == []
    assert hangs(rig.turn(9 * S - 1)) == []
    assert hangs(rig.turn(1)) == [10]
    assert sent(rig.finish(10, second), m.Done), "what it answers all the same counts"


def test_other_lanes_do_not_hide_one_that_hangs(impatient):
    rig = impatient
    rig.worker(11, lanes=2)
    rig.do(e.WorkerEnded(10, ""))
    rig.submit(1, 8)
    stuck, other = sent(rig.turn(), m.Run)
    rig.turn(9 * S)
    rig.finish(11, other)
    assert stuck.batch in rig.core.workers[11].batches
    assert hangs(rig.turn(1 * S)) == [11]


def test_a_worker_that_is_busy_for_ever_with_short_batches_does_not_hang(impatient):
    rig = impatient
    for _ in range(3000):
        rig.submit(1, 1)
        run = run_of(rig.turn(10 * MS))
        for done in sent(rig.finish(10, run), m.Done):
            rig.say(1, m.Release(done.lease, 0, 1))
    assert len(rig.core.timers.heap) == 1, "one timer serves all batches of a worker"
    assert rig.turn(10 * S) == []
    assert rig.core.next_timer_ns() is None, "an idle worker is not watched"


def test_a_broker_that_stood_still_itself_blames_nobody(impatient):
    """The whole pool was paused: its workers have done nothing meanwhile because they could not."""
    rig = impatient
    rig.submit(1, 4)
    run_of(rig.turn())
    assert hangs(rig.turn(3600 * S)) == []
    assert hangs(rig.turn(10 * S - 1)) == []
    assert hangs(rig.turn(1)) == [10]


def test_a_worker_that_said_why_it_must_end_and_does_not_is_killed_and_its_reason_kept(impatient):
    rig = impatient
    rig.submit(1, 4)
    run_of(rig.turn())
    rig.say(10, m.Bye("the GPU is lost"))
    assert hangs(rig.turn(10 * S)) == [10]
    assert rig.core.workers[10].said == "the GPU is lost"


def test_without_a_limit_a_batch_may_run_for_ever(rig):
    rig.submit(1, 4)
    run_of(rig.turn())
    assert rig.core.next_timer_ns() is None
    assert rig.turn(10**9 * S) == []


def test_no_suspect_runs_beside_that_of_a_worker_that_is_about_to_end(rig):
    rig.worker(11)
    rig.submit(1, 4)
    rig.say(10, m.Failed(run_of(rig.turn(), 10).batch, 0, "no"))
    run_of(rig.turn(), 10)
    rig.say(10, m.Bye("the GPU is lost"))
    assert rig.turn() == []
    rig.do(e.WorkerEnded(10, "exit code 5"))
    assert run_of(rig.turn(), 11).rows == [m.Rows(0, 2, 2, 2)]


def test_while_there_are_suspects_other_workers_go_on(rig):
    rig.worker(11)
    rig.submit(1, 4)
    actions = rig.turn()
    (first,) = [a.peer for a in actions if isinstance(a, e.Send) and isinstance(a.message, m.Run)]
    run = run_of(actions, first)
    rig.say(first, m.Failed(run.batch, 0, "no"))
    suspect = run_of(rig.turn(), 10)
    assert (suspect.attempt, suspect.rows) == (1, [m.Rows(0, 0, 2, 2)])
    for _ in range(3):
        rig.submit(2, 1)
        rig.turn()
    assert {worker.peer: len(worker.batches) for worker in rig.core.workers.values()} == {10: 1, 11: 2}


def test_a_long_reason_fits_a_message(rig):
    rig.submit(1)
    actions: list[e.Action] = []
    for _ in range(MAX_ATTEMPTS):
        run = run_of(rig.turn())
        actions = rig.say(10, m.Failed(run.batch, run.attempt, "x" * 4096))
    m.decode_from_broker(m.encode(sent(actions, m.Done)))
    assert len(sent(actions, m.Done)[0].text) == 4096


# --- Producers that end --------------------------------------------------------------------------


@pytest.mark.parametrize("closed_first", [False, True])
def test_a_producers_end_gives_back_all_but_what_runs(rig, closed_first):
    producers_slots(rig)
    others = rig.submit(2)
    if closed_first:
        assert rig.do(e.ProducerClosed(1)) == []
        assert rig.states() == (5, 2, 1, 4, 4), "quarantined: the queued ones are dropped, and none is free"
        assert rig.do(e.ProducerClosed(1)) == []
    rig.do(e.ProducerEnded(1))
    assert rig.states() == (11, 0, 1, 4, 0)
    actions: list[e.Action] = []
    for batch in list(rig.core.workers[10].batches):
        actions += rig.say(10, m.Finished(batch, 0, 0, 2_000_000, 0, 0))
    assert actions == [e.Forget(1)], "nobody is told of results that nobody waits for"
    assert rig.states() == (15, 0, 1, 0, 0)
    (done,) = sent(rig.finish(10, run_of(rig.turn())), m.Done)
    assert done.lease == others
    assert rig.do(e.ProducerEnded(1)) == []


@pytest.mark.parametrize("how", ["failed", "worker ended"])
def test_what_ran_for_one_who_ended_is_not_tried_again(rig, how):
    """Its neighbours in the batch are."""
    leases = [(peer, rig.lease(peer, 2)) for peer in (1, 2)]
    for peer, lease in leases:
        rig.say(peer, m.Submit(lease, 0, 2, 0, 2))
    run = run_of(rig.turn())
    assert rig.do(e.ProducerEnded(1)) == []
    assert rig.states() == (12, 0, 0, 4, 0)
    if how == "failed":
        actions = rig.say(10, m.Failed(run.batch, run.attempt, "no"))
    else:
        actions = rig.do(e.WorkerEnded(10, "SIGKILL"))
        rig.worker(11)
    assert e.Forget(1) in actions
    assert rig.states() == (14, 0, 2, 0, 0)
    (again_run,) = sent(rig.turn(), m.Run)
    assert again_run.rows == [m.Rows(0, 2, 1, 1)]


@pytest.mark.parametrize("event", [e.ProducerClosed(1), e.ProducerEnded(1)])
def test_one_who_leaves_with_nothing_is_forgotten_at_once(rig, event):
    assert rig.do(event) == [e.Forget(1)]
    assert 1 not in rig.core.producers


@pytest.mark.parametrize("event", [e.ProducerClosed(1), e.ProducerEnded(1)])
def test_what_waits_to_be_tried_again_goes_with_its_owner(rig, event):
    rig.submit(1, 4)
    rig.say(10, m.Failed(run_of(rig.turn()).batch, 0, "no"))
    assert rig.core.books.suspects == 2
    rig.do(event)
    assert rig.core.books.suspects == 0
    assert rig.states() == ((12, 0, 0, 0, 4) if isinstance(event, e.ProducerClosed) else (16, 0, 0, 0, 0))
    rig.submit(2)
    assert sent(rig.turn(), m.Run)


def test_a_closed_one_may_release_and_no_more(rig):
    leases = producers_slots(rig)
    rig.do(e.ProducerClosed(1))
    before = everything(rig.core)
    messages = [
        m.Lease(9, 0, 1, None), m.Lease(9, 0, 1, 0), m.Submit(leases["leased"], 0, 2, 9, 2),
        m.Cancel(leases["leased"], 0, 2), m.Status(1), m.Bye(""),
    ]  # fmt: skip
    assert rig.say(1, *messages) == []
    assert everything(rig.core) == before
    assert rig.core.violations == 0
    rig.say(1, m.Release(leases["leased"], 0, 2), m.Release(leases["done"], 0, 2))
    assert rig.states() == (10, 0, 0, 4, 2)


def test_a_closed_one_that_releases_its_last_slot_is_forgotten(rig):
    lease = rig.lease(1, 2)
    rig.do(e.ProducerClosed(1))
    assert rig.say(1, m.Release(lease, 0, 1)) == []
    assert rig.say(1, m.Release(lease, 1, 1)) == [e.Forget(1)]


def test_what_runs_for_a_closed_one_ends_and_stays_quarantined(rig):
    rig.submit(1, 2)
    run = run_of(rig.turn())
    rig.do(e.ProducerClosed(1))
    rig.say(10, m.Failed(run.batch, 0, "no"))
    assert rig.states() == (14, 0, 0, 0, 2)
    assert sent(rig.turn(), m.Run) == []
    assert rig.do(e.ProducerEnded(1)) == [e.Forget(1)]
    assert rig.states() == (16, 0, 0, 0, 0)


# --- Draining and figures ------------------------------------------------------------------------


def test_drain_refuses_leases_finishes_work_and_says_so_once(rig):
    leased = rig.lease(1, 1)
    rig.submit(1, 2)
    first = run_of(rig.turn())
    rig.do(e.Drain())
    assert rig.refused(1, m.Lease(12, 0, 1, 0), m.CLOSING).request == 12
    assert rig.refused(1, m.Lease(13, 0, 1, None), m.CLOSING).request == 13
    rig.say(1, m.Submit(leased, 0, 1, 0, 1))
    second = run_of(rig.turn())
    assert [type(a) for a in rig.finish(10, first) + rig.turn()] == [e.Send], "Done, and not drained yet"
    assert sent(rig.finish(10, second), m.Done)
    assert rig.turn() == [e.Drained()]
    assert rig.turn() == []


def test_drain_recalls_what_is_held(rig):
    """Whoever uses slots again asks for none, and is not refused any."""
    rig.lease(1, 1)
    rig.lease(2, 2)
    rig.join(4)
    actions = rig.do(e.Drain())
    assert [one.peer for one in actions if isinstance(one, e.Send) and isinstance(one.message, m.Recall)] == [1, 2]


def test_drain_waits_for_what_is_to_be_tried_again(rig):
    rig.submit(1, 2)
    run = run_of(rig.turn())
    rig.do(e.Drain())
    rig.do(e.WorkerEnded(10, "SIGKILL"))
    assert rig.turn() == []
    rig.worker(11)
    for _ in range(2):
        run = run_of(rig.turn(), 11)
        rig.finish(11, run)
    assert rig.turn() == [e.Drained()]


def test_a_drain_answers_a_request_once():
    rig, _ = filled()
    rig.say(3, m.Lease(31, 0, 1, 5 * MS))
    rig.turn()
    (error,) = sent(rig.do(e.Drain()), m.Error)
    assert (error.code, error.request) == (m.CLOSING, 31)
    assert rig.turn(6 * MS) == [e.Drained()]


def test_status(rig):
    producers_slots(rig)
    rig.refused(1, m.Release(99, 0, 1))
    (answer,) = sent(rig.say(2, m.Status(77)), m.Report, 2)
    assert answer.request == 77
    figures = msgspec.json.decode(answer.body, type=PoolReport)
    assert (figures.producers, figures.violations, len(figures.workers), figures.draining) == (2, 1, 1, False)
    assert (figures.models[0].leased, figures.models[0].running, figures.models[0].free) == (2, 4, 6)


def test_a_worker_that_lies_about_times_cannot_break_the_figures(rig):
    huge = 2**63 - 1
    for _ in range(3):
        rig.submit(1)
        run = run_of(rig.turn())
        rig.say(10, m.Finished(run.batch, run.attempt, huge, huge, huge, huge))
    (answer,) = sent(rig.say(1, m.Status(1)), m.Report)
    assert msgspec.json.decode(answer.body, type=PoolReport).models[0].compute_ns == huge


def test_the_core_does_no_input_or_output():
    """No sockets, clock or threads: nothing of the kind is within its reach."""
    banned = {"socket", "zmq", "time", "threading", "select", "os"}
    assert not banned & set(vars(core_module))


# --- Floods --------------------------------------------------------------------------------------


def test_a_flood_of_lease_requests_is_bounded_for_each_client():
    rig = Rig((4, 1, 1))
    rig.join(1, 2)
    rig.lease(1, 3)
    rig.core.leasing.max_waiting = 5
    for number in range(1, 6):
        assert rig.say(2, m.Lease(number, 0, 2, None)) == []
    assert "ask for several slots in one request" in rig.refused(2, m.Lease(6, 0, 2, None), m.BUSY).text
    assert rig.say(1, m.Lease(1, 0, 2, None)) == []  # another's
    rig.turn()
    assert rig.refused(2, m.Lease(6, 0, 2, 0), m.BUSY).request == 6  # who does not wait is answered as ever
    lease_id = next(iter(rig.core.producers[1].leases))
    assert sent(rig.say(1, m.Release(lease_id, 0, 3)) + rig.turn(), m.Grant, 2)
    assert rig.say(2, m.Lease(6, 0, 2, None)) == []  # one was granted, so that one more may wait


def test_requests_that_are_over_are_not_kept_behind_one_that_waits_for_ever():
    rig = Rig((4, 1, 1))
    rig.join(1, 2, 3)
    rig.lease(1, 3)
    assert rig.say(2, m.Lease(1, 0, 3, None)) == []
    rig.turn()
    for number in range(1, 3000):
        rig.core.handle(e.Received(3, m.Lease(number, 0, 1, 1)), rig.now_ns)
        (error,) = sent(rig.turn(1), m.Error, 3)
        assert (error.code, error.request) == (m.BUSY, number)
        assert len(rig.core.models[0].waiting) <= 2
    assert rig.core.producers[3].waiting == 0


def test_reports_in_one_turn_say_what_was_done_between_them() -> None:
    """Those that follow each other are made once; one after a change is made anew."""
    rig = Rig((8, 1, 4))
    rig.join(1)
    lease = rig.lease(1, 2)
    said = rig.say(1, m.Status(1), m.Status(2), m.Release(lease, 0, 2), m.Status(4), m.Status(5))
    reports = sent(said, m.Report)
    assert [report.request for report in reports] == [1, 2, 4, 5]
    free = [msgspec.json.decode(report.body, type=PoolReport).models[0].free for report in reports]
    assert free == [6, 6, 8, 8]
    rig.turn(1_000_000)
    (later,) = sent(rig.say(1, m.Status(6)), m.Report)
    assert msgspec.json.decode(later.body, type=PoolReport).uptime_s > 0


def test_requests_above_their_own_cap_come_back_in_their_order_once_it_allows_for_them():
    rig = Rig((8, 1, 1), cap=4)
    rig.join(1, 2)
    lease, other = rig.lease(1, 4), rig.lease(2, 4)
    for number, count in ((1, 3), (2, 1), (3, 2)):
        assert rig.say(1, m.Lease(number, 0, count, None)) == []
    rig.turn()
    model = rig.core.models[0]
    assert (len(model.waiting), len(model.requests())) == (0, 3), "they are not looked at again each turn"
    rig.say(2, m.Lease(4, 0, 1, None))
    rig.say(1, m.Release(lease, 0, 1))
    assert [one.request for one in sent(rig.turn(), m.Grant)] == [2], "2 before 4, which came later; 1 is passed by"
    rig.say(2, m.Release(other, 0, 1))
    assert [one.request for one in sent(rig.turn(), m.Grant)] == [4]
    rig.say(1, m.Release(lease, 1, 3))
    assert [one.request for one in sent(rig.turn(), m.Grant)] == [1]
    assert rig.figures().waiting == 1
    rig.do(e.ProducerEnded(1))
    assert (rig.figures().waiting, model.parked) == (0, {})


def test_parked_requests_that_are_over_are_not_kept():
    rig = Rig((4, 1, 1), cap=2)
    rig.join(1)
    rig.lease(1, 2)
    assert rig.say(1, m.Lease(2, 0, 1, MS), m.Lease(3, 0, 1, None)) == []
    rig.turn()
    (late,) = sent(rig.turn(2 * MS), m.Error)
    assert (late.code, late.request) == (m.BUSY, 2)
    assert [one.request for many in rig.core.models[0].parked.values() for one in many] == [3]
    (closing,) = sent(rig.do(e.Drain()), m.Error)
    assert (closing.code, closing.request, rig.core.models[0].parked) == (m.CLOSING, 3, {})
