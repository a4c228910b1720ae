"""The pool's figures, as `trtpool status` and `client.status()` give them.

Counts are totals since the pool started; ``_ns`` are sums of durations over items or batches, so that a
rate or a mean over any span is the difference of two reports.
"""

from __future__ import annotations

import msgspec

from .histogram import Histogram


class ClassReport(msgspec.Struct, frozen=True):
    """What was done for one class of requests of a model.

    Attributes:
        queued: slots in the queue now.
        waiting: lease requests that wait for slots.
        items: items that ended with a result.
        queue_ns: sum over these, from arrival until dispatch; `queue_ns / items` is the mean time in the queue.
    """

    queued: int
    waiting: int
    items: int
    queue_ns: int


class DeviceReport(msgspec.Struct, frozen=True):
    """What one model did on one GPU, or on the CPU.  Times are nanoseconds.

    Attributes:
        gpu: the pool's number for it; None on the CPU.  In pools of very many models and GPUs there is one for all, -1.
        items, batches: that ended with a result.
        sizes: of batches, in items less one.
        queue: of items, from arrival until their batch was sent to a worker.
        dispatch: of batches, with the worker and not on the device: messages, and the wait for a lane.
        copy_in, compute, copy_out: of batches on the device.  Those that nothing was copied for are left out.
        latency: of items, from arrival to end, as the broker saw it.
        copied_in_bytes, copied_out_bytes: what those batches took to the GPU and from it; 0 on the CPU.
    """

    gpu: int | None
    items: int
    batches: int
    sizes: Histogram
    queue: Histogram
    dispatch: Histogram
    copy_in: Histogram
    compute: Histogram
    copy_out: Histogram
    latency: Histogram
    copied_in_bytes: int = 0
    copied_out_bytes: int = 0


class ModelReport(msgspec.Struct, frozen=True):
    """One model: how its slots stand now, and what has been done.

    Attributes:
        free, leased, queued, running, done: slots in each state now.
        waiting: lease requests that wait for slots.
        items: items that ended with a result.
        failed_items: items that ended with an error of any kind.
        batches: batches finished.
        runs: runs of adjacent slots in those batches; `runs / batches` near 1 means that batches are slices.
        gathered_items: items copied through scratch memory because they were small and scattered.
        retries: batches that went back to the queue.
        queue_ns: sum over items, from arrival until dispatch.
        copy_in_ns, compute_ns, copy_out_ns: sums over batches.
        overdue: recalls that a client did not answer in time; see `HolderReport`.
        evicted: processes that were ended for that.
        interactive, bulk: the classes, which together make up the figures above.
        leases: nanoseconds that requests for slots waited.
        devices: what was done where, and how its times were spread.
        path: the file that its engines were loaded from, as the pool sees it.
    """

    name: str
    slots: int
    items_per_slot: int
    max_batch: int
    slot_bytes: int
    free: int
    leased: int
    queued: int
    running: int
    done: int
    waiting: int
    items: int
    failed_items: int
    batches: int
    runs: int
    gathered_items: int
    retries: int
    queue_ns: int
    copy_in_ns: int
    compute_ns: int
    copy_out_ns: int
    overdue: int
    evicted: int
    interactive: ClassReport
    bulk: ClassReport
    leases: Histogram = Histogram()
    devices: tuple[DeviceReport, ...] = ()
    path: str = ""


class WorkerReport(msgspec.Struct, frozen=True):
    """One worker that is ready; `gpu` is the pool's number for its GPU, None on the CPU.

    `generation` tells engines apart that a reload exchanged: below the pool's, it finishes what it had before; above,
    it stands by.
    """

    pid: int
    device: str
    lanes: int
    batches_in_flight: int
    gpu: int | None = None
    generation: int = 0


class HolderReport(msgspec.Struct, frozen=True):
    """What one client holds of one model.

    Attributes:
        pid: its process; 0: not known.
        model: the model's name.
        leased, queued, running, done: slots in each state now.
        idle_s: seconds since it was last granted, submitted, released or told the end of anything of that model.
        overdue: others wait for slots, and it has done nothing about what it holds for `recall_timeout_s`.
    """

    pid: int
    model: str
    leased: int
    queued: int
    running: int
    done: int
    idle_s: float
    overdue: bool


class ClientReport(msgspec.Struct, frozen=True):
    """One client.

    Attributes:
        peer: the broker's number for it, never reused.
        pid: its process; 0: not known.
        items: of its that ended with a result.
        leases: it has now.
        slots: it holds now, of all models.
        waiting: its requests that wait for slots.
    """

    peer: int
    pid: int
    items: int
    leases: int
    slots: int
    waiting: int


class PoolReport(msgspec.Struct, frozen=True):
    """The whole pool.

    Attributes:
        epoch: how many brokers it has had.
        worker_ends: workers that ended, for whatever reason; others were started.
        holders: the few clients that hold the most slots, those that are overdue first.
        clients: the few that most was done for.
        generation: of the engines that answer; rises with each reload.
    """

    name: str
    epoch: int
    uptime_s: float
    arena_bytes: int
    producers: int
    violations: int
    draining: bool
    workers: tuple[WorkerReport, ...]
    models: tuple[ModelReport, ...]
    holders: tuple[HolderReport, ...] = ()
    clients: tuple[ClientReport, ...] = ()
    worker_ends: int = 0
    generation: int = 0
