"""The pool's figures, read off the core."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, Final

from trtpool.ipc.histogram import Histogram
from trtpool.ipc.report import (
    ClassReport,
    ClientReport,
    DeviceReport,
    HolderReport,
    ModelReport,
    PoolReport,
    WorkerReport,
)

from .meters import HISTOGRAMS, Meter
from .recall import is_overdue
from .records import Model, Producer, Totals
from .slots import State

if TYPE_CHECKING:
    from .core import Core

LARGEST: Final = 2**63 - 1
"""A worker that lies must not make a sum that JSON's 64 bits cannot hold, and so end the broker."""

MAX_HOLDERS: Final = 16
MAX_CLIENTS: Final = 32
"""Clients in a report, which must fit in a frame."""

MAX_METERS: Final = 64
"""Histograms of so many models and GPUs; of more, those of a model are taken together."""


def report(core: Core) -> PoolReport:
    """The pool's figures now."""
    return PoolReport(
        name=core.name,
        epoch=core.epoch,
        uptime_s=(core.now_ns - core.started_ns) / 1e9,
        arena_bytes=core.arena_bytes,
        producers=len(core.producers),
        violations=core.violations,
        draining=core.books.draining,
        workers=tuple(
            WorkerReport(worker.pid, worker.device, worker.lanes, len(worker.batches), worker.gpu, worker.generation)
            for worker in core.workers.values()
            if worker.lanes
        ),
        models=tuple(_report_model(core, model) for model in core.models),
        holders=_holders(core),
        clients=_clients(core),
        worker_ends=core.worker_ends,
        generation=core.generation,
    )


def _holders(core: Core) -> tuple[HolderReport, ...]:
    held = [
        (is_overdue(model, producer), producer.held[model.index], producer, model)
        for producer in core.producers.values()
        for model in core.models
        if producer.held[model.index]
    ]
    held.sort(key=lambda one: one[:2], reverse=True)
    return tuple(_holder(core, producer, model) for _, _, producer, model in held[:MAX_HOLDERS])


def _clients(core: Core) -> tuple[ClientReport, ...]:
    busiest = heapq.nlargest(MAX_CLIENTS, core.producers.values(), key=lambda one: one.items)
    return tuple(
        ClientReport(one.peer, one.pid, min(one.items, LARGEST), len(one.leases), sum(one.held), one.waiting)
        for one in busiest
    )


def _devices(core: Core, model: Model) -> tuple[DeviceReport, ...]:
    devices = [_device(model, gpu, meter) for gpu, meter in model.meters.items()]
    if len(devices) > 1 and sum(len(one.meters) for one in core.models) > MAX_METERS:
        return (_together(devices),)
    return tuple(devices)


def _device(model: Model, gpu: int | None, meter: Meter) -> DeviceReport:
    meter.count()
    into, out = meter.copied_in_bytes, meter.copied_out_bytes
    if gpu is not None and not model.varies:
        more_in, more_out = model.copied.of(meter.items)
        into, out = into + more_in, out + more_out
    figures: dict[str, Any] = {name: meter.histogram(name) for name in HISTOGRAMS}
    figures |= {"copied_in_bytes": min(into, LARGEST), "copied_out_bytes": min(out, LARGEST)}
    return DeviceReport(gpu, meter.items, meter.batches, **figures)


def _together(devices: list[DeviceReport]) -> DeviceReport:
    counts = ("items", "batches", "copied_in_bytes", "copied_out_bytes")
    figures: dict[str, Any] = {name: min(sum(getattr(one, name) for one in devices), LARGEST) for name in counts}
    figures |= {name: sum((getattr(one, name) for one in devices), Histogram()) for name in HISTOGRAMS}
    return DeviceReport(-1, **figures)


def _holder(core: Core, producer: Producer, model: Model) -> HolderReport:
    states = bytearray().join(lease.states for lease in producer.leases.values() if lease.model is model)
    return HolderReport(
        pid=producer.pid,
        model=model.layout.spec.name,
        leased=states.count(State.LEASED),
        queued=states.count(State.QUEUED),
        running=states.count(State.RUNNING),
        done=states.count(State.DONE),
        idle_s=(core.now_ns - producer.active_ns[model.index]) / 1e9,
        overdue=is_overdue(model, producer),
    )


def _report_model(core: Core, model: Model) -> ModelReport:
    layout, totals = model.layout, model.totals
    states = bytearray()
    for producer in core.producers.values():
        for lease in producer.leases.values():
            if lease.model is model:
                states += lease.states
    figures = {name: min(getattr(totals, name), LARGEST) for name in Totals.__slots__}
    urgent = ClassReport(
        queued=sum(work.count for line in model.lines for work in line.waiting() if work.priority),
        waiting=sum(request.priority > 0 for request in model.requests()),
        items=figures.pop("urgent_items"),
        queue_ns=figures.pop("urgent_queue_ns"),
    )
    queued, waiting = states.count(State.QUEUED), sum(1 for _ in model.requests())
    return ModelReport(
        name=layout.spec.name,
        slots=layout.slots,
        items_per_slot=layout.items_per_slot,
        max_batch=layout.max_batch,
        slot_bytes=layout.slot_bytes,
        free=model.ring.free,
        leased=states.count(State.LEASED),
        queued=queued,
        running=states.count(State.RUNNING),
        done=states.count(State.DONE),
        waiting=waiting,
        **figures,
        interactive=urgent,
        bulk=ClassReport(
            queued=queued - urgent.queued,
            waiting=waiting - urgent.waiting,
            items=figures["items"] - urgent.items,
            queue_ns=figures["queue_ns"] - urgent.queue_ns,
        ),
        leases=Histogram.of(model.lease_waits, min(model.lease_wait_ns, LARGEST)),
        devices=_devices(core, model),
        path=model.path,
    )
