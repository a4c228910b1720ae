"""How a worker joins: what it is given over the lifeline, and what it checks before it uses it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from itertools import pairwise

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given

from tests.conftest import memory_held
from trtpool.ipc import messages as m
from trtpool.ipc.arena import create_segment, map_segment
from trtpool.ipc.errors import PoolNotFound, ProtocolError
from trtpool.ipc.layout import Layout, ModelPlan, plan
from trtpool.ipc.lifeline import Description, send_packet
from trtpool.ipc.settings import PROTOCOL_VERSION, WorkerConfig
from trtpool.ipc.tensors import ModelSpec, TensorSpec
from trtpool.workers.engine import EngineError, Times
from trtpool.workers.joining import Inbox, Job, cut, join

X, Y = TensorSpec("x", "float32", (3,)), TensorSpec("y", "int16", ())
SPEC = ModelSpec("a", "/a.onnx", (X,), (Y,))
LAYOUT = plan([ModelPlan(SPEC, 8, 2, 6), ModelPlan(msgspec.structs.replace(SPEC, name="b"), 4, 1, 4)])


@pytest.fixture
def ends():
    """The broker's end of a lifeline, and the descriptor of the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ours, theirs.detach()
    ours.close()


@pytest.fixture
def arena():
    fd = create_segment(LAYOUT.segment_bytes)
    yield fd
    os.close(fd)


def describe(ours: socket.socket, arena: int, layout: Layout = LAYOUT) -> None:
    send_packet(ours, Description(PROTOCOL_VERSION, 1, "pool", "", b"", layout), [arena])


@pytest.fixture
def joined(ends, arena):
    ours, fd = ends
    describe(ours, arena)
    made = join(WorkerConfig(os.getpid(), fd, (), 1))
    yield made
    made.leave()


def test_a_worker_gets_the_arena_and_a_way_to_the_broker(joined, ends, arena):
    ours, _ = ends
    assert joined.models == LAYOUT.models
    assert os.fstat(joined.arena_fd).st_ino == os.fstat(arena).st_ino
    assert not os.get_inheritable(joined.arena_fd)
    joined.pipe.send([m.Ready("device", 3, 1)])
    assert m.decode_to_broker(ours.recv(4096)) == [m.Ready("device", 3, 1)]
    ours.send(m.encode([m.Bye("later")]))
    assert joined.pipe.receive() == [m.Bye("later")]


def test_planes_lie_in_the_arena(joined, arena):
    inputs, outputs = joined.planes(0, SPEC)
    assert {name: (plane.shape, plane.dtype) for name, plane in {**inputs, **outputs}.items()} == {
        "x": ((8, 2, 3), np.float32),
        "y": ((8, 2), np.int16),
    }
    seen = np.frombuffer(map_segment(arena, LAYOUT.segment_bytes), np.uint8)
    for plane, offset in ((inputs["x"], LAYOUT.models[0].inputs[0].offset), (outputs["y"], 4096)):
        plane[0].view(np.uint8)[...] = 0xA7
        assert (seen[offset : offset + plane[0].nbytes] == 0xA7).all()
    second, _ = joined.planes(1, msgspec.structs.replace(SPEC, name="b"))
    assert second["x"].shape == (4, 1, 3)


@pytest.mark.parametrize("changed", [{"name": "c"}, {"inputs": (Y,)}, {"outputs": (X,)}, {"batch_limit": 4}], ids=str)
def test_a_model_that_changed_meanwhile_is_refused(changed, joined):
    with pytest.raises(ProtocolError, match=r"/a.onnx changed after the pool had looked at it: "):
        joined.planes(0, msgspec.structs.replace(SPEC, **changed))


class Post:
    """An inbox, and what is sent to it; `take` is `receive` or `poll`."""

    def __init__(self, ours: socket.socket, inbox: Inbox, take: str) -> None:
        self.ours, self.inbox = ours, inbox
        self.take: Callable[[], list[m.Run]] = getattr(inbox, take)

    def send(self, *messages: m.FromBroker) -> list[m.Run]:
        self.ours.send(m.encode(list(messages)))
        return self.take()


@pytest.fixture(params=["receive", "poll"])
def post(joined, ends, request):
    return Post(ends[0], Inbox(joined), request.param)


RUN = m.Run(5, 0, 0, [m.Rows(0, 6, 2, 3), m.Rows(0, 0, 1, 1)])


def test_batches_come_by_the_frame(post):
    assert post.send(RUN) == [RUN]
    assert post.send(RUN, m.Run(6, 1, 1, [m.Rows(0, 3, 1, 1)])) == [RUN, m.Run(6, 1, 1, [m.Rows(0, 3, 1, 1)])]
    assert not post.inbox.over


def test_an_empty_inbox_can_be_polled(joined, ends):
    inbox = Inbox(joined)
    assert inbox.poll() == []
    assert not inbox.over
    ends[0].send(m.encode([RUN]))
    assert inbox.poll() == [RUN]
    assert inbox.poll() == []


@pytest.mark.parametrize("rows", [m.Rows(0, 7, 2, 3), m.Rows(0, 8, 1, 1), m.Rows(1, 0, 1, 1)], ids=str)
def test_rows_outside_of_the_planes_are_refused(rows, post):
    with pytest.raises(ProtocolError, match="batch 5 names slots"):
        post.send(m.Run(5, 0, 0, [m.Rows(0, 0, 1, 1), rows]))
    assert post.inbox.over


def test_the_slots_of_each_model_count(post):
    rows = [m.Rows(0, 4, 1, 1)]
    assert post.send(m.Run(1, 0, 0, rows))
    with pytest.raises(ProtocolError, match=r"slots 4\+1 of 4"):
        post.send(m.Run(1, 0, 1, rows))


def test_a_model_that_is_not_there_is_refused(post):
    with pytest.raises(ProtocolError, match="batch 1 is for model 2 of 2"):
        post.send(m.Run(1, 0, 2, [m.Rows(0, 0, 1, 1)]))


def test_after_bye_nothing_comes(post):
    assert post.send(RUN, m.Bye("later"), RUN) == [RUN]
    assert post.inbox.over


def test_at_the_brokers_end_nothing_comes(post):
    post.ours.send(m.encode([RUN]))
    post.ours.close()
    assert (post.take(), post.inbox.over) == ([RUN], False)
    assert (post.take(), post.inbox.over) == ([], True)


def test_what_is_not_understood_is_the_last(post):
    post.ours.send(b"?")
    with pytest.raises(ProtocolError, match="1 bytes that are no messages"):
        post.take()
    assert post.inbox.over


def test_frames_that_were_heard_before_are_skipped(post):
    """The broker died after it had sent them, and the next sends them again."""
    assert post.send(RUN) == [RUN]
    post.ours.send(m.encode([m.Resume(2, 0)]))
    post.ours.send(m.encode([RUN]))
    assert post.send(m.Run(6, 0, 0, RUN.rows)) == [m.Run(6, 0, 0, RUN.rows)]


def test_a_pool_that_ended_meanwhile_is_no_pool(ends):
    ours, fd = ends
    ours.close()
    with pytest.raises(PoolNotFound, match="start it again"):
        join(WorkerConfig(os.getpid(), fd, (), 1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_an_arena_of_another_size_is_refused(ends):
    ours, fd = ends
    small = create_segment(4096)
    describe(ours, small)
    os.close(small)
    memfds = memory_held()["memfd"]
    with pytest.raises(ProtocolError, match="4096 bytes, expected"):
        join(WorkerConfig(os.getpid(), fd, (), 1))
    assert memory_held()["memfd"] == memfds


RUNS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=8
)  # slots of each run, and how many items its last slot lacks


@given(runs=RUNS, items_per_slot=st.integers(1, 5), batch_slots=st.integers(1, 12), more=st.integers(0, 4))
def test_a_run_is_cut_into_batches_that_are_no_larger_than_they_may_be(runs, items_per_slot, batch_slots, more):
    max_batch = batch_slots * items_per_slot + more % items_per_slot
    rows, first = [], 0
    for count, lacking in runs:
        rows.append(m.Rows(3, first, count, count * items_per_slot - lacking % items_per_slot))
        first += count + 1
    batches = cut(rows, max_batch, items_per_slot)
    slots = []
    for batch in batches:
        assert 0 < sum(part.items for part in batch) <= max_batch
        for part in batch:
            assert part.segment == 3
            assert (part.count - 1) * items_per_slot < part.items <= part.count * items_per_slot
            left = part.items
            for slot in range(part.first, part.first + part.count):
                slots.append((slot, min(left, items_per_slot)))
                left -= items_per_slot
    expected = []
    for run in rows:
        full = [(slot, items_per_slot) for slot in range(run.first, run.first + run.count - 1)]
        expected += [*full, (run.first + run.count - 1, run.items - len(full) * items_per_slot)]
    assert slots == expected
    for before, after in pairwise(batches):  # nothing that had room was left for the next
        held = sum(part.items for part in before)
        assert held + min(after[0].items, items_per_slot) > max_batch


def test_a_batch_that_fits_is_not_touched():
    rows = [m.Rows(0, 6, 2, 3), m.Rows(0, 0, 1, 1)]
    (batch,) = cut(rows, 4, 2)
    assert batch is rows


def test_a_job_is_finished_with_its_last_batch():
    job = Job(m.Run(9, 2, 0, [m.Rows(0, 0, 7, 13)]), LAYOUT.models[0])
    assert [[(part.first, part.count, part.items) for part in batch] for batch in job.batches] == [
        [(0, 3, 6)], [(3, 3, 6)], [(6, 1, 1)]
    ]  # fmt: skip
    assert job.finish(Times(1, 20, 300, 4, (), 3)) is None
    assert job.finish(Times(2, 30, 400, 5)) is None
    before_ns = time.monotonic_ns()
    finished = job.finish(Times(3, 40, 500, 6, (), 8))
    assert isinstance(finished, m.Finished)
    assert before_ns <= finished.ended_ns <= time.monotonic_ns()
    assert msgspec.structs.replace(finished, ended_ns=0) == m.Finished(*(9, 2, 6, 90, 1200, 15, 3), filled_items=11)


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_a_job_of_which_a_batch_is_refused_fails_when_none_of_it_runs_any_more(refused):
    job = Job(m.Run(9, 2, 0, [m.Rows(0, 0, 7, 13)]), LAYOUT.models[0])
    told = [
        job.fail(EngineError("too large")) if number == refused else job.finish(Times(1, 2, 3)) for number in range(3)
    ]
    assert told == [None, None, m.Failed(9, 2, "too large")]
