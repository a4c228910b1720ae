"""What the core keeps of leases, peers, batches and models.

::

    Producer --< LeaseRecord --< Work (queued, or in a batch)
    Worker --< Batch --< Work
    Model: ring of slots, waiting requests, those of the interactive class apart
    Model --< Line (one for any GPU, one for each GPU that work is pinned to): a queue for each class, suspects
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter
from typing import Final

from trtpool.ipc.histogram import BUCKETS
from trtpool.ipc.layout import ModelLayout
from trtpool.ipc.settings import BULK

from .batching import Work, WorkQueue
from .copied import CopiedBytes
from .meters import NOTES_BYTES, Meter
from .slots import Ring
from .variants import VariantQueue

OVERTAKES: Final = 4
"""Interactive work goes first, but of the batches that a worker is sent while older bulk work waits, at most so many in
a row: the next begins with bulk work whose turn it is.  The same holds for grants of a model's slots.  So bulk keeps a
fifth, and more while interactive batches have room left."""


CACHED_BYTES: Final = 1 << 20
"""A ring of slots may begin again when so many bytes were granted, and a batch: what a processor's own cache holds."""


class LeaseRecord:
    """A producer's right to a run of slots.

    Attributes:
        states: one `State` a slot; FREE: released already.
        live: slots that were not released.
        spare: it was granted in advance, and nothing was done with it yet.
        orphaned: its producer's process has ended.
    """

    __slots__ = ("count", "first", "id", "live", "model", "orphaned", "producer", "seq", "spare", "states")

    def __init__(self, lease_id: int, producer: Producer, model: Model, first: int, count: int) -> None:
        self.id = lease_id
        self.producer = producer
        self.model = model
        self.first = first
        self.count = count
        self.live = count
        self.seq = -1
        self.spare = False
        self.orphaned = False
        self.states = bytearray(b"\x01" * count)

    def use_spare(self) -> None:
        """Something is done with what was granted in advance."""
        self.spare = False
        self.model.spares -= self.count


class Request:
    """A lease request that waits.

    Attributes:
        deadline_ns: 0: for ever.
        asked_ns: since when it waits.
        number: rises in order of arrival, among those of its model.
    """

    __slots__ = (
        "asked_ns", "count", "deadline_ns", "model", "number", "over", "priority", "producer", "request",
    )  # fmt: skip

    def __init__(
        self,
        producer: Producer,
        model: Model,
        request: int,
        count: int,
        deadline_ns: int,
        priority: int = BULK,
        asked_ns: int = 0,
    ) -> None:
        self.producer = producer
        self.model = model
        self.request = request
        self.count = count
        self.deadline_ns = deadline_ns
        self.priority = priority
        self.asked_ns = asked_ns
        self.over = False
        model.asked += 1
        self.number = model.asked
        producer.waiting += 1

    def end(self) -> None:
        """It was answered, or nobody waits for the answer."""
        self.over = True
        self.producer.waiting -= 1


_arrival = attrgetter("number")


class Producer:
    """A client.

    Attributes:
        pid: its process; 0: not known.
        held: its slots of each model.
        items: of its that ended with a result.
        active_ns: for each model, when it was last granted, submitted, released or told the end of anything.
        overdue_ns: for each model, when it was last found to hold slots that others waited for too long.
        evicted_ns: when its process was to be killed; 0: never.
        closed: its lifeline has ended.
        waiting: its requests that are not answered.
    """

    __slots__ = ("active_ns", "closed", "evicted_ns", "held", "items", "leases", "overdue_ns", "peer", "pid", "waiting")

    def __init__(self, peer: int, models: int, pid: int = 0) -> None:
        self.peer = peer
        self.pid = pid
        self.held = [0] * models
        self.items = 0
        self.active_ns = [0] * models
        self.overdue_ns = [0] * models
        self.evicted_ns = 0
        self.leases: dict[int, LeaseRecord] = {}
        self.closed = False
        self.waiting = 0

    def may_hold(self, model: Model, count: int) -> bool:
        """Whether `count` slots more leave it within its cap."""
        return self.held[model.index] + count <= model.cap


class Worker:
    """A worker process.

    Attributes:
        device, lanes, gpu: see `messages.Ready`; no lanes: it is not ready.
        batches: those it has been sent and not answered.
        said: why it must end, in its own words, or that it hung; None while it goes on.
        oldest_ns: since when the oldest of its batches has been that.
        watched: whether a timer will look at `oldest_ns`; there is one at most.
        overtaken: batches in a row that it was sent before older bulk work; see `OVERTAKES`.
        generation: of its engines; it serves if that is the core's.
    """

    __slots__ = (
        "batches", "device", "generation", "gpu", "lanes", "oldest_ns", "overtaken", "peer", "pid", "said", "watched",
    )  # fmt: skip

    def __init__(self, peer: int, pid: int, generation: int = 0) -> None:
        self.peer = peer
        self.pid = pid
        self.generation = generation
        self.device = ""
        self.lanes = 0
        self.gpu: int | None = None
        self.batches: dict[int, Batch] = {}
        self.said: str | None = None
        self.oldest_ns = 0
        self.watched = False
        self.overtaken = 0


class Batch:
    """Work of one line, sent to a worker together; `expected_ns` is what its model was charged for it."""

    __slots__ = ("alone", "attempt", "dispatched_ns", "expected_ns", "id", "line", "model", "runs", "works")

    def __init__(
        self,
        batch_id: int,
        line: Line,
        works: list[Work],
        runs: int,
        attempt: int,
        *,
        alone: bool,
        now_ns: int,
        expected_ns: int,
    ) -> None:
        self.id = batch_id
        self.line = line
        self.model = line.model
        self.works = works
        self.runs = runs
        self.attempt = attempt
        self.alone = alone
        self.dispatched_ns = now_ns
        self.expected_ns = expected_ns


class Suspect:
    """Work whose batch failed; it runs alone on a worker, in ever smaller groups, until the cause is found."""

    __slots__ = ("attempt", "works")

    def __init__(self, works: list[Work], attempt: int) -> None:
        self.works = works
        self.attempt = attempt

    @property
    def queued_ns(self) -> int:
        """When the oldest of it arrived."""
        return min(work.queued_ns for work in self.works)


class Line:
    """Work of one model that waits for one GPU, or for any worker.

    Attributes:
        gpu: the pool's number for the GPU that alone may run it; None: any worker.
        queue, urgent: bulk and interactive work.
        hold_until_ns: until when its oldest work last waited for a batch to fill.
    """

    __slots__ = ("gpu", "hold_until_ns", "model", "queue", "suspects", "urgent")

    def __init__(self, model: Model, gpu: int | None) -> None:
        self.model = model
        self.gpu = gpu
        queue = VariantQueue if model.varies else WorkQueue
        self.queue = queue(model.items_per_slot)
        self.urgent = queue(model.items_per_slot)
        self.suspects: deque[Suspect] = deque()
        self.hold_until_ns = 0

    @property
    def has_full_batch(self) -> bool:
        """Whether one slot more would not fit in the next batch."""
        queue, urgent = self.queue, self.urgent
        items = queue.items + urgent.items
        if self.model.varies and items:
            first = urgent.leading if len(urgent) else queue.leading
            items = queue.items_like(first) + urgent.items_like(first)
        return items > self.model.max_batch - self.model.items_per_slot

    def waiting(self) -> Iterator[Work]:
        """All its work that is QUEUED."""
        return chain(self.queue, self.urgent, *(suspect.works for suspect in self.suspects))

    def may_run_on(self, worker: Worker) -> bool:
        """Whether the worker is on the right GPU."""
        return self.gpu is None or self.gpu == worker.gpu


class Totals:
    """Running sums of one model; see `ModelReport`.  `urgent_items` and the like are of the interactive class alone."""

    __slots__ = (
        "batches", "compute_ns", "copy_in_ns", "copy_out_ns", "evicted", "failed_items", "gathered_items", "items",
        "overdue", "queue_ns", "retries", "runs", "urgent_items", "urgent_queue_ns",
    )  # fmt: skip

    def __init__(self) -> None:
        self.batches = self.runs = self.items = self.failed_items = self.retries = self.gathered_items = 0
        self.queue_ns = self.copy_in_ns = self.compute_ns = self.copy_out_ns = 0
        self.urgent_items = self.urgent_queue_ns = self.overdue = self.evicted = 0


class Model:
    """One model's slots and everything that waits for it.

    Attributes:
        lines: grows by one for each GPU that work is pinned to.
        meters: what was done, by the pool's number for the GPU, or None on the CPU.
        lease_waits, lease_wait_ns: how long requests for slots waited; a histogram, and its sum.
        waiting, urgent: bulk and interactive requests, in order of arrival.
        parked: requests that were found to be above their client's own cap, until it gives slots back.
        asked: requests that ever waited.
        unasked: clients that were granted slots since they were last sent a Recall.
        overtaken: interactive requests in a row that were granted before older bulk ones.
        short_ns: since when there has been somebody who found no room; 0: nobody waits for any.
        watched: whether a timer will look at `short_ns`; there is one at most.
        evict_ns: before this nobody is evicted.
        max_delay_ns: how long bulk work may wait for a batch to fill.
        weight, finish: its share of the workers, and how much of that it has had; see `shares`.
        varies: not all its work may share batches; see `variants`.
        copied: the bytes that its batches take to a GPU and back.
        path: the file that its engines were loaded from.
    """

    __slots__ = (
        "asked", "cap", "copied", "evict_ns", "finish", "index", "items_per_slot", "layout", "lease_wait_ns",
        "lease_waits", "lines", "max_batch", "max_delay_ns", "meters", "overtaken", "parked", "path", "ring", "run_ns",
        "segment", "short_ns", "spares", "totals", "unasked", "urgent", "varies", "waiting", "watched", "weight",
    )  # fmt: skip

    def __init__(self, index: int, layout: ModelLayout, cap: int, max_delay_ns: int = 0, weight: int = 1) -> None:
        self.index = index
        self.layout = layout
        self.segment = layout.segment
        self.cap = cap
        self.max_delay_ns = max_delay_ns
        self.weight = weight
        self.finish = 0
        self.items_per_slot = layout.items_per_slot
        self.max_batch = layout.max_batch
        self.varies = not layout.spec.is_uniform
        self.copied = CopiedBytes(layout.spec)
        self.path = layout.spec.path
        batch = -(-layout.max_batch // layout.items_per_slot)
        self.ring = Ring(layout.slots, batch, max(batch, CACHED_BYTES // layout.slot_bytes))
        self.lines = [Line(self, None)]
        self.waiting: deque[Request] = deque()
        self.urgent: deque[Request] = deque()
        self.parked: dict[Producer, list[Request]] = {}
        self.asked = 0
        self.unasked: dict[Producer, None] = {}
        self.overtaken = 0
        self.short_ns = 0
        self.watched = False
        self.evict_ns = 0
        self.spares = 0  # slots that were granted in advance, and that nothing was done with yet
        self.run_ns = 1_000_000  # of a batch, averaged over the last few; the first are taken for long
        self.totals = Totals()
        self.meters: dict[int | None, Meter] = {}
        self.lease_waits = [0] * BUCKETS
        self.lease_wait_ns = 0

    def meter(self, gpu: int | None) -> Meter:
        """Where to note what was done on a GPU, or on the CPU; it has room for a note."""
        meter = self.meters.get(gpu)
        if meter is None:
            meter = self.meters[gpu] = Meter()
        elif meter.at == NOTES_BYTES:
            meter.count()
        return meter

    def requests(self) -> list[Request]:
        """Those that wait and are not over, interactive ones first, each class in order of arrival."""
        found = [one for one in chain(self.urgent, self.waiting, *self.parked.values()) if not one.over]
        return sorted(found, key=lambda one: (-one.priority, one.number))

    def add_request(self, request: Request) -> None:
        """One that came just now waits for its turn."""
        (self.urgent if request.priority else self.waiting).append(request)

    def park(self, request: Request) -> None:
        """One that is above its client's own cap is looked at no more until `unpark`; it is in no queue any more."""
        self.parked.setdefault(request.producer, []).append(request)

    def unpark(self, producer: Producer) -> None:
        """A client gave slots back: those of its requests that its cap allows for now are at their places again."""
        parked = self.parked.pop(producer, ())
        room = self.cap - producer.held[self.index]
        above = []
        for request in parked:
            if request.count > room:
                above.append(request)
            else:
                bisect.insort(self.urgent if request.priority else self.waiting, request, key=_arrival)
        if above:
            self.parked[producer] = above

    def drop_requests(self) -> None:
        """Keep no request that is over."""
        self.waiting = deque(request for request in self.waiting if not request.over)
        self.urgent = deque(request for request in self.urgent if not request.over)
        parked = ((producer, [one for one in many if not one.over]) for producer, many in self.parked.items())
        self.parked = {producer: many for producer, many in parked if many}

    def is_short(self) -> bool:
        """Whether somebody waits for room, and not only below its own cap."""
        return first_short(self.urgent) is not None or first_short(self.waiting) is not None

    def next_request(self) -> Request | None:
        """The one that is granted next, once there is room; see `Leasing.serve_waiting`."""
        bulk, urgent = first_short(self.waiting), first_short(self.urgent)
        return bulk if urgent is None or (bulk is not None and self.overtaken >= OVERTAKES) else urgent

    def line(self, gpu: int | None) -> Line:
        """Where work for a GPU, or for any, waits."""
        for line in self.lines:
            if line.gpu == gpu:
                return line
        self.lines.append(Line(self, gpu))
        return self.lines[-1]


def first_short(requests: Iterable[Request]) -> Request | None:
    """The first that waits for room, and not only below its own cap."""
    return next((one for one in requests if not one.over and one.producer.may_hold(one.model, one.count)), None)


def producer_cap(layout: ModelLayout, asked: int) -> int:
    """Slots of a model that one producer may hold: `asked`, else what leaves over a quarter, and a batch if it can.

    That is at least half.  What is left over is also what can be granted in advance, see `leasing.SURPLUS`.
    """
    if asked:
        return min(asked, layout.slots)
    batch_slots = -(-layout.max_batch // layout.items_per_slot)
    return max(layout.slots - max(batch_slots, layout.slots // 4), -(-layout.slots // 2))
