"""Models share the workers by their weights, whatever they flood them with: a core with simulated devices and time."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.broker.core_rig import MS, layouts, sent
from trtpool.broker import events as e
from trtpool.broker.core import Core
from trtpool.broker.invariants import validate
from trtpool.broker.shares import MOST_NS, SCALE
from trtpool.broker.snapshot import restore, save
from trtpool.ipc import messages as m
from trtpool.ipc.settings import INTERACTIVE, ModelTerms

US = 1_000
SLOTS = 64
BATCH = 4


class Load(NamedTuple):
    """What is asked of one model: `depth` items are queued or running at any time, and a batch takes `batch_ns`."""

    weight: int
    batch_ns: int
    depth: int
    priority: int = 0


class Simulation:
    """Producers that keep each model as deep in work as its load says, and workers of one device each.

    Attributes:
        served_ns: for each model, the time that devices worked for it.
        order: the models of batches, as they were sent.
        idle: whether a device ever had nothing to do.
    """

    def __init__(self, loads: list[Load], *, workers: int = 1, lanes: int = 1) -> None:
        self.loads = loads
        self.core = self._new_core()
        self.now_ns = MS
        self.served_ns: Counter[int] = Counter()
        self.order: list[int] = []
        self.waits_ns: list[list[int]] = [[] for _ in loads]
        self.paused: set[int] = set()
        self._ends: list[tuple[int, int, int, m.Run]] = []
        self._numbers = itertools.count()
        self._busy_until = dict.fromkeys(range(100, 100 + workers), self.now_ns)
        for peer in range(1, len(loads) + 1):
            self._tell(e.ProducerJoined(peer, 1000 + peer))
        for peer in self._busy_until:
            self._tell(e.WorkerJoined(peer, 1000 + peer))
            self._tell(e.Received(peer, m.Ready("cpu", lanes)))

    def _new_core(self) -> Core:
        terms = [ModelTerms(weight=load.weight, max_slots_per_producer=SLOTS) for load in self.loads]
        return Core(layouts(*[(SLOTS, 1, BATCH)] * len(self.loads)), terms=terms, started_ns=MS)

    def take_over(self) -> None:
        """Another broker goes on from what this one had."""
        core = self._new_core()
        restore(core, save(self.core))
        assert save(core) == save(self.core)
        self.core = core

    def start(self, *models: int) -> None:
        """These models get their work."""
        for model in models or range(len(self.loads)):
            self._submit(model, self.loads[model].depth)
        self._tell(e.TurnEnded())

    def run(self, until_ns: int) -> None:
        """Let devices work and producers go on, until then."""
        while self._ends and self._ends[0][0] <= until_ns:
            self.now_ns, _, worker, run = heapq.heappop(self._ends)
            took_ns = self.loads[run.model].batch_ns
            self.served_ns[run.model] += took_ns
            ended = self._tell(e.Received(worker, m.Finished(run.batch, run.attempt, 0, took_ns, 0, 0)))
            for done in sent(ended, m.Done):
                assert done.status == m.OK
                self.waits_ns[run.model].append(done.queue_ns)
                self._tell(e.Received(1 + run.model, m.Release(done.lease, done.first, done.count)))
                if run.model not in self.paused:
                    self._submit(run.model, done.count)
            self._tell(e.TurnEnded())
        self.now_ns = until_ns

    def _submit(self, model: int, items: int) -> None:
        priority = self.loads[model].priority
        for _ in range(items):
            asked = self._tell(e.Received(1 + model, m.Lease(1, model, 1, 0, priority)))
            (grant,) = sent(asked, m.Grant)
            ((lease, _),) = grant.leases
            self._tell(e.Received(1 + model, m.Submit(lease, 0, 1, 0, 1, priority=priority)))

    def _tell(self, event: e.Event) -> list[e.Action]:
        actions = self.core.handle(event, self.now_ns)
        for action in actions:
            if isinstance(action, e.Send) and isinstance(action.message, m.Run):
                run = action.message
                end_ns = max(self.now_ns, self._busy_until[action.peer]) + self.loads[run.model].batch_ns
                self._busy_until[action.peer] = end_ns
                heapq.heappush(self._ends, (end_ns, next(self._numbers), action.peer, run))
                self.order.append(run.model)
        if isinstance(event, e.TurnEnded):
            validate(self.core)
        return actions


def unfairness(simulation: Simulation, since: Counter[int]) -> float:
    """How far apart two models got, in time by weight, from what the devices had done for them before."""
    got = [(simulation.served_ns[i] - since[i]) / load.weight for i, load in enumerate(simulation.loads)]
    return max(got) - min(got)


def bound(simulation: Simulation, workers: int, lanes: int) -> float:
    """One batch of each that is in service, and one that is next: what any packet-wise scheme may be off by."""
    return sum((workers * (lanes + 1) + 2) * load.batch_ns / load.weight for load in simulation.loads)


# Deep enough that each model has work queued at all times, whatever is sent ahead.
flooding = st.builds(
    Load,
    st.integers(1, 9),
    st.integers(300, 20_000).map(lambda us: us * US),
    st.sampled_from([48, 51, SLOTS]),
    st.just(0),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(flooding, min_size=2, max_size=3), st.integers(1, 2), st.integers(1, 3), st.booleans())
def test_while_all_have_work_time_goes_by_weight(loads, workers, lanes, taken_over):
    simulation = Simulation(loads, workers=workers, lanes=lanes)
    simulation.start()
    simulation.run(100 * MS)  # until it is known what the models' batches take
    since = simulation.served_ns.copy()
    for step in range(1, 6):
        if taken_over:
            simulation.take_over()
        simulation.run(100 * MS + step * 60 * MS)
        assert unfairness(simulation, since) <= 2 * bound(simulation, workers, lanes)


@pytest.mark.parametrize(("weights", "share"), [((1, 1), 0.5), ((3, 1), 0.75), ((1, 9), 0.1)])
def test_shares_of_a_device(weights, share):
    """However unlike the batches are: the second model's take ten times as long."""
    simulation = Simulation([Load(weights[0], 2 * MS, SLOTS), Load(weights[1], 20 * MS, SLOTS)])
    simulation.start()
    simulation.run(20_000 * MS)
    total_ns = sum(simulation.served_ns.values())
    assert simulation.served_ns[0] / total_ns == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("priority", [0, INTERACTIVE])
def test_who_floods_does_not_keep_others_waiting(priority):
    """One item at a time beside a queue of 64: in order of arrival it would wait for all that was there before."""
    loads = [Load(1, 5 * MS, SLOTS, priority), Load(1, 1 * MS, 1, priority)]
    simulation = Simulation(loads)
    simulation.start()
    simulation.run(1_000 * MS)
    waits = simulation.waits_ns[1]
    assert len(waits) > 30
    assert max(waits[5:]) <= 3 * 5 * MS, "the batch in the device, and those that were sent ahead"


def test_who_is_alone_has_all_the_time():
    simulation = Simulation([Load(1, 4 * MS, 16), Load(1000, 4 * MS, 16)])
    simulation.start(0)
    simulation.run(400 * MS)
    assert simulation.served_ns[0] >= 390 * MS, "a model of small weight waits for nobody who has no work"


def test_what_was_not_used_is_no_credit():
    """A model that was idle gets its share from now on, and does not make up for lost time."""
    simulation = Simulation([Load(1, 4 * MS, SLOTS), Load(1, 4 * MS, SLOTS)])
    simulation.start(0)
    simulation.run(4_000 * MS)
    before = simulation.served_ns.copy()
    simulation.start(1)
    simulation.run(4_200 * MS)
    assert unfairness(simulation, before) <= 6 * 4 * MS


def test_a_batch_is_charged_what_it_took():
    """The first batches are taken for 1 ms, and one of the models' takes 50."""
    simulation = Simulation([Load(1, 50 * MS, SLOTS), Load(1, 1 * MS, SLOTS)])
    simulation.start()
    simulation.run(500 * MS)
    assert unfairness(simulation, Counter()) <= 4 * 50 * MS


def test_a_take_over_changes_nothing():
    """The same batches in the same order as if the first broker had lived on."""
    orders = []
    for taken_over in (False, True):
        simulation = Simulation([Load(2, 3 * MS, SLOTS), Load(1, 7 * MS, 9), Load(5, 1 * MS, 20)], lanes=2)
        simulation.start()
        for step in range(1, 20):
            simulation.run(step * 11 * MS)
            if taken_over:
                simulation.take_over()
        orders.append(simulation.order)
    assert orders[0] == orders[1]
    assert set(orders[0]) == {0, 1, 2}


def test_a_worker_that_lies_about_times_puts_its_model_off_for_an_hour_at_most():
    simulation = Simulation([Load(1, 1 * MS, 4), Load(1, 1 * MS, 4)])
    simulation.start()
    batch = next(iter(simulation.core.workers[100].batches.values()))
    model = batch.model
    simulation._tell(e.Received(100, m.Finished(batch.id, batch.attempt, 2**60, 2**60, 2**60, 0)))
    assert model.finish - simulation.core.books.shares.virtual <= 3 * MOST_NS * SCALE
    simulation.take_over()


def test_weights_have_bounds():
    """As written in `ModelTerms`, and checked where a broker is told of them."""
    with pytest.raises(msgspec.ValidationError, match=">= 1"):
        msgspec.convert({"weight": 0}, ModelTerms)
