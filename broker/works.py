"""What becomes of work between its Submit and its Done.

A work ends once: with a result, or with an error that names the cause.  A batch that fails, or whose worker ends, is
cut in halves, each a *suspect* that runs alone on a worker, down to one slot: so its batch-mates succeed, and only what
fails alone `MAX_ATTEMPTS` times is to blame.  Work of an owner whose process has ended goes on, since a device may be
writing to its slots, and ends unheard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from trtpool.ipc import messages as m
from trtpool.ipc.settings import MAX_ATTEMPTS

from .batching import UNIFORM, Work, halves
from .books import Books, Refused
from .leasing import Leasing
from .meters import LARGEST, NOTE_BYTES, note
from .records import Batch, Model, Producer, Suspect, Worker
from .shapes import check_outputs, variant_of
from .slots import FINISH, SUBMIT, Event, move
from .slow import SlowRequests
from .timers import Timers


class Works:
    """See the module's docstring; `slow` is told of batches that ended."""

    def __init__(self, books: Books, timers: Timers, leasing: Leasing, slow: SlowRequests) -> None:
        self._books = books
        self._timers = timers
        self._leasing = leasing
        self._slow = slow

    # ------------------------------------------------------------------ from producers

    def submit(self, producer: Producer, message: m.Submit) -> None:
        """Queue slots that a producer has written."""
        lease = self._leasing.find(producer, message)
        books, model = self._books, lease.model
        count, items = message.count, message.items
        if message.seq <= lease.seq:
            raise Refused(m.BAD_MESSAGE, f"seq {message.seq} after {lease.seq} of lease {lease.id}")
        if not (count - 1) * model.items_per_slot < items <= count * model.items_per_slot:
            raise Refused(
                m.BAD_MESSAGE,
                f"{items} items in {count} slots of {model.items_per_slot}: all but the last slot must be full",
            )
        if items != count * model.items_per_slot and model.layout.spec.whole_slots:
            raise Refused(m.BAD_MESSAGE, f"{items} items in {count} slots of {model.items_per_slot}: all must be full")
        if message.again > model.cap:
            raise Refused(m.BAD_MESSAGE, f"again {message.again} is above the cap of {model.cap}")
        gpu = message.gpu
        if gpu is not None:
            books.check_gpu(gpu)
        is_plain = not (model.varies or message.shapes or message.shared)
        variant = UNIFORM if is_plain else variant_of(model.layout, message)
        move(lease.states, SUBMIT, message.first, count)
        lease.seq = message.seq
        if lease.spare:
            lease.use_spare()
        producer.active_ns[model.index] = now_ns = books.now_ns
        deadline = 0 if message.deadline_ns is None else now_ns + max(1, message.deadline_ns)
        seq, again, priority = message.seq, message.again, message.priority
        work = Work(
            *(lease, message.first, count, items, seq, now_ns, deadline, again),
            gpu=gpu,
            priority=priority,
            variant=variant,
        )
        line = model.lines[0] if gpu is None else model.line(gpu)
        if priority:
            line.urgent.add(work)
            books.urgent += 1
        else:
            line.queue.add(work)
        if deadline:
            self._timers.start(deadline, work)

    def cancel(self, producer: Producer, message: m.Cancel) -> None:
        """Drop the works that lie wholly within what is named; too late is no error."""
        lease = producer.leases.get(message.lease)
        if lease is None:
            return
        end = message.first + message.count
        mine = self._withdraw(
            lease.model, lambda w: w.lease is lease and message.first <= w.at and w.at + w.count <= end
        )
        for work in sorted(mine, key=lambda work: work.at):
            move(lease.states, Event.DROP, work.at, work.count)
            self._fail(work, m.CANCELLED, "it was cancelled before it was dispatched")

    def unqueue(self, producer: Producer) -> list[Work]:
        """Take everything that `producer` has queued out of the queues."""
        removed = []
        for model in self._books.models:
            removed += self._withdraw(model, lambda work: work.lease.producer is producer)
        return removed

    def _withdraw(self, model: Model, chosen: Callable[[Work], bool]) -> list[Work]:
        """Take the chosen works out of the queues and from among the suspects; they are still QUEUED."""
        books, removed = self._books, []
        for line in model.lines:
            queued = [work for work in line.queue if chosen(work)]
            if queued:
                line.queue.remove(set(queued))
                removed += queued
            if len(line.urgent) and (urgent := [work for work in line.urgent if chosen(work)]):
                line.urgent.remove(set(urgent))
                books.urgent -= len(urgent)
                removed += urgent
            if line.suspects:
                for suspect in line.suspects:
                    removed += [work for work in suspect.works if chosen(work)]
                    suspect.works = [work for work in suspect.works if not chosen(work)]
                books.suspects -= sum(not suspect.works for suspect in line.suspects)
                line.suspects = deque(suspect for suspect in line.suspects if suspect.works)
        return removed

    # ------------------------------------------------------------------ from workers

    def finished(self, worker: Worker, message: m.Finished) -> None:
        """A batch has run: its outputs are written."""
        batch = self._find_batch(worker, message)
        books, model, batches, shapes = self._books, batch.model, message.batches, message.shapes
        if model.varies or shapes:
            self._take_shapes(worker, batch, message)
        self._take_back(worker, batch)
        now_ns, ended_ns, index = books.now_ns, message.ended_ns, model.index
        books.suspects -= batch.alone
        totals = model.totals
        copy_in_ns, compute_ns, copy_out_ns = message.copy_in_ns, message.compute_ns, message.copy_out_ns
        totals.batches += batches
        totals.runs += batch.runs + batches - 1
        totals.gathered_items += message.gathered_items
        totals.copy_in_ns += copy_in_ns
        totals.compute_ns += compute_ns
        totals.copy_out_ns += copy_out_ns
        device_ns = (copy_in_ns, compute_ns, copy_out_ns)
        took_ns = copy_in_ns + compute_ns + copy_out_ns
        if batches > 1:  # an item was in one of them
            copy_in_ns, compute_ns, copy_out_ns = (spent // batches for spent in device_ns)
        model.run_ns += (took_ns // batches - model.run_ns) // 8
        books.shares.settle(model, batch.expected_ns, took_ns)
        if self._slow.limit_ns:
            self._slow.look(worker, batch, message)
        send = books.send
        ended = waited_ns = 0
        for work in batch.works:
            lease, items, at, count = work.lease, work.items, work.at, work.count
            if lease.orphaned:
                self._end_unheard(worker, work)
                continue
            queue_ns = batch.dispatched_ns - work.queued_ns
            ended += items
            waited_ns += queue_ns * items
            if work.priority:
                totals.urgent_items += items
                totals.urgent_queue_ns += queue_ns * items
            move(lease.states, FINISH, at, count)
            producer = lease.producer
            producer.items += items
            producer.active_ns[index] = now_ns
            # Two starred tuples in place of arguments would double what it takes to make this.
            done = m.Done(
                lease.id, at, count, work.seq, m.OK, queue_ns, copy_in_ns, compute_ns, copy_out_ns, "", ended_ns, shapes
            )
            send(producer.peer, done)
            if work.again:
                self._leasing.grant_again(work)
        totals.items += ended
        totals.queue_ns += waited_ns
        meter = model.meter(worker.gpu)
        waited_ns = min(waited_ns, LARGEST)  # many items, for weeks
        note(meter.notes, meter.at, ended, batches, waited_ns, now_ns - batch.dispatched_ns, *device_ns)
        meter.at += NOTE_BYTES

    def failed(self, worker: Worker, message: m.Failed) -> None:
        """A batch has failed, and the worker goes on."""
        batch = self._find_batch(worker, message)
        self._take_back(worker, batch)
        self._retry(batch, m.ENGINE_FAILED, message.text, counts=True)

    def worker_ended(self, worker: Worker, text: str) -> None:
        """All that a worker had goes back; what ran alone may be why it ended."""
        for batch in worker.batches.values():
            self._retry(batch, m.WORKER_DIED, text, counts=batch.alone)

    def _take_shapes(self, worker: Worker, batch: Batch, message: m.Finished) -> None:
        """Check the shapes of a batch whose items may have several, and count what it copied."""
        model = batch.model
        check_outputs(model.layout, message.shapes)
        if worker.gpu is not None:
            items, (inputs, _) = sum(work.items for work in batch.works), batch.works[0].variant
            copied = model.copied.of(items, inputs, message.shapes, filled=message.filled_items)
            model.meter(worker.gpu).add_copied(*copied)

    def _end_unheard(self, worker: Worker, work: Work) -> None:
        """A work has run whose owner has ended."""
        model = work.lease.model
        if worker.gpu is not None and not model.varies:  # else the batch was counted as a whole
            model.meter(worker.gpu).add_copied(*model.copied.of(work.items))
        self._free_orphan(work)

    @staticmethod
    def _find_batch(worker: Worker, message: m.Finished | m.Failed) -> Batch:
        """The batch that a worker answers for."""
        batch = worker.batches.get(message.batch)
        if batch is None or batch.attempt != message.attempt:
            raise Refused(m.BAD_MESSAGE, f"batch {message.batch}, attempt {message.attempt}, is not running here")
        return batch

    def _take_back(self, worker: Worker, batch: Batch) -> None:
        """The worker has the batch no more."""
        if batch is next(iter(worker.batches.values())):
            worker.oldest_ns = self._books.now_ns  # the next one had to wait for it
        del worker.batches[batch.id]

    def _retry(self, batch: Batch, status: int, text: str, *, counts: bool) -> None:
        """Put a batch back: in halves, each to run alone, down to one slot, which fails after `MAX_ATTEMPTS`.

        Args:
            counts: whether the failure is one that a slot which ran alone is to blame for.
        """
        model = batch.model
        model.totals.retries += 1
        self._books.suspects -= batch.alone
        works = []
        for work in batch.works:
            if work.lease.orphaned:
                self._free_orphan(work)
            elif work.lease.producer.closed:
                move(work.lease.states, FINISH, work.at, work.count)
            else:
                works.append(work)
        if not works:
            return
        if len(works) == 1 and works[0].count == 1 and counts:
            work = works[0]
            work.attempts += 1
            if work.attempts >= MAX_ATTEMPTS:
                move(work.lease.states, FINISH, work.at, work.count)
                self._fail(work, status, f"{text} (tried alone {work.attempts} times)"[:4096])
                return
        for group in halves(works, model.items_per_slot):
            for work in group:
                move(work.lease.states, Event.RETRY, work.at, work.count)
                if work.deadline_ns:  # a half has no timer yet, and the whole's may have been thrown away
                    self._timers.start(work.deadline_ns, work)
            batch.line.suspects.append(Suspect(group, batch.attempt + 1))
            self._books.suspects += 1

    # ------------------------------------------------------------------ how it ends

    def expire_all(self, model: Model, late: set[Work]) -> None:
        """End queued works of a model whose deadline has passed."""
        for work in self._withdraw(model, late.__contains__):
            self.expire(work)

    def expire(self, work: Work) -> None:
        """End a work, in no queue any more, whose deadline has passed."""
        move(work.lease.states, Event.DROP, work.at, work.count)
        waited_ms = (self._books.now_ns - work.queued_ns) / 1e6
        self._fail(work, m.DEADLINE, f"its deadline passed after {waited_ms:.1f} ms in the queue")

    def _fail(self, work: Work, status: int, text: str) -> None:
        """Tell the producer that slots, which are DONE, ended without a result."""
        lease, books = work.lease, self._books
        producer, model = lease.producer, lease.model
        model.totals.failed_items += work.items
        producer.active_ns[model.index] = books.now_ns
        queue_ns = books.now_ns - work.queued_ns
        books.send(producer.peer, m.Done(lease.id, work.at, work.count, work.seq, status, queue_ns, 0, 0, 0, text))

    def _free_orphan(self, work: Work) -> None:
        move(work.lease.states, Event.ORPHAN, work.at, work.count)
        self._leasing.free(work.lease, work.at, work.count)
        self._books.forget_if_empty(work.lease.producer)
