"""Slots that somebody holds and does nothing with, while others wait for them.

Who lacks room has the others asked for what they hold (`messages.Recall`), each once after it was last granted any:
it gives back at once what it can, and keeps nothing that it releases until it is granted more.  So those who hold
slots and do nothing cost nothing, however many requests wait.  A process that then neither releases nor submits
anything of that model for `recall_timeout_s` is *overdue*: that is said once, and with `evict` its process is ended,
since it alone can give back slots that it may still write.

Slots are idle while they are LEASED or DONE, and the process has no work of that model in flight: one that waits for
the pool is not idle.  What the pool granted in advance counts for nothing, and as much again neither: its client may
not have read that yet, nor said that it released as much; see `leasing.SURPLUS`.

All clients of one process are taken together, since they end together.  The process that embeds the pool is reported
and never ended, nor is the one whose request comes next: its end would serve nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from trtpool.ipc import messages as m

from .books import Books
from .events import Evict, Overdue
from .records import Model, Producer, Request
from .slots import State
from .timers import STOOD_STILL_NS, Timers


class Holder(NamedTuple):
    """A process that holds idle slots of a model.

    Attributes:
        producers: all its clients, first the one that holds the most.
        pid: its number; 0: not known.
        leased, done: slots in these states.
        idle: those of them that count.
        held: all its slots of the model.
        since_ns: when it last did anything with the model.
    """

    producers: list[Producer]
    pid: int
    leased: int
    done: int
    idle: int
    held: int
    since_ns: int


def holders(producers: Iterable[Producer], model: Model) -> list[Holder]:
    """Processes that hold idle slots of the model, those with the most first."""
    processes: dict[int, list[Producer]] = {}
    for producer in producers:
        processes.setdefault(_process_of(producer), []).append(producer)
    found = [_holder(model, clients) for clients in processes.values()]
    return sorted((one for one in found if one is not None), key=lambda one: -one.idle)


def _process_of(producer: Producer) -> int:
    """What is the same for all clients of a process; those of an unknown one are taken for one process each."""
    return producer.pid or -producer.peer


def _holder(model: Model, producers: list[Producer]) -> Holder | None:
    index = model.index
    if not any(producer.held[index] for producer in producers):
        return None
    leased = done = spare = 0
    for producer in producers:
        for lease in producer.leases.values():
            if lease.model is not model:
                continue
            if State.QUEUED in lease.states or State.RUNNING in lease.states:
                return None
            leased += lease.states.count(State.LEASED)
            done += lease.states.count(State.DONE)
            spare += lease.count if lease.spare else 0
    idle = leased + done - 2 * spare
    if idle <= 0:
        return None
    producers = sorted(producers, key=lambda one: -one.held[index])
    since_ns = max(producer.active_ns[index] for producer in producers)
    held = sum(producer.held[index] for producer in producers)
    return Holder(producers, producers[0].pid, leased, done, idle, held, since_ns)


def is_overdue(model: Model, producer: Producer) -> bool:
    """Whether somebody waits, and the client was found to do nothing about it."""
    since_ns = max(producer.active_ns[model.index], model.short_ns)
    return model.short_ns > 0 and producer.overdue_ns[model.index] > since_ns


def _wanted(model: Model) -> dict[int, int]:
    """How many slots each process waits for that it may hold."""
    rooms: dict[Producer, int] = {}
    wanted: dict[int, int] = {}
    for request in model.requests():
        producer = request.producer
        room = rooms.setdefault(producer, model.cap - producer.held[model.index])
        if request.count <= room:
            rooms[producer] -= request.count
            process = _process_of(producer)
            wanted[process] = wanted.get(process, 0) + request.count
    return wanted


def _name(one: Holder) -> str:
    return f"process {one.pid}" if one.pid else f"a process that cannot be named (client {one.producers[0].peer})"


class Recalls:
    """See the module's docstring.

    Args:
        timeout_ns: after how long a process is overdue; 0: never.
        evicts: whether one that is gets ended.
        owner_pid: the process that the pool is part of; 0: none.
    """

    def __init__(self, books: Books, timers: Timers, timeout_ns: int, *, evicts: bool, owner_pid: int) -> None:
        self._books = books
        self._timers = timers
        self.timeout_ns = timeout_ns
        self._evicts = evicts
        self._owner_pid = owner_pid

    def ask(self, request: Request) -> None:
        """Recall what others hold, and look after it until nobody waits."""
        model, now_ns = request.model, self._books.now_ns
        unasked, model.unasked = model.unasked, {}
        for producer in unasked:
            if producer is request.producer:
                model.unasked[producer] = None
            else:
                self._recall(model, producer)
        if not model.short_ns:
            model.short_ns = now_ns
            if self.timeout_ns and not model.watched:
                model.watched = True
                self._timers.start(now_ns + self.timeout_ns, model)

    def ask_all(self) -> None:
        """Recall what anybody holds: the pool is stopping, and nobody shall go on with slots that are done."""
        for model in self._books.models:
            model.unasked = {}
            for producer in self._books.producers.values():
                self._recall(model, producer)

    def _recall(self, model: Model, producer: Producer) -> None:
        if producer.held[model.index] and not producer.closed:
            self._books.send(producer.peer, m.Recall(model.index))

    def look(self, model: Model, late_ns: int) -> None:
        """See what became of a recall, as long as anybody waits for room; a broker that stood still blames nobody."""
        if not model.short_ns or not model.is_short():
            model.watched = False
            return
        if late_ns > STOOD_STILL_NS:
            model.short_ns = self._books.now_ns
        self._books.actions += self._overdue(model)
        self._timers.start(self._next_look_ns(model), model)

    def excuse(self, now_ns: int) -> None:
        """Nobody read for a while what clients said: recalls have the whole time-out from now on."""
        for model in self._books.models:
            if model.short_ns:
                model.short_ns = now_ns

    def holders(self, model: Model) -> list[Holder]:
        """Processes that hold idle slots of the model, those with the most first."""
        return holders(self._books.producers.values(), model)

    def blame(self, found: list[Holder], asking: Producer) -> str:
        """Who holds idle slots that `asking` waited for, as a part of a sentence; "" if nobody does."""
        for one in found:
            if asking not in one.producers:
                seconds = (self._books.now_ns - one.since_ns) / 1e9
                return f"; {_name(one)} holds {one.idle} idle slots since {seconds:.1f} s"
        return ""

    def _overdue(self, model: Model) -> list[Overdue | Evict]:
        """What is to be said and done about those who have not answered a recall of the model's slots."""
        now_ns = self._books.now_ns
        late = [one for one in self.holders(model) if self._due_ns(model, one) <= now_ns]
        actions: list[Overdue | Evict] = []
        for one in late:
            if one.producers[0].overdue_ns[model.index] <= max(one.since_ns, model.short_ns):
                model.totals.overdue += 1
                actions.append(Overdue(one.producers[0].peer, f"{self._complaint(model, one)}; {self._remedy(one)}"))
            for producer in one.producers:
                producer.overdue_ns[model.index] = now_ns
        if self._evicts and model.evict_ns <= now_ns:
            actions += self._evict(model, late)
        return actions

    def _next_look_ns(self, model: Model) -> int:
        """When somebody may be overdue next, if all goes on like this; not so soon that many make it a burden."""
        now_ns, timeout_ns = self._books.now_ns, self.timeout_ns
        due = [self._due_ns(model, one) for one in self.holders(model)]
        due += [model.evict_ns, now_ns + timeout_ns]
        return max(min(one for one in due if one > now_ns), now_ns + timeout_ns // 8)

    def _due_ns(self, model: Model, one: Holder) -> int:
        return max(one.since_ns, model.short_ns) + self.timeout_ns

    def _evict(self, model: Model, late: list[Holder]) -> list[Evict]:
        """End as few of these as those who wait need, the one with the most idle slots first; then give it time."""
        now_ns, wanted = self._books.now_ns, _wanted(model)
        head = model.next_request()
        spared = {_process_of(head.producer)} if head is not None else set()
        spared |= {self._owner_pid}
        lacking = sum(wanted.values()) - model.ring.free - self._coming(model)
        actions = []
        for one in late:
            process = _process_of(one.producers[0])
            others = lacking - wanted.get(process, 0)  # what it waits for itself is no reason to end it
            if others <= 0 or process in spared or any(producer.evicted_ns for producer in one.producers):
                continue
            lacking = others - one.held
            for producer in one.producers:
                producer.evicted_ns = now_ns
            model.totals.evicted += 1
            model.evict_ns = now_ns + self.timeout_ns
            actions.append(Evict(one.producers[0].peer, self._complaint(model, one)))
        return actions

    def _coming(self, model: Model) -> int:
        """Slots of processes that are about to end.  One that lives on after a while will not: it may not be ours."""
        now_ns = self._books.now_ns
        return sum(
            producer.held[model.index]
            for producer in self._books.producers.values()
            if producer.evicted_ns and now_ns - producer.evicted_ns < self.timeout_ns
        )

    def _complaint(self, model: Model, one: Holder) -> str:
        seconds = (self._books.now_ns - one.since_ns) / 1e9
        return (
            f"{_name(one)} holds {one.idle} idle slots of model {model.layout.spec.name!r} ({one.leased} leased, "
            f"{one.done} done and not released), did nothing with them for {seconds:.1f} s, "
            "and others wait for them"
        )

    def _remedy(self, one: Holder) -> str:
        if one.pid and one.pid == self._owner_pid:
            return "it is the process that the pool is part of, so it is never evicted: release slots there"
        if self._evicts:
            return "it is ended if others need its slots"
        return "release them there, end it, or start the pool with --evict, which does that"
