"""The broker's decisions: a state machine with no sockets, clock or threads.

Events change the state, and `Core.take` gives what is to be done by then.  Whatever a peer sends, it
either is legal here or is answered with an Error and changes nothing.

The units of work are runs of slots, not slots: the cost of a message does not depend on how many it names.

This file takes events in and knows who comes and goes.  What it decides is decided in `leasing` (who gets slots),
`works` (what becomes of work) and `dispatch` (which worker gets it), over the `books` that they share.  Messages go
straight to their methods, so that the cut costs no call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from trtpool.ipc import messages as m
from trtpool.ipc.layout import ModelLayout
from trtpool.ipc.settings import ModelTerms

from .batching import Work
from .books import Books, Refused
from .dispatch import Dispatch
from .events import (
    Action,
    Drain,
    Drained,
    Event,
    Forget,
    Leaves,
    ProducerClosed,
    ProducerEnded,
    ProducerJoined,
    Received,
    Send,
    Switch,
    Switched,
    TurnEnded,
    WorkerEnded,
    WorkerJoined,
    WorkerReady,
)
from .hangs import Hangs
from .leasing import Leasing
from .recall import Recalls
from .records import Model, Producer, Request, Worker, producer_cap
from .reporting import report
from .slots import Event as SlotEvent
from .slots import IllegalTransition, move
from .slow import SlowRequests
from .timers import Timers, is_due
from .works import Works


class Core:
    """See the module's docstring.

    Args:
        models: the layout of each model, in the order that messages number them.
        terms: for each model, in that order; by default, for all of them, `max_slots_per_producer` and `max_delay_us`.
        max_slots_per_producer, max_delay_us, batch_timeout_s, recall_timeout_s, evict, slow_ms: see `PoolSettings`.
        owner_pid: the process that the pool is part of, which is never evicted; 0: none.
        gpus: how many GPUs the pool has; 0 on the CPU.
        name, epoch, arena_bytes, started_ns: for reports.

    Attributes:
        models, producers, workers: those of the books.
        violations: what peers sent that no client or worker of ours sends.
        drained: that was said.
        generation: of the workers that serve; see `Switch`.
        worker_ends: workers that ended.
    """

    def __init__(
        self,
        models: Sequence[ModelLayout],
        *,
        terms: Sequence[ModelTerms] = (),
        max_slots_per_producer: int = 0,
        max_delay_us: int = 0,
        batch_timeout_s: float = 0.0,
        recall_timeout_s: float = 0.0,
        evict: bool = False,
        slow_ms: float = 0.0,
        owner_pid: int = 0,
        gpus: int = 0,
        name: str = "default",
        epoch: int = 1,
        arena_bytes: int = 0,
        started_ns: int = 0,
    ) -> None:
        terms = terms or [ModelTerms(max_delay_us, max_slots_per_producer)] * len(models)
        self.models = [
            Model(index, layout, producer_cap(layout, one.max_slots_per_producer), one.max_delay_us * 1000, one.weight)
            for index, (layout, one) in enumerate(zip(models, terms, strict=True))
        ]
        self.name, self.epoch, self.arena_bytes, self.started_ns = name, epoch, arena_bytes, started_ns
        self.books = books = Books(self.models, gpus, started_ns)
        self.producers, self.workers = books.producers, books.workers
        self.timers = timers = Timers()
        self.recalls = Recalls(books, timers, int(recall_timeout_s * 1e9), evicts=evict, owner_pid=owner_pid)
        self.hangs = Hangs(books, timers, int(batch_timeout_s * 1e9))
        self.leasing = Leasing(books, timers, self.recalls)
        self.works = Works(books, timers, self.leasing, SlowRequests(books, int(slow_ms * 1e6)))
        self.dispatch = Dispatch(books, timers, self.works, self.hangs)
        self.drained = False
        self.generation = 0
        self.violations = 0
        self.worker_ends = 0
        self._events = 0
        self._report, self._reported_at = b"", -1
        self._event_handlers: dict[type[Any], Callable[[Any], None]] = {
            ProducerJoined: self._producer_joined,
            WorkerJoined: self._worker_joined,
            ProducerClosed: self._producer_closed,
            ProducerEnded: self._producer_ended,
            WorkerEnded: self._worker_ended,
            Drain: self._drain,
            Switch: self._switch,
        }
        self._from_producer: dict[type[Any], Callable[[Producer, Any], None]] = {
            m.Lease: self.leasing.lease,
            m.Submit: self.works.submit,
            m.Release: self.leasing.release,
            m.Cancel: self.works.cancel,
            m.Status: self._status,
            m.Bye: self._producer_bye,
        }
        self._from_worker: dict[type[Any], Callable[[Worker, Any], None]] = {
            m.Ready: self._ready,
            m.Finished: self.works.finished,
            m.Failed: self.works.failed,
            m.Bye: self._worker_bye,
        }

    # ------------------------------------------------------------------ in and out

    def handle(self, event: Event, now_ns: int) -> list[Action]:
        """Take one event; returns what to do.  `tell`, `receive` and `end_turn` do the same without a list."""
        self.tell(event, now_ns)
        mail, actions = self.take()
        return [Send(peer, message) for peer, messages in mail.items() for message in messages] + actions

    def tell(self, event: Event, now_ns: int) -> None:
        """Take one event.  Work goes out on `TurnEnded`."""
        if isinstance(event, Received):
            self.receive(event.peer, [event.message], now_ns)
        elif isinstance(event, TurnEnded):
            self.end_turn(now_ns)
        else:
            self.books.now_ns = now_ns
            self._events += 1
            self._event_handlers[type(event)](event)

    def take(self) -> tuple[dict[int, list[m.FromBroker]], list[Action]]:
        """What was decided since the last time: messages for each peer, in order, and what else is to be done."""
        books = self.books
        mail, books.mail = books.mail, {}
        actions, books.actions = books.actions, []
        return mail, actions

    @property
    def now_ns(self) -> int:
        """When the last event came."""
        return self.books.now_ns

    def next_timer_ns(self) -> int | None:
        """When a `TurnEnded` is due even if nothing else happens."""
        heap = self.timers.heap
        return heap[0][0] if heap else None

    def receive(self, peer: int, messages: Iterable[m.ToBroker], now_ns: int) -> None:
        """Take what a peer sent, as so many events of `Received`."""
        self.books.now_ns = now_ns
        producer = self.producers.get(peer)
        worker = None if producer is not None else self.workers.get(peer)
        for message in messages:
            self._events += 1
            try:
                if producer is not None:
                    if producer.closed and type(message) is not m.Release:
                        continue  # sent before its lifeline ended; only its slots are of interest now
                    handler = self._from_producer.get(type(message))
                    if handler is None:
                        raise Refused(m.BAD_MESSAGE, f"a producer may not send {type(message).__name__}")
                    handler(producer, message)
                elif worker is not None:  # else its end was handled before this, its last, message
                    worker_handler = self._from_worker.get(type(message))
                    if worker_handler is None:
                        raise Refused(m.BAD_MESSAGE, f"a worker may not send {type(message).__name__}")
                    worker_handler(worker, message)
            except Refused as refused:
                if refused.code == m.BAD_MESSAGE:
                    self.violations += 1
                self.books.send(peer, m.Error(refused.code, str(refused), refused.request))
            except IllegalTransition as error:
                self.refuse(peer, str(error))

    def refuse(self, peer: int, text: str) -> None:
        """What a peer sent was no message."""
        self.violations += 1
        self.books.send(peer, m.Error(m.BAD_MESSAGE, text))

    # ------------------------------------------------------------------ peers

    def _producer_bye(self, _producer: Producer, _message: m.Bye) -> None:
        """Said out of courtesy; what counts is the end of its lifeline."""

    def _worker_bye(self, worker: Worker, message: m.Bye) -> None:
        """It gets no more work; what it has goes back when its process has ended.  Its first reason is the cause."""
        if worker.said is None:
            worker.said = message.text
            self.books.stop_serving(worker)

    def _producer_joined(self, event: ProducerJoined) -> None:
        self.producers[event.peer] = Producer(event.peer, len(self.models), event.pid)
        self.books.send(event.peer, m.Welcome(self.epoch, event.peer, [model.cap for model in self.models]))

    def _worker_joined(self, event: WorkerJoined) -> None:
        self.workers[event.peer] = Worker(event.peer, event.pid, event.generation)
        self.books.send(event.peer, m.Welcome(self.epoch, event.peer, []))

    def _ready(self, worker: Worker, message: m.Ready) -> None:
        if worker.lanes:
            raise Refused(m.BAD_MESSAGE, "Ready was said before")
        if message.gpu is not None:
            self.books.check_gpu(message.gpu)
        worker.device, worker.lanes, worker.gpu = message.device, message.lanes, message.gpu
        if worker.said is None:
            self._place(worker)
        self.books.actions.append(WorkerReady(worker.peer))

    def _place(self, worker: Worker) -> None:
        """One that goes on serves, is to leave, or stands by until its generation serves."""
        if worker.generation == self.generation:
            self.books.serving.append(worker)
        elif worker.generation < self.generation:
            self.books.retiring.append(worker)

    def _switch(self, event: Switch) -> None:
        """All at once, so that no batch is sent to an old engine after one was sent to a new one."""
        books = self.books
        if event.generation > self.generation:
            self.generation = event.generation
            books.serving, books.retiring = [], []
            for worker in self.workers.values():
                if worker.lanes and worker.said is None:
                    self._place(worker)
            for model, path in zip(self.models, event.paths, strict=True):
                model.path = path
        books.actions.append(Switched(event.generation))

    def _let_go(self) -> None:
        """Tell those Bye that were replaced and have finished what they had."""
        for worker in [one for one in self.books.retiring if not one.batches]:
            worker.said = "other engines have taken its place"
            self.books.stop_serving(worker)
            self.books.send(worker.peer, m.Bye(worker.said))
            self.books.actions.append(Leaves(worker.peer))

    def _producer_closed(self, event: ProducerClosed) -> None:
        """Drop what it queued and keep its slots: its process, or a child of it, may still write to them."""
        producer = self.producers.get(event.peer)
        if producer is None or producer.closed:
            return
        producer.closed = True
        self.leasing.forget_requests(producer)
        for work in self.works.unqueue(producer):
            move(work.lease.states, SlotEvent.DROP, work.at, work.count)
        self.books.forget_if_empty(producer)

    def _producer_ended(self, event: ProducerEnded) -> None:
        producer = self.producers.get(event.peer)
        if producer is None:
            return
        producer.closed = True
        self.leasing.forget_requests(producer)
        self.works.unqueue(producer)
        self.leasing.abandon(producer)
        self.books.forget_if_empty(producer)

    def _worker_ended(self, event: WorkerEnded) -> None:
        worker = self.workers.pop(event.peer, None)
        if worker is None:
            return
        self.worker_ends += 1
        self.books.stop_serving(worker)
        worker.watched = False
        how = f"{worker.said} ({event.reason})" if worker.said else event.reason
        self.works.worker_ended(worker, f"the worker ended: {how}")
        self.books.actions.append(Forget(event.peer))

    # ------------------------------------------------------------------ the turn

    def _drain(self, _event: Drain) -> None:
        self.books.draining = True
        self.leasing.refuse_all()

    def end_turn(self, now_ns: int) -> None:
        """All that has arrived was received: make batches of it, and see to what is due."""
        books, heap = self.books, self.timers.heap
        books.now_ns = now_ns
        self._events += 1
        if heap and heap[0][0] <= now_ns:
            self._fire_timers()
        for model in self.models:
            if model.waiting or model.urgent or model.short_ns:
                self.leasing.serve_waiting(model)
        if books.suspects:
            self.dispatch.dispatch_suspect()
        self.dispatch.dispatch()
        if books.retiring:
            self._let_go()
        if books.draining and not self.drained and not self._has_work():
            self.drained = True
            books.actions.append(Drained())

    def _has_work(self) -> bool:
        return (
            self.books.urgent > 0
            or any(line.queue.items or line.suspects for model in self.models for line in model.lines)
            or any(worker.batches for worker in self.workers.values())
        )

    def _fire_timers(self) -> None:
        dropped: dict[Model, set[Work]] = {}
        late_requests = []
        for what, late_ns in self.timers.fired(self.books.now_ns):
            if isinstance(what, Request):
                if not what.over:
                    what.end()
                    late_requests.append(what)
            elif isinstance(what, Worker):
                self.hangs.look(what, late_ns)
            elif isinstance(what, Model):
                self.recalls.look(what, late_ns)
            elif isinstance(what, Work) and is_due(what):
                dropped.setdefault(what.lease.model, set()).add(what)
        if late_requests:
            self.leasing.refuse_late(late_requests)
        for model, late in dropped.items():
            self.works.expire_all(model, late)

    def excuse_peers(self, now_ns: int) -> None:
        """Nobody read for a while what peers said: batches and recalls have the whole time-out from now on."""
        self.hangs.excuse(now_ns)
        self.recalls.excuse(now_ns)

    # ------------------------------------------------------------------ figures

    def _status(self, producer: Producer, message: m.Status) -> None:
        if self._events != self._reported_at + 1:  # thousands in one frame must not take seconds
            self._report = msgspec.json.encode(report(self))
        self._reported_at = self._events
        self.books.send(producer.peer, m.Report(message.request, self._report))
