"""Workers that hang: one whose oldest batch runs for longer than `batch_timeout_s` is ended.

One timer a worker serves this, started with its first batch and again for as long as it has any, so that it costs
nothing for each batch.  A broker that stood still itself blames nobody.
"""

from __future__ import annotations

from .books import Books
from .events import Hung
from .records import Worker
from .timers import STOOD_STILL_NS, Timers


class Hangs:
    """See the module's docstring.

    Attributes:
        timeout_ns: how long a batch may run; 0: for ever.
    """

    def __init__(self, books: Books, timers: Timers, timeout_ns: int) -> None:
        self._books = books
        self._timers = timers
        self.timeout_ns = timeout_ns

    def watch(self, worker: Worker) -> None:
        """Look after a worker that was sent a batch, and is not looked after yet."""
        worker.watched = True
        self._timers.start(worker.oldest_ns + self.timeout_ns, worker)

    def look(self, worker: Worker, late_ns: int) -> None:
        """Have a worker ended whose oldest batch runs for too long, else look again when it would be too long."""
        if not (worker.watched and worker.batches):
            worker.watched = False
            return
        books = self._books
        if late_ns > STOOD_STILL_NS:
            worker.oldest_ns = books.now_ns
        due_ns = worker.oldest_ns + self.timeout_ns
        if due_ns > books.now_ns:
            self._timers.start(due_ns, worker)
            return
        worker.watched = False
        text = (
            f"it hung: a batch ran for more than {self.timeout_ns / 1e9:g} s, so the pool killed it; "
            "if batches may take that long, start the pool with a longer --batch-timeout-s"
        )
        if worker.said is None:
            worker.said = text
            books.stop_serving(worker)
        books.actions.append(Hung(worker.peer, text))

    def excuse(self, now_ns: int) -> None:
        """Nobody read for a while what workers said: batches have the whole time-out from now on."""
        for worker in self._books.workers.values():
            worker.oldest_ns = now_ns
