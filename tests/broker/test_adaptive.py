"""Batch sizes follow the load by themselves, in simulated time: no clock, all chance is seeded.

Items arrive one by one at random times (a Poisson process), spread over many clients, at a device whose batches cost
something in themselves and something for each item.  `python tests/broker/test_adaptive.py` prints what comes of it:
the tables of docs/batching.md.
"""

from __future__ import annotations

import functools
import heapq
import random
import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.broker.core_rig import layouts
from trtpool.broker import events as e
from trtpool.broker.core import Core
from trtpool.broker.invariants import validate
from trtpool.ipc import messages as m

US: Final = 1000
SECOND: Final = 10**9
MAX_BATCH: Final = 64
SLOTS: Final = 1024
CLIENTS: Final = 32
WORKER: Final = 1000
DELAY_US: Final = 2000
WARM_UP, MEASURED = 500, 2500
RATES: Final = (100, 1_000, 4_000, 10_000, 20_000, 40_000, 60_000, 120_000)
DOC: Final = Path(__file__).parents[2] / "docs" / "batching.md"


class Stage(NamedTuple):
    """A part of a device, which works at one batch at a time."""

    batch_us: int
    item_us: int

    def took_ns(self, items: int) -> int:
        return (self.batch_us + items * self.item_us) * US


class Device(NamedTuple):
    """Its batches pass the stages in order; as many are in it as it has lanes, and others wait."""

    name: str
    lanes: int
    stages: tuple[Stage, ...]

    @property
    def alone_ns(self) -> int:
        """What one item takes that nothing else is in the way of."""
        return sum(stage.took_ns(1) for stage in self.stages)

    @property
    def items_per_s(self) -> float:
        """The most that it can do: full batches, one after the other."""
        slowest_ns = max(stage.took_ns(MAX_BATCH) for stage in self.stages)
        return MAX_BATCH * SECOND / slowest_ns


CPU: Final = Device("one lane, 200 us a batch and 10 us an item", 1, (Stage(200, 10),))
GPU: Final = Device("three lanes, copies beside compute", 3, (Stage(20, 10), Stage(180, 10)))


@dataclass
class Seen:
    """What came of a load.

    Attributes:
        batches: items in each, and in how many runs.
        latencies_ns: of each item, from its arrival until its result.
        queued_ns: of each item, until its batch went to the device.
    """

    batches: list[tuple[int, int]] = field(default_factory=list)
    latencies_ns: list[int] = field(default_factory=list)
    queued_ns: list[int] = field(default_factory=list)

    @property
    def size(self) -> float:
        return statistics.mean(items for items, _ in self.batches)

    @property
    def runs(self) -> float:
        return statistics.mean(runs for _, runs in self.batches)

    @property
    def mean_us(self) -> float:
        return statistics.mean(self.latencies_ns) / US

    @property
    def p99_us(self) -> float:
        return sorted(self.latencies_ns)[len(self.latencies_ns) * 99 // 100] / US


class Simulation:
    """Arrivals, the core, and a device; see the module.

    Args:
        advance: clients ask for the next slot with each submission, and keep it until they have an item for it.
    """

    def __init__(self, device: Device, rate: float, max_delay_us: int, seed: int, *, advance: bool) -> None:
        self.again = int(advance)
        self.device, self.gap_s, self.delay_ns = device, 1 / rate, max_delay_us * US
        self.random = random.Random(seed)
        self.core = Core(
            layouts((SLOTS, 1, MAX_BATCH)), max_delay_us=max_delay_us, max_slots_per_producer=SLOTS // CLIENTS
        )
        self.now_ns = 0
        self.seen = Seen()
        self.ended = self.number = self.seq = 0
        self.later: list[tuple[int, int, e.Event | None]] = []  # when, a number, and what: None is an arrival
        self.lanes_ns = [0] * device.lanes
        self.stages_ns = [0] * len(device.stages)
        self.in_device = 0
        self.spoken = False
        self.stock: list[deque[int]] = [deque() for _ in range(CLIENTS)]  # leases
        self.wanting: list[deque[int]] = [deque() for _ in range(CLIENTS)]  # arrivals without one
        self.arrived_ns: dict[int, int] = {}  # by lease
        self.queued_ns: dict[int, int] = {}
        for client in range(CLIENTS):
            self.tell(e.ProducerJoined(client))
        self.tell(e.WorkerJoined(WORKER, 1))
        self.tell(e.Received(WORKER, m.Ready("simulated", device.lanes)))
        self.schedule(0, None)

    def schedule(self, after_ns: int, event: e.Event | None) -> None:
        self.number += 1
        heapq.heappush(self.later, (self.now_ns + after_ns, self.number, event))

    def tell(self, event: e.Event) -> None:
        """The core hears of it, and its peers of what it decides."""
        self.spoken = self.spoken or isinstance(event, e.Received)
        for action in self.core.handle(event, self.now_ns):
            if isinstance(action, e.Send):
                self.hear(action.peer, action.message)

    def hear(self, peer: int, message: m.FromBroker) -> None:
        if isinstance(message, m.Grant):
            for lease_id, _ in message.leases:
                self.stock[peer].append(lease_id)
            self.submit(peer)
        elif isinstance(message, m.Run):
            self.run(message)
        elif isinstance(message, m.Done):
            assert message.status == m.OK
            self.ended += 1
            if self.ended > WARM_UP:
                self.seen.latencies_ns.append(self.now_ns - self.arrived_ns[message.lease])
                self.seen.queued_ns.append(message.queue_ns)
            self.tell(e.Received(peer, m.Release(message.lease, message.first, message.count)))

    def arrive(self) -> None:
        client = self.random.randrange(CLIENTS)
        self.wanting[client].append(self.now_ns)
        if not self.stock[client]:
            self.seq += 1
            self.tell(e.Received(client, m.Lease(self.seq, 0, 1, None)))
        self.submit(client)
        self.schedule(int(self.random.expovariate(1 / self.gap_s) * SECOND), None)

    def submit(self, client: int) -> None:
        while self.wanting[client] and self.stock[client]:
            lease_id = self.stock[client].popleft()
            self.arrived_ns[lease_id] = self.wanting[client].popleft()
            self.tell(e.Received(client, m.Submit(lease_id, 0, 1, 1, 1, None, self.again)))

    def run(self, run: m.Run) -> None:
        items = sum(rows.items for rows in run.rows)
        if self.ended >= WARM_UP:
            self.seen.batches.append((items, len(run.rows)))
        at_ns = max(self.now_ns, heapq.heappop(self.lanes_ns))
        for index, stage in enumerate(self.device.stages):
            at_ns = self.stages_ns[index] = max(at_ns, self.stages_ns[index]) + stage.took_ns(items)
        heapq.heappush(self.lanes_ns, at_ns)
        took_ns = sum(stage.took_ns(items) for stage in self.device.stages)
        self.in_device += 1
        self.schedule(at_ns - self.now_ns, e.Received(WORKER, m.Finished(run.batch, 0, 0, took_ns, 0, 0)))

    def step(self) -> None:
        """Go on to what happens next, which may be a timer of the core's."""
        timer_ns = self.core.next_timer_ns()
        if timer_ns is not None and timer_ns < self.later[0][0]:
            self.now_ns = max(self.now_ns, timer_ns)
        else:
            self.now_ns, _, event = heapq.heappop(self.later)
            if event is None:
                self.arrive()
            else:
                self.in_device -= 1
                self.tell(event)
        self.spoken = True
        while self.spoken:  # what was granted is submitted at once
            self.spoken = False
            self.tell(e.TurnEnded())
        self.check()

    def check(self) -> None:
        """Work-conserving: nothing waits, but for `max_delay_us`, while nothing is in the device."""
        queue = self.core.models[0].lines[0].queue
        if queue.items and not self.in_device:
            assert self.delay_ns, "the device is idle while there is work"
            assert queue.items < MAX_BATCH, "a full batch waits"
            assert self.now_ns - queue.oldest.queued_ns < self.delay_ns, "it waits for longer than max_delay_us"


@functools.cache
def simulate(device: Device, rate: float, max_delay_us: int = 0, seed: int = 5, *, advance: bool = False) -> Seen:
    """A load of so many items/s."""
    simulation = Simulation(device, rate, max_delay_us, seed, advance=advance)
    while simulation.ended < WARM_UP + MEASURED:
        simulation.step()
    validate(simulation.core)
    return simulation.seen


def fixed_point(stage: Stage, rate: float) -> float:
    """The batch that is as large as what arrives while one of that size runs: b = rate * (batch + b * item)."""
    return rate * stage.batch_us / (1e6 - rate * stage.item_us)


# --- Work-conserving ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [CPU, GPU], ids=["CPU", "GPU"])
def test_at_low_load_an_item_goes_alone_and_at_once(device):
    seen = simulate(device, 100)
    assert seen.size <= 1.05
    assert device.alone_ns / US <= seen.mean_us <= 1.1 * device.alone_ns / US


@pytest.mark.parametrize("seed", [5, 6])
@pytest.mark.parametrize(("device", "slowest"), [(CPU, CPU.stages[0]), (GPU, GPU.stages[1])], ids=["CPU", "GPU"])
def test_batches_are_what_arrives_while_one_runs(device, slowest, seed):
    """So they grow with the load, with no setting: the fixed cost of a batch is shared by as many as need be."""
    sizes = [simulate(device, rate, seed=seed).size for rate in RATES]
    assert sizes == sorted(sizes)
    for rate, size in zip(RATES, sizes, strict=True):
        if 10_000 <= rate <= 0.8 * device.items_per_s:  # of fewer than two there is no less than one
            assert size == pytest.approx(fixed_point(slowest, rate), rel=0.1)
    assert RATES[-1] > 1.5 * device.items_per_s
    assert sizes[-1] >= 0.99 * MAX_BATCH


@pytest.mark.parametrize("device", [CPU, GPU], ids=["CPU", "GPU"])
def test_below_saturation_an_item_waits_for_the_batches_before_it_and_no_more(device):
    """At most one that runs and one that was sent ahead; then comes its own."""
    full_ns = sum(stage.took_ns(MAX_BATCH) for stage in device.stages)
    for rate in RATES:
        if rate <= 0.8 * device.items_per_s:
            assert max(simulate(device, rate).latencies_ns) <= 3 * full_ns


# --- max_delay_us ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [CPU, GPU], ids=["CPU", "GPU"])
def test_with_a_delay_batches_are_what_arrives_in_it(device):
    """And full ones from the rate on that fills one in the delay."""
    for rate in RATES:
        due = 1 + rate * DELAY_US / 1e6  # who came first, and who comes while that one waits
        size = simulate(device, rate, DELAY_US).size
        if due > 1.2 * MAX_BATCH:
            assert size >= 0.99 * MAX_BATCH
        else:
            assert size == pytest.approx(due, rel=0.1)


@pytest.mark.parametrize("device", [CPU, GPU], ids=["CPU", "GPU"])
def test_nobody_is_held_back_for_longer_than_the_delay(device):
    """`Simulation.check` says so of every moment; here, of what clients are told."""
    for rate in RATES:
        if rate <= 0.8 * device.items_per_s:
            longest_ns = max(simulate(device, rate, DELAY_US).queued_ns)
            assert longest_ns <= DELAY_US * US
            assert rate * DELAY_US / 1e6 > MAX_BATCH or longest_ns == DELAY_US * US


# --- Runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_us", [0, DELAY_US])
@pytest.mark.parametrize("device", [CPU, GPU], ids=["CPU", "GPU"])
def test_what_is_leased_when_it_arrives_makes_batches_of_one_run(device, delay_us):
    """Slots are granted in the order of arrival, so what waits lies side by side, but where the ring begins again."""
    for rate in RATES:
        assert simulate(device, rate, delay_us).runs <= 1.5


def test_at_saturation_what_was_leased_in_advance_makes_few_runs_too():
    for device in (CPU, GPU):
        seen = simulate(device, RATES[-1], advance=True)
        assert seen.size >= 0.99 * MAX_BATCH
        assert seen.runs <= 4


# --- docs/batching.md -----------------------------------------------------------------------------


def rows(device: Device, delay_us: int) -> list[list[float]]:
    """For each rate: load in percent, items a batch, runs a batch (leased on arrival, in advance), latencies in us."""
    table = []
    for rate in RATES:
        seen, advance = simulate(device, rate, delay_us), simulate(device, rate, delay_us, advance=True)
        load = 100 * rate / device.items_per_s
        table.append([rate, load, seen.size, seen.runs, advance.runs, seen.mean_us, seen.p99_us])
    return table


TABLES: Final = ((CPU, 0), (GPU, 0), (CPU, DELAY_US))


def documented() -> list[list[list[float]]]:
    """The figures of each table in the page."""
    tables: list[list[list[float]]] = []
    for line in DOC.read_text().splitlines():
        if line.startswith("|---"):
            tables.append([])
        elif line.startswith("|") and line[2].isdigit():
            tables[-1].append([float(cell.strip(" %").replace(",", "")) for cell in line.strip("|").split("|")])
    return tables


def test_the_page_has_these_figures():
    """Run `python tests/broker/test_adaptive.py` for the new ones, if batches are made in another way on purpose."""
    assert len(documented()) == len(TABLES)
    for (device, delay_us), told in zip(TABLES, documented(), strict=True):
        for now, then in zip(rows(device, delay_us), told, strict=True):
            assert then == pytest.approx(now, rel=0.1, abs=0.6), f"{device.name}, {delay_us} us"


if __name__ == "__main__":
    for one, wait_us in TABLES:
        print(f"\n**{one.name}**, `max_delay_us` {wait_us}:\n")  # noqa: T201  # for the page
        print("| items/s | load | items a batch | runs a batch | with slots leased in advance | mean us | p99 us |")  # noqa: T201
        print("|---|---|---|---|---|---|---|")  # noqa: T201
        for rate_, load_, *sizes_, mean_, p99_ in rows(one, wait_us):
            cells = [
                f"{rate_:,}",
                f"{load_:.0f} %",
                *(f"{size:.1f}" for size in sizes_),
                f"{mean_:,.0f}",
                f"{p99_:,.0f}",
            ]
            print("| " + " | ".join(cells) + " |")  # noqa: T201
