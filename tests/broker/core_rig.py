"""A core to test with: a clock that only tests move, and `validate()` after every event."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import msgspec

from trtpool.broker import events as e
from trtpool.broker.batching import UNIFORM
from trtpool.broker.core import Core
from trtpool.broker.invariants import validate
from trtpool.broker.reporting import report
from trtpool.ipc import messages as m
from trtpool.ipc.layout import ModelLayout, ModelPlan, plan
from trtpool.ipc.report import ModelReport
from trtpool.ipc.settings import BULK
from trtpool.ipc.tensors import ModelSpec, TensorSpec

M = TypeVar("M", bound=m.FromBroker)
MS = 1_000_000


def layouts(*sizes: tuple[int, int, int], varies: bool = False) -> tuple[ModelLayout, ...]:
    """One model for each ``(slots, items_per_slot, max_batch)``; that `varies` has items of several shapes."""
    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "float32", (2,)),)
    outputs: tuple[TensorSpec, ...] = (TensorSpec("y", "float32", ()),)
    if varies:
        inputs = (TensorSpec("x", "float32", (2, 9), (2, 1)), TensorSpec("k", "float32", (), shared=True))
        outputs = (TensorSpec("y", "float32", (9,), (0,)), TensorSpec("z", "float32", ()))
    plans = []
    for index, (slots, items_per_slot, max_batch) in enumerate(sizes):
        plans.append(ModelPlan(ModelSpec(f"m{index}", "/m.onnx", inputs, outputs), slots, items_per_slot, max_batch))
    return plan(plans).models


def variant(size: int, shared: int = 0) -> tuple[m.Shapes, bytes]:
    """Shapes and digest of a submission to a model that varies."""
    return ((2, size),), bytes([shared]) * m.SHARED_BYTES


def written(run: m.Run) -> m.Shapes:
    """The shapes of the outputs that a worker tells of a batch."""
    return tuple(shape[1:] for shape in run.shapes)


def sent(actions: Iterable[e.Action], kind: type[M], peer: int | None = None) -> list[M]:
    """The messages of one kind among `actions`, to `peer` or to anyone."""
    return [
        action.message
        for action in actions
        if isinstance(action, e.Send) and isinstance(action.message, kind) and (peer is None or action.peer == peer)
    ]


def everything(core: Core) -> bytes:
    """All that the core holds and what a refused message must leave as it was, but for the count of violations."""
    figures = msgspec.structs.replace(report(core), violations=0)
    leases = [
        (lease.id, bytes(lease.states), lease.seq, lease.live)
        for producer in core.producers.values()
        for lease in producer.leases.values()
    ]
    queued = [
        [(line.gpu, work.priority, work.first, work.count, work.items) for work in line.waiting()]
        for model in core.models
        for line in model.lines
    ]
    batches = [(worker.peer, list(worker.batches)) for worker in core.workers.values()]
    return msgspec.json.encode((figures, repr((leases, queued, batches)), core.next_timer_ns()))


class Rig:
    """See the module.  Peers 1 to 9 are producers in these tests, from 10 on workers."""

    def __init__(
        self,
        *sizes: tuple[int, int, int],
        max_delay_us: int = 0,
        cap: int = 0,
        gpus: int = 0,
        batch_timeout_s: float = 0.0,
        recall_timeout_s: float = 0.0,
        evict: bool = False,
        owner_pid: int = 0,
        slow_ms: float = 0.0,
        varies: bool = False,
    ) -> None:
        self.core = Core(
            layouts(*sizes or [(16, 1, 4)], varies=varies),
            max_delay_us=max_delay_us,
            max_slots_per_producer=cap,
            batch_timeout_s=batch_timeout_s,
            recall_timeout_s=recall_timeout_s,
            evict=evict,
            slow_ms=slow_ms,
            owner_pid=owner_pid,
            gpus=gpus,
            started_ns=MS,
        )
        self.now_ns = MS

    def do(self, event: e.Event) -> list[e.Action]:
        actions = self.core.handle(event, self.now_ns)
        validate(self.core)
        return actions

    def join(self, *peers: int) -> None:
        for peer in peers:  # each a process of its own, whose number is 100 and the peer's
            assert sent(self.do(e.ProducerJoined(peer, 100 + peer)), m.Welcome, peer)

    def worker(self, peer: int = 10, lanes: int = 1, gpu: int | None = None, ahead: int = 0) -> None:
        """One that is ready, of the generation that serves, or of one `ahead` of it."""
        assert sent(self.do(e.WorkerJoined(peer, 1000 + peer, self.core.generation + ahead)), m.Welcome, peer)
        assert self.say(peer, m.Ready("cpu" if gpu is None else "a GPU", lanes, gpu)) == [e.WorkerReady(peer)]

    def switch(self, generation: int, path: str = "/new.onnx") -> list[e.Action]:
        return self.do(e.Switch(generation, [path] * len(self.core.models)))

    def say(self, peer: int, *messages: m.ToBroker) -> list[e.Action]:
        """What the core answers before the turn ends."""
        return [action for message in messages for action in self.do(e.Received(peer, message))]

    def turn(self, after_ns: int = 0) -> list[e.Action]:
        self.now_ns += after_ns
        return self.do(e.TurnEnded())

    def refused(self, peer: int, message: m.ToBroker, code: int = m.BAD_MESSAGE) -> m.Error:
        """Send what is illegal now: it must be answered by one Error, and change nothing."""
        before, violations = everything(self.core), self.core.violations
        (action,) = self.say(peer, message)
        assert isinstance(action, e.Send)
        assert isinstance(action.message, m.Error)
        assert (action.peer, action.message.code) == (peer, code)
        assert everything(self.core) == before
        assert self.core.violations == violations + (code == m.BAD_MESSAGE)
        return action.message

    def lease(self, peer: int, count: int = 1, model: int = 0, priority: int = BULK) -> int:
        """Lease slots that are one run; returns the lease's id."""
        actions = self.say(peer, m.Lease(1, model, count, None, priority)) + self.turn()
        ((lease_id, run),) = sent(actions, m.Grant, peer)[0].leases
        assert run.count == count
        return lease_id

    def submit(
        self,
        peer: int,
        count: int = 1,
        model: int = 0,
        *,
        deadline_ns: int | None = None,
        gpu: int | None = None,
        priority: int = BULK,
        variant: tuple[m.Shapes, bytes] = UNIFORM,
    ) -> int:
        """Lease full slots and submit them, without ending the turn; returns the lease's id."""
        lease_id = self.lease(peer, count, model, priority)
        items = count * self.core.models[model].items_per_slot
        assert self.say(peer, m.Submit(lease_id, 0, count, 0, items, deadline_ns, 0, gpu, priority, *variant)) == []
        return lease_id

    def finish(self, worker: int, run: m.Run, compute_ns: int = 2_000_000) -> list[e.Action]:
        """A batch ends; by default it took so long that the next is sent ahead even if it is not full."""
        return self.say(worker, m.Finished(run.batch, run.attempt, 1, compute_ns, 3, 0, 1, shapes=written(run)))

    def figures(self, model: int = 0) -> ModelReport:
        return report(self.core).models[model]

    def states(self, model: int = 0) -> tuple[int, int, int, int, int]:
        """Slots that are free, leased, queued, running and done."""
        now = self.figures(model)
        return now.free, now.leased, now.queued, now.running, now.done
