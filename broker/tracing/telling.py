"""From what a broker wrote to the story of what happened when.

::

    producer   Lease -> Grant            "lease": it waits for slots
               Grant -> Submit           "fill"; of a lease that is submitted in parts, from the submission before
               Done -> Release           "read"; of slots that are used again, to their next fill
    queue      Submit -> Run             for each attempt; an attempt that fails puts the work back
    worker     Run -> Finished           an execution, whose phases `tracks` puts in their places
    arrows     fill -> execution -> read, for all slots of a submission that went through together
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from trtpool.broker.slots import State
from trtpool.ipc import messages as m
from trtpool.ipc.errors import ProtocolError
from trtpool.ipc.logs import work_id

from .records import Heard, Joined, Left, Opening, Part, Present, Record, Sent, Turn
from .story import Execution, Flow, QueueSlice, Slice, Story

_ENDS = {m.DEADLINE: "deadline passed", m.CANCELLED: "cancelled", m.ENGINE_FAILED: "engine failed",
         m.WORKER_DIED: "worker died"}  # fmt: skip


def tell(records: Iterator[Record], closed_ns: int) -> Story:
    """The story of all records.

    Args:
        records: of one trace, in the order in which they were written.
        closed_ns: when the trace ended; 0: nobody said.

    Raises:
        ProtocolError: not even its beginning was written.
    """
    opening = next(records, None)
    if not isinstance(opening, Opening):
        raise ProtocolError(
            "nothing of the trace was written: its buffer is too small for what the pool holds; give a larger one "
            "(--buffer-mib), or ask again"
        )
    teller = _Teller(opening)
    for record in records:
        teller.take(record)
    teller.close(closed_ns)
    return teller.story


@dataclass(eq=False, slots=True)
class _Reading:
    at: int
    count: int
    left: int
    slice: Slice

    def overlap(self, first: int, count: int) -> int:
        """How many of these slots it is of; negative if they are further apart."""
        return min(first + count, self.at + self.count) - max(first, self.at)


@dataclass(eq=False, slots=True)
class _Lease:
    """One that was granted; `left`: its slots that were neither submitted nor released; `live`: those not released."""

    id: int
    peer: int
    model: int
    since_ns: int
    left: int
    live: int
    advance: bool
    fills: dict[int, Slice] = field(default_factory=dict)
    ran: dict[int, Execution] = field(default_factory=dict)
    readings: list[_Reading] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _Queued:
    """What is queued of a submission."""

    model: int
    peer: int
    since_ns: int
    slots: int


class _Teller:
    """Reads the records of a trace in their order, and keeps what has begun and not ended."""

    def __init__(self, opening: Opening) -> None:
        self.story = Story(
            opening.pool,
            opening.pid,
            opening.now_ns,
            opening.now_ns,
            opening.models,
            {peer.peer: peer for peer in opening.peers},
        )
        self._leases: dict[int, _Lease] = {}
        self._asked: dict[tuple[int, int], tuple[int, int, int]] = {}  # (peer, request): since, model, count
        self._queue: dict[tuple[int, int], _Queued] = {}  # by lease and seq
        self._running: dict[tuple[int, int], Sent] = {}  # by worker and batch
        self._open(opening)

    # ------------------------------------------------------------------ what is there already

    def _open(self, opening: Opening) -> None:
        now_ns = opening.now_ns
        for held in opening.held:
            states = held.states
            left, live = states.count(State.LEASED), len(states) - states.count(State.FREE)
            lease = _Lease(held.lease, held.peer, held.model, now_ns, left, live, advance=False)
            self._leases[held.lease] = lease
            at = 0
            for state, some in groupby(states):
                count = len(list(some))
                if state == State.DONE:
                    self._read(lease, at, count, "held since before the trace", {})
                at += count
        for asked in opening.asked:
            self._asked[asked.peer, asked.request] = (now_ns, asked.model, asked.count)
        for model, part in opening.queued:
            self._put_back(model, part, now_ns)
        for sent in opening.sent:
            self._running[sent.worker, sent.batch] = sent
        self._set_levels(now_ns, opening.levels)

    # ------------------------------------------------------------------ what happens

    def take(self, record: Record) -> None:
        """The next record."""
        assert not isinstance(record, Opening), record
        now_ns = self.story.end_ns = max(self.story.end_ns, record.now_ns)
        if isinstance(record, Heard):
            for message in record.said:
                self._hear(record.peer, message, now_ns)
        elif isinstance(record, Turn):
            for sent in record.sent:
                self._send(sent, now_ns)
            for peer, told in record.told:
                for answer in told:
                    self._tell(peer, answer, now_ns)
            self._set_levels(now_ns, record.levels)
        elif isinstance(record, Joined):
            self.story.peers[record.peer] = Present(record.peer, record.pid, record.is_worker)
            self.story.marks.append((now_ns, record.peer, "joined"))
        else:
            self._leave(record, now_ns)

    def _set_levels(self, now_ns: int, levels: list[int]) -> None:
        for model in range(len(levels) // 2):
            self.story.levels.append((now_ns, model, levels[2 * model], levels[2 * model + 1]))

    def _hear(self, peer: int, message: m.ToBroker, now_ns: int) -> None:
        if isinstance(message, m.Submit):
            self._submit(peer, message, now_ns)
        elif isinstance(message, m.Finished):
            self._finish(peer, message, now_ns)
        elif isinstance(message, m.Release):
            self._release(peer, message, now_ns)
        elif isinstance(message, m.Lease):
            self._asked[peer, message.request] = (now_ns, message.model, message.count)
        elif isinstance(message, m.Failed):
            self._fail(peer, message.batch, f"failed: {message.text}", now_ns)
        elif isinstance(message, m.Ready) and peer in self.story.peers:
            pid = self.story.peers[peer].pid
            self.story.peers[peer] = Present(peer, pid, True, message.device, message.lanes, message.gpu)
            self.story.marks.append((now_ns, peer, "ready"))

    def _submit(self, peer: int, message: m.Submit, now_ns: int) -> None:
        lease = self._leases.get(message.lease)
        if lease is None or lease.peer != peer:
            return
        work = work_id(lease.id, message.seq)
        args = self._args(lease.model, work=work, items=message.items, slots=message.count)
        if lease.advance:
            args["granted_in_advance"] = True
        # Slots that are used again were done since then, and the client says when it had read them: by its own clock,
        # which may be another, in a container with a time namespace.
        readings = [one.slice.start_ns for one in lease.readings if one.overlap(message.first, message.count) > 0]
        since_ns = max(readings, default=lease.since_ns)
        if since_ns <= message.leased_ns <= now_ns:
            since_ns = message.leased_ns
        used_again = self._end_reading(lease, message.first, message.count, since_ns)
        fill = Slice(peer, "fill", since_ns, now_ns, f"fill {work}", args)
        self.story.slices.append(fill)
        lease.fills[message.seq] = fill
        lease.since_ns = now_ns
        lease.left -= message.count - used_again
        self._queue[lease.id, message.seq] = _Queued(lease.model, peer, now_ns, message.count)

    def _release(self, peer: int, message: m.Release, now_ns: int) -> None:
        lease = self._leases.get(message.lease)
        if lease is None or lease.peer != peer:
            return
        read = self._end_reading(lease, message.first, message.count, now_ns)
        lease.left -= message.count - read
        if read < message.count and lease.left <= 0:
            self._hold(lease, now_ns, "given back unused")
        lease.live -= message.count
        if lease.live <= 0:
            del self._leases[lease.id]

    @staticmethod
    def _end_reading(lease: _Lease, first: int, count: int, now_ns: int) -> int:
        """Slots are read no more; how many of them were being read."""
        read = 0
        for reading in lease.readings[:]:
            some = reading.overlap(first, count)
            if some > 0:
                read += some
                reading.left -= some
                if reading.left <= 0:
                    reading.slice.end_ns = now_ns
                    lease.readings.remove(reading)
        return read

    def _finish(self, worker: int, message: m.Finished, now_ns: int) -> None:
        sent = self._running.pop((worker, message.batch), None)
        if sent is None:
            return
        # Its clock may be another, in a container with a time namespace of its own.
        told_ns = message.ended_ns
        end_ns = told_ns if sent.sent_ns <= told_ns <= now_ns else now_ns
        device_ns = (message.copy_in_ns, message.compute_ns, message.copy_out_ns)
        args = self._sent_args(sent)
        if message.batches > 1:
            args["batches"] = message.batches
        execution = Execution(worker, sent.sent_ns, end_ns, device_ns, "", args)
        self.story.executions.append(execution)
        for part in sent.parts:
            lease = self._leases.get(part.lease)
            if lease is not None:
                lease.ran[part.at] = execution

    def _fail(self, worker: int, batch: int, how: str, now_ns: int) -> None:
        """A batch ends without a result: what it had is queued again, until a Done says that it failed for good."""
        sent = self._running.pop((worker, batch), None)
        if sent is None:
            return
        self.story.executions.append(Execution(worker, sent.sent_ns, now_ns, None, how, self._sent_args(sent)))
        for part in sent.parts:
            self._put_back(sent.model, part, now_ns)

    def _put_back(self, model: int, part: Part, now_ns: int) -> None:
        lease = self._leases.get(part.lease)
        if lease is None:  # its owner is gone
            return
        queued = self._queue.setdefault((part.lease, part.seq), _Queued(model, lease.peer, now_ns, 0))
        queued.slots += part.count

    def _send(self, sent: Sent, now_ns: int) -> None:
        self._running[sent.worker, sent.batch] = sent
        for part in sent.parts:
            args: dict[str, object] = {"batch": sent.batch, "attempt": sent.attempt, "items": part.items}
            self._unqueue(part.lease, part.seq, part.count, now_ns, args)

    def _unqueue(self, lease: int, seq: int, count: int, now_ns: int, args: dict[str, object]) -> None:
        queued = self._queue.get((lease, seq))
        if queued is None:
            return
        named = self._args(queued.model, work=work_id(lease, seq), slots=count, **args)
        self.story.queued.append(QueueSlice(queued.model, queued.since_ns, now_ns, named))
        queued.slots -= count
        if queued.slots <= 0:
            del self._queue[lease, seq]

    def _tell(self, peer: int, message: m.FromBroker, now_ns: int) -> None:
        if isinstance(message, m.Grant):
            count = sum(run.count for _, run in message.leases)
            self._end_wait(peer, message.request, f"lease of {count}", now_ns)
            for number, run in message.leases:
                self._leases[number] = _Lease(
                    number, peer, message.model, now_ns, run.count, run.count, advance=not message.request
                )
        elif isinstance(message, m.Done):
            self._end(message, now_ns)
        elif isinstance(message, m.Error) and message.request:
            self._end_wait(peer, message.request, f"lease refused: {message.text}", now_ns)

    def _end_wait(self, peer: int, request: int, name: str, now_ns: int) -> None:
        asked = self._asked.pop((peer, request), None)
        if asked is not None:
            since_ns, model, count = asked
            self.story.slices.append(Slice(peer, "lease", since_ns, now_ns, name, self._args(model, slots=count)))

    def _end(self, done: m.Done, now_ns: int) -> None:
        lease = self._leases.get(done.lease)
        if lease is None:
            return
        work = work_id(done.lease, done.seq)
        if done.status != m.OK:
            how = _ENDS.get(done.status, "failed")
            self._unqueue(done.lease, done.seq, done.count, now_ns, {"ended": how})
            self._read(lease, done.first, done.count, f"{how}: {work}", {"error": done.text})
            return
        read = self._read(lease, done.first, done.count, f"read {work}", {"work": work})
        fill, execution = lease.fills.get(done.seq), lease.ran.pop(done.first, None)
        if fill is not None and execution is not None:
            self.story.flows.append(Flow(work, fill, execution, read))

    def _read(self, lease: _Lease, at: int, count: int, name: str, args: dict[str, object]) -> Slice:
        named = self._args(lease.model, slots=count, **args)
        reading = _Reading(at, count, count, Slice(lease.peer, "read", self.story.end_ns, -1, name, named))
        lease.readings.append(reading)
        self.story.slices.append(reading.slice)
        return reading.slice

    def _hold(self, lease: _Lease, now_ns: int, name: str) -> None:
        args = self._args(lease.model, lease=lease.id)
        self.story.slices.append(Slice(lease.peer, "fill", lease.since_ns, now_ns, name, args))

    # ------------------------------------------------------------------ ends

    def _leave(self, left: Left, now_ns: int) -> None:
        peer = left.peer
        self.story.marks.append((now_ns, peer, f"left: {left.text}" if left.text else "left"))
        for worker, batch in [key for key in self._running if key[0] == peer]:
            self._fail(worker, batch, f"lost: {left.text}", now_ns)
        self._end_all(now_ns, lambda one: one == peer)

    def close(self, closed_ns: int) -> None:
        """Nothing more happens; what goes on is cut off."""
        now_ns = self.story.end_ns = max(self.story.end_ns, closed_ns)
        for sent in self._running.values():
            execution = Execution(sent.worker, sent.sent_ns, now_ns, None, "running", self._sent_args(sent))
            self.story.executions.append(execution)
        self._end_all(now_ns, lambda _: True)

    def _end_all(self, now_ns: int, chosen: Callable[[int], bool]) -> None:
        """What the chosen peers had begun ends."""
        for peer, request in [key for key in self._asked if chosen(key[0])]:
            self._end_wait(peer, request, "lease: still waits", now_ns)
        for lease, seq in [key for key, queued in self._queue.items() if chosen(queued.peer)]:
            self._unqueue(lease, seq, self._queue[lease, seq].slots, now_ns, {"ended": "still queued"})
        for one in [lease for lease in self._leases.values() if chosen(lease.peer)]:
            if one.left > 0:
                self._hold(one, now_ns, "holds slots")
            for reading in one.readings:
                reading.slice.end_ns = now_ns
            del self._leases[one.id]

    # ------------------------------------------------------------------ what is shown of it

    def _args(self, model: int, **more: object) -> dict[str, object]:
        return {"model": self.story.models[model][0], **more}

    def _sent_args(self, sent: Sent) -> dict[str, object]:
        works = list(dict.fromkeys(work_id(part.lease, part.seq) for part in sent.parts))
        items = sum(part.items for part in sent.parts)
        return self._args(sent.model, batch=sent.batch, attempt=sent.attempt, items=items, works=works)
