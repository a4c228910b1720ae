"""What a trace says of what a core did: by a clock that only the tests move, so that each slice is known."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.broker.core_rig import MS, Rig
from tests.trace_check import Checked, check
from trtpool.broker import control as c
from trtpool.broker import events as e
from trtpool.broker.journal import Journal
from trtpool.broker.ledger import Ledger
from trtpool.broker.tracing.chrome import NAMELESS_PID, Trace, write
from trtpool.broker.tracing.records import MIN_BYTES, Joined, Opening, Writer, create, read
from trtpool.broker.tracing.story import Execution, Slice, Story
from trtpool.broker.tracing.tap import Tap
from trtpool.broker.tracing.telling import tell
from trtpool.broker.tracing.tracer import Tracer
from trtpool.broker.tracing.tracks import lanes_of, rows_of
from trtpool.ipc import messages as m
from trtpool.ipc.errors import ProtocolError


class TracedRig(Rig):
    """A core behind a tap from `trace` on.  Producers are peers 1 to 9, workers those from 10."""

    def __init__(self, *sizes: tuple[int, int, int], gpus: int = 0) -> None:
        super().__init__(*sizes, gpus=gpus)
        self.tap: Tap | None = None
        self.fd = -1
        self.opened = 0

    def trace(self, size: int = 4 * MIN_BYTES) -> None:
        self.fd = create(size)
        self.writer = Writer(os.dup(self.fd))
        self.tap = Tap(self.core, self.writer, self._open)
        self.turn()
        assert self.opened == 1

    def _open(self) -> None:
        self.opened += 1

    def do(self, event: e.Event) -> list[e.Action]:
        """As in a broker's turn of this one event."""
        if self.tap is None:
            return super().do(event)
        if isinstance(event, e.Received):
            self.tap.receive(event.peer, [event.message], self.now_ns)
        elif isinstance(event, e.TurnEnded):
            self.core.end_turn(self.now_ns)
        else:
            self.tap.tell(event, self.now_ns)
        mail, actions = self.tap.take()
        return [e.Send(peer, message) for peer, messages in mail.items() for message in messages] + actions

    def stop(self) -> Story:
        self.writer.close(self.now_ns)
        try:
            written = read(self.fd)
            self.dropped = written.dropped
            return tell(written.records, written.closed_ns)
        finally:
            os.close(self.fd)
            self.fd = -1

    def written(self, folder: Path, ended: str = "") -> Checked:
        """The trace's file, which is sound."""
        story = self.stop()
        trace: Trace = write(story, folder / "trace.json", self.dropped, ended)
        checked = check(trace.path)
        assert trace.events == len(checked.events)
        return checked


@pytest.fixture
def rig() -> Iterator[TracedRig]:
    rig = TracedRig()
    yield rig
    if rig.fd >= 0:
        os.close(rig.fd)


def spans(slices: list[Slice]) -> list[tuple[str, str, float, float]]:
    """Kind, name, and begin and end in milliseconds."""
    return [(one.kind, one.name, one.start_ns / MS, one.end_ns / MS) for one in slices]


def grant(rig: TracedRig, peer: int, count: int = 1, request: int = 1) -> int:
    """A lease of so many slots, granted at the end of a turn."""
    rig.say(peer, m.Lease(request, 0, count, None))
    rig.turn()
    return max(rig.core.producers[peer].leases)


def finish(rig: TracedRig, worker: int, took_ms: tuple[int, int, int] = (1, 5, 2)) -> None:
    """The oldest batch of a worker ends now."""
    copy_in, compute, copy_out = took_ms
    batch = next(iter(rig.core.workers[worker].batches.values()))
    rig.say(worker, m.Finished(batch.id, batch.attempt, copy_in * MS, compute * MS, copy_out * MS, 0, 1, rig.now_ns))
    rig.turn()


def test_the_life_of_a_submission(rig: TracedRig, tmp_path: Path) -> None:
    rig.join(1)
    rig.worker(gpu=None)
    rig.trace()  # at 1 ms
    rig.say(1, m.Lease(1, 0, 2, None))
    rig.turn(3 * MS)
    (lease,) = rig.core.producers[1].leases
    rig.now_ns += 6 * MS
    rig.say(1, m.Submit(lease, 0, 2, 1, 2))
    rig.turn(10 * MS)
    rig.now_ns += 20 * MS
    finish(rig, 10)
    rig.now_ns += 5 * MS
    rig.say(1, m.Release(lease, 0, 2))
    rig.turn()
    rig.now_ns += 5 * MS
    story = rig.stop()
    assert spans(story.slices) == [
        ("lease", "lease of 2", 1, 4), ("fill", f"fill {lease}.1", 4, 10), ("read", f"read {lease}.1", 40, 45)
    ]  # fmt: skip
    ((queue),) = story.queued
    assert (queue.start_ns / MS, queue.end_ns / MS) == (10, 20)
    ((flow),) = story.flows
    assert flow.name == f"{lease}.1"
    assert (flow.fill, flow.read) == (story.slices[1], story.slices[2])
    phases = lanes_of(story.executions, 1, story.start_ns)
    assert [(one.name, one.start_ns / MS, one.end_ns / MS) for one in phases] == [
        ("copy in", 32, 33), ("compute", 33, 38), ("copy out", 38, 40)
    ]  # fmt: skip
    assert story.levels[0] == (MS, 0, 16, 0)
    assert [(when / MS, free, queued) for when, _, free, queued in story.levels] == [
        (1, 16, 0), (4, 14, 0), (10, 14, 2), (20, 14, 0), (45, 16, 0)
    ]  # fmt: skip
    assert story.end_ns == 50 * MS
    trace = write(story, tmp_path / "trace.json", 0, "")
    checked = check(trace.path)
    assert [event["ph"] for event in checked.events if event["ph"] in "stf"] == ["s", "t", "f"]
    assert checked.processes() == {
        os.getpid(): "pool default", 101: "producer 101", 1010: "worker 1010: cpu"
    }  # fmt: skip
    assert checked.tracks(101) == ["lease", "fill", "read"]
    assert trace.seconds == pytest.approx(0.049)


def test_what_goes_on_when_a_trace_begins_and_ends_is_in_it(rig: TracedRig, tmp_path: Path) -> None:
    for peer in (1, 2, 3, 4):
        rig.join(peer)
    rig.worker()
    read_later, running, queued, kept = (grant(rig, peer) for peer in (1, 2, 3, 4))
    rig.say(1, m.Submit(read_later, 0, 1, 1, 1))
    rig.turn()
    finish(rig, 10)
    rig.say(2, m.Submit(running, 0, 1, 1, 1))
    rig.turn(MS)
    rig.say(3, m.Lease(9, 0, 12, None))  # waits: it would be above its cap
    rig.trace()
    rig.say(3, m.Submit(queued, 0, 1, 1, 1))
    rig.turn(MS)
    rig.now_ns += 8 * MS
    story = rig.stop()
    assert spans(story.slices) == [
        ("read", "held since before the trace", 2, 11),
        ("fill", f"fill {queued}.1", 2, 2),
        ("lease", "lease: still waits", 2, 11),
        ("fill", "holds slots", 2, 11),
    ]
    assert story.slices[3].peer == 4
    assert kept == story.slices[3].args["lease"]
    assert [one.how for one in story.executions] == ["running"] * len(rig.core.workers[10].batches)
    assert not story.flows
    check(write(story, tmp_path / "trace.json", 0, "").path)


def test_work_of_a_worker_that_dies_is_queued_again(rig: TracedRig, tmp_path: Path) -> None:
    rig.join(1)
    rig.worker(10)
    rig.trace()
    lease = grant(rig, 1, 2)
    rig.say(1, m.Submit(lease, 0, 2, 1, 2))
    rig.turn()
    rig.now_ns += 4 * MS
    rig.do(e.WorkerEnded(10, "it was killed"))
    rig.now_ns += 3 * MS
    rig.worker(11)
    for _ in range(2):  # in halves
        rig.turn()
        rig.now_ns += 10 * MS
        finish(rig, 11)
    rig.say(1, m.Release(lease, 0, 2))
    rig.turn()
    story = rig.stop()
    assert [(one.start_ns / MS, one.end_ns / MS, one.args["attempt"]) for one in story.queued] == [
        (1, 1, 0), (5, 8, 1), (5, 18, 1)
    ]  # fmt: skip
    lost, *done = story.executions
    assert (lost.how, lost.worker) == ("lost: it was killed", 10)
    assert [(one.worker, one.how) for one in done] == [(11, ""), (11, "")]
    assert [flow.execution for flow in story.flows] == done
    assert {flow.name for flow in story.flows} == {f"{lease}.1"}
    checked = check(write(story, tmp_path / "trace.json", 0, "").path)
    assert [event["args"]["ended"] for event in checked.named("lost")] == ["lost: it was killed"]
    assert "left: it was killed" in [event["name"] for event in checked.of("i")]


def test_work_that_ends_without_a_result_says_why(rig: TracedRig) -> None:
    rig.join(1)
    rig.worker()
    rig.trace()
    late, cancelled, failed = (grant(rig, 1, request=number) for number in (1, 2, 3))
    rig.say(1, m.Submit(failed, 0, 1, 1, 1))
    rig.turn()
    rig.say(1, m.Submit(late, 0, 1, 1, 1, deadline_ns=MS), m.Submit(cancelled, 0, 1, 1, 1))
    rig.say(1, m.Cancel(cancelled, 0, 1))
    rig.turn(2 * MS)
    for _ in range(9):
        for batch in list(rig.core.workers[10].batches.values()):
            rig.say(10, m.Failed(batch.id, batch.attempt, "no memory"))
        rig.turn(MS)
    story = rig.stop()
    names = [one.name for one in story.slices if one.kind == "read"]
    assert sorted(names) == sorted(
        [f"deadline passed: {late}.1", f"cancelled: {cancelled}.1", f"engine failed: {failed}.1"]
    )
    assert {one.how for one in story.executions} == {"failed: no memory"}
    assert not story.flows


def test_what_is_refused_leaves_no_trace(rig: TracedRig) -> None:
    rig.join(1, 2)
    rig.trace()
    lease = grant(rig, 1)
    rig.say(2, m.Submit(lease, 0, 1, 1, 1), m.Release(lease, 0, 1))  # another's
    rig.say(1, m.Submit(lease, 0, 1, 1, 9), m.Submit(77, 0, 1, 1, 1))  # too many items; no such lease
    rig.say(1, m.Lease(5, 0, 99, 0))
    rig.turn(MS)
    story = rig.stop()
    kinds = [(one.peer, one.kind, one.name.partition(":")[0]) for one in story.slices]
    assert kinds == [(1, "lease", "lease of 1"), (1, "lease", "lease refused"), (1, "fill", "holds slots")]
    assert not story.queued


def test_slots_granted_with_a_result_say_so_and_those_given_back_too(rig: TracedRig) -> None:
    rig.join(1)
    rig.worker()
    rig.trace()
    lease = grant(rig, 1)
    rig.say(1, m.Submit(lease, 0, 1, 1, 1, again=1))
    rig.turn(MS)
    finish(rig, 10, (0, 1, 0))
    spare = max(rig.core.producers[1].leases)
    assert spare != lease
    rig.now_ns += MS
    rig.say(1, m.Release(lease, 0, 1), m.Submit(spare, 0, 1, 1, 1))
    rig.turn(MS)
    unused = grant(rig, 1, request=2)
    rig.now_ns += MS
    rig.say(1, m.Release(unused, 0, 1))
    story = rig.stop()
    fills = [one for one in story.slices if one.kind == "fill"]
    assert [one.args.get("granted_in_advance", False) for one in fills] == [False, True, False]
    assert fills[2].name == "given back unused"


@pytest.mark.parametrize(("leased_ms", "read_until_ms"), [(45, 45), (0, 40), (999, 40)])
def test_slots_that_are_used_again_are_read_until_their_next_fill(
    rig: TracedRig, leased_ms: int, read_until_ms: int
) -> None:
    """By the client's clock, unless that is another's."""
    rig.join(1)
    rig.worker()
    rig.trace()  # at 1 ms
    lease = grant(rig, 1, 2)
    rig.now_ns = 10 * MS
    rig.say(1, m.Submit(lease, 0, 2, 1, 2))
    rig.turn()
    rig.now_ns = 40 * MS
    finish(rig, 10)
    rig.now_ns = 50 * MS
    rig.say(1, m.Submit(lease, 0, 2, 2, 2, leased_ns=leased_ms * MS))
    rig.turn()
    rig.now_ns = 60 * MS
    finish(rig, 10)
    rig.now_ns = 70 * MS
    rig.say(1, m.Release(lease, 0, 2))
    story = rig.stop()
    assert spans([one for one in story.slices if one.kind != "lease"]) == [
        ("fill", f"fill {lease}.1", 1, 10),
        ("read", f"read {lease}.1", 40, read_until_ms),
        ("fill", f"fill {lease}.2", read_until_ms, 50),
        ("read", f"read {lease}.2", 60, 70),
    ]
    assert len(story.flows) == 2


def test_a_producer_that_ends_ends_what_it_had_begun(rig: TracedRig, tmp_path: Path) -> None:
    rig.join(1)
    rig.trace()
    lease = grant(rig, 1, 3)
    rig.say(1, m.Submit(lease, 0, 1, 1, 1), m.Lease(2, 0, 15, None))
    rig.turn(MS)
    rig.do(e.ProducerClosed(1))
    rig.do(e.ProducerEnded(1))
    rig.now_ns += 5 * MS
    story = rig.stop()
    assert {one.end_ns / MS for one in story.slices} == {1, 2}
    assert {one.end_ns / MS for one in story.queued} == {2}
    assert story.queued[0].args["ended"] == "still queued"
    check(write(story, tmp_path / "trace.json", 0, "").path)


def test_peers_of_other_pid_namespaces_and_clients_of_one_process(rig: TracedRig, tmp_path: Path) -> None:
    for peer, pid in ((1, 0), (2, 0), (3, 77), (4, 77)):
        rig.do(e.ProducerJoined(peer, pid))
    rig.trace()
    for peer in (1, 2, 3, 4):
        grant(rig, peer)
    rig.now_ns += MS
    checked = rig.written(tmp_path, "by a test")
    assert {NAMELESS_PID + 1: "producer of peer 1", NAMELESS_PID + 2: "producer of peer 2", 77: "producer 77"}.items() \
        <= checked.processes().items()  # fmt: skip
    assert checked.tracks(77) == ["lease", "fill", "fill"]
    assert checked.other["ended"] == "by a test"


# --- The buffer ----------------------------------------------------------------------------------


def test_what_has_no_room_is_counted_and_what_is_there_has_no_holes(rig: TracedRig, tmp_path: Path) -> None:
    rig.join(1)
    rig.trace(MIN_BYTES)
    lease, rounds = grant(rig, 1), 0
    while not rig.writer._dropped:
        rig.say(1, m.Release(lease, 0, 1))
        lease, rounds = grant(rig, 1, request=rounds + 2), rounds + 1
    at = rig.writer._at
    rig.say(1, m.Release(lease, 0, 1))
    rig.turn()
    assert rig.writer._at == at, "what would fit is dropped too"
    full = rig.now_ns
    rig.now_ns += MS
    checked = rig.written(tmp_path)
    assert checked.other["dropped_events"] == rig.dropped >= 2
    assert len(checked.named("lease of")) in (rounds, rounds + 1)
    assert checked.other["end_ns"] == full + MS


def test_a_buffer_too_small_for_what_a_pool_holds_says_so() -> None:
    rig = TracedRig((2 * MIN_BYTES, 1, 64))
    rig.join(1)
    grant(rig, 1, MIN_BYTES)
    rig.trace(MIN_BYTES)
    with pytest.raises(ProtocolError, match="buffer-mib"):
        rig.stop()


def _unsealed(size: int) -> int:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def _small() -> int:
    fd = _unsealed(4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def _pipe() -> int:
    read_fd, write_fd = os.pipe()
    os.close(write_fd)
    return read_fd


@pytest.mark.parametrize("make", [lambda: _unsealed(MIN_BYTES), _small, _pipe])
def test_a_broker_writes_only_to_memory_that_cannot_shrink(make: Callable[[], int]) -> None:
    fd = make()
    with pytest.raises(ProtocolError, match=r"sealed|cannot be written"):
        Writer(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_what_another_version_wrote_is_refused() -> None:
    fd = create(MIN_BYTES)
    try:
        writer = Writer(os.dup(fd))
        writer.write("nonsense", 1)  # type: ignore[arg-type]
        writer.close(1)
        writer.close(2)
        with pytest.raises(ProtocolError, match="same version"):
            tell(*read(fd)[::2])
    finally:
        os.close(fd)


# --- The broker's side ----------------------------------------------------------------------------


def _journal() -> Journal:
    return Journal(-1, 64 << 20)


class Control:
    """In place of the supervisor: what it is told."""

    def __init__(self) -> None:
        self.told: list[c.Control] = []

    def tell(self, message: c.Control) -> None:
        self.told.append(message)


def test_a_pool_that_is_not_traced_calls_the_core_itself(rig: TracedRig) -> None:
    ledger, control = Ledger(rig.core, _journal()), Control()
    tracer = Tracer(ledger, cast("Any", control))
    assert ledger._decider is rig.core
    rig.fd = create(MIN_BYTES)
    tracer.start(1, os.dup(rig.fd), MS)
    assert isinstance(ledger._decider, Tap)
    assert not control.told, "it begins at the end of the turn"
    ledger.end_turn(2 * MS)
    ledger.decide(e.ProducerJoined(1, 7), 3 * MS)
    tracer.stop(2, 4 * MS)  # another's, long over
    assert control.told == [c.TraceStarted(1)]
    tracer.stop(1, 5 * MS)
    tracer.stop(1, 6 * MS)
    assert control.told == [c.TraceStarted(1), c.TraceStopped(1)]
    assert ledger._decider is rig.core
    ledger.decide(e.ProducerJoined(2, 8), 7 * MS)
    written = read(rig.fd)
    opening, joined = written.records
    assert isinstance(opening, Opening)
    assert joined == Joined(3 * MS, 1, 7, is_worker=False)
    assert written.closed_ns == 5 * MS


def test_a_broker_that_is_passed_no_memory_says_so(rig: TracedRig) -> None:
    ledger, control = Ledger(rig.core, _journal()), Control()
    Tracer(ledger, cast("Any", control)).start(1, _pipe(), MS)
    ((stopped),) = control.told
    assert isinstance(stopped, c.TraceStopped)
    assert "cannot be written" in stopped.text
    assert ledger._decider is rig.core


# --- Tracks --------------------------------------------------------------------------------------


def execution(sent: int, end: int, *device: int, how: str = "") -> Execution:
    return Execution(10, sent, end, (device[0], device[1], device[2]) if device else None, how, {})


def drawn(*executions: Execution, lanes: int = 1, from_ns: int = 0) -> list[tuple[int, str, int, int]]:
    return [(one.lane, one.name, one.start_ns, one.end_ns) for one in lanes_of(executions, lanes, from_ns)]


def test_batches_that_overlap_are_on_lanes_of_their_own() -> None:
    first, second = execution(0, 100, 10, 80, 10), execution(5, 150, 10, 80, 20)
    assert [one[0] for one in drawn(first, second, lanes=2)] == [0, 0, 0, 1, 1, 1]
    # On one lane, the second has what the first leaves over, and keeps its proportions.
    assert drawn(first, second)[3:] == [(0, "copy in", 100, 104), (0, "compute", 104, 140), (0, "copy out", 140, 150)]


def test_phases_are_never_before_a_batch_was_sent_nor_before_the_trace() -> None:
    assert drawn(execution(50, 100, 0, 1000, 0)) == [(0, "compute", 50, 100)]
    assert drawn(execution(50, 100, 0, 1000, 0), from_ns=70) == [(0, "compute", 70, 100)]
    assert drawn(execution(50, 100, 0, 0, 0)) == []
    assert drawn(execution(0, 100, 0, 100, 0), execution(0, 100, 0, 50, 0)) == [(0, "compute", 0, 100)]


def test_what_ended_without_a_result_is_drawn_where_there_is_room() -> None:
    done, lost, other = execution(0, 60, 0, 60, 0), execution(10, 90, how="lost"), execution(20, 90, how="lost")
    assert drawn(lost, other, done) == [(0, "compute", 0, 60), (0, "lost", 60, 90)]
    assert len(drawn(lost, other, done, lanes=2)) == 3


def test_slices_take_the_first_track_that_is_free() -> None:
    times = [(0, 10), (2, 4), (3, 12), (4, 6), (10, 11), (11, 11), (11, 13)]
    slices = [Slice(1, "fill", start, end, "", {}) for start, end in times]
    assert [row for row, _ in rows_of(reversed(slices))] == [0, 1, 2, 1, 0, 0, 0]


# --- Anything ------------------------------------------------------------------------------------

OPERATIONS = ("lease", "submit", "release", "cancel", "finish", "fail", "kill", "leave", "lie", "turn", "start")


@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 7), st.integers(0, 3)), max_size=60), st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_happens_the_trace_is_sound(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int, int]], data: st.DataObject
) -> None:
    rig = TracedRig((8, 2, 6))
    rig.join(1, 2)
    workers, producers = 10, 2
    rig.worker(10, lanes=2)
    begin = data.draw(st.integers(0, len(operations)))
    for index, (what, number, after_ms) in enumerate(operations):
        if index == begin:
            rig.trace()
        rig.now_ns += after_ms * MS
        leases: list[Any] = [lease for one in rig.core.producers.values() for lease in one.leases.values()]
        batches = [(one.peer, batch) for one in rig.core.workers.values() for batch in one.batches.values()]
        if what == "lease" and rig.core.producers:
            peer = list(rig.core.producers)[number % len(rig.core.producers)]
            rig.say(peer, m.Lease(index + 1, 0, 1 + number % 4, (None, 0, 3 * MS)[number % 3]))
        elif what in ("submit", "release", "cancel", "lie") and leases:
            lease = leases[number % len(leases)]
            first = after_ms % lease.count
            count = lease.count - first
            peer = lease.producer.peer if what != "lie" else 3 - lease.producer.peer
            if what in ("submit", "lie") and peer in rig.core.producers:
                deadline = (None, 2 * MS)[number % 2]
                rig.say(peer, m.Submit(lease.id, first, count, index + 1, 2 * count, deadline, again=number % 2))
            elif what == "release":
                rig.say(peer, m.Release(lease.id, first, count))
            elif what == "cancel":
                rig.say(peer, m.Cancel(lease.id, first, count))
        elif what in ("finish", "fail") and batches:
            worker, batch = batches[number % len(batches)]
            ended_ns = (rig.now_ns, 0, rig.now_ns - MS, 5)[after_ms]
            if what == "finish":
                rig.say(worker, m.Finished(batch.id, batch.attempt, MS, number * MS, MS, 0, 1, ended_ns))
            else:
                rig.say(worker, m.Failed(batch.id, batch.attempt, "it failed"))
        elif what == "kill" and rig.core.workers:
            rig.do(e.WorkerEnded(next(iter(rig.core.workers)), "it was killed"))
        elif what == "leave" and rig.core.producers:
            peer = next(iter(rig.core.producers))
            rig.do(e.ProducerClosed(peer))
            rig.do(e.ProducerEnded(peer))
        elif what == "start":
            workers, producers = workers + 1, producers + 1
            if producers < 10:
                rig.do(e.ProducerJoined(producers, 100 + producers))
            rig.worker(workers, lanes=1 + number % 2)
        rig.turn()
    if begin == len(operations):
        rig.trace()
    checked = rig.written(tmp_path_factory.mktemp("trace"))
    assert rig.dropped == 0
    assert checked.other["end_ns"] == rig.now_ns
