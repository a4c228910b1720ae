"""Requests that took long are told of, with their story."""

from __future__ import annotations

from tests.broker.core_rig import MS, Rig, sent
from trtpool.broker import events as e
from trtpool.ipc import messages as m


def run_one(rig: Rig, count: int, queued_ns: int, ran_ns: int) -> list[e.Action]:
    """A request that waited and ran for so long; what the core says of it but for messages."""
    lease = rig.submit(1, count)
    (run,) = sent(rig.turn(queued_ns), m.Run)
    rig.now_ns += ran_ns
    actions = rig.finish(10, run, compute_ns=2 * MS)
    rig.say(1, m.Release(lease, 0, count))
    return [action for action in actions if not isinstance(action, e.Send)]


def a_rig(slow_ms: float) -> Rig:
    rig = Rig(slow_ms=slow_ms)
    rig.join(1)
    rig.worker()
    return rig


def test_a_slow_request_is_told_of_with_its_story():
    rig = a_rig(10)
    assert run_one(rig, 1, 6 * MS, 3 * MS) == []
    assert run_one(rig, 3, 6 * MS, 5 * MS) == [
        e.Slow(
            1,
            "slow: process 101 waited 11.000 ms for work 2.0, 3 items of m0: queue 6.000, dispatch 3.000, "
            "copy in 0.000, compute 2.000, copy out 0.000 ms; in batch 2 of 3 items in 1 runs, attempt 1, "
            "worker process 1010",
        )
    ]


def test_one_line_a_second_says_how_many_others_there_were():
    rig = a_rig(10)
    assert len(run_one(rig, 1, 20 * MS, 0)) == 1
    assert run_one(rig, 1, 20 * MS, 0) == run_one(rig, 1, 20 * MS, 0) == []
    (told,) = run_one(rig, 1, 1000 * MS, 0)
    assert isinstance(told, e.Slow)
    assert told.text.endswith("; 2 more were slow since the last that was told of")


def test_without_a_limit_nothing_is_slow():
    assert run_one(a_rig(0), 1, 10**15, 0) == []
