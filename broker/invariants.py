"""Every invariant of the core, in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .batching import Work
from .records import Model
from .slots import State

if TYPE_CHECKING:
    from .core import Core


def validate(core: Core) -> None:
    """Assert every invariant; for tests, after every event."""
    taken = _validate_producers(core)
    for model, slots in zip(core.models, taken, strict=True):
        _validate_model(core, model, slots)
    _validate_workers(core)


def _validate_producers(core: Core) -> list[bytearray]:
    """Returns, for each model, which slots are held: 1 for each that is."""
    taken = [bytearray(model.layout.slots) for model in core.models]
    held = {producer.peer: [0] * len(core.models) for producer in core.producers.values()}
    for producer in core.producers.values():
        assert producer.leases or not producer.closed, "a closed producer that holds nothing is still known"
        for lease in producer.leases.values():
            assert lease.producer is producer
            assert 0 < lease.live == lease.count - lease.states.count(State.FREE), "a lease has lost count"
            if lease.orphaned:
                assert set(lease.states) <= {State.FREE, State.RUNNING}, "an orphan's slot was not freed"
            for at, state in enumerate(lease.states):
                if state != State.FREE:
                    slot = lease.first + at
                    assert not taken[lease.model.index][slot], f"slot {slot} has two owners"
                    taken[lease.model.index][slot] = 1
                    held[producer.peer][lease.model.index] += 1
        assert producer.held == held[producer.peer], "a producer's slots were miscounted"
        asked = [one for model in core.models for one in model.requests() if one.producer is producer]
        assert producer.waiting == len(asked) <= core.leasing.max_waiting, "a producer's requests were miscounted"
        for model in core.models:
            assert producer.held[model.index] <= model.cap, "a producer holds more than its cap"
    return taken


def _validate_model(core: Core, model: Model, taken: bytearray) -> None:
    model.ring.validate(taken)
    leases = [one for producer in core.producers.values() for one in producer.leases.values()]
    spares = sum(one.count for one in leases if one.spare and one.model is model)
    assert model.spares == spares, "spares were miscounted"
    assert 2 * spares <= max(0, model.layout.slots - model.cap), "idle clients could starve others"
    assert len({line.gpu for line in model.lines}) == len(model.lines), "a GPU has two lines"
    for line in model.lines:
        assert line.gpu is None or line.gpu < core.books.gpus, "there is a line for no GPU of the pool"
        for queue, is_urgent in ((line.queue, False), (line.urgent, True)):
            assert queue.items == sum(work.items for work in queue), "a queue lost count of items"
            assert queue.slots == sum(work.count for work in queue), "a queue lost count of slots"
            assert all((work.priority > 0) == is_urgent for work in queue), "a work waits in another class's queue"
        assert {work.gpu for work in line.waiting()} <= {line.gpu}, "a work waits for another GPU than its own"
    _validate_works(core, model, [work for line in model.lines for work in line.waiting()], State.QUEUED)
    running = [
        work
        for worker in core.workers.values()
        for batch in worker.batches.values()
        if batch.model is model
        for work in batch.works
    ]
    _validate_works(core, model, running, State.RUNNING)
    for request in model.requests():
        assert request.producer.peer in core.producers, "one that left still waits"
    for requests, is_urgent in ((model.waiting, False), (model.urgent, True)):
        assert all((one.priority > 0) == is_urgent for one in requests), "a request waits in another class"
        numbers = [one.number for one in requests]
        assert numbers == sorted(numbers), "a request waits out of turn"
    for producer, parked in model.parked.items():
        assert all(one.producer is producer for one in parked), "a request is parked as another's"
        assert not any(producer.may_hold(model, one.count) for one in parked), "a request waits for nothing"
    assert all(core.producers.get(one.peer) is one for one in model.unasked), "one that left would be asked for slots"
    watched = model.watched or not core.recalls.timeout_ns
    assert not model.short_ns or watched, "a recall is not looked after"


def _validate_workers(core: Core) -> None:
    able = [worker for worker in core.workers.values() if worker.lanes and worker.said is None]
    serving = {worker.peer for worker in able if worker.generation == core.generation}
    assert {worker.peer for worker in core.books.serving} == serving, "it is not known who serves"
    retiring = {worker.peer for worker in able if worker.generation < core.generation}
    assert {worker.peer for worker in core.books.retiring} == retiring, "it is not known who is to leave"
    for worker in able:
        assert worker.generation <= core.generation or not worker.batches, "one that stands by was sent work"
    urgent = sum(len(line.urgent) for model in core.models for line in model.lines)
    assert core.books.urgent == urgent, "interactive works were miscounted"
    waiting = sum(len(line.suspects) for model in core.models for line in model.lines)
    alone = sum(batch.alone for worker in core.workers.values() for batch in worker.batches.values())
    assert core.books.suspects == waiting + alone, "suspects were miscounted"
    assert alone <= 1, "two suspects run at once"
    for worker in core.workers.values():
        watched = worker.watched or worker.said is not None
        assert watched or not (core.hangs.timeout_ns and worker.batches), "a worker that may hang is not watched"
        assert len(worker.batches) <= worker.lanes + 1, "a worker was sent more than its credit"
        for batch in worker.batches.values():
            assert {work.gpu for work in batch.works} <= {batch.line.gpu} <= {None, worker.gpu}, "on another GPU"
            assert not batch.alone or len(worker.batches) == 1, "a suspect does not run alone"
            assert len({work.variant for work in batch.works}) == 1, "a batch is of several variants"


def _validate_works(core: Core, model: Model, works: list[Work], state: State) -> None:
    """Every slot in `state` is in exactly one work, and the works name no other."""
    expected = sum(
        lease.states.count(state)
        for producer in core.producers.values()
        for lease in producer.leases.values()
        if lease.model is model
    )
    assert sum(work.count for work in works) == expected, f"{state.name} slots and works differ"
    seen: set[int] = set()
    for work in works:
        slots = range(work.first, work.first + work.count)
        assert seen.isdisjoint(slots), f"a {state.name} slot is in two works"
        seen.update(slots)
        states = work.lease.states[work.at : work.at + work.count]
        assert states == bytes([state]) * work.count, f"a work's slots are not {state.name}"
        assert (work.count - 1) * model.items_per_slot < work.items <= work.count * model.items_per_slot
