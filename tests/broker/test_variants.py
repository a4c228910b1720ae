"""Items of several shapes, and inputs that a batch shares: what goes together, and who goes first."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.broker.core_rig import MS, Rig, sent, variant
from trtpool.broker.batching import Variant, Work
from trtpool.broker.books import Refused
from trtpool.broker.journal import SLOT_BYTES, journal_bytes, slot_bytes
from trtpool.broker.records import LeaseRecord, Model, Producer
from trtpool.broker.shapes import variant_of
from trtpool.broker.variants import VariantQueue
from trtpool.ipc import messages as m
from trtpool.ipc.layout import Layout, ModelPlan, plan
from trtpool.ipc.settings import INTERACTIVE
from trtpool.ipc.tensors import ModelSpec, Span, TensorSpec

SMALL, LARGE, OTHER = variant(1), variant(9), variant(9, shared=1)


@pytest.fixture
def rig() -> Rig:
    rig = Rig((32, 1, 4), varies=True)
    rig.join(1, 2)
    return rig


def runs(rig: Rig, worker: int = 10) -> list[m.Run]:
    """What a worker is sent, one batch after the other, until there is no more."""
    got = []
    waiting = sent(rig.turn(), m.Run, worker)
    while waiting:
        got += waiting
        waiting = [run for one in waiting for run in sent(rig.finish(worker, one) + rig.turn(), m.Run, worker)]
    return got


def test_items_of_one_variant_share_a_batch_and_others_do_not(rig):
    for one in (SMALL, LARGE, SMALL, OTHER, LARGE):
        rig.submit(1, variant=one)
    rig.worker()
    assert [(run.shapes, sum(rows.items for rows in run.rows)) for run in runs(rig)] == [
        (SMALL[0], 2),
        (LARGE[0], 2),
        (OTHER[0], 1),
    ]


def test_the_oldest_goes_first_however_many_of_another_shape_there_are(rig):
    rig.submit(1, variant=SMALL)
    rig.now_ns += 1
    for _ in range(3):
        rig.submit(2, 4, variant=LARGE)
    rig.worker()
    assert [run.shapes for run in runs(rig)] == [SMALL[0], *3 * [LARGE[0]]]


def test_nobody_waits_for_more_than_what_came_before(rig):
    """One shape keeps coming, and each batch of it would be full; the other goes in its turn all the same."""
    rig.submit(1, 4, variant=LARGE)
    rig.submit(1, 4, variant=LARGE)
    rig.submit(2, variant=SMALL)
    rig.now_ns += 1
    rig.worker()
    order = []
    waiting = sent(rig.turn(), m.Run)
    for _ in range(4):
        run, *waiting = waiting
        order.append(run.shapes)
        rig.now_ns += 1
        rig.submit(1, 4, variant=LARGE)
        waiting += sent(rig.finish(10, run) + rig.turn(), m.Run)
    assert order == [LARGE[0], LARGE[0], SMALL[0], LARGE[0]]


def test_a_full_batch_of_another_shape_goes_while_the_oldest_waits_for_its_own_to_fill():
    rig = Rig((32, 1, 4), varies=True, max_delay_us=2000)
    rig.join(1)
    rig.worker()
    rig.submit(1, variant=SMALL)
    rig.now_ns += 1
    rig.submit(1, 4, variant=LARGE)
    (run,) = sent(rig.turn(), m.Run)
    assert run.shapes == LARGE[0]
    rig.finish(10, run)
    assert sent(rig.turn(), m.Run) == []
    due_ns = rig.core.next_timer_ns()
    assert due_ns is not None
    (run,) = sent(rig.turn(due_ns - rig.now_ns), m.Run)
    assert run.shapes == SMALL[0]


def test_the_oldest_that_has_waited_long_enough_goes_before_a_full_batch():
    rig = Rig((32, 1, 4), varies=True, max_delay_us=2000)
    rig.join(1)
    rig.submit(1, variant=SMALL)
    rig.now_ns += 1
    rig.submit(1, 4, variant=LARGE)
    rig.turn()
    rig.now_ns += 3 * MS
    rig.worker()
    assert [run.shapes for run in runs(rig)] == [SMALL[0], LARGE[0]]


def test_interactive_work_is_filled_up_with_bulk_of_its_own_variant(rig):
    rig.submit(1, variant=SMALL)
    rig.submit(1, 2, variant=LARGE)
    rig.submit(2, variant=LARGE, priority=INTERACTIVE)
    rig.worker()
    assert [(run.shapes, sum(rows.items for rows in run.rows)) for run in runs(rig)] == [(LARGE[0], 3), (SMALL[0], 1)]


def test_a_result_has_the_shapes_that_the_worker_tells(rig):
    rig.worker()
    lease = rig.submit(1, variant=SMALL)
    (run,) = sent(rig.turn(), m.Run)
    (done,) = sent(rig.say(10, m.Finished(run.batch, 0, 1, 2, 3, 0, 1, shapes=((7,),))), m.Done)
    assert (done.lease, done.status, done.shapes) == (lease, m.OK, ((7,),))


def test_what_failed_is_run_again_with_its_shapes(rig):
    rig.worker()
    rig.submit(1, 2, variant=SMALL)
    (run,) = sent(rig.turn(), m.Run)
    rig.say(10, m.Failed(run.batch, 0, "no"))
    again = runs(rig)
    assert [(one.attempt, one.shapes) for one in again] == [(1, SMALL[0]), (1, SMALL[0])]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (((), bytes(16)), "0 shapes for 1 inputs whose shape varies"),
        (variant(0), r"input 'x' takes items of (2, 1 to 9), not (2, 0)"),
        (variant(10), r"input 'x' takes items of (2, 1 to 9), not (2, 10)"),
        ((((9,),), bytes(16)), "not (9,)"),
        ((SMALL[0], b""), "a digest of 0 bytes where it has 16"),
    ],
)
def test_a_submission_that_the_model_does_not_take_is_refused(rig, given, text):
    lease = rig.lease(1)
    assert text in rig.refused(1, m.Submit(lease, 0, 1, 0, 1, None, 0, None, 0, *given)).text


def test_a_model_of_one_shape_takes_no_others():
    rig = Rig()
    rig.join(1)
    lease = rig.lease(1)
    text = rig.refused(1, m.Submit(lease, 0, 1, 0, 1, None, 0, None, 0, ((2,),))).text
    assert text == "1 shapes for 0 inputs whose shape varies"


@pytest.mark.parametrize("shapes", [(), ((10,),), ((2,), (2,)), ((2, 2),)])
def test_a_worker_that_tells_impossible_shapes_is_refused(rig, shapes):
    rig.worker()
    rig.submit(1, variant=SMALL)
    (run,) = sent(rig.turn(), m.Run)
    assert "are not what the rows hold" in rig.refused(10, m.Finished(run.batch, 0, 1, 2, 3, 0, 1, shapes=shapes)).text
    assert sent(rig.finish(10, run), m.Done)


def test_the_table_has_room_for_shapes(rig):
    layout, plain = rig.core.models[0].layout, Rig((32, 1, 4)).core.models[0].layout
    assert slot_bytes(layout.spec) > SLOT_BYTES == slot_bytes(plain.spec)
    assert journal_bytes(Layout((layout,), 4096)) > journal_bytes(Layout((plain,), 4096))


@given(
    st.lists(st.tuples(st.sampled_from([SMALL, LARGE, OTHER]), st.integers(1, 3)), min_size=1, max_size=20),
    st.integers(1, 5),
)
def test_a_queue_gives_all_in_order_of_age_of_its_variants(works: list[tuple[Variant, int]], most: int) -> None:
    """Whatever is queued: each batch is of the oldest work's variant, has that work, and is as full as it can be."""
    model = Model(0, Rig((64, 1, 4), varies=True).core.models[0].layout, 64)
    producer = Producer(1, 1)
    queue = VariantQueue(1)
    firsts = itertools.accumulate((count for _, count in works), initial=0)
    for age, ((one, count), first) in enumerate(zip(works, firsts, strict=False)):
        lease = LeaseRecord(age + 1, producer, model, first, count)
        queue.add(Work(lease, 0, count, count, 0, age, 0, 0, variant=one))
    left = [(age, one) for age, (one, count) in enumerate(works) for _ in range(count)]
    while left:
        assert (queue.items, queue.slots) == (len(left), len(left))
        assert queue.oldest.queued_ns == left[0][0]
        assert sorted({work.queued_ns for work in queue}) == sorted({age for age, _ in left})
        oldest, kind = left[0]
        like = sum(one == kind for _, one in left)
        batch = queue.take(most)
        assert {work.variant for work in batch} == {kind}
        assert sum(work.count for work in batch) == min(like, most)
        assert oldest in {work.queued_ns for work in batch}
        for work in batch:
            for _ in range(work.count):
                left.remove((work.queued_ns, kind))
    assert not len(queue)


def test_shapes_that_no_profile_takes_are_refused():
    x, y = TensorSpec("x", "float32", (32,), (1,)), TensorSpec("y", "float32", ())
    profiles = ((Span((1,), (8,)),), (Span((16,), (32,)),))
    (layout,) = plan([ModelPlan(ModelSpec("m", "/m.plan", (x,), (y,), profiles=profiles), 4, 1, 4)]).models
    submit = m.Submit(1, 0, 1, 0, 1, None, 0, None, 0, ((8,),))
    assert variant_of(layout, submit) == (((8,),), b"")
    with pytest.raises(Refused, match=r"items of x \(1 to 8\) or x \(16 to 32\) are taken, not \(\(9,\),\)"):
        variant_of(layout, msgspec.structs.replace(submit, shapes=((9,),)))
