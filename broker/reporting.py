"""The pool's figures, read off the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtpool.ipc.report import ModelReport, PoolReport, WorkerReport

from .records import Model, Totals
from .slots import State

if TYPE_CHECKING:
    from .core import Core


def report(core: Core) -> PoolReport:
    """The pool's figures now."""
    return PoolReport(
        name=core.name,
        epoch=core.epoch,
        uptime_s=(core.now_ns - core.started_ns) / 1e9,
        arena_bytes=core.arena_bytes,
        producers=len(core.producers),
        violations=core.violations,
        draining=core.draining,
        workers=tuple(
            WorkerReport(worker.pid, worker.device, worker.lanes, len(worker.batches), worker.gpu)
            for worker in core.workers.values()
            if worker.lanes
        ),
        models=tuple(_report_model(core, model) for model in core.models),
    )


def _report_model(core: Core, model: Model) -> ModelReport:
    layout, totals = model.layout, model.totals
    states = bytearray()
    for producer in core.producers.values():
        for lease in producer.leases.values():
            if lease.model is model:
                states += lease.states
    return ModelReport(
        name=layout.spec.name,
        slots=layout.slots,
        items_per_slot=layout.items_per_slot,
        max_batch=layout.max_batch,
        slot_bytes=layout.slot_bytes,
        free=model.ring.free,
        leased=states.count(State.LEASED),
        queued=states.count(State.QUEUED),
        running=states.count(State.RUNNING),
        done=states.count(State.DONE),
        waiting=sum(not request.over for request in model.waiting),
        # A worker that lies must not make a sum that JSON's 64 bits cannot hold, and so end the broker.
        **{name: min(getattr(totals, name), 2**63 - 1) for name in Totals.__slots__},
    )
