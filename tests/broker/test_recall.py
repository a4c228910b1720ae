"""Idle slots that others wait for: who is reported, who is ended, and who is not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.broker.core_rig import MS, Rig, sent
from tests.broker.test_core import grants, run_of
from trtpool.broker import events as e
from trtpool.broker import recall
from trtpool.ipc import messages as m
from trtpool.ipc.errors import ConfigError
from trtpool.ipc.report import HolderReport
from trtpool.ipc.settings import INTERACTIVE, ModelSource, PoolSettings

S = 1000 * MS
TIMEOUT_S = 10


def make(producers: int = 4, *, evict: bool = True, cap: int = 6, **options: Any) -> Rig:
    """8 slots in batches of 2; the process of producer `n` is 100 + n."""
    rig = Rig((8, 1, 2), evict=evict, cap=cap, recall_timeout_s=TIMEOUT_S, **options)
    rig.join(*range(1, producers + 1))
    return rig


def wait_for(rig: Rig, peer: int, count: int = 1, wait_ns: int | None = None) -> list[e.Action]:
    return rig.say(peer, m.Lease(10 * peer, 0, count, wait_ns)) + rig.turn()


def later(rig: Rig, seconds: float) -> list[e.Action]:
    """Let time pass from timer to timer, as the loop does; returns all that was decided."""
    end_ns = rig.now_ns + int(seconds * S)
    actions = []
    while (due_ns := rig.core.next_timer_ns()) is not None and due_ns <= end_ns:
        rig.now_ns = max(rig.now_ns, due_ns)
        actions += rig.turn()
    rig.now_ns = end_ns
    return actions + rig.turn()


def evicted(actions: list[e.Action]) -> list[int]:
    return [action.peer for action in actions if isinstance(action, e.Evict)]


def recalled(actions: list[e.Action]) -> list[int]:
    return [one.peer for one in actions if isinstance(one, e.Send) and isinstance(one.message, m.Recall)]


def overdue(actions: list[e.Action]) -> list[int]:
    return [action.peer for action in actions if isinstance(action, e.Overdue)]


# --- Reported ------------------------------------------------------------------------------------


def test_one_who_does_not_answer_a_recall_is_reported_once():
    rig = make(evict=False)
    rig.lease(1, 6)
    rig.lease(2, 2)
    assert sent(wait_for(rig, 3, 5), m.Recall)
    assert later(rig, TIMEOUT_S - 0.001) == []
    (first, second) = later(rig, 0.001)
    assert isinstance(first, e.Overdue)
    assert isinstance(second, e.Overdue)
    assert (first.peer, second.peer) == (1, 2), "the one that holds the most first"
    assert first.text == (
        "process 101 holds 6 idle slots of model 'm0' (6 leased, 0 done and not released), did nothing with them for "
        "10.0 s, and others wait for them; release them there, end it, or start the pool with --evict, which does that"
    )
    assert later(rig, 100 * TIMEOUT_S) == [], "once for each recall"
    assert rig.figures().overdue == 2


def test_who_holds_slots_is_asked_once_until_it_is_granted_more():
    rig = make(evict=False)
    lease = rig.lease(1, 5)
    rig.lease(2, 3)
    assert recalled(wait_for(rig, 3, 2)) == [1, 2]
    assert recalled(wait_for(rig, 3, 1)) == []
    rig.say(1, m.Release(lease, 0, 3))
    (first, second) = sent(rig.turn(), m.Grant)
    assert (first.leases[0][1].count, second.leases[0][1].count) == (2, 1)
    assert recalled(wait_for(rig, 2, 1)) == [3], "it alone was granted any since"


def test_one_that_is_granted_slots_while_others_wait_is_asked_at_once():
    """Else it could use them again for ever."""
    rig = make(evict=False)
    rig.lease(1, 5)
    rig.lease(2, 2)
    assert recalled(wait_for(rig, 3, 3)) == [1, 2]
    rig.say(4, m.Lease(40, 0, 1, None, INTERACTIVE))
    actions = rig.turn()
    assert grants(actions) == [(4, 40)]
    assert recalled(actions) == [4]
    assert recalled(rig.turn(MS)) == []


def test_one_who_waits_is_asked_when_another_waits_too():
    rig = make(evict=False)
    lease = rig.lease(1, 6)
    rig.lease(2, 2)
    assert recalled(wait_for(rig, 2, 1)) == [1], "nobody asks itself"
    rig.say(1, m.Release(lease, 0, 1))
    rig.turn()
    assert recalled(wait_for(rig, 3, 1)) == [2]


def test_one_who_answers_and_fails_again_is_reported_again():
    rig = make(evict=False)
    lease = rig.lease(1, 6)
    rig.lease(2, 2)
    wait_for(rig, 3, 6)
    assert overdue(later(rig, TIMEOUT_S)) == [1, 2]
    rig.say(1, m.Release(lease, 0, 1))
    assert overdue(later(rig, TIMEOUT_S)) == [1]
    assert rig.figures().overdue == 3


def test_a_new_recall_is_a_new_report():
    rig = make(evict=False)
    rig.lease(1, 6)
    other = rig.lease(2, 2)
    wait_for(rig, 3)
    assert overdue(later(rig, TIMEOUT_S)) == [1, 2]
    rig.say(2, m.Release(other, 0, 1))
    assert grants(rig.turn()) == [(3, 30)]
    assert later(rig, 5 * TIMEOUT_S) == [], "nobody waits"
    wait_for(rig, 4, 2)
    assert overdue(later(rig, TIMEOUT_S)) == [1, 2, 3]


def test_the_report_and_the_refusal_name_who_holds():
    rig = make(evict=False)
    rig.lease(1, 6)
    rig.lease(2, 1)
    wait_for(rig, 3, 2, wait_ns=12 * S)
    actions = later(rig, 12)
    assert overdue(actions) == [1, 2]
    (error,) = sent(actions, m.Error, 3)
    assert "; process 101 holds 6 idle slots since 12.0 s; release results sooner" in error.text
    wait_for(rig, 3, 2)
    later(rig, TIMEOUT_S)
    report = sent(rig.say(3, m.Status(1)), m.Report)[0].body
    assert b'"overdue":true' in report
    first = recall_report(rig)[0]
    assert first == HolderReport(101, "m0", 6, 0, 0, 0, 22.0, True)


def recall_report(rig: Rig) -> tuple[HolderReport, ...]:
    from trtpool.broker.reporting import report

    return report(rig.core).holders


def test_the_holders_in_a_report_are_few_and_each_state_is_told():
    rig = make(4, cap=6)
    rig.worker()
    done = rig.submit(1)
    rig.finish(10, run_of(rig.turn()))
    rig.submit(1)
    run_of(rig.turn())
    rig.lease(1, 2)
    (held,) = recall_report(rig)
    assert (held.leased, held.queued, held.running, held.done) == (2, 0, 1, 1)
    assert not held.overdue
    rig.say(1, m.Release(done, 0, 1))
    crowd = Rig((64, 1, 2))
    crowd.join(*range(1, 40))
    for peer in range(1, 40):
        crowd.lease(peer, 1 + (peer == 33))
    holders = recall_report(crowd)
    assert len(holders) == 16
    assert holders[0].pid == 133


def test_an_idle_pool_sleeps():
    """A timer runs only while somebody waits for room."""
    rig = make()
    rig.lease(1, 6)
    assert rig.core.next_timer_ns() is None
    wait_for(rig, 2, 3, wait_ns=S)
    later(rig, 3 * TIMEOUT_S)
    assert rig.core.next_timer_ns() is None


def test_without_a_time_nobody_is_looked_for():
    rig = Rig((8, 1, 2), evict=True)
    rig.join(1, 2, 3)
    rig.lease(1, 6)
    wait_for(rig, 2, 3)
    assert rig.core.next_timer_ns() is None
    assert later(rig, 10**6) == []


def test_one_at_its_own_cap_makes_nobody_overdue():
    rig = make()
    rig.lease(1, 6)
    rig.lease(2, 1)
    wait_for(rig, 1, 1)
    assert later(rig, 5 * TIMEOUT_S) == []


# --- Ended ---------------------------------------------------------------------------------------


def test_one_who_holds_idle_slots_is_ended_and_who_waits_gets_them():
    rig = make()
    rig.lease(1, 6)
    rig.lease(2, 2)
    wait_for(rig, 3, 4)
    actions = later(rig, TIMEOUT_S)
    assert evicted(actions) == [1], "the one with the most, and no more than are needed"
    assert rig.figures().evicted == 1
    assert evicted(later(rig, TIMEOUT_S - 1)) == [], "it takes a while to end"
    rig.do(e.ProducerEnded(1))
    assert grants(rig.turn()) == [(3, 30)]
    assert evicted(later(rig, 10 * TIMEOUT_S)) == [], "nobody waits any more"


def test_of_two_idle_ones_one_is_enough():
    rig = make()
    rig.lease(1, 4)
    rig.lease(2, 4)
    wait_for(rig, 3)
    assert evicted(later(rig, TIMEOUT_S)) == [1]


def test_as_many_as_those_who_wait_need():
    rig = make()
    rig.lease(1, 4)
    rig.lease(2, 4)
    wait_for(rig, 3, 3)
    wait_for(rig, 4, 3)
    assert evicted(later(rig, TIMEOUT_S)) == [1, 2]


def test_what_is_about_to_come_free_counts():
    rig = make()
    rig.lease(1, 4)
    rig.lease(2, 4)
    wait_for(rig, 3, 3)
    assert evicted(later(rig, TIMEOUT_S)) == [1]
    rig.do(e.ProducerClosed(1))  # it is being killed, and its process has not ended yet
    assert evicted(later(rig, TIMEOUT_S / 2)) == []


def test_one_that_cannot_be_killed_is_tried_once_and_then_another():
    rig = make()
    rig.lease(1, 5)
    rig.lease(2, 3)
    wait_for(rig, 3)
    assert evicted(later(rig, TIMEOUT_S)) == [1]
    assert evicted(later(rig, TIMEOUT_S)) == [2]
    assert evicted(later(rig, 10 * TIMEOUT_S)) == []


def test_each_thing_that_one_does_begins_a_new_period():
    rig = make()
    lease = rig.lease(1, 6)
    rig.worker()
    wait_for(rig, 3, 6)
    for at in range(2):
        assert evicted(later(rig, TIMEOUT_S - 1)) == []
        rig.say(1, m.Release(lease, at, 1))
        rig.turn()
    for at in range(2, 4):
        assert evicted(later(rig, TIMEOUT_S - 1)) == []
        rig.say(1, m.Submit(lease, at, 1, at, 1))
        run = run_of(rig.turn())
        rig.finish(10, run)
    assert evicted(later(rig, TIMEOUT_S - 1)) == []
    assert evicted(later(rig, 3)) == [1]


def test_one_that_waits_for_the_pool_is_not_idle():
    """Its results are not all there: it cannot be expected to have read the first."""
    rig = make()
    rig.worker()
    lease = rig.lease(1, 6)
    rig.say(1, m.Submit(lease, 0, 1, 0, 1))
    run = run_of(rig.turn())
    wait_for(rig, 3, 6)
    assert later(rig, 3 * TIMEOUT_S) == []
    rig.finish(10, run)
    assert later(rig, TIMEOUT_S - 1) == []
    assert evicted(later(rig, 3)) == [1]


def test_one_that_was_just_granted_is_not_ended():
    rig = make()
    rig.lease(1, 6)
    wait_for(rig, 3, 3)
    later(rig, TIMEOUT_S - 1)
    rig.do(e.ProducerEnded(1))
    assert grants(rig.turn()) == [(3, 30)]
    wait_for(rig, 4, 6)
    assert evicted(later(rig, TIMEOUT_S - 1)) == []
    assert evicted(later(rig, 1)) == [3]


def test_slots_granted_in_advance_are_nobodys_fault():
    """Nor are as many others: the client may not have said yet that it released them."""
    rig = Rig((16, 1, 4), recall_timeout_s=TIMEOUT_S, evict=True, cap=12)
    rig.join(1, 2, 3)
    rig.worker()
    lease = rig.lease(1)
    rig.say(1, m.Submit(lease, 0, 1, 0, 1, None, 1))
    assert sent(rig.finish(10, run_of(rig.turn())), m.Grant, 1), "a spare"
    assert rig.states() == (14, 1, 0, 0, 1)
    rig.lease(2, 12)
    wait_for(rig, 3, 4)
    actions = later(rig, 2 * TIMEOUT_S)
    assert (overdue(actions), evicted(actions)) == ([2], [2])


def test_all_clients_of_a_process_are_taken_together():
    rig = make(0)
    for peer, pid in ((1, 500), (2, 500), (3, 600), (4, 700)):
        rig.do(e.ProducerJoined(peer, pid))
    rig.lease(1, 5)
    mine = rig.lease(2, 2)
    wait_for(rig, 4, 4)
    for at in range(2):
        assert later(rig, TIMEOUT_S - 1) == []
        rig.say(2, m.Release(mine, at, 1))
    assert evicted(later(rig, TIMEOUT_S - 1)) == []
    assert evicted(later(rig, 2)) == [1]


def test_the_process_that_embeds_the_pool_is_reported_and_never_ended():
    rig = make(owner_pid=101)
    rig.lease(1, 6)
    rig.lease(2, 2)
    wait_for(rig, 3, 4)
    actions = later(rig, TIMEOUT_S)
    assert overdue(actions) == [1, 2]
    assert evicted(actions) == [2]
    texts = [action.text for action in actions if isinstance(action, e.Overdue)]
    assert "is never evicted: release slots there" in texts[0]
    assert evicted(later(rig, 10 * TIMEOUT_S)) == []


def test_two_that_each_hold_what_the_other_waits_for():
    rig = make()
    rig.lease(1, 4)
    rig.lease(2, 4)
    wait_for(rig, 1, 2)
    wait_for(rig, 2, 2)
    assert evicted(later(rig, TIMEOUT_S)) == [2], "the end of the one who is next would serve nobody"
    rig.do(e.ProducerEnded(2))
    assert grants(rig.turn()) == [(1, 10)]


def test_one_whose_lifeline_ended_and_who_lives_on_is_ended():
    rig = make()
    rig.lease(1, 6)
    rig.do(e.ProducerClosed(1))
    wait_for(rig, 3, 4)
    assert evicted(later(rig, TIMEOUT_S)) == [1]


def test_a_broker_that_stood_still_blames_nobody():
    rig = make()
    rig.lease(1, 6)
    wait_for(rig, 3, 4)
    assert rig.turn(3600 * S) == []
    assert evicted(later(rig, TIMEOUT_S - 1)) == []
    assert evicted(later(rig, 1)) == [1]


def test_after_a_take_over_the_periods_begin_anew():
    rig = make()
    rig.lease(1, 6)
    wait_for(rig, 3, 4)
    later(rig, TIMEOUT_S - 1)
    rig.core.excuse_peers(rig.now_ns)
    assert evicted(later(rig, TIMEOUT_S - 1)) == []
    assert evicted(later(rig, 1)) == [1]


@pytest.mark.parametrize("clients", [1, 100])
def test_looking_is_no_burden(clients):
    """However many clients become due, each at a time of its own, a period has few looks."""
    rig = Rig((clients + 4, 1, 2), recall_timeout_s=TIMEOUT_S, cap=4)
    rig.join(*range(1, clients + 2))
    for peer in range(1, clients + 1):
        rig.lease(peer, 1)
        rig.now_ns += 50 * MS
    rig.lease(clients + 1, 2)
    rig.say(1, m.Lease(9, 0, 3, None))
    rig.turn()
    looks = 0
    end_ns = rig.now_ns + TIMEOUT_S * S
    for peer in range(2, clients + 1):  # each shows at a time of its own that it lives
        rig.now_ns += MS
        rig.core.producers[peer].active_ns[0] = rig.now_ns
    while (due_ns := rig.core.next_timer_ns()) is not None and due_ns <= end_ns + TIMEOUT_S * S:
        rig.now_ns = due_ns
        rig.turn()
        looks += 1
    assert 2 <= looks <= 18


def test_holders_that_are_not_known_by_pid_are_each_their_own():
    rig = make(0)
    rig.do(e.ProducerJoined(1))
    rig.do(e.ProducerJoined(2))
    rig.lease(1, 4)
    rig.lease(2, 2)
    assert [one.idle for one in recall.holders(rig.core.producers.values(), rig.core.models[0])] == [4, 2]


def test_evicting_needs_a_time():
    model = (ModelSource("/m.onnx", "m"),)
    with pytest.raises(ConfigError, match="--evict with --recall-timeout-s 0 would never evict"):
        PoolSettings(models=model, run_dir="/run", evict=True, recall_timeout_s=0)
    PoolSettings(models=model, run_dir="/run", recall_timeout_s=0)
