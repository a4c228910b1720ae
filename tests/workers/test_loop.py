"""The CPU worker's loop with a broker that the test plays, blocking and spinning."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from typing import Final

import numpy as np
import pytest

from tests.workers.fake_engine import negate
from trtpool.ipc import messages as m
from trtpool.ipc.arena import create_segment, map_segment
from trtpool.ipc.errors import ProtocolError
from trtpool.ipc.layout import ModelPlan, plan
from trtpool.ipc.pipe import Pipe
from trtpool.ipc.settings import EngineSettings, InspectRequest, ModelSource, WorkerConfig
from trtpool.workers.engine import EngineError
from trtpool.workers.joining import MAX_TEXT, Joined
from trtpool.workers.loop import WorkerLoop

NET_S: Final = 60.0
"""Far more than anything takes; a wait that reaches it has failed."""

SLOTS: Final = 8


class Rig:
    """A loop in a thread, with the broker's end of its lifeline in the test's hands."""

    def __init__(self, *, busy_poll: bool) -> None:
        self.broker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.broker.settimeout(NET_S)
        engine = self.engine = negate()
        layout = plan([ModelPlan(engine.spec, SLOTS, 1, 4)])
        fd = create_segment(layout.segment_bytes)
        joined = Joined(Pipe(theirs), map_segment(fd, layout.segment_bytes), fd, layout.models)
        inputs, outputs = joined.planes(0, engine.spec)
        self.x, self.y = inputs["x"], outputs["y"]
        self.x[...] = np.arange(SLOTS)[:, None, None] + 1
        request = InspectRequest(ModelSource("/nowhere", "negate"), EngineSettings())
        config = WorkerConfig(os.getpid(), theirs.fileno(), (request,), 1, busy_poll=busy_poll)
        self.loop = WorkerLoop(joined, config, lambda _request, _cpus: engine)
        self.raised: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:  # noqa: BLE001  # for the test to look at
            self.raised = error

    def send(self, *messages: m.FromBroker) -> None:
        self.broker.send(m.encode(list(messages)))

    def receive(self) -> list[m.ToBroker]:
        return m.decode_to_broker(self.broker.recv(1 << 16))

    def join(self) -> None:
        """Until `run` has come back."""
        self._thread.join(NET_S)
        assert not self._thread.is_alive(), "the loop does not end"

    def close(self) -> None:
        self.broker.shutdown(socket.SHUT_RDWR)
        self.join()
        self.loop.close()
        self.broker.close()


@pytest.fixture(params=[False, True], ids=["blocks", "spins"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(busy_poll=request.param)
    assert made.receive() == [m.Ready("cpu", 1)]
    yield made
    made.close()


def run(batch: int, *slots: int) -> m.Run:
    return m.Run(batch, 1, 0, [m.Rows(0, slot, 1, 1) for slot in slots])


def test_each_batch_is_told_when_its_outputs_are_written(rig):
    rig.send(run(1, 3, 5), run(2, 0))
    assert [(said.batch, said.attempt) for _ in range(2) for said in rig.receive()] == [(1, 1), (2, 1)]
    assert rig.y[:, 0, 0].tolist() == [-1, 0, 0, -4, 0, -6, 0, 0]
    rig.send(run(3, 7))
    assert [said.batch for said in rig.receive()] == [3]


def test_every_batch_size_has_run_before_it_is_ready(rig):
    assert rig.engine.warm == [4, 1, 2, 3]


def test_several_batches_in_one_run_are_told_of_together(rig):
    rig.send(run(1, *range(7)))
    (said,) = rig.receive()
    assert (said.batch, said.attempt, said.batches) == (1, 1, 2)
    assert rig.y[:, 0, 0].tolist() == [-1, -2, -3, -4, -5, -6, -7, 0]


def test_a_batch_that_fails_is_told_and_the_worker_goes_on(rig, monkeypatch):
    run_well = rig.engine.run

    def refuse(batch, shapes=()):
        if any(rows.first == 3 for rows in batch):
            raise EngineError("no " * MAX_TEXT)
        return run_well(batch, shapes)

    monkeypatch.setattr(rig.engine, "run", refuse)
    rig.send(run(1, *range(5)), run(2, 2))
    (failed,), (said,) = rig.receive(), rig.receive()
    assert isinstance(failed, m.Failed)
    assert (failed.batch, failed.attempt, failed.text[:6]) == (1, 1, "no no ")
    assert len(failed.text) <= MAX_TEXT
    assert said.batch == 2


def test_it_ends_when_it_is_told(rig):
    rig.send(run(1, 2), m.Bye("the pool stops"))
    assert [said.batch for said in rig.receive()] == [1]
    rig.join()
    assert rig.raised is None


def test_it_ends_with_the_broker(rig):
    rig.broker.shutdown(socket.SHUT_RDWR)
    rig.join()
    assert rig.raised is None


def test_an_error_of_the_brokers_is_told(rig):
    rig.send(m.Error(m.BAD_MESSAGE, "what is that?"))
    rig.join()
    assert isinstance(rig.raised, ProtocolError)
