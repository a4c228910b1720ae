"""The GPU worker's loop with a broker and engines that the test drives: order, credit, faults and ends."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NoReturn

import msgspec
import numpy as np
import pytest

from trtpool.ipc import messages as m
from trtpool.ipc.arena import create_segment, map_segment
from trtpool.ipc.errors import EngineFailed, ProtocolError
from trtpool.ipc.layout import ModelPlan, plan
from trtpool.ipc.pipe import Pipe
from trtpool.ipc.settings import WorkerConfig
from trtpool.ipc.tensors import ModelSpec, TensorSpec
from trtpool.workers.engine import Batch, BatchRefused, EngineError, Planes, Shapes, Times
from trtpool.workers.joining import MAX_TEXT, Joined
from trtpool.workers.lane_loop import SHORT_NS, LaneLoop

NET_S: Final = 60.0
"""Far more than anything takes; a wait that reaches it has failed."""

SLOTS: Final = 16


class HeldEngine:
    """``y = -x``, of which no batch ends before the test says so.

    Attributes:
        launched: the lane and first slot of each launch, in order.
        blocked: the lanes that threads block on.
        threads: which did what, in order: "launch" or "block".
        times: what each batch takes; more than a short one.
        refuse: what `launch` raises, if anything.
    """

    def __init__(self, lanes: int, *, blocks: bool) -> None:
        self.lanes = lanes
        self.launched: list[tuple[int, int]] = []
        self.blocked: list[int] = []
        self.threads: list[tuple[str, int]] = []
        self.times = Times(SHORT_NS, 22, 33)
        self._blocks = blocks
        self.refuse: Exception | None = None
        self.closed = False
        self._running: dict[int, Batch] = {}
        self._ended: dict[int, Exception | None] = {}
        self._over = False
        self._changed = threading.Condition()  # of an RLock

    @property
    def spec(self) -> ModelSpec:
        raise NotImplementedError

    def bind(self, inputs: Planes, outputs: Planes, max_batch: int) -> None:
        self._inputs, self._outputs = inputs, outputs

    def run(self, batch: Batch, shapes: Shapes = ()) -> Times:
        raise NotImplementedError

    def launch(self, lane: int, batch: Batch, shapes: Shapes = ()) -> None:
        with self._changed:
            assert lane not in self._running, "the lane is in use"
            assert 0 <= lane < self.lanes
            if self.refuse is not None:
                raise self.refuse
            self._running[lane] = batch
            self.threads.append(("launch", threading.get_ident()))
            self.launched.append((lane, batch[0].first))
            self._changed.notify_all()

    def ended(self, lane: int) -> bool:
        with self._changed:
            return lane in self._ended or lane not in self._running or self._over

    def block(self, lane: int) -> None:
        assert self._blocks, "it is to spin"
        with self._changed:
            self.blocked.append(lane)
            self.threads.append(("block", threading.get_ident()))
            self._changed.notify_all()
            over = self._changed.wait_for(lambda: lane in self._ended or lane not in self._running or self._over, NET_S)
            self.blocked.remove(lane)
            assert over, "never ended"

    def poll(self, lane: int) -> Times | None:
        with self._changed:
            assert lane in self._running, "nothing is on the lane"
            if lane not in self._ended and not self._over:
                return None
            batch, error = self._running.pop(lane), self._ended.pop(lane, None)
        if error is not None:
            raise error
        for rows in batch:
            span = slice(rows.first, rows.first + rows.count)
            self._outputs["y"][span] = -self._inputs["x"][span]
        return self.times

    def close(self) -> None:
        self.closed = True

    # ------------------------------------------------------------------ for tests

    def finish(self, lane: int, error: Exception | None = None) -> None:
        """The batch on a lane has ended."""
        with self._changed:
            self._ended[lane] = error
            self._changed.notify_all()

    def wait_launched(self, count: int) -> list[tuple[int, int]]:
        """`launched`, once there were so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.launched) >= count, NET_S), "never launched"
            return list(self.launched)

    def still(self) -> contextlib.AbstractContextManager[Any]:
        """Nobody learns meanwhile what has ended."""
        return self._changed

    def wait_blocked(self, lane: int) -> None:
        """Until a thread blocks on a lane, and none on others."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.blocked == [lane], NET_S), f"blocked on {self.blocked}"

    def let_go(self) -> None:
        """Let all that waits go on."""
        with self._changed:
            self._over = True
            self._changed.notify_all()


class End:
    """In place of `os._exit`: nothing of the calling thread runs any more until the test is over."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self._called, self._over = threading.Event(), threading.Event()

    def __call__(self, code: int) -> NoReturn:
        if not self._over.is_set():
            self.codes.append(code)
            self._called.set()
            assert self._over.wait(NET_S)
        raise SystemExit

    def wait(self) -> int:
        """The exit code, once the process would have ended."""
        assert self._called.wait(NET_S), "the process lives on"
        return self.codes[0]

    def let_go(self) -> None:
        self._over.set()


class Rig:
    """A loop in a thread, with the broker's end of its lifeline in the test's hands."""

    def __init__(self, lanes: Sequence[int], *, spins: bool, kind: type[LaneLoop] = LaneLoop) -> None:
        self.broker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.broker.settimeout(NET_S)
        x, y = TensorSpec("x", "float32", (2,)), TensorSpec("y", "float32", (2,))
        specs = [ModelSpec(f"model-{number}", "/nowhere", (x,), (y,)) for number in range(len(lanes))]
        layout = plan([ModelPlan(spec, SLOTS, 1, 4) for spec in specs])
        fd = create_segment(layout.segment_bytes)
        self.joined = Joined(Pipe(theirs), map_segment(fd, layout.segment_bytes), fd, layout.models)
        self.planes = [self.joined.planes(number, spec) for number, spec in enumerate(specs)]
        self.engines = [HeldEngine(count, blocks=not spins) for count in lanes]
        for engine, (inputs, outputs) in zip(self.engines, self.planes, strict=True):
            inputs["x"][...] = np.arange(SLOTS)[:, None, None] + 1
            engine.bind(inputs, outputs, 4)
        self.end = End()
        config = WorkerConfig(os.getpid(), theirs.fileno(), (), 1, gpu=7, busy_poll=spins)
        engines: Any = self.engines
        self.loop = kind(self.joined, config, engines, "Fake GPU", end=self.end)
        self.raised: BaseException | None = None
        self.closed = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.ready = self.receive()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:  # noqa: BLE001  # for the test to look at
            self.raised = error

    def run(self, *batches: int, model: int = 0) -> None:
        """Send batches, each of the one slot whose number it has, in one frame."""
        self.send(*(m.Run(number, 0, model, [m.Rows(0, number, 1, 1)]) for number in batches))

    def send(self, *messages: m.FromBroker) -> None:
        self.broker.send(m.encode(list(messages)))

    def receive(self) -> list[m.ToBroker]:
        """The next frame; empty when the worker has ended."""
        frame = self.broker.recv(1 << 16)
        return [self._without_end(message) for message in m.decode_to_broker(frame)] if frame else []

    @staticmethod
    def _without_end(message: m.ToBroker) -> m.ToBroker:
        """`message`, and if it is a Finished, without the time that it must have."""
        if not isinstance(message, m.Finished):
            return message
        assert 0 < message.ended_ns <= time.monotonic_ns()
        return msgspec.structs.replace(message, ended_ns=0)

    def hear(self, count: int) -> list[m.ToBroker]:
        """The next messages, in however many frames."""
        heard: list[m.ToBroker] = []
        while len(heard) < count:
            frame = self.receive()
            assert frame, f"the worker has ended, after {heard}"
            heard += frame
        return heard

    def wait_over(self) -> None:
        """Until the loop knows that nothing more comes."""
        self.wait_until(lambda: self.loop._inbox.over)

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Until the loop is so far."""
        deadline = time.monotonic() + NET_S
        while not true():
            assert time.monotonic() < deadline

    def join(self) -> None:
        """Until `run` has come back."""
        self._thread.join(NET_S)
        assert not self._thread.is_alive(), "the loop does not end"

    def close(self) -> None:
        """End the loop, however far it is.  Again: nothing."""
        if self.closed:
            return
        self.closed = True
        self.end.let_go()
        for engine in self.engines:
            engine.let_go()
        self.broker.shutdown(socket.SHUT_RDWR)
        self.join()
        self.loop.close()
        self.broker.close()


@pytest.fixture(params=[False, True], ids=["blocks", "spins"])
def spins(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, spins: bool) -> Iterator[Callable[..., Rig]]:  # a fixture
    """Makes rigs of models with so many lanes each."""
    hook = threading.excepthook
    # pytest complains of a thread that `End` ended.
    monkeypatch.setattr(threading, "excepthook", lambda args: args.exc_type is SystemExit or hook(args))
    interval = sys.getswitchinterval()
    rigs = []

    def make(*lanes: int) -> Rig:
        rigs.append(Rig(lanes, spins=spins))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()
    sys.setswitchinterval(interval)


def finished(batch: int, attempt: int = 0) -> m.Finished:
    return m.Finished(batch, attempt, SHORT_NS, 22, 33, 0)


# --- Work ----------------------------------------------------------------------------------------


def test_it_says_what_it_is(make):
    assert make(3).ready == [m.Ready("Fake GPU", 3, 7)]


def test_of_several_models_the_one_with_the_fewest_lanes_counts(make):
    rig = make(4, 2, 3)
    assert rig.ready == [m.Ready("Fake GPU", 2, 7)]
    rig.run(1, 2, 3, model=2)
    rig.engines[2].wait_launched(2)
    rig.engines[2].finish(rig.engines[2].launched[0][0])
    assert rig.receive() == [finished(1)]
    assert [first for _, first in rig.engines[2].wait_launched(3)] == [1, 2, 3]


def test_a_batch_is_finished_when_its_outputs_are_written(make):
    rig = make(3)
    rig.send(m.Run(41, 2, 0, [m.Rows(0, 5, 2, 2), m.Rows(0, 1, 1, 1)]))
    ((lane, first),) = rig.engines[0].wait_launched(1)
    assert first == 5
    outputs = rig.planes[0][1]["y"][:, 0, 0]
    assert not outputs.any()
    rig.engines[0].finish(lane)
    assert rig.receive() == [finished(41, 2)]
    assert outputs.tolist() == [-(slot + 1) if slot in (5, 6, 1) else 0 for slot in range(SLOTS)]


def test_batches_that_have_ended_are_all_told(make, spins):
    rig = make(3)
    rig.run(4, 5, 6)
    lanes = [lane for lane, _ in rig.engines[0].wait_launched(3)]
    assert sorted(lanes) == [0, 1, 2]
    with rig.engines[0].still():
        for lane in reversed(lanes):
            rig.engines[0].finish(lane)
    if spins:  # it may be looking at any of them
        assert sorted(message.batch for message in rig.hear(3)) == [4, 5, 6]
    else:
        assert rig.receive() == [finished(4), finished(5), finished(6)]


@pytest.mark.parametrize("spins", [False], indirect=True)
def test_a_thread_blocks_on_the_oldest_batch(make):
    rig = make(3)
    engine = rig.engines[0]
    rig.run(4)
    rig.run(5)
    (oldest, _), (younger, _) = engine.wait_launched(2)
    engine.wait_blocked(oldest)
    engine.finish(oldest)
    assert rig.receive() == [finished(4)]
    engine.wait_blocked(younger)


def test_a_younger_batch_that_ended_need_not_wait_for_an_older_one(make, spins):
    rig = make(3)
    engine = rig.engines[0]
    rig.run(4, 5)
    (oldest, _), (younger, _) = engine.wait_launched(2)
    if not spins:  # else batch 6 could be heard in the same turn, after that turn's look
        engine.wait_blocked(oldest)
    engine.finish(younger)
    rig.run(6)  # whoever hears of it looks at all that runs
    assert rig.receive() == [finished(5)]
    engine.wait_launched(3)
    engine.finish(oldest)
    assert rig.receive() == [finished(4)]


@pytest.mark.parametrize("spins", [False], indirect=True)
def test_short_batches_wake_no_other_thread(make):
    rig = make(3)
    engine = rig.engines[0]
    engine.times = Times(1, 2, 3)
    for number in range(1, 9):
        rig.run(number)
        lane, _ = engine.wait_launched(number)[-1]
        engine.finish(lane)
        assert rig.receive() == [m.Finished(number, 0, 1, 2, 3, 0)]
        if number == 1:  # nobody knew yet how short it is
            rig.wait_until(lambda: rig.loop._sleeps)
            del engine.threads[:]
    assert len({thread for _, thread in engine.threads}) == 1


@pytest.mark.parametrize("spins", [False], indirect=True)
def test_what_comes_while_a_short_batch_runs_is_heard_after_it(make):
    rig = make(3)
    engine = rig.engines[0]
    engine.times = Times(1, 2, 3)
    rig.run(1)
    engine.finish(engine.wait_launched(1)[0][0])
    assert rig.receive()
    rig.run(2)
    lane, _ = engine.wait_launched(2)[1]
    rig.run(3)
    engine.finish(lane)
    assert rig.receive() == [m.Finished(2, 0, 1, 2, 3, 0)]
    assert engine.wait_launched(3)[-1][1] == 3


def test_with_a_lane_free_new_work_is_heard_while_other_runs(make):
    rig = make(3)
    for number in range(1, 4):
        rig.run(number)
        assert rig.engines[0].wait_launched(number)[-1][1] == number


def test_a_batch_that_comes_when_no_lane_is_free_is_heard_when_one_is(make):
    rig = make(1)
    rig.run(1)
    rig.engines[0].wait_launched(1)
    rig.run(2)
    rig.engines[0].finish(0)
    assert rig.receive() == [finished(1)]
    assert rig.engines[0].wait_launched(2) == [(0, 1), (0, 2)]


def test_by_itself_each_batch_is_told_in_a_frame_of_its_own(make):
    """Again and again, since the threads take turns."""
    rig = make(3)
    for number in range(1, 50):
        rig.run(number % SLOTS)
        lane, _ = rig.engines[0].wait_launched(number)[-1]
        rig.engines[0].finish(lane)
        assert rig.receive() == [finished(number % SLOTS)]


def test_several_batches_in_one_run_share_the_lanes_and_are_told_of_together(make):
    rig = make(2)
    engine = rig.engines[0]
    rig.send(m.Run(7, 1, 0, [m.Rows(0, 1, 9, 9), m.Rows(0, 12, 2, 2)]), m.Run(8, 0, 0, [m.Rows(0, 15, 1, 1)]))
    assert {first for _, first in engine.wait_launched(2)} == {1, 5}
    for launched in range(3):
        lane, _ = engine.wait_launched(min(3, launched + 2))[launched]
        engine.finish(lane)
    assert engine.launched[2][1] == 9
    assert rig.hear(1) == [m.Finished(7, 1, 3 * SHORT_NS, 66, 99, 0, 3)]
    assert engine.wait_launched(4)[3][1] == 15
    engine.finish(engine.launched[3][0])
    assert rig.hear(1) == [finished(8)]
    written = [*range(1, 10), 12, 13, 15]
    assert np.flatnonzero(rig.planes[0][1]["y"][:, 0, 0]).tolist() == written


def test_one_of_several_batches_that_cannot_be_launched_fails_their_run(make):
    rig = make(1)
    engine = rig.engines[0]
    rig.send(m.Run(7, 1, 0, [m.Rows(0, 1, 8, 8)]))
    engine.wait_launched(1)
    engine.refuse = EngineError("no such kernel")
    engine.finish(0)
    text = "batch 7 could not be launched: no such kernel"
    assert rig.hear(2) == [m.Failed(7, 1, text), m.Bye(text)]
    assert rig.end.wait() == EngineFailed.exit_code


def test_a_batch_beyond_the_lanes_waits_for_the_first_that_comes_free(make):
    rig = make(2)
    engine = rig.engines[0]
    rig.run(1, 2, 3)  # the credit: as many as there are lanes, and one
    (first, _), (second, _) = engine.wait_launched(2)
    engine.finish(first)
    assert rig.receive() == [finished(1)]
    assert engine.wait_launched(3)[2] == (first, 3)
    rig.run(4)
    engine.finish(second)
    assert rig.receive() == [finished(2)]
    assert engine.wait_launched(4)[3] == (second, 4)


def test_waiting_batches_are_launched_in_the_order_that_they_came(make):
    rig = make(1)
    engine = rig.engines[0]
    for number in range(6):
        rig.run(number)
    for number in range(6):
        assert engine.wait_launched(number + 1)[number] == (0, number)
        engine.finish(0)
        assert rig.receive() == [finished(number)]


def test_models_share_the_lanes(make):
    rig = make(2, 2)
    rig.run(1)
    rig.run(2, model=1)
    ((one, _),), ((two, _),) = (engine.wait_launched(1) for engine in rig.engines)
    assert {one, two} == {0, 1}
    rig.run(3, model=1)
    rig.engines[0].finish(one)
    assert rig.receive() == [finished(1)]
    assert rig.engines[1].wait_launched(2)[1] == (one, 3)
    assert len(rig.engines[0].launched) == 1


# --- Faults --------------------------------------------------------------------------------------


def test_a_batch_that_cannot_be_launched_is_failed_and_the_worker_ends(make):
    rig = make(2)
    engine = rig.engines[0]
    rig.run(1)
    engine.wait_launched(1)
    engine.refuse = EngineError("no such kernel")
    rig.send(m.Run(9, 3, 0, [m.Rows(0, 2, 1, 1)]), m.Run(10, 0, 0, [m.Rows(0, 3, 1, 1)]))
    text = "batch 9 could not be launched: no such kernel"
    assert rig.receive() == [m.Failed(9, 3, text), m.Bye(text)]
    assert rig.end.wait() == EngineFailed.exit_code
    assert [first for _, first in engine.launched] == [1]


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_batch_that_is_refused_fails_alone_and_the_worker_goes_on(make, lanes):
    rig = make(lanes)
    engine = rig.engines[0]
    if lanes == 2:
        rig.run(1)
        engine.wait_launched(1)
    engine.refuse = BatchRefused("it is too large")
    rig.send(m.Run(9, 3, 0, [m.Rows(0, 2, 1, 1)]))
    assert rig.receive() == [m.Failed(9, 3, "it is too large")]
    engine.refuse = None
    rig.run(4)
    for number, (lane, _) in zip((1, 4)[-lanes:], engine.wait_launched(lanes), strict=True):
        engine.finish(lane)
        assert rig.receive() == [finished(number)]


def test_a_waiting_batch_that_cannot_be_launched_is_failed_and_what_ended_is_told(make):
    rig = make(1)
    engine = rig.engines[0]
    rig.run(1, 2)
    engine.wait_launched(1)
    engine.refuse = EngineError("no such kernel")
    engine.finish(0)
    text = "batch 2 could not be launched: no such kernel"
    assert rig.hear(3) == [finished(1), m.Failed(2, 0, text), m.Bye(text)]
    assert rig.end.wait() == EngineFailed.exit_code


def test_a_fault_of_the_device_blames_no_batch(make):
    rig = make(3)
    rig.run(1, 2, 3)
    ((first, _), *_) = rig.engines[0].wait_launched(3)
    rig.engines[0].finish(first, EngineError("an illegal address"))
    assert rig.receive() == [m.Bye("the GPU failed: an illegal address")]
    assert rig.end.wait() == EngineFailed.exit_code


def test_a_defect_of_ours_ends_the_worker_too(make):
    rig = make(3)
    rig.run(1)
    ((lane, _),) = rig.engines[0].wait_launched(1)
    rig.engines[0].finish(lane, RuntimeError("unforeseen"))
    assert rig.receive() == [m.Bye("the worker failed: RuntimeError('unforeseen')")]
    assert rig.end.wait() == EngineFailed.exit_code


def test_a_long_reason_is_cut(make):
    rig = make(1)
    rig.engines[0].refuse = EngineError("x" * 10_000)
    rig.run(1)
    failed, bye = rig.receive()
    assert failed.text == bye.text
    assert len(bye.text) == MAX_TEXT


def test_a_fault_ends_the_worker_when_the_broker_has_ended_before(make):
    rig = make(1)
    rig.run(1)
    ((lane, _),) = rig.engines[0].wait_launched(1)
    rig.broker.shutdown(socket.SHUT_RDWR)
    rig.engines[0].finish(lane, EngineError("an illegal address"))
    assert rig.end.wait() == EngineFailed.exit_code


# --- Ends ----------------------------------------------------------------------------------------


def test_when_the_broker_ends_what_runs_is_waited_for(make):
    rig = make(3)
    rig.run(1, 2)
    lanes = [lane for lane, _ in rig.engines[0].wait_launched(2)]
    rig.broker.shutdown(socket.SHUT_RDWR)
    rig.wait_over()
    for lane in lanes:
        rig.engines[0].finish(lane)
    rig.join()
    assert rig.raised is None
    assert not rig.loop._second.is_alive()
    assert rig.planes[0][1]["y"][1:3].all()
    assert not rig.end.codes


def test_when_the_broker_ends_with_every_lane_in_use_the_worker_ends_after_them(make):
    rig = make(2)
    rig.run(1, 2)
    lanes = [lane for lane, _ in rig.engines[0].wait_launched(2)]
    rig.broker.shutdown(socket.SHUT_RDWR)
    for lane in lanes:
        rig.engines[0].finish(lane)
    rig.join()
    assert rig.raised is None
    assert rig.planes[0][1]["y"][1:3].all()


def test_a_bye_that_comes_while_no_lane_is_free_is_heard_when_one_is(make):
    """And by then one thread sleeps, which must not do so for ever."""
    rig = make(1)
    rig.run(1)
    rig.engines[0].wait_launched(1)
    rig.send(m.Bye("the pool stops"))
    rig.engines[0].finish(0)
    assert rig.receive() == [finished(1)]
    rig.join()
    assert rig.raised is None


def test_what_waits_when_bye_comes_is_finished(make):
    rig = make(1)
    rows = [m.Rows(0, 1, 1, 1)]
    rig.send(m.Run(1, 0, 0, rows), m.Run(2, 0, 0, rows), m.Bye("the pool stops"))
    for number in (1, 2):
        rig.engines[0].wait_launched(number)
        rig.engines[0].finish(0)
        assert rig.receive() == [finished(number)]
    rig.join()
    assert rig.raised is None


@pytest.mark.parametrize("rounds", range(20))
def test_it_ends_at_once_when_nothing_runs(rounds, make):
    """The end may be heard by either thread, between any two steps of the other."""
    rig = make(3)
    for number in range(rounds % 4):
        rig.run(number + 1)
        lane, _ = rig.engines[0].wait_launched(number + 1)[-1]
        rig.engines[0].finish(lane)
    rig.send(m.Bye("the pool stops"))
    assert rig.hear(rounds % 4) == [finished(number + 1) for number in range(rounds % 4)]
    rig.join()
    assert rig.raised is None


def test_after_bye_what_runs_is_finished(make):
    rig = make(2)
    rig.run(1, 2)
    lanes = [lane for lane, _ in rig.engines[0].wait_launched(2)]
    rig.send(m.Bye("the pool stops"))
    for lane in lanes:
        rig.engines[0].finish(lane)
    assert sorted(message.batch for message in rig.hear(2)) == [1, 2]
    rig.join()
    assert rig.raised is None
    assert not rig.engines[0].closed
    rig.close()
    assert rig.engines[0].closed


@pytest.mark.parametrize("idle", [True, False])
def test_an_error_of_the_brokers_is_told(idle, make):
    rig = make(1)
    if not idle:
        rig.run(1)
        rig.engines[0].wait_launched(1)
    rig.send(m.Error(m.BAD_MESSAGE, "what is that?"))
    rig.engines[0].let_go()
    assert rig.hear(not idle) == [finished(1)] * (not idle)
    rig.join()
    assert isinstance(rig.raised, ProtocolError)
    assert "the broker refused a message: what is that?" in str(rig.raised)


def test_rows_outside_of_the_planes_end_the_worker(make):
    rig = make(1)
    rig.send(m.Run(1, 0, 0, [m.Rows(0, SLOTS, 1, 1)]))
    rig.join()
    assert isinstance(rig.raised, ProtocolError)
    assert not rig.engines[0].launched
