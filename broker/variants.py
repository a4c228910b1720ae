"""Work that may share a batch, and work that may not.

Where a model's items differ in shape, or share an input, a submission has a *variant*: the shapes of its items, and a
digest of what is in its shared inputs.  A batch is of one variant.  Its worker is told the shapes; nobody but clients
ever sees what the digest is of.

`VariantQueue` keeps a queue for each variant that waits.  The next batch is of the oldest work's variant, so none is
starved, whatever else comes; and as soon as there is a worker it goes, however few there are of it.  Only while the
oldest may still wait for its batch to fill (`max_delay_us`) does a variant that fills one go before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from .batching import MAX_WORKS, Variant, Work, WorkQueue


class VariantQueue(WorkQueue):
    """Queued work of any variants; see the module."""

    def __init__(self, items_per_slot: int) -> None:
        super().__init__(items_per_slot)
        self._queues: dict[Variant, WorkQueue] = {}
        self._count = 0
        self._oldest: WorkQueue | None = None  # looked for when it is not known
        self._lead: WorkQueue | None = None  # goes before the oldest

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Work]:
        return chain.from_iterable(self._queues.values())

    @property
    def oldest(self) -> Work:
        return self._find_oldest().oldest

    @property
    def leading(self) -> Work:
        return (self._lead or self._find_oldest()).oldest

    def add(self, work: Work) -> None:
        queue = self._queues.get(work.variant)
        if queue is None:
            queue = self._queues[work.variant] = WorkQueue(self._items_per_slot)
        queue.add(work)
        self.items += work.items
        self.slots += work.count
        self._count += 1

    def remove(self, gone: set[Work]) -> None:
        """Remove some works, wherever they stand."""
        for variant in {work.variant for work in gone}:
            if (queue := self._queues.get(variant)) is not None:
                queue.remove(gone)
                self._settle(variant)
        self._recount()

    def items_like(self, work: Work) -> int:
        queue = self._queues.get(work.variant)
        return 0 if queue is None else queue.items

    def lead_oldest(self) -> None:
        self._lead = None

    def lead_full(self, max_items: int) -> bool:
        full = [queue for queue in self._queues.values() if queue.items >= max_items]
        self._lead = min(full, key=_age, default=None)
        return self._lead is not None

    def take(self, max_items: int, max_works: int = MAX_WORKS) -> list[Work]:
        return self._take_from(self.leading.variant, max_items, max_works)

    def take_like(self, work: Work, max_items: int, max_works: int) -> list[Work]:
        return self._take_from(work.variant, max_items, max_works) if work.variant in self._queues else []

    def _take_from(self, variant: Variant, max_items: int, max_works: int) -> list[Work]:
        batch = self._queues[variant].take(max_items, max_works)
        self._settle(variant)
        self._recount()
        return batch

    def _find_oldest(self) -> WorkQueue:
        if self._oldest is None:
            self._oldest = min(self._queues.values(), key=_age)
        return self._oldest

    def _settle(self, variant: Variant) -> None:
        """Something was taken from a variant's queue."""
        self._oldest = self._lead = None
        if not len(self._queues[variant]):
            del self._queues[variant]

    def _recount(self) -> None:
        queues = self._queues.values()
        self.items = sum(queue.items for queue in queues)
        self.slots = sum(queue.slots for queue in queues)
        self._count = sum(map(len, queues))


def _age(queue: WorkQueue) -> tuple[int, int, int]:
    """Sorts queues by their oldest work; of what came at once, by lease, which a broker that takes over knows too."""
    work = queue.oldest
    return work.queued_ns, work.lease.id, work.at
