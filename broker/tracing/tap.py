"""What stands between ledger and core while a trace runs: it passes all on, and writes down what is of interest.

It is put there and taken away again by `Ledger.follow`; without it the ledger calls the core itself, so that a pool
that is not traced pays nothing, not even for a question whether it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Final

from trtpool.broker import events as e
from trtpool.broker.batching import Work
from trtpool.broker.core import Core
from trtpool.broker.records import Batch
from trtpool.ipc import messages as m

from .records import Asked, Heard, Held, Joined, Left, Opening, Part, Present, Said, Sent, Told, Turn, Writer

_SAID: Final = (m.Lease, m.Submit, m.Release, m.Ready, m.Finished, m.Failed)
_TOLD: Final = (m.Grant, m.Done, m.Error)


class Tap:
    """See the module.

    The trace begins when the turn ends in which the tap was put there: then nothing is half done.

    Args:
        core: the broker's.
        writer: where to write.
        opened: called when the trace has begun.
    """

    def __init__(self, core: Core, writer: Writer, opened: Callable[[], None]) -> None:
        self._core = core
        self._writer = writer
        self._opened = opened
        self._is_open = False
        self._levels: list[int] = []

    def receive(self, peer: int, messages: Iterable[m.ToBroker], now_ns: int) -> None:
        """See `Core.receive`."""
        core = self._core
        if not self._is_open:
            core.receive(peer, messages, now_ns)
            return
        producer = core.producers.get(peer)
        accepted: list[Said] = []
        for message in messages:
            violations = core.violations
            core.receive(peer, (message,), now_ns)
            ignored = producer is not None and producer.closed and not isinstance(message, m.Release)
            if isinstance(message, _SAID) and core.violations == violations and not ignored:
                accepted.append(message)
        if accepted:
            self._writer.write(Heard(now_ns, peer, accepted), len(accepted))

    def tell(self, event: e.Event, now_ns: int) -> None:
        """See `Core.tell`."""
        self._core.tell(event, now_ns)
        if not self._is_open:
            return
        if isinstance(event, (e.ProducerJoined, e.WorkerJoined)):
            is_worker = isinstance(event, e.WorkerJoined)
            self._writer.write(Joined(now_ns, event.peer, event.pid, is_worker), 1)
        elif isinstance(event, (e.ProducerClosed, e.ProducerEnded, e.WorkerEnded)):
            text = event.reason if isinstance(event, e.WorkerEnded) else ""
            self._writer.write(Left(now_ns, event.peer, text), 1)

    def take(self) -> tuple[dict[int, list[m.FromBroker]], list[e.Action]]:
        """See `Core.take`."""
        core = self._core
        mail, actions = core.take()
        if not self._is_open:
            self._is_open = True
            self._levels = _levels(core)
            self._writer.write(_opening(core, self._levels), 1)
            self._opened()
            return mail, actions
        told: list[tuple[int, list[Told]]] = []
        sent: list[Sent] = []
        for peer, messages in mail.items():
            some = [message for message in messages if isinstance(message, _TOLD)]
            if some:
                told.append((peer, some))
            worker = core.workers.get(peer)
            if worker is not None:
                numbers = [message.batch for message in messages if isinstance(message, m.Run)]
                sent += [_sent(peer, worker.batches[number]) for number in numbers if number in worker.batches]
        levels = _levels(core)
        if told or sent or levels != self._levels:
            changed = [] if levels == self._levels else levels
            self._levels = levels
            events = len(sent) + sum(len(some) for _, some in told) + bool(changed)
            self._writer.write(Turn(core.now_ns, sent, told, changed), events)
        return mail, actions


def _levels(core: Core) -> list[int]:
    levels: list[int] = []
    for model in core.models:
        queued = sum(line.queue.items + line.urgent.items for line in model.lines)
        for line in model.lines:
            if line.suspects:
                queued += sum(work.items for suspect in line.suspects for work in suspect.works)
        levels += (model.ring.free, queued)
    return levels


def _part(work: Work) -> Part:
    return Part(work.lease.id, work.at, work.count, work.seq, work.items, work.queued_ns)


def _sent(worker: int, batch: Batch) -> Sent:
    parts = [_part(work) for work in batch.works]
    return Sent(worker, batch.id, batch.attempt, batch.model.index, batch.dispatched_ns, parts)


def _opening(core: Core, levels: list[int]) -> Opening:
    peers = [Present(one.peer, one.pid, is_worker=False) for one in core.producers.values()]
    peers += [Present(one.peer, one.pid, True, one.device, one.lanes, one.gpu) for one in core.workers.values()]
    return Opening(
        core.now_ns,
        core.name,
        os.getpid(),
        [(model.layout.spec.name, model.layout.slots) for model in core.models],
        peers,
        [
            Held(producer.peer, lease.id, lease.model.index, bytes(lease.states))
            for producer in core.producers.values()
            for lease in producer.leases.values()
        ],
        [
            Asked(one.producer.peer, one.request, model.index, one.count, one.asked_ns)
            for model in core.models
            for one in model.requests()
        ],
        [(model.index, _part(work)) for model in core.models for line in model.lines for work in line.waiting()],
        [_sent(worker.peer, batch) for worker in core.workers.values() for batch in worker.batches.values()],
        levels,
    )
