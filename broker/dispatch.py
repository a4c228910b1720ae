"""What is sent to which worker, and when.

A free worker takes what there is: that of the model whose turn it is, see `shares`, and of this the oldest that may run
on it; see `Dispatch._choose`.  Interactive work goes before bulk, in turns; see `OVERTAKES`.  Suspects run before all
else, one at a time, on a worker that is kept for them.
"""

from __future__ import annotations

from typing import Final

from trtpool.ipc import messages as m

from .batching import Work, rows_of, take_both
from .books import Books
from .hangs import Hangs
from .records import OVERTAKES, Batch, Line, Worker
from .slots import DISPATCH, move
from .timers import Timers
from .works import Works

SEND_AHEAD_NS: Final = 500_000
"""A worker with one lane is sent a batch that is not full ahead of time if batches of the model take this long on
average: while it waits for the broker it loses about 50 us, which a batch that grows meanwhile makes up for if it is
short."""

BRIEF_NS: Final = 250_000
"""Batches of a model that runs more briefly than half of this go to a worker several at a time, as many as take so
long: a message costs us, and the worker, as much as such a batch, and nobody waits longer for it than this."""

MAX_TOGETHER: Final = 16
"""Most batches that are sent at a time."""


def _oldest_suspect_ns(line: Line) -> int:
    return line.suspects[0].queued_ns


class Dispatch:
    """See the module's docstring.

    Attributes:
        next_batch: the id of the next batch, never reused.
    """

    def __init__(self, books: Books, timers: Timers, works: Works, hangs: Hangs) -> None:
        self._books = books
        self._timers = timers
        self._works = works
        self._hangs = hangs
        self.next_batch = 1

    def dispatch(self) -> None:
        """Make batches while there is a worker to take one."""
        books = self._books
        while (choice := self._choose_by_class() if books.urgent else self._choose()) is not None:
            worker, line, leads = choice
            works = self._take(worker, line, leads=leads) if books.urgent else line.queue.take(self._next_items(line))
            for work in works[:]:
                if work.deadline_ns and work.deadline_ns <= books.now_ns:
                    self._works.expire(work)
                    works.remove(work)
            if works:
                self._run(worker, line, works, attempt=0, alone=False)

    def dispatch_suspect(self) -> None:
        """Send the next suspect, if the worker that is kept for it has nothing else."""
        following = self._next_suspect()
        if following is not None and not following[0].batches:
            worker, line = following
            suspect = line.suspects.popleft()
            self._run(worker, line, suspect.works, suspect.attempt, alone=True)

    def _next_items(self, line: Line) -> int:
        """Most items to send now: a batch, or several brief ones, which are dealt out by guided self-scheduling.

        Each worker gets half of its share of what is left, so that all end at about the same time (Polychronopoulos
        and Kuck, IEEE Transactions on Computers, 1987); one that is alone gets all.
        """
        model, workers = line.model, len(self._books.serving)
        max_batch = model.max_batch
        if model.varies:  # each batch has shapes of its own to tell
            return max_batch
        share = line.queue.items // max_batch // (2 * workers if workers > 1 else 1)
        if share < 2 or 2 * model.run_ns > BRIEF_NS:
            return max_batch
        together = min(share, BRIEF_NS // max(1, model.run_ns), MAX_TOGETHER)
        return together * (max_batch - max_batch % model.items_per_slot)

    def _take(self, worker: Worker, line: Line, *, leads: bool) -> list[Work]:
        """The line's next batch, which begins with interactive work if that `leads`, and is filled with the other."""
        queues = (line.urgent, line.queue) if leads else (line.queue, line.urgent)
        bulk = [one for model in self._books.models for one in model.lines if len(one.queue) and one.may_run_on(worker)]
        next_bulk = min(bulk, key=self._turn, default=None)
        waiting = len(line.urgent)
        works, is_filled = take_both(*queues, line.model.max_batch)
        self._books.urgent += len(line.urgent) - waiting
        has_bulk = not leads or next_bulk is None or (next_bulk is line and is_filled)
        worker.overtaken = 0 if has_bulk else worker.overtaken + 1
        return works

    def _choose(self) -> tuple[Worker, Line, bool] | None:
        """The worker and the line of the next batch: of the first work, by turns, that some worker takes now.

        A worker takes the first work that may run on it, and while it must not have that yet, nothing else: else
        full batches could overtake one that is not full for ever.  While there are suspects, one worker is kept for
        them.
        """
        due = self._due()
        if not due:
            return None
        if len(due) == 1 and not self._books.suspects:  # as in most turns of most pools
            worker = self._pick_worker(due[0], self._books.serving)
            return None if worker is None else (worker, due[0], False)
        placed = self._place(due, self._ready_for(due))
        return None if placed is None else (*placed, False)

    def _due(self) -> list[Line]:
        """Lines of which bulk work may go, the one whose turn it is first."""
        due = []
        for model in self._books.models:
            for line in model.lines:
                if line.queue.items and not (model.max_delay_ns and self._held_back(line)):
                    due.append(line)  # noqa: PERF401  # a comprehension costs twice as much, each turn
        if len(due) > 1:
            due.sort(key=self._turn)
        return due

    def _turn(self, line: Line) -> tuple[int, int]:
        """What sorts lines with bulk work: by their models' shares, then by age."""
        return self._books.shares.start_of(line.model), line.queue.oldest.queued_ns

    def _urgent_turn(self, line: Line) -> tuple[int, int]:
        """The same for lines with interactive work."""
        return self._books.shares.start_of(line.model), line.urgent.oldest.queued_ns

    def _ready_for(self, due: list[Line]) -> list[Worker]:
        """Workers that may be sent work, those last that alone may run some of it; the one for suspects is left out."""
        workers = self._books.serving
        if wanted := {line.gpu for line in due if line.gpu is not None} if len(due) > 1 else ():
            workers = sorted(workers, key=lambda one: one.gpu in wanted)  # what has a choice leaves these alone
        if self._books.suspects and (kept := self._next_suspect()) is not None:
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
        urgent = [line for model in self._books.models for line in model.lines if len(line.urgent)]
        urgent.sort(key=self._urgent_turn)
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
        sent it ahead if the model takes long to run.  If batches are brief, see `BRIEF_NS`, not the device is what all
        wait for but us, and those that grow until the last is done save us messages.  With interactive work in it, it
        may use any free lane.
        """
        full, anywhere = line.has_full_batch, line.gpu is None
        run_ns = line.model.run_ns
        single, brief = 1 + (run_ns >= SEND_AHEAD_NS), 2 * run_ns <= BRIEF_NS
        best = None
        for worker in workers:
            lanes, batches = worker.lanes, len(worker.batches)
            if full:
                credit = lanes + 1
            elif lanes > 1 and (urgent or not brief):
                credit = lanes if urgent else 2
            else:
                credit = single
            if (
                batches < credit
                and (anywhere or line.may_run_on(worker))
                and (best is None or batches < len(best.batches))
            ):
                best = worker
        return best

    def _held_back(self, line: Line) -> bool:
        """Whether a batch that is not full should wait for `max_delay_us` to pass."""
        queue = line.queue
        until = queue.oldest.queued_ns + line.model.max_delay_ns
        if until <= self._books.now_ns or self._books.draining:
            queue.lead_oldest()
            return False
        if queue.lead_full(line.model.max_batch):
            return False
        if line.hold_until_ns != until:
            line.hold_until_ns = until
            self._timers.start(until, line)
        return True

    def _next_suspect(self) -> tuple[Worker, Line] | None:
        """The worker that is kept for suspects, and the line of which it runs, or will run, the first.

        It is one that runs a suspect now, else the first that may run the oldest, unless work pinned to its GPU is
        older still: others may be able to run the suspect, and none but it that work.
        """
        for worker in self._books.workers.values():
            for batch in worker.batches.values():
                if batch.alone:
                    return worker, batch.line
        lines = [line for model in self._books.models for line in model.lines if line.suspects]
        for line in sorted(lines, key=_oldest_suspect_ns):
            for worker in self._books.serving:
                if line.may_run_on(worker) and not self._has_pinned(worker.gpu, _oldest_suspect_ns(line)):
                    return worker, line
        return None

    def _has_pinned(self, gpu: int | None, before_ns: int) -> bool:
        """Whether work that is pinned to this GPU was queued before."""
        return gpu is not None and any(
            line.gpu == gpu and len(queue) and queue.oldest.queued_ns < before_ns
            for model in self._books.models
            for line in model.lines
            for queue in (line.queue, line.urgent)
        )

    def _run(self, worker: Worker, line: Line, works: list[Work], attempt: int, *, alone: bool) -> None:
        books, model = self._books, line.model
        for work in works:
            move(work.lease.states, DISPATCH, work.at, work.count)
        rows = rows_of(works, model.items_per_slot, model.layout.segment)
        batches = -(-sum(work.items for work in works) // model.max_batch)
        batch = Batch(
            *(self.next_batch, line, works, len(rows), attempt),
            alone=alone,
            now_ns=books.now_ns,
            expected_ns=books.shares.charge(model, batches),
        )
        self.next_batch += 1
        if not worker.batches:
            worker.oldest_ns = books.now_ns
        worker.batches[batch.id] = batch
        if self._hangs.timeout_ns and not worker.watched:
            self._hangs.watch(worker)
        books.send(worker.peer, m.Run(batch.id, attempt, model.index, rows, works[0].variant[0]))
