"""What a core that is followed says, and that it decides what any other does."""

from __future__ import annotations

import logging

import pytest

from tests.broker.core_rig import layouts
from trtpool.broker import events as e
from trtpool.broker.core import Core
from trtpool.broker.trail import FollowedCore
from trtpool.ipc import messages as m

PRODUCER, WORKER = 1, 10


def story(core: Core) -> list[e.Action]:
    """Two submits of one lease that go to a worker as one batch, which fails, and is run again in halves."""
    now = iter(range(1, 1000))
    actions: list[e.Action] = []

    def tell(*events: e.Event) -> None:
        for event in [*events, e.TurnEnded()]:
            actions.extend(core.handle(event, next(now)))

    tell(e.ProducerJoined(PRODUCER), e.WorkerJoined(WORKER, 99), e.Received(WORKER, m.Ready("cpu", 1)))
    tell(e.Received(PRODUCER, m.Lease(1, 0, 2, None)))
    submits = [e.Received(PRODUCER, m.Submit(1, at, 1, seq, 1)) for at, seq in ((0, 5), (1, 6))]
    tell(*submits)
    tell(e.Received(WORKER, m.Failed(1, 0, "no")))
    tell(e.Received(WORKER, m.Finished(2, 1, 1_000_000, 2_000_000, 0, 0)))
    tell(e.Received(WORKER, m.Finished(3, 1, 0, 0, 0, 0)))
    tell(e.Received(PRODUCER, m.Release(77, 0, 1)))
    return actions


@pytest.fixture
def lines(caplog):
    """Messages and fields of what was said, as far as these name works and batches."""

    def read():
        return [
            (
                record.getMessage(),
                {name: vars(record)[name] for name in ("work", "works", "batch") if hasattr(record, name)},
            )
            for record in caplog.records
        ]

    caplog.set_level(logging.DEBUG, "trtpool.broker")
    return read


def test_every_step_of_a_work_is_said_with_its_id(lines):
    story(FollowedCore(layouts((16, 1, 4))))
    assert lines() == [
        ("work 1.5 of peer 1 queued: 1 items in 1 slots", {"work": "1.5"}),
        ("work 1.6 of peer 1 queued: 1 items in 1 slots", {"work": "1.6"}),
        ("batch 1, attempt 0, sent to peer 10: work 1.5, 1.6", {"works": ["1.5", "1.6"], "batch": 1}),
        ("batch 1, attempt 0, failed: no", {"batch": 1}),
        ("batch 2, attempt 1, sent to peer 10: work 1.5", {"works": ["1.5"], "batch": 2}),
        ("batch 2, attempt 1, ended after 3.000 ms", {"batch": 2}),
        ("work 1.5 ended: done", {"work": "1.5"}),
        ("batch 3, attempt 1, sent to peer 10: work 1.6", {"works": ["1.6"], "batch": 3}),
        ("batch 3, attempt 1, ended after 0.000 ms", {"batch": 3}),
        ("work 1.6 ended: done", {"work": "1.6"}),
        ("peer 1 was refused something: lease 77 is not yours, or was released", {}),
    ]


def test_it_decides_what_any_other_core_does(lines):
    plain, followed = story(Core(layouts((16, 1, 4)))), story(FollowedCore(layouts((16, 1, 4))))
    runs = [action.message for action in followed if isinstance(action, e.Send) and isinstance(action.message, m.Run)]
    assert [run.works for run in runs] == [["1.5", "1.6"], ["1.5"], ["1.6"]]
    unnamed = [
        action._replace(message=m.Run(one.batch, one.attempt, one.model, one.rows))
        if isinstance(action, e.Send) and isinstance(one := action.message, m.Run)
        else action
        for action in followed
    ]
    assert unnamed == plain


def test_while_it_takes_over_it_says_nothing(lines):
    core = FollowedCore(layouts((16, 1, 4)))
    core.silent = True
    assert len(story(core)) > 5
    assert lines() == []


def test_a_run_names_no_more_than_a_frame_has_room_for():
    core = FollowedCore(layouts((2048, 1, 1024)))
    for event in (e.ProducerJoined(PRODUCER), e.WorkerJoined(WORKER, 9), e.Received(WORKER, m.Ready("cpu", 1))):
        core.tell(event, 1)
    core.receive(PRODUCER, [m.Lease(1, 0, 1000, None)], 2)
    core.end_turn(2)
    core.receive(PRODUCER, [m.Submit(1, at, 1, at, 1) for at in range(1000)], 3)
    core.end_turn(4)
    _, run = core.take()[0][WORKER]
    assert isinstance(run, m.Run)
    assert (len(run.works), run.works[0]) == (m.MAX_NAMED, "1.0")
    assert m.decode_from_broker(m.encode([run])) == [run]
