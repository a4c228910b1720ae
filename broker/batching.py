"""From queued work to batches that are slices.

`WorkQueue.take` picks the next batch: the oldest work first, then what lies beside it in the arena, so that a
batch is one run of slots, or a few.  It looks at most `WINDOW_BATCHES` batches deep, and work that was passed
over `MAX_PASSED` times is taken in order of arrival, so a neighbour's luck never starves anyone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Final, TypeAlias

from trtpool.ipc import messages as m
from trtpool.ipc.settings import BULK

if TYPE_CHECKING:
    from .records import LeaseRecord

WINDOW_BATCHES: Final = 4
MAX_PASSED: Final = 8
MAX_WORKS: Final = 4096
"""Most works, and so most runs, in a batch: what a frame to a worker has room for."""

Variant: TypeAlias = tuple[m.Shapes, bytes]
"""Shapes of the items, and a digest of what is in shared inputs: a batch is of one variant; see `variants`."""

UNIFORM: Final[Variant] = ((), b"")
"""The one of all work of a model whose items are of one shape and share nothing."""


class Work:
    """Adjacent slots submitted together, or a part of them.

    Attributes:
        lease: whose.
        at: the first of them, counted in the lease.
        first: the first of them, counted in the model's slots.
        count, items: slots, and the items in them; all slots are full but the last.
        seq: the submission's number.
        queued_ns: when it arrived.
        deadline_ns: when it is dropped if still queued; 0: never.
        again: slots to grant to its producer when it is done.
        gpu: the pool's number for the GPU that alone may run it; None: any.
        priority: its class, see `trtpool.ipc.settings.PRIORITIES`.
        variant: what a batch-mate must have in common with it.
        passed: how often a younger one was taken before it.
        attempts: how often it ended a worker, or failed, alone.
    """

    __slots__ = (
        "again", "at", "attempts", "count", "deadline_ns", "first", "gpu", "items", "lease", "passed", "priority",
        "queued_ns", "seq", "variant",
    )  # fmt: skip

    def __init__(
        self,
        lease: LeaseRecord,
        at: int,
        count: int,
        items: int,
        seq: int,
        queued_ns: int,
        deadline_ns: int,
        again: int,
        *,
        gpu: int | None = None,
        priority: int = BULK,
        variant: Variant = UNIFORM,
    ) -> None:
        self.lease = lease
        self.at = at
        self.first = lease.first + at
        self.count = count
        self.items = items
        self.seq = seq
        self.queued_ns = queued_ns
        self.deadline_ns = deadline_ns
        self.again = again
        self.gpu = gpu
        self.priority = priority
        self.variant = variant
        self.passed = 0
        self.attempts = 0

    def split(self, count: int, items_per_slot: int) -> Work:
        """Cut the first `count` slots off, which become a Work of their own; this one keeps the rest."""
        items = count * items_per_slot
        times, kind = (self.queued_ns, self.deadline_ns), self.priority
        head = Work(
            self.lease, self.at, count, items, self.seq, *times, 0, gpu=self.gpu, priority=kind, variant=self.variant
        )
        head.attempts, head.passed = self.attempts, self.passed
        self.at += count
        self.first += count
        self.count -= count
        self.items -= head.items
        return head


def _slot_order(work: Work) -> int:
    return work.first


class WorkQueue:
    """Queued work of one model and one class, and for one GPU, or for any, oldest first."""

    def __init__(self, items_per_slot: int) -> None:
        self.items = 0
        self.slots = 0
        self._items_per_slot = items_per_slot
        self._works: deque[Work] = deque()

    def __len__(self) -> int:
        return len(self._works)

    def __iter__(self) -> Iterator[Work]:
        return iter(self._works)

    @property
    def oldest(self) -> Work:
        return self._works[0]

    @property
    def leading(self) -> Work:
        """The oldest of those that the next batch is taken from."""
        return self.oldest

    def add(self, work: Work) -> None:
        self._works.append(work)
        self.items += work.items
        self.slots += work.count

    def remove(self, gone: set[Work]) -> None:
        """Remove some works, wherever they stand."""
        kept = deque(work for work in self._works if work not in gone)
        self._reset(kept)

    def items_like(self, _work: Work) -> int:
        """Items that may be in a batch with this work."""
        return self.items

    def lead_oldest(self) -> None:
        """Have the next batch be that of the oldest work."""

    def lead_full(self, max_items: int) -> bool:
        """Have the next batch be a full one; whether there is any."""
        return self.items >= max_items

    def take_like(self, _work: Work, max_items: int, max_works: int) -> list[Work]:
        """Take what fills up a batch that this work is in; the queue may have nothing for it."""
        return self.take(max_items, max_works) if len(self) else []

    def take(self, max_items: int, max_works: int = MAX_WORKS) -> list[Work]:
        """Take the next batch, at most `max_items` items, in slot order.  The queue must not be empty.

        Only if there is room for less than a slot can there be nothing that fits.
        """
        works = self._works
        if self.items <= max_items and len(works) <= max_works:
            batch = sorted(works, key=_slot_order) if len(works) > 1 else list(works)
            self._works = deque()
            self.items = self.slots = 0
            return batch
        batch = self._take_window(max_items, max_works)
        batch.sort(key=_slot_order)
        for work in batch:
            self.items -= work.items
            self.slots -= work.count
        return batch

    def _take_window(self, max_items: int, max_works: int) -> list[Work]:
        window: list[Work] = []
        depth = 0
        while self._works and depth < WINDOW_BATCHES * max_items:
            work = self._works.popleft()
            window.append(work)
            depth += work.items
        starved = any(work.passed >= MAX_PASSED for work in window)
        order = window if starved else self._by_neighbourhood(window, max_items)
        batch, chosen = self._fill(order, max_items, max_works)
        youngest = max((index for index, work in enumerate(window) if work in chosen), default=0)
        for work in window[:youngest]:
            if work not in chosen:
                work.passed += 1
        self._works.extendleft(work for work in reversed(window) if work not in chosen)
        return batch

    def _by_neighbourhood(self, window: list[Work], max_items: int) -> list[Work]:
        """`window` with the oldest's neighbours first, then the next oldest's, and so on."""
        if self._is_slice(window, max_items):
            return window
        age = {work: index for index, work in enumerate(window)}
        chains = list(self._chains(sorted(window, key=_slot_order)))
        chains.sort(key=lambda chain: min(age[work] for work in chain))
        # Within a chain longer than a batch, start so that its oldest is in.
        order: list[Work] = []
        room = max_items
        for chain in chains:
            items = sum(work.items for work in chain)
            order += self._around_oldest(chain, age, room) if items > room > 0 else chain
            room -= items
        return order

    def _is_slice(self, window: list[Work], max_items: int) -> bool:
        """Whether the window begins with a batch of adjacent slots already, as a steady load does."""
        items = window[0].items
        for before, work in pairwise(window):
            if items >= max_items:
                break
            if not self.adjacent(before, work):
                return False
            items += work.items
        return True

    @staticmethod
    def _around_oldest(chain: list[Work], age: dict[Work, int], room: int) -> list[Work]:
        oldest = min(range(len(chain)), key=lambda index: age[chain[index]])
        start, items = oldest, sum(work.items for work in chain[oldest:])
        while start and items + chain[start - 1].items <= room:
            start -= 1
            items += chain[start].items
        return chain[start:] + chain[:start]

    def adjacent(self, before: Work, after: Work) -> bool:
        """Whether `after` goes on where `before`, full, ends."""
        return before.first + before.count == after.first and before.items == before.count * self._items_per_slot

    def _chains(self, works: Iterable[Work]) -> Iterator[list[Work]]:
        chain: list[Work] = []
        for work in works:
            if chain and not self.adjacent(chain[-1], work):
                yield chain
                chain = []
            chain.append(work)
        if chain:
            yield chain

    def _fill(self, order: list[Work], max_items: int, max_works: int) -> tuple[list[Work], set[Work]]:
        """The first works of `order` that fit, the last cut to fit; also as a set, without the cut one."""
        batch: list[Work] = []
        chosen: set[Work] = set()
        room = max_items
        for work in order[:max_works]:
            if work.items <= room:
                batch.append(work)
                chosen.add(work)
                room -= work.items
            elif room // self._items_per_slot:
                batch.append(work.split(room // self._items_per_slot, self._items_per_slot))
                break
            else:
                break
        return batch, chosen

    def _reset(self, works: deque[Work]) -> None:
        self._works = works
        self.items = sum(work.items for work in works)
        self.slots = sum(work.count for work in works)


def take_both(leading: WorkQueue, following: WorkQueue, max_items: int) -> tuple[list[Work], bool]:
    """Take a batch, in slot order, of one class, and fill what is left of it with the other.

    Returns also whether the oldest of the other is in it.  `leading` must not be empty.
    """
    batch = leading.take(max_items)
    room = max_items - sum(work.items for work in batch)
    if not (room and len(following) and len(batch) < MAX_WORKS):
        return batch, False
    is_oldest = following.oldest.variant == batch[0].variant
    filling = following.take_like(batch[0], room, MAX_WORKS - len(batch))
    return sorted(batch + filling, key=_slot_order), is_oldest and bool(filling)


def rows_of(batch: list[Work], items_per_slot: int, segment: int = 0) -> list[m.Rows]:
    """The batch, in slot order, as few runs as it can be."""
    rows: list[m.Rows] = []
    first = count = items = 0
    for work in batch:
        if count and first + count == work.first and items == count * items_per_slot:
            count += work.count
            items += work.items
            continue
        if count:
            rows.append(m.Rows(segment, first, count, items))
        first, count, items = work.first, work.count, work.items
    rows.append(m.Rows(segment, first, count, items))
    return rows


def halves(batch: list[Work], items_per_slot: int) -> list[list[Work]]:
    """Cut a batch of at least two slots in two, by slots; a batch of one stays whole."""
    slots = sum(work.count for work in batch)
    if slots < 2:
        return [batch]
    left: list[Work] = []
    room = slots // 2
    right = list(batch)
    while room:
        work = right[0]
        if work.count <= room:
            left.append(right.pop(0))
            room -= work.count
        else:
            left.append(work.split(room, items_per_slot))
            room = 0
    return [left, right]
