"""Slots that somebody holds and does nothing with, while others wait for them.

Who lacks room has the others asked for what they hold idle (`messages.Recall`).  A process that then neither releases
nor submits anything of that model for `recall_timeout_s` is *overdue*: that is said once, and with `evict` its
process is ended, since it alone can give back slots that it may still write.

Slots are idle while they are LEASED or DONE, and the process has no work of that model in flight: one that waits for
the pool is not idle.  What the pool granted in advance counts for nothing, and as much again neither: its client may
not have read that yet, nor said that it released as much; see `core.SURPLUS`.

All clients of one process are taken together, since they end together.  The process that embeds the pool is reported
and never ended, nor is the one whose request comes next: its end would serve nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .events import Evict, Overdue
from .records import Model, Producer
from .slots import State

if TYPE_CHECKING:
    from .core import Core


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


def holders(core: Core, model: Model) -> list[Holder]:
    """Processes that hold idle slots of the model, those with the most first."""
    processes: dict[int, list[Producer]] = {}
    for producer in core.producers.values():
        processes.setdefault(_process_of(producer), []).append(producer)
    found = [_holder(model, producers) for producers in processes.values()]
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


def blame(core: Core, found: list[Holder], asking: Producer) -> str:
    """Who holds idle slots that `asking` waited for, as a part of a sentence; "" if nobody does."""
    for one in found:
        if asking not in one.producers:
            seconds = (core.now_ns - one.since_ns) / 1e9
            return f"; {_name(one)} holds {one.idle} idle slots since {seconds:.1f} s"
    return ""


def overdue(core: Core, model: Model) -> list[Overdue | Evict]:
    """What is to be said and done about those who have not answered a recall of the model's slots."""
    late = [one for one in holders(core, model) if _due_ns(core, model, one) <= core.now_ns]
    actions: list[Overdue | Evict] = []
    for one in late:
        if one.producers[0].overdue_ns[model.index] <= max(one.since_ns, model.short_ns):
            model.totals.overdue += 1
            actions.append(Overdue(one.producers[0].peer, f"{_complaint(core, model, one)}; {_remedy(core, one)}"))
        for producer in one.producers:
            producer.overdue_ns[model.index] = core.now_ns
    if core.evicts and model.evict_ns <= core.now_ns:
        actions += _evict(core, model, late)
    return actions


def next_look_ns(core: Core, model: Model) -> int:
    """When somebody may be overdue next, if all goes on like this; not so soon that many clients make it a burden."""
    timeout_ns = core.recall_timeout_ns
    due = [_due_ns(core, model, one) for one in holders(core, model)]
    due += [model.evict_ns, core.now_ns + timeout_ns]
    return max(min(one for one in due if one > core.now_ns), core.now_ns + timeout_ns // 8)


def is_overdue(model: Model, producer: Producer) -> bool:
    """Whether somebody waits, and the client was found to do nothing about it."""
    since_ns = max(producer.active_ns[model.index], model.short_ns)
    return model.short_ns > 0 and producer.overdue_ns[model.index] > since_ns


def _due_ns(core: Core, model: Model, one: Holder) -> int:
    return max(one.since_ns, model.short_ns) + core.recall_timeout_ns


def _evict(core: Core, model: Model, late: list[Holder]) -> list[Evict]:
    """End as few of these as those who wait need, the one with the most idle slots first; then give it time."""
    wanted = _wanted(model)
    head = core.next_request(model)
    spared = {_process_of(head.producer)} if head is not None else set()
    spared |= {core.owner_pid}
    lacking = sum(wanted.values()) - model.ring.free - _coming(core, model)
    actions = []
    for one in late:
        process = _process_of(one.producers[0])
        others = lacking - wanted.get(process, 0)  # what it waits for itself is no reason to end it
        if others <= 0 or process in spared or any(producer.evicted_ns for producer in one.producers):
            continue
        lacking = others - one.held
        for producer in one.producers:
            producer.evicted_ns = core.now_ns
        model.totals.evicted += 1
        model.evict_ns = core.now_ns + core.recall_timeout_ns
        actions.append(Evict(one.producers[0].peer, _complaint(core, model, one)))
    return actions


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


def _coming(core: Core, model: Model) -> int:
    """Slots of processes that are about to end.  One that lives on after a while will not end: it may not be ours."""
    return sum(
        producer.held[model.index]
        for producer in core.producers.values()
        if producer.evicted_ns and core.now_ns - producer.evicted_ns < core.recall_timeout_ns
    )


def _name(one: Holder) -> str:
    return f"process {one.pid}" if one.pid else f"a process that cannot be named (client {one.producers[0].peer})"


def _complaint(core: Core, model: Model, one: Holder) -> str:
    return (
        f"{_name(one)} holds {one.idle} idle slots of model {model.layout.spec.name!r} ({one.leased} leased, "
        f"{one.done} done and not released), did nothing with them for {(core.now_ns - one.since_ns) / 1e9:.1f} s, "
        "and others wait for them"
    )


def _remedy(core: Core, one: Holder) -> str:
    if one.pid and one.pid == core.owner_pid:
        return "it is the process that the pool is part of, so it is never evicted: release slots there"
    if core.evicts:
        return "it is ended if others need its slots"
    return "release them there, end it, or start the pool with --evict, which does that"
