"""A core as bytes, and back: where a new broker starts from; see `journal`.

Everything that decides what a core does next is kept, in its order, so that a restored core answers every later
event as the one that was saved would have.  What is not kept are requests that were answered and timers of what is
over, which do nothing, and settings.  Virtual time, of which differences alone count, starts anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from trtpool.ipc.histogram import Histogram
from trtpool.ipc.messages import Shapes

from .batching import Work
from .core import Core
from .meters import Meter, SavedMeter
from .records import Batch, LeaseRecord, Line, Model, Producer, Request, Suspect, Totals, Worker
from .timers import is_due

LARGEST: Final = 2**63 - 1
"""Sums of what a worker claims may not fit the 64 bits that are written; reports cut them there too."""


class _Saved(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Base of what is written."""


class _Lease(_Saved, frozen=True):
    id: int
    model: int
    first: int
    count: int
    live: int
    seq: int
    spare: bool
    orphaned: bool
    states: bytes


class _Work(_Saved, frozen=True):
    lease: int
    at: int
    count: int
    items: int
    seq: int
    queued_ns: int
    deadline_ns: int
    again: int
    gpu: int | None
    passed: int
    attempts: int
    priority: int
    shapes: Shapes
    shared: bytes


class _Batch(_Saved, frozen=True):
    id: int
    model: int
    gpu: int | None
    works: list[_Work]
    runs: int
    attempt: int
    alone: bool
    dispatched_ns: int
    expected_ns: int


class _Producer(_Saved, frozen=True):
    peer: int
    pid: int
    closed: bool
    items: int
    active_ns: list[int]
    overdue_ns: list[int]
    evicted_ns: int
    leases: list[_Lease]


class _Worker(_Saved, frozen=True):
    peer: int
    pid: int
    device: str
    lanes: int
    gpu: int | None
    said: str | None
    oldest_ns: int
    watched: bool
    overtaken: int
    generation: int
    batches: list[_Batch]


class _Request(_Saved, frozen=True):
    producer: int
    request: int
    count: int
    deadline_ns: int
    priority: int
    asked_ns: int


class _Line(_Saved, frozen=True):
    gpu: int | None
    hold_until_ns: int
    queue: list[_Work]
    urgent: list[_Work]
    suspects: list[tuple[int, list[_Work]]]


class _Model(_Saved, frozen=True):
    cursor: int
    run_ns: int
    finish: int
    overtaken: int
    short_ns: int
    watched: bool
    evict_ns: int
    totals: list[int]
    meters: list[SavedMeter]
    lease_waits: Histogram
    path: str
    waiting: list[_Request]
    unasked: list[int]
    lines: list[_Line]


class _Core(_Saved, frozen=True):
    """`timers` have when, their order, of what kind, and which of that kind, in the order of saving."""

    next_lease: int
    next_batch: int
    next_timer: int
    now_ns: int
    draining: bool
    drained: bool
    violations: int
    worker_ends: int
    generation: int
    producers: list[_Producer]
    workers: list[_Worker]
    serving: list[int]
    models: list[_Model]
    timers: list[tuple[int, int, int, int]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Core).decode


def save(core: Core) -> bytes:
    """All of `core`; it must have no actions that were not taken."""
    places = _places(core)
    timers = [
        (when_ns, order, *places[id(what)])
        for when_ns, order, what in sorted(core.timers.heap)
        if id(what) in places and is_due(what)
    ]
    return _encode(
        _Core(
            *(core.leasing.next_lease, core.dispatch.next_batch, core.timers.started, core.now_ns),
            *(core.books.draining, core.drained, core.violations, core.worker_ends),
            core.generation,
            [
                _Producer(
                    *(one.peer, one.pid, one.closed, min(one.items, LARGEST), one.active_ns, one.overdue_ns),
                    *(one.evicted_ns, _save_leases(one)),
                )
                for one in core.producers.values()
            ],
            [_save_worker(one) for one in core.workers.values()],
            [worker.peer for worker in core.books.serving],
            [_save_model(model, core.books.shares.virtual) for model in core.models],
            timers,
        )
    )


def restore(core: Core, saved: bytes | memoryview) -> None:
    """Make `core`, which must be new and of the same settings, what the saved one was.

    Raises:
        msgspec.MsgspecError: these bytes are not what `save` wrote.
    """
    data = _decode(saved)
    leases: dict[int, LeaseRecord] = {}
    for one in data.producers:
        producer = core.producers[one.peer] = Producer(one.peer, len(core.models), one.pid)
        producer.closed = one.closed
        producer.active_ns, producer.overdue_ns = list(one.active_ns), list(one.overdue_ns)
        producer.evicted_ns, producer.items = one.evicted_ns, one.items
        for lease in one.leases:
            leases[lease.id] = _restore_lease(core, producer, lease)
    for model, kept in zip(core.models, data.models, strict=True):
        _restore_model(core, model, kept, leases)
    for worker in data.workers:
        core.workers[worker.peer] = _restore_worker(core, worker, leases)
    core.books.serving = [core.workers[peer] for peer in data.serving]
    core.generation = data.generation
    core.books.retiring = [
        one for one in core.workers.values() if one.lanes and one.said is None and one.generation < data.generation
    ]
    core.leasing.next_lease, core.dispatch.next_batch = data.next_lease, data.next_batch
    core.books.now_ns, core.books.draining, core.drained = data.now_ns, data.draining, data.drained
    core.violations, core.worker_ends = data.violations, data.worker_ends
    core.books.urgent = sum(len(line.urgent) for model in core.models for line in model.lines)
    core.books.suspects = sum(len(line.suspects) for model in core.models for line in model.lines) + sum(
        batch.alone for worker in core.workers.values() for batch in worker.batches.values()
    )
    things = _things(core)
    timers = [(when_ns, order, things[kind][index]) for when_ns, order, kind, index in data.timers]
    core.timers.restore(timers, data.next_timer)


def _things(core: Core) -> tuple[list[Any], ...]:
    """What a timer may be of, in an order that a restored core has too.

    Requests, works that wait, lines, workers, models.
    """
    lines = [line for model in core.models for line in model.lines]
    works = [work for line in lines for queue in (line.queue, line.urgent) for work in queue]
    works += [work for line in lines for suspect in line.suspects for work in suspect.works]
    requests = [one for model in core.models for one in model.requests()]
    return requests, works, lines, list(core.workers.values()), core.models


def _places(core: Core) -> dict[int, tuple[int, int]]:
    return {id(one): (kind, index) for kind, many in enumerate(_things(core)) for index, one in enumerate(many)}


# ---------------------------------------------------------------------- parts, saved


def _save_leases(producer: Producer) -> list[_Lease]:
    return [
        _Lease(
            *(one.id, one.model.index, one.first, one.count, one.live, one.seq, one.spare, one.orphaned),
            bytes(one.states),
        )
        for one in producer.leases.values()
    ]


def _save_works(works: Sequence[Work]) -> list[_Work]:
    return [
        _Work(
            *(one.lease.id, one.at, one.count, one.items, one.seq, one.queued_ns, one.deadline_ns, one.again),
            *(one.gpu, one.passed, one.attempts, one.priority, *one.variant),
        )
        for one in works
    ]


def _save_worker(worker: Worker) -> _Worker:
    batches = [
        _Batch(
            *(one.id, one.model.index, one.line.gpu, _save_works(one.works)),
            *(one.runs, one.attempt, one.alone),
            *(one.dispatched_ns, one.expected_ns),
        )
        for one in worker.batches.values()
    ]
    return _Worker(
        *(worker.peer, worker.pid, worker.device, worker.lanes, worker.gpu, worker.said),
        *(worker.oldest_ns, worker.watched, worker.overtaken, worker.generation, batches),
    )


def _save_model(model: Model, virtual: int) -> _Model:
    return _Model(
        model.ring.cursor,
        min(model.run_ns, LARGEST),
        max(-LARGEST, min(model.finish - virtual, LARGEST)),
        *(model.overtaken, model.short_ns, model.watched, model.evict_ns),
        [min(getattr(model.totals, name), LARGEST) for name in Totals.__slots__],
        [meter.save(gpu) for gpu, meter in model.meters.items()],
        Histogram.of(model.lease_waits, min(model.lease_wait_ns, LARGEST)),
        model.path,
        [
            _Request(
                *(one.producer.peer, one.request, one.count, one.deadline_ns, one.priority),
                one.asked_ns,
            )
            for one in model.requests()
        ],
        [producer.peer for producer in model.unasked],
        [
            _Line(
                *(line.gpu, line.hold_until_ns, _save_works(list(line.queue)), _save_works(list(line.urgent))),
                [(suspect.attempt, _save_works(suspect.works)) for suspect in line.suspects],
            )
            for line in model.lines
        ],
    )


# ---------------------------------------------------------------------- parts, restored


def _restore_lease(core: Core, producer: Producer, saved: _Lease) -> LeaseRecord:
    model = core.models[saved.model]
    lease = LeaseRecord(saved.id, producer, model, saved.first, saved.count)
    lease.live, lease.seq, lease.spare, lease.orphaned = saved.live, saved.seq, saved.spare, saved.orphaned
    lease.states = bytearray(saved.states)
    producer.leases[lease.id] = lease
    producer.held[model.index] += lease.live
    if lease.spare:
        model.spares += lease.count
    model.ring.mark(lease.first, lease.states)
    return lease


def _restore_works(saved: list[_Work], leases: dict[int, LeaseRecord]) -> list[Work]:
    works = []
    for one in saved:
        times = (one.seq, one.queued_ns, one.deadline_ns, one.again)
        lease, variant = leases[one.lease], (one.shapes, one.shared)
        work = Work(lease, one.at, one.count, one.items, *times, gpu=one.gpu, priority=one.priority, variant=variant)
        work.passed, work.attempts = one.passed, one.attempts
        works.append(work)
    return works


def _restore_model(core: Core, model: Model, saved: _Model, leases: dict[int, LeaseRecord]) -> None:
    model.ring.cursor = saved.cursor
    model.run_ns, model.finish, model.overtaken = saved.run_ns, saved.finish, saved.overtaken
    model.short_ns, model.watched, model.evict_ns = saved.short_ns, saved.watched, saved.evict_ns
    for name, total in zip(Totals.__slots__, saved.totals, strict=True):
        setattr(model.totals, name, total)
    model.meters = {kept.gpu: Meter(kept) for kept in saved.meters}
    model.lease_waits, model.lease_wait_ns = saved.lease_waits.dense(), saved.lease_waits.total
    for one in saved.waiting:
        producer = core.producers[one.producer]
        request = Request(producer, model, one.request, one.count, one.deadline_ns, one.priority, one.asked_ns)
        model.add_request(request)
    model.path = saved.path
    model.unasked = dict.fromkeys(core.producers[peer] for peer in saved.unasked)
    for queued in saved.lines:
        line = model.line(queued.gpu)
        line.hold_until_ns = queued.hold_until_ns
        for work in _restore_works(queued.queue, leases):
            line.queue.add(work)
        for work in _restore_works(queued.urgent, leases):
            line.urgent.add(work)
        line.suspects = deque(Suspect(_restore_works(works, leases), attempt) for attempt, works in queued.suspects)


def _restore_worker(core: Core, saved: _Worker, leases: dict[int, LeaseRecord]) -> Worker:
    worker = Worker(saved.peer, saved.pid, saved.generation)
    worker.device, worker.lanes, worker.gpu, worker.said = saved.device, saved.lanes, saved.gpu, saved.said
    worker.oldest_ns, worker.watched, worker.overtaken = saved.oldest_ns, saved.watched, saved.overtaken
    for one in saved.batches:
        line: Line = core.models[one.model].line(one.gpu)
        works = _restore_works(one.works, leases)
        worker.batches[one.id] = Batch(
            one.id,
            line,
            works,
            one.runs,
            one.attempt,
            alone=one.alone,
            now_ns=one.dispatched_ns,
            expected_ns=one.expected_ns,
        )
    return worker
