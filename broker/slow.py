"""Requests that took long, told with their story: where their time went, and which batch they were in.

One line a second at most, about the slowest of a batch; it says how many others there were.  What a client waited for
its slots, and how late it reads, only the client knows: it logs its own, see `trtpool.ipc.inflight`.
"""

from __future__ import annotations

from typing import Final

from trtpool.ipc import messages as m
from trtpool.ipc.logs import work_id

from .batching import Work
from .books import Books
from .events import Slow
from .records import Batch, Worker

EVERY_NS: Final = 1_000_000_000
"""Between two lines: a pool that is slow for everybody must not be slower for telling so."""


class SlowRequests:
    """See the module.

    Args:
        limit_ns: from the arrival of a request to its end, from which it is slow; 0: none is.
    """

    def __init__(self, books: Books, limit_ns: int) -> None:
        self._books = books
        self.limit_ns = limit_ns
        self._next_ns = 0
        self._untold = 0

    def look(self, worker: Worker, batch: Batch, finished: m.Finished) -> None:
        """A batch has ended; `limit_ns` is not 0."""
        now_ns = self._books.now_ns
        slow = [
            work for work in batch.works if now_ns - work.queued_ns >= self.limit_ns and not work.lease.producer.closed
        ]
        if not slow:
            return
        if now_ns < self._next_ns:
            self._untold += len(slow)
            return
        slowest = min(slow, key=lambda work: work.queued_ns)
        others = self._untold + len(slow) - 1
        self._untold, self._next_ns = 0, now_ns + EVERY_NS
        text = _story(worker, batch, finished, slowest, now_ns)
        if others:
            text += f"; {others} more were slow since the last that was told of"
        self._books.actions.append(Slow(slowest.lease.producer.peer, text))


def _story(worker: Worker, batch: Batch, finished: m.Finished, work: Work, now_ns: int) -> str:
    lease, model, batches = work.lease, batch.model, finished.batches
    device = tuple(spent // batches for spent in (finished.copy_in_ns, finished.compute_ns, finished.copy_out_ns))
    with_worker_ns = now_ns - batch.dispatched_ns
    phases = {
        "queue": batch.dispatched_ns - work.queued_ns,
        "dispatch": max(0, with_worker_ns - sum(device)),
        **dict(zip(("copy in", "compute", "copy out"), device, strict=True)),
    }
    times = ", ".join(f"{name} {spent / 1e6:.3f}" for name, spent in phases.items())
    place = f"worker process {worker.pid}" + ("" if worker.gpu is None else f" on GPU {worker.gpu}")
    items = sum(one.items for one in batch.works)
    name = work_id(lease.id, work.seq)
    return (
        f"slow: process {lease.producer.pid or '?'} waited {(now_ns - work.queued_ns) / 1e6:.3f} ms for work "
        f"{name}, {work.items} items of {model.layout.spec.name}: {times} ms; in batch {batch.id} "
        f"of {items} items in {batch.runs} runs, attempt {batch.attempt + 1}, {place}"
    )
