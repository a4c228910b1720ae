"""The broker's decisions: a state machine with no sockets, clock or threads.

Events change the state, and `Core.take` gives what is to be done by then.  Whatever a peer sends, it
either is legal here or is answered with an Error and changes nothing.

The units of work are runs of slots, not slots: the cost of a message does not depend on how many it names.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

import msgspec

from trtpool.ipc import messages as m
from trtpool.ipc.layout import ModelLayout
from trtpool.ipc.settings import MAX_ATTEMPTS, MAX_WAITING_REQUESTS

from . import recall
from .batching import Work, halves, rows_of, take_both
from .events import (
    Action,
    Drain,
    Drained,
    Event,
    Forget,
    Hung,
    ProducerClosed,
    ProducerEnded,
    ProducerJoined,
    Received,
    Send,
    TurnEnded,
    WorkerEnded,
    WorkerJoined,
    WorkerReady,
)
from .records import Batch, LeaseRecord, Line, Model, Producer, Request, Suspect, Worker, producer_cap
from .reporting import report
from .slots import Event as SlotEvent
from .slots import IllegalTransition, State, move

SEND_AHEAD_NS: Final = 500_000
"""A worker with one lane is sent a batch that is not full ahead of time if batches of the model take this long on
average: while it waits for the broker it loses about 50 us, which a batch that grows meanwhile makes up for if it is
short."""

BRIEF_NS: Final = 250_000
"""Batches of a model that runs more briefly than half of this go to a worker several at a time, as many as take so
long: a message costs us, and the worker, as much as such a batch, and nobody waits longer for it than this."""

MAX_TOGETHER: Final = 16
"""Most batches that are sent at a time."""

SURPLUS: Final = 4
"""`again` is granted while a quarter (1 / SURPLUS) of the slots stays free.

An idle client may hold what it was granted in advance, and may not have said yet that it released as much, for
as long as it lives.  So all that is granted in advance, counted twice, is never more than a producer's cap leaves over:
whoever asks for slots gets them in the end.
"""


PRUNE_TIMERS: Final = 1024
"""Timers of what is over are thrown away at twice as many as were left the last time, and not before so many."""


STOOD_STILL_NS: Final = 1_000_000_000
"""A timer that fires so late says that the broker itself stood still, and then perhaps the workers did too: a container
that was paused, a machine without memory.  None of them is taken for hung because of that."""


OVERTAKES: Final = 4
"""Interactive work goes first, but of the batches that a worker is sent while older bulk work waits, at most so many in
a row: the next begins with the oldest bulk work.  The same holds for grants of a model's slots.  So bulk keeps a fifth,
and more while interactive batches have room left."""


class _Refused(Exception):
    """A message is illegal now; answered with an Error."""

    def __init__(self, code: int, text: str, request: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.request = request


def _oldest_ns(line: Line) -> int:
    return line.queue.oldest.queued_ns


def _oldest_urgent_ns(line: Line) -> int:
    return line.urgent.oldest.queued_ns


def _oldest_suspect_ns(line: Line) -> int:
    return line.suspects[0].queued_ns


Timed: TypeAlias = Request | Work | Line | Worker | Model
"""What there are timers for."""


class Core:
    """See the module's docstring.

    Args:
        models: the layout of each model, in the order that messages number them.
        max_slots_per_producer: see `PoolSettings`.
        max_delay_us, batch_timeout_s, recall_timeout_s, evict: see `PoolSettings`.
        owner_pid: the process that the pool is part of, which is never evicted; 0: none.
        gpus: how many GPUs the pool has; 0 on the CPU.
        name, epoch, arena_bytes, started_ns: for reports.
    """

    def __init__(
        self,
        models: Sequence[ModelLayout],
        *,
        max_slots_per_producer: int = 0,
        max_delay_us: int = 0,
        batch_timeout_s: float = 0.0,
        recall_timeout_s: float = 0.0,
        evict: bool = False,
        owner_pid: int = 0,
        gpus: int = 0,
        name: str = "default",
        epoch: int = 1,
        arena_bytes: int = 0,
        started_ns: int = 0,
    ) -> None:
        self.models = [
            Model(index, layout, producer_cap(layout, max_slots_per_producer)) for index, layout in enumerate(models)
        ]
        self._max_delay_ns = max_delay_us * 1000
        self.batch_timeout_ns = int(batch_timeout_s * 1e9)
        self.recall_timeout_ns = int(recall_timeout_s * 1e9)
        self.evicts = evict
        self.owner_pid = owner_pid
        self.gpus = gpus
        self.name, self.epoch, self.arena_bytes, self.started_ns = name, epoch, arena_bytes, started_ns
        self.producers: dict[int, Producer] = {}
        self.workers: dict[int, Worker] = {}
        self.serving: list[Worker] = []  # those that may be sent work
        self._timers: list[tuple[int, int, Timed]] = []
        self._mail: dict[int, list[m.FromBroker]] = {}
        self._actions: list[Action] = []
        self.now_ns = started_ns
        self._next_lease = 1
        self._next_batch = 1
        self._next_timer = 0
        self._prune_at = PRUNE_TIMERS
        self.draining = False
        self._drained = False
        self.urgent = 0  # interactive works that are queued
        self.suspects = 0  # groups of work that must run alone, waiting or running
        self.violations = 0
        self._events = 0
        self._report, self._reported_at = b"", -1
        self.max_waiting = MAX_WAITING_REQUESTS
        self._event_handlers: dict[type[Any], Callable[[Any], None]] = {
            ProducerJoined: self._producer_joined,
            WorkerJoined: self._worker_joined,
            ProducerClosed: self._producer_closed,
            ProducerEnded: self._producer_ended,
            WorkerEnded: self._worker_ended,
            Drain: self._drain,
        }
        self._from_producer: dict[type[Any], Callable[[Producer, Any], None]] = {
            m.Lease: self._lease,
            m.Submit: self._submit,
            m.Release: self._release,
            m.Cancel: self._cancel,
            m.Status: self._status,
            m.Bye: self._producer_bye,
        }
        self._from_worker: dict[type[Any], Callable[[Worker, Any], None]] = {
            m.Ready: self._ready,
            m.Finished: self._finished,
            m.Failed: self._failed,
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
            self.now_ns = now_ns
            self._events += 1
            self._event_handlers[type(event)](event)

    def take(self) -> tuple[dict[int, list[m.FromBroker]], list[Action]]:
        """What was decided since the last time: messages for each peer, in order, and what else is to be done."""
        mail, self._mail = self._mail, {}
        actions, self._actions = self._actions, []
        return mail, actions

    def next_timer_ns(self) -> int | None:
        """When a `TurnEnded` is due even if nothing else happens."""
        return self._timers[0][0] if self._timers else None

    def _send(self, peer: int, message: m.FromBroker) -> None:
        mail = self._mail.get(peer)
        if mail is None:
            self._mail[peer] = [message]
        else:
            mail.append(message)

    def _start_timer(self, when_ns: int, what: Timed) -> None:
        self._next_timer += 1
        heapq.heappush(self._timers, (when_ns, self._next_timer, what))
        if len(self._timers) >= self._prune_at:  # far deadlines of work that ended long ago would pile up
            self._timers = [timer for timer in self._timers if self._is_due(timer[2])]
            heapq.heapify(self._timers)
            self._prune_at = max(PRUNE_TIMERS, 2 * len(self._timers))

    @staticmethod
    def _is_due(what: Timed) -> bool:
        """Whether a timer still has something to do."""
        if isinstance(what, Request):
            return not what.over
        if isinstance(what, (Worker, Model)):
            return what.watched
        return isinstance(what, Line) or what.lease.states[what.at] == State.QUEUED

    def receive(self, peer: int, messages: Iterable[m.ToBroker], now_ns: int) -> None:
        """Take what a peer sent, as so many events of `Received`."""
        self.now_ns = now_ns
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
                        raise _Refused(m.BAD_MESSAGE, f"a producer may not send {type(message).__name__}")
                    handler(producer, message)
                elif worker is not None:  # else its end was handled before this, its last, message
                    worker_handler = self._from_worker.get(type(message))
                    if worker_handler is None:
                        raise _Refused(m.BAD_MESSAGE, f"a worker may not send {type(message).__name__}")
                    worker_handler(worker, message)
            except _Refused as refused:
                if refused.code == m.BAD_MESSAGE:
                    self.violations += 1
                self._send(peer, m.Error(refused.code, str(refused), refused.request))
            except IllegalTransition as error:
                self.refuse(peer, str(error))

    def refuse(self, peer: int, text: str) -> None:
        """What a peer sent was no message."""
        self.violations += 1
        self._send(peer, m.Error(m.BAD_MESSAGE, text))

    def _producer_bye(self, _producer: Producer, _message: m.Bye) -> None:
        """Said out of courtesy; what counts is the end of its lifeline."""

    def _worker_bye(self, worker: Worker, message: m.Bye) -> None:
        """It gets no more work; what it has goes back when its process has ended.  Its first reason is the cause."""
        if worker.said is None:
            worker.said = message.text
            self._stop_serving(worker)

    def _stop_serving(self, worker: Worker) -> None:
        if worker in self.serving:
            self.serving.remove(worker)

    # ------------------------------------------------------------------ peers

    def _producer_joined(self, event: ProducerJoined) -> None:
        self.producers[event.peer] = Producer(event.peer, len(self.models), event.pid)
        self._send(event.peer, m.Welcome(self.epoch, event.peer, [model.cap for model in self.models]))

    def _worker_joined(self, event: WorkerJoined) -> None:
        self.workers[event.peer] = Worker(event.peer, event.pid)
        self._send(event.peer, m.Welcome(self.epoch, event.peer, []))

    def _ready(self, worker: Worker, message: m.Ready) -> None:
        if worker.lanes:
            raise _Refused(m.BAD_MESSAGE, "Ready was said before")
        if message.gpu is not None:
            self._check_gpu(message.gpu)
        worker.device, worker.lanes, worker.gpu = message.device, message.lanes, message.gpu
        if worker.said is None:
            self.serving.append(worker)
        self._actions.append(WorkerReady(worker.peer))

    def _check_gpu(self, gpu: int) -> None:
        if gpu >= self.gpus:
            raise _Refused(m.BAD_MESSAGE, f"GPU {gpu} of a pool with {self.gpus} GPUs, which are counted from 0")

    def _producer_closed(self, event: ProducerClosed) -> None:
        """Drop what it queued and keep its slots: its process, or a child of it, may still write to them."""
        producer = self.producers.get(event.peer)
        if producer is None or producer.closed:
            return
        producer.closed = True
        self._forget_requests(producer)
        for work in self._unqueue(producer):
            move(work.lease.states, SlotEvent.DROP, work.at, work.count)
        self._forget_if_empty(producer)

    def _producer_ended(self, event: ProducerEnded) -> None:
        producer = self.producers.get(event.peer)
        if producer is None:
            return
        producer.closed = True
        self._forget_requests(producer)
        self._unqueue(producer)
        for lease in list(producer.leases.values()):
            lease.orphaned = True
            before = bytes(lease.states)
            move(lease.states, SlotEvent.ABANDON, 0, lease.count)
            for at, (was, state) in enumerate(zip(before, lease.states, strict=True)):
                if was and not state:
                    self._free(lease, at, 1)
        self._forget_if_empty(producer)

    def _forget_requests(self, producer: Producer) -> None:
        for model in self.models:
            for request in model.requests():
                if request.producer is producer:
                    request.end()

    def _unqueue(self, producer: Producer) -> list[Work]:
        """Take everything that `producer` has queued out of the queues."""
        removed = []
        for model in self.models:
            removed += self._withdraw(model, lambda work: work.lease.producer is producer)
        return removed

    def _withdraw(self, model: Model, chosen: Callable[[Work], bool]) -> list[Work]:
        """Take the chosen works out of the queues and from among the suspects; they are still QUEUED."""
        removed = []
        for line in model.lines:
            queued = [work for work in line.queue if chosen(work)]
            if queued:
                line.queue.remove(set(queued))
                removed += queued
            if len(line.urgent) and (urgent := [work for work in line.urgent if chosen(work)]):
                line.urgent.remove(set(urgent))
                self.urgent -= len(urgent)
                removed += urgent
            if line.suspects:
                for suspect in line.suspects:
                    removed += [work for work in suspect.works if chosen(work)]
                    suspect.works = [work for work in suspect.works if not chosen(work)]
                self.suspects -= sum(not suspect.works for suspect in line.suspects)
                line.suspects = deque(suspect for suspect in line.suspects if suspect.works)
        return removed

    def _forget_if_empty(self, producer: Producer) -> None:
        if producer.closed and not producer.leases and producer.peer in self.producers:
            del self.producers[producer.peer]
            self._actions.append(Forget(producer.peer))

    def _worker_ended(self, event: WorkerEnded) -> None:
        worker = self.workers.pop(event.peer, None)
        if worker is None:
            return
        self._stop_serving(worker)
        worker.watched = False
        how = f"{worker.said} ({event.reason})" if worker.said else event.reason
        for batch in worker.batches.values():
            self._retry(batch, m.WORKER_DIED, f"the worker ended: {how}", counts=batch.alone)
        self._actions.append(Forget(event.peer))

    # ------------------------------------------------------------------ leases

    def _lease(self, producer: Producer, message: m.Lease) -> None:
        request = message.request
        if message.model >= len(self.models):
            raise _Refused(m.BAD_MESSAGE, f"there is no model {message.model}", request)
        model = self.models[message.model]
        if message.count > model.cap:
            raise _Refused(
                m.TOO_LARGE,
                f"{message.count} slots were asked for and one client may hold {model.cap} of model "
                f"{model.layout.spec.name!r}; ask for fewer, or start the pool with more --slots",
                request,
            )
        if self.draining:
            raise _Refused(m.CLOSING, "the pool is stopping and grants no more slots", request)
        if message.wait_ns != 0 and producer.waiting >= self.max_waiting:
            raise _Refused(
                m.BUSY,
                f"{producer.waiting} requests of this client wait for slots, and more may not: ask for several slots "
                "in one request (lease_many), or release results first",
                request,
            )
        if message.wait_ns == 0:
            self._lease_now(producer, model, message)
            return
        deadline = 0 if message.wait_ns is None else self.now_ns + message.wait_ns
        waiting = Request(producer, model, request, message.count, deadline, message.priority)
        (model.urgent if message.priority else model.waiting).append(waiting)
        if deadline:
            self._start_timer(deadline, waiting)

    def _lease_now(self, producer: Producer, model: Model, message: m.Lease) -> None:
        """Grant at once or refuse.  Those who came before go first, unless only their own cap holds them up.

        An interactive one passes by the bulk ones, in its turn.
        """
        may = self._may_hold(producer, model, message.count)
        if may and (model.waiting or model.urgent):
            self._serve_waiting(model)
            may = self._may_go_first(producer, model, message)
        if not (may and self._grant(producer, model, message.request, message.count)):
            raise _Refused(m.BUSY, self._busy_text(producer, model, message.count), message.request)

    def _may_go_first(self, producer: Producer, model: Model, message: m.Lease) -> bool:
        """Whether nobody who waits goes before one that asks now."""
        if not self._may_hold(producer, model, message.count) or self._is_any_short(model.urgent):
            return False
        if self._is_any_short(model.waiting):
            if not message.priority or model.overtaken >= OVERTAKES or model.ring.free < message.count:
                return False
            model.overtaken += 1
        return True

    def _is_short(self, model: Model) -> bool:
        """Whether somebody waits for room, and not only below its own cap."""
        return self._is_any_short(model.urgent) or self._is_any_short(model.waiting)

    def _is_any_short(self, requests: Iterable[Request]) -> bool:
        return any(not one.over and self._may_hold(one.producer, one.model, one.count) for one in requests)

    @staticmethod
    def _may_hold(producer: Producer, model: Model, count: int) -> bool:
        """Whether `count` slots more leave the producer within its cap."""
        return producer.held[model.index] + count <= model.cap

    def _busy_text(self, producer: Producer, model: Model, count: int, idle: str = "") -> str:
        held = producer.held[model.index]
        return (
            f"{count} slots of model {model.layout.spec.name!r} did not come free in time: {model.ring.free} of "
            f"{model.layout.slots} are free and this client holds {held} of at most {model.cap}{idle}; "
            "release results sooner (kept arrays keep their slots), wait longer, or start the pool with more --slots"
        )

    def _serve_waiting(self, model: Model) -> None:
        """Grant in order of arrival, interactive requests first, but see `OVERTAKES`.

        One that is at its own cap is passed by; one that lacks room blocks the rest, of either class.
        """
        passed: tuple[list[Request], list[Request]] = ([], [])
        while True:
            request = self._first(model.urgent, passed[1]) if model.urgent else None
            bulk = self._first(model.waiting, passed[0])
            if bulk is not None and (request is None or model.overtaken >= OVERTAKES):
                request = bulk
            if request is None:
                model.short_ns = 0
                break
            if not self._grant(request.producer, model, request.request, request.count):
                self._lacks_room(request)
                break
            (model.waiting if request is bulk else model.urgent).popleft()
            request.end()
            model.overtaken = 0 if request is bulk else model.overtaken + (bulk is not None)
        model.waiting.extendleft(reversed(passed[0]))
        model.urgent.extendleft(reversed(passed[1]))

    def _first(self, waiting: deque[Request], passed: list[Request]) -> Request | None:
        """The first request that is not at its own cap; those before it go to `passed`."""
        while waiting:
            request = waiting[0]
            if not request.over:
                if self._may_hold(request.producer, request.model, request.count):
                    return request
                passed.append(request)
            waiting.popleft()
        return None

    def next_request(self, model: Model) -> Request | None:
        """The one that `_serve_waiting` would grant now, had it room."""
        bulk, urgent = (
            next((one for one in waiting if not one.over and self._may_hold(one.producer, model, one.count)), None)
            for waiting in (model.waiting, model.urgent)
        )
        return bulk if urgent is None or (bulk is not None and model.overtaken >= OVERTAKES) else urgent

    def _lacks_room(self, request: Request) -> None:
        """Recall what others hold idle, once for each request, and look after it until nobody waits."""
        model = request.model
        if not request.recalled:
            request.recalled = True
            self._recall(model, besides=request.producer)
        if self.recall_timeout_ns and not model.short_ns:
            model.short_ns = self.now_ns
            if not model.watched:
                model.watched = True
                self._start_timer(self.now_ns + self.recall_timeout_ns, model)

    def _recall(self, model: Model, besides: Producer) -> None:
        """Ask the others for slots that they hold and have not submitted."""
        for producer in self.producers.values():
            if producer is not besides and producer.held[model.index] and not producer.closed:
                self._send(producer.peer, m.Recall(model.index))

    def _grant(self, producer: Producer, model: Model, request: int, count: int) -> bool:
        """Grant slots if the ring has them."""
        runs = model.ring.take(count)
        if runs is None:
            return False
        leases = []
        segment = model.layout.segment
        for first, length in runs:
            lease = LeaseRecord(self._next_lease, producer, model, first, length)
            if not request:
                lease.spare = True
                model.spares += length
            self._next_lease += 1
            producer.leases[lease.id] = lease
            leases.append((lease.id, m.SlotRun(segment, first, length)))
        producer.held[model.index] += count
        producer.active_ns[model.index] = self.now_ns
        self._send(producer.peer, m.Grant(request, model.index, leases))
        return True

    def _find(self, producer: Producer, message: m.Submit | m.Release | m.Cancel) -> LeaseRecord:
        lease = producer.leases.get(message.lease)
        if lease is None:
            raise _Refused(m.BAD_MESSAGE, f"lease {message.lease} is not yours, or was released")
        if message.first + message.count > lease.count:
            raise _Refused(
                m.BAD_MESSAGE, f"slots {message.first} to {message.first + message.count} of a lease of {lease.count}"
            )
        return lease

    def _release(self, producer: Producer, message: m.Release) -> None:
        lease = self._find(producer, message)
        move(lease.states, SlotEvent.RELEASE, message.first, message.count)
        self._free(lease, message.first, message.count)
        producer.active_ns[lease.model.index] = self.now_ns
        if producer.closed:
            self._forget_if_empty(producer)

    def _free(self, lease: LeaseRecord, at: int, count: int) -> None:
        """Give slots back to the ring; their states are FREE already."""
        model = lease.model
        model.ring.give_back(lease.first + at, count)
        self._use_spare(lease)
        lease.producer.held[model.index] -= count
        lease.live -= count
        if not lease.live:
            del lease.producer.leases[lease.id]

    @staticmethod
    def _use_spare(lease: LeaseRecord) -> None:
        if lease.spare:
            lease.spare = False
            lease.model.spares -= lease.count

    # ------------------------------------------------------------------ work

    def _submit(self, producer: Producer, message: m.Submit) -> None:
        lease = self._find(producer, message)
        model = lease.model
        count, items = message.count, message.items
        if message.seq <= lease.seq:
            raise _Refused(m.BAD_MESSAGE, f"seq {message.seq} after {lease.seq} of lease {lease.id}")
        if not (count - 1) * model.items_per_slot < items <= count * model.items_per_slot:
            raise _Refused(
                m.BAD_MESSAGE,
                f"{items} items in {count} slots of {model.items_per_slot}: all but the last slot must be full",
            )
        if message.again > model.cap:
            raise _Refused(m.BAD_MESSAGE, f"again {message.again} is above the cap of {model.cap}")
        gpu = message.gpu
        if gpu is not None:
            self._check_gpu(gpu)
        move(lease.states, SlotEvent.SUBMIT, message.first, count)
        lease.seq = message.seq
        if lease.spare:
            self._use_spare(lease)
        producer.active_ns[model.index] = now_ns = self.now_ns
        deadline = 0 if message.deadline_ns is None else now_ns + max(1, message.deadline_ns)
        seq, again, priority = message.seq, message.again, message.priority
        work = Work(lease, message.first, count, items, seq, now_ns, deadline, again, gpu=gpu, priority=priority)
        line = model.line(gpu)
        if priority:
            line.urgent.add(work)
            self.urgent += 1
        else:
            line.queue.add(work)
        if deadline:
            self._start_timer(deadline, work)

    def _cancel(self, producer: Producer, message: m.Cancel) -> None:
        """Drop the works that lie wholly within what is named; too late is no error."""
        lease = producer.leases.get(message.lease)
        if lease is None:
            return
        end = message.first + message.count
        mine = self._withdraw(
            lease.model, lambda w: w.lease is lease and message.first <= w.at and w.at + w.count <= end
        )
        for work in sorted(mine, key=lambda work: work.at):
            move(lease.states, SlotEvent.DROP, work.at, work.count)
            self._end(work, m.CANCELLED, "it was cancelled before it was dispatched")

    def _end(self, work: Work, status: int, text: str = "", times: tuple[int, int, int, int] = (0, 0, 0, 0)) -> None:
        """Tell the producer that slots, which are DONE, ended; `times` are queue, copy-in, compute, copy-out."""
        lease = work.lease
        producer, model = lease.producer, lease.model
        totals = model.totals
        if status == m.OK:
            totals.items += work.items
        else:
            totals.failed_items += work.items
        producer.active_ns[model.index] = self.now_ns
        self._send(producer.peer, m.Done(lease.id, work.at, work.count, work.seq, status, *times, text))

    def _grant_again(self, work: Work) -> None:
        """Grant the slots that a Submit asked for in advance, if nobody goes short by it."""
        model, producer, count = work.lease.model, work.lease.producer, work.again
        if (
            not ((model.waiting or model.urgent) and self._is_short(model))
            and not self.draining
            and not producer.closed
            and model.ring.free - count >= model.layout.slots // SURPLUS
            and 2 * (model.spares + count) <= model.layout.slots - model.cap
            and self._may_hold(producer, model, count)
        ):
            self._grant(producer, model, 0, count)

    def _finished(self, worker: Worker, message: m.Finished) -> None:
        batch = self._take_back(worker, message)
        self.suspects -= batch.alone
        totals = batch.model.totals
        batches = message.batches
        totals.batches += batches
        totals.runs += batch.runs + batches - 1
        totals.gathered_items += message.gathered_items
        totals.copy_in_ns += message.copy_in_ns
        totals.compute_ns += message.compute_ns
        totals.copy_out_ns += message.copy_out_ns
        took_ns = message.copy_in_ns + message.compute_ns + message.copy_out_ns
        batch.model.run_ns += (took_ns // batches - batch.model.run_ns) // 8
        for work in batch.works:
            lease = work.lease
            if lease.orphaned:
                self._free_orphan(work)
                continue
            queue_ns = batch.dispatched_ns - work.queued_ns
            totals.queue_ns += queue_ns * work.items
            if work.priority:
                totals.urgent_items += work.items
                totals.urgent_queue_ns += queue_ns * work.items
            move(lease.states, SlotEvent.FINISH, work.at, work.count)
            self._end(work, m.OK, "", (queue_ns, message.copy_in_ns, message.compute_ns, message.copy_out_ns))
            if work.again:
                self._grant_again(work)

    def _free_orphan(self, work: Work) -> None:
        move(work.lease.states, SlotEvent.ORPHAN, work.at, work.count)
        self._free(work.lease, work.at, work.count)
        self._forget_if_empty(work.lease.producer)

    def _failed(self, worker: Worker, message: m.Failed) -> None:
        self._retry(self._take_back(worker, message), m.ENGINE_FAILED, message.text, counts=True)

    def _take_back(self, worker: Worker, message: m.Finished | m.Failed) -> Batch:
        """The batch that a worker answers for; it has it no more."""
        batch = worker.batches.get(message.batch)
        if batch is None or batch.attempt != message.attempt:
            raise _Refused(m.BAD_MESSAGE, f"batch {message.batch}, attempt {message.attempt}, is not running here")
        if batch is next(iter(worker.batches.values())):
            worker.oldest_ns = self.now_ns  # the next one had to wait for it
        del worker.batches[batch.id]
        return batch

    def _retry(self, batch: Batch, status: int, text: str, *, counts: bool) -> None:
        """Put a batch back: in halves, each to run alone, down to one slot, which fails after `MAX_ATTEMPTS`.

        Args:
            counts: whether the failure is one that a slot which ran alone is to blame for.
        """
        model = batch.model
        model.totals.retries += 1
        self.suspects -= batch.alone
        works = []
        for work in batch.works:
            if work.lease.orphaned:
                self._free_orphan(work)
            elif work.lease.producer.closed:
                move(work.lease.states, SlotEvent.FINISH, work.at, work.count)
            else:
                works.append(work)
        if not works:
            return
        if len(works) == 1 and works[0].count == 1 and counts:
            work = works[0]
            work.attempts += 1
            if work.attempts >= MAX_ATTEMPTS:
                move(work.lease.states, SlotEvent.FINISH, work.at, work.count)
                self._end(work, status, f"{text} (tried alone {work.attempts} times)"[:4096])
                return
        for group in halves(works, model.items_per_slot):
            for work in group:
                move(work.lease.states, SlotEvent.RETRY, work.at, work.count)
                if work.deadline_ns:  # a half has no timer yet, and the whole's may have been thrown away
                    self._start_timer(work.deadline_ns, work)
            batch.line.suspects.append(Suspect(group, batch.attempt + 1))
            self.suspects += 1

    # ------------------------------------------------------------------ the turn

    def _drain(self, _event: Drain) -> None:
        self.draining = True
        for model in self.models:
            for request in model.requests():
                text = "the pool is stopping and grants no more slots"
                request.end()  # its timer must not answer it again
                self._send(request.producer.peer, m.Error(m.CLOSING, text, request.request))
            model.waiting.clear()
            model.urgent.clear()

    def end_turn(self, now_ns: int) -> None:
        """All that has arrived was received: make batches of it, and see to what is due."""
        self.now_ns = now_ns
        self._events += 1
        if self._timers and self._timers[0][0] <= self.now_ns:
            self._fire_timers()
        for model in self.models:
            if model.waiting or model.urgent or model.short_ns:
                self._serve_waiting(model)
        if self.suspects:
            self._dispatch_suspect()
        self._dispatch()
        if self.draining and not self._drained and not self._has_work():
            self._drained = True
            self._actions.append(Drained())

    def _has_work(self) -> bool:
        return (
            self.urgent > 0
            or any(line.queue.items or line.suspects for model in self.models for line in model.lines)
            or any(worker.batches for worker in self.workers.values())
        )

    def _fire_timers(self) -> None:
        dropped: dict[Model, set[Work]] = {}
        late_requests = []
        while self._timers and self._timers[0][0] <= self.now_ns:
            when_ns, _, what = heapq.heappop(self._timers)
            if isinstance(what, Request):
                if not what.over:
                    what.end()
                    late_requests.append(what)
            elif isinstance(what, Worker):
                self._look_after(what, late_ns=self.now_ns - when_ns)
            elif isinstance(what, Model):
                self._look_for_idle(what, late_ns=self.now_ns - when_ns)
            elif isinstance(what, Work) and self._is_due(what):
                dropped.setdefault(what.lease.model, set()).add(what)
        if late_requests:
            self._refuse_late(late_requests)
        for model, late in dropped.items():
            for work in self._withdraw(model, late.__contains__):
                self._expire(work)

    def _refuse_late(self, requests: list[Request]) -> None:
        """Answer those who have waited long enough; the text says who holds what they waited for."""
        holders = {model: recall.holders(self, model) for model in {request.model for request in requests}}
        for one in requests:
            idle = recall.blame(self, holders[one.model], one.producer)
            text = self._busy_text(one.producer, one.model, one.count, idle)
            self._send(one.producer.peer, m.Error(m.BUSY, text, one.request))
        for model in holders:  # those behind one that lacks room would else be kept as long as that waits
            model.waiting = deque(request for request in model.waiting if not request.over)
            model.urgent = deque(request for request in model.urgent if not request.over)

    def _look_for_idle(self, model: Model, late_ns: int) -> None:
        """See what became of a recall, as long as anybody waits for room; a broker that stood still blames nobody."""
        if not model.short_ns or not self._is_short(model):
            model.watched = False
            return
        if late_ns > STOOD_STILL_NS:
            model.short_ns = self.now_ns
        self._actions += recall.overdue(self, model)
        self._start_timer(recall.next_look_ns(self, model), model)

    def _look_after(self, worker: Worker, late_ns: int) -> None:
        """Have a worker ended whose oldest batch runs for too long, else look again when it would be too long."""
        if not (worker.watched and worker.batches):
            worker.watched = False
            return
        if late_ns > STOOD_STILL_NS:
            worker.oldest_ns = self.now_ns
        due_ns = worker.oldest_ns + self.batch_timeout_ns
        if due_ns > self.now_ns:
            self._start_timer(due_ns, worker)
            return
        worker.watched = False
        text = (
            f"it hung: a batch ran for more than {self.batch_timeout_ns / 1e9:g} s, so the pool killed it; "
            "if batches may take that long, start the pool with a longer --batch-timeout-s"
        )
        if worker.said is None:
            worker.said = text
            self._stop_serving(worker)
        self._actions.append(Hung(worker.peer, text))

    def excuse_peers(self, now_ns: int) -> None:
        """Nobody read for a while what peers said: batches and recalls have the whole time-out from now on."""
        for worker in self.workers.values():
            worker.oldest_ns = now_ns
        for model in self.models:
            if model.short_ns:
                model.short_ns = now_ns

    def _expire(self, work: Work) -> None:
        move(work.lease.states, SlotEvent.DROP, work.at, work.count)
        waited_ms = (self.now_ns - work.queued_ns) / 1e6
        self._end(work, m.DEADLINE, f"its deadline passed after {waited_ms:.1f} ms in the queue")

    def _dispatch(self) -> None:
        """Make batches while there is a worker to take one."""
        while (choice := self._choose_by_class() if self.urgent else self._choose()) is not None:
            worker, line, leads = choice
            works = self._take(worker, line, leads=leads) if self.urgent else line.queue.take(self._next_items(line))
            late = [work for work in works if work.deadline_ns and work.deadline_ns <= self.now_ns]
            for work in late:
                self._expire(work)
                works.remove(work)
            if works:
                self._run(worker, line, works, attempt=0, alone=False)

    def _next_items(self, line: Line) -> int:
        """Most items to send now: a batch, or several brief ones, which are dealt out by guided self-scheduling.

        Each worker gets half of its share of what is left, so that all end at about the same time (Polychronopoulos
        and Kuck, IEEE Transactions on Computers, 1987); one that is alone gets all.
        """
        model, workers = line.model, len(self.serving)
        max_batch = model.max_batch
        share = line.queue.items // max_batch // (2 * workers if workers > 1 else 1)
        if share < 2 or 2 * model.run_ns > BRIEF_NS:
            return max_batch
        together = min(share, BRIEF_NS // max(1, model.run_ns), MAX_TOGETHER)
        return together * (max_batch - max_batch % model.items_per_slot)

    def _take(self, worker: Worker, line: Line, *, leads: bool) -> list[Work]:
        """The line's next batch, which begins with interactive work if that `leads`, and is filled with the other."""
        queues = (line.urgent, line.queue) if leads else (line.queue, line.urgent)
        bulk = [one for model in self.models for one in model.lines if len(one.queue) and one.may_run_on(worker)]
        oldest = min(bulk, key=_oldest_ns, default=None)
        waiting = len(line.urgent)
        works, is_filled = take_both(*queues, line.model.max_batch)
        self.urgent += len(line.urgent) - waiting
        has_oldest = not leads or oldest is None or (oldest is line and is_filled)
        worker.overtaken = 0 if has_oldest else worker.overtaken + 1
        return works

    def _choose(self) -> tuple[Worker, Line, bool] | None:
        """The worker and the line of the next batch: of the oldest work that some worker takes now.

        A worker takes the oldest work that may run on it, and while it must not have that yet, nothing younger: else
        full batches could overtake one that is not full for ever.  While there are suspects, one worker is kept for
        them.
        """
        due = self._due()
        if not due:
            return None
        if len(due) == 1 and not self.suspects:  # as in most turns of most pools
            worker = self._pick_worker(due[0], self.serving)
            return None if worker is None else (worker, due[0], False)
        placed = self._place(due, self._ready_for(due))
        return None if placed is None else (*placed, False)

    def _due(self) -> list[Line]:
        """Lines of which bulk work may go, the one with the oldest first."""
        due = []
        for model in self.models:
            for line in model.lines:
                if line.queue.items and not (self._max_delay_ns and self._held_back(line)):
                    due.append(line)  # noqa: PERF401  # a comprehension costs twice as much, each turn
        if len(due) > 1:
            due.sort(key=_oldest_ns)
        return due

    def _ready_for(self, due: list[Line]) -> list[Worker]:
        """Workers that may be sent work, those last that alone may run some of it; the one for suspects is left out."""
        workers = self.serving
        if wanted := {line.gpu for line in due if line.gpu is not None} if len(due) > 1 else ():
            workers = sorted(workers, key=lambda one: one.gpu in wanted)  # what has a choice leaves these alone
        if self.suspects and (kept := self._next_suspect()) is not None:
            workers = [one for one in workers if one is not kept[0]]
        return workers

    def _place(self, due: list[Line], workers: list[Worker], *, urgent: bool = False) -> tuple[Worker, Line] | None:
        for line in due:
            worker = self._pick_worker(line, workers, urgent)
            if worker is not None:
                return worker, line
            if line.gpu is None:
                break
            workers = [one for one in workers if one.gpu != line.gpu]
        return None

    def _choose_by_class(self) -> tuple[Worker, Line, bool] | None:
        """The same while there is interactive work; also whether that leads the batch.

        Workers that owe bulk a batch take nothing else.  All others take interactive work first: also in place of a
        full batch of bulk work that would be sent ahead of a lane, since behind it there would be no lane for long.
        """
        bulk = self._due()
        urgent = [line for model in self.models for line in model.lines if len(line.urgent)]
        urgent.sort(key=_oldest_urgent_ns)
        free: list[Worker] = []
        owing: list[Worker] = []
        for worker in self._ready_for(urgent + bulk):
            owes = worker.overtaken >= OVERTAKES and any(line.may_run_on(worker) for line in bulk)
            (owing if owes else free).append(worker)
        if owing and (placed := self._place(bulk, owing)) is not None:
            return (*placed, False)
        if (placed := self._place(urgent, free, urgent=True)) is not None:
            return (*placed, True)
        if (placed := self._place(bulk, free)) is None:
            return None
        worker, line = placed
        for other in urgent:
            if other.may_run_on(worker):
                return worker, other, True
        return worker, line, False

    @staticmethod
    def _pick_worker(line: Line, workers: list[Worker], urgent: bool = False) -> Worker | None:
        """The worker with the fewest batches among those that may have the line's next one.

        A full batch is sent even if all lanes are busy, one ahead of them, so that the worker need not wait for us.
        One that is not full had better grow here than wait in the device, which computes one batch while it copies
        another: a worker with several lanes gets it while it has less than these two, and one with a single lane is
        sent it ahead if the model takes long to run.  With interactive work in it, it may use any free lane.
        """
        full = line.has_full_batch
        single = 1 + (line.model.run_ns >= SEND_AHEAD_NS)
        best = None
        for worker in workers:
            lanes, batches = worker.lanes, len(worker.batches)
            credit = lanes + 1 if full else (lanes if urgent else 2) if lanes > 1 else single
            if batches < credit and line.may_run_on(worker) and (best is None or batches < len(best.batches)):
                best = worker
        return best

    def _held_back(self, line: Line) -> bool:
        """Whether a batch that is not full should wait for `max_delay_us` to pass."""
        if line.queue.items >= line.model.max_batch or self.draining:
            return False
        until = line.queue.oldest.queued_ns + self._max_delay_ns
        if until <= self.now_ns:
            return False
        if line.hold_until_ns != until:
            line.hold_until_ns = until
            self._start_timer(until, line)
        return True

    def _next_suspect(self) -> tuple[Worker, Line] | None:
        """The worker that is kept for suspects, and the line of which it runs, or will run, the first.

        It is one that runs a suspect now, else the first that may run the oldest, unless work pinned to its GPU is
        older still: others may be able to run the suspect, and none but it that work.
        """
        for worker in self.workers.values():
            for batch in worker.batches.values():
                if batch.alone:
                    return worker, batch.line
        lines = [line for model in self.models for line in model.lines if line.suspects]
        for line in sorted(lines, key=_oldest_suspect_ns):
            for worker in self.serving:
                if line.may_run_on(worker) and not self._has_pinned(worker.gpu, _oldest_suspect_ns(line)):
                    return worker, line
        return None

    def _has_pinned(self, gpu: int | None, before_ns: int) -> bool:
        """Whether work that is pinned to this GPU was queued before."""
        return gpu is not None and any(
            line.gpu == gpu and len(queue) and queue.oldest.queued_ns < before_ns
            for model in self.models
            for line in model.lines
            for queue in (line.queue, line.urgent)
        )

    def _dispatch_suspect(self) -> None:
        following = self._next_suspect()
        if following is not None and not following[0].batches:
            worker, line = following
            suspect = line.suspects.popleft()
            self._run(worker, line, suspect.works, suspect.attempt, alone=True)

    def _run(self, worker: Worker, line: Line, works: list[Work], attempt: int, *, alone: bool) -> None:
        model = line.model
        for work in works:
            move(work.lease.states, SlotEvent.DISPATCH, work.at, work.count)
        rows = rows_of(works, model.items_per_slot, model.layout.segment)
        batch = Batch(self._next_batch, line, works, len(rows), attempt, alone, self.now_ns)
        self._next_batch += 1
        if not worker.batches:
            worker.oldest_ns = self.now_ns
        worker.batches[batch.id] = batch
        if self.batch_timeout_ns and not worker.watched:
            worker.watched = True
            self._start_timer(worker.oldest_ns + self.batch_timeout_ns, worker)
        self._send(worker.peer, m.Run(batch.id, attempt, model.index, rows))

    # ------------------------------------------------------------------ figures

    def _status(self, producer: Producer, message: m.Status) -> None:
        if self._events != self._reported_at + 1:  # thousands in one frame must not take seconds
            self._report = msgspec.json.encode(report(self))
        self._reported_at = self._events
        self._send(producer.peer, m.Report(message.request, self._report))
