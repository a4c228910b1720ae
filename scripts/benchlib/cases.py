"""The four cases: who takes part, with what, and how each is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np

from .baselines import BASELINES, Setup, ring
from .crew import Cost, Counters, Crew, Exchanger, Started
from .latency import Alternating, Samples, relay
from .workload import IMAGES, SMALL, Workload

CHUNK: Final = 64
IMAGE_SLOTS: Final = 64
SMALL_ITEMS: Final = 1024


@dataclass(frozen=True)
class Options:
    """How long to measure.

    Attributes:
        rounds: windows of each contender.
        window_s: length of a window, throughput cases.
        latency_s: length of a window in which the contenders of case c take turns.
        thorough: False leaves out the rows that say little: pickling hides which engine computes.
        pool: False leaves the pool out, to look at the baselines alone.
        folder: for the models.
    """

    rounds: int
    window_s: float
    latency_s: float
    thorough: bool
    pool: bool
    folder: Path

    def model(self, workload: Workload) -> Path:
        """The model file of `workload`, written when first asked for."""
        path = self.folder / f"mean{workload.item_bytes}.onnx"
        if not path.exists():
            workload.write_model(path)
        return path


@dataclass
class Series:
    """What one contender did, a value a round.

    Attributes:
        name, engine: the contender.
        pool: it is trtpool; the others are compared with it.
        values: items/s, or microseconds.
        items: over all rounds.
        cpu_s: of all its processes, over all rounds.
        items_per_batch, runs_per_batch: by the pool's own counters, over all rounds.
    """

    name: str
    engine: str
    pool: bool = False
    values: list[float] = field(default_factory=list)
    items: int = 0
    cpu_s: float = 0.0
    items_per_batch: float | None = None
    runs_per_batch: float | None = None


@dataclass(frozen=True)
class Table:
    """One table of the report; `lower_is_better` for latencies."""

    case: str
    title: str
    unit: str
    lower_is_better: bool
    note: str
    series: list[Series]


@dataclass(frozen=True)
class Contender:
    name: str
    engine: str
    start: Callable[[], AbstractContextManager[Started]]
    pool: bool = False


class _Up:
    """A contender with its producers, up and warm."""

    def __init__(self, contender: Contender, stack: contextlib.ExitStack) -> None:
        self.series = Series(contender.name, contender.engine, contender.pool)
        self._cost = Cost()
        with self._cost.starting():
            started = stack.enter_context(contender.start())
            self._crew = stack.enter_context(contextlib.closing(Crew(started.connects)))
        self._counters = started.counters
        self._before = self._counters() if self._counters else None

    def turn(self, window_s: float) -> None:
        cpu_s = self._cost.cpu_s()
        turns = self._crew.run(window_s)
        self.series.cpu_s += self._cost.cpu_s() - cpu_s
        items = sum(turn.report for turn in turns)
        took_s = max(turn.ended_s for turn in turns) - min(turn.started_s for turn in turns)
        self.series.values.append(items / took_s)
        self.series.items += items

    def count(self) -> None:
        """Take the batch sizes since the start from the pool's counters."""
        if self._counters is None or self._before is None:
            return
        now = Counters(*(b - a for a, b in zip(self._before, self._counters(), strict=True)))
        self.series.items_per_batch = now.items / max(1, now.batches)
        self.series.runs_per_batch = now.runs / max(1, now.batches)


def _compete(contenders: Sequence[Contender], options: Options) -> list[Series]:
    """Let `contenders` take turns, forwards and backwards, for `options.rounds` rounds."""
    with contextlib.ExitStack() as stack:
        up = [_Up(contender, stack) for contender in contenders]
        for turn in range(options.rounds):
            for one in up if turn % 2 == 0 else reversed(up):
                one.turn(options.window_s)
        for one in up:
            one.count()
    return [one.series for one in up]


def _baselines(setup: Setup, thorough: bool) -> list[Contender]:
    """Each baseline with each engine; `thorough` decides about NumPy behind a pickle."""
    return [
        Contender(name, engine, partial(start, replace(setup, engine=engine)))
        for (name, start), engine in product(BASELINES.items(), ("numpy", "onnxruntime"))
        if thorough or name == "ring" or engine == "onnxruntime"
    ]


def _chunked(setup: Setup, thorough: bool) -> list[Contender]:
    """The baselines with `setup.count` items a message, chunked by hand."""
    return [
        Contender(f"{name}, {setup.count} a message", setup.engine, partial(start, setup))
        for name, start in BASELINES.items()
        if thorough or name == "ring"
    ]


def _pool(
    name: str, base: Setup, style: str, max_batch: int, items_per_slot: int = 1, transport: str = "lifeline"
) -> Contender:
    from .poolside import PoolSetup, pool  # not needed, and perhaps not importable, with --no-pool

    setup = PoolSetup(base, style, max_batch, items_per_slot, transport)
    return Contender(name, "onnxruntime", partial(pool, setup), pool=True)


FAIR: Final = (
    "Fair are the onnxruntime rows: the same session and thread count on both sides, so what differs is "
    "transport. The numpy rows show what changing the engine alone does. Executors have one worker for each "
    "producer, all others one."
)


def images(options: Options) -> Iterator[Table]:
    """Case a: 600 KB images, 1 and 4 producers."""
    for producers in (1, 4):
        setup = Setup(IMAGES, options.model(IMAGES), producers, IMAGE_SLOTS)
        contenders = _baselines(setup, options.thorough)
        if options.pool:
            eights = Setup(IMAGES, setup.model, producers, IMAGE_SLOTS // 8, 8)
            contenders += [
                _pool("pool, map", setup, "map", max_batch=8),
                _pool("pool, runs of 8", eights, "runs", max_batch=8),
            ]
        title = f"{IMAGES.name}, {producers} producer{'s' * (producers > 1)}, {IMAGE_SLOTS} slots"
        yield Table("a", title, "items/s", False, FAIR, _compete(contenders, options))


def small(options: Options) -> Iterator[Table]:
    """Case b: 1 KB items, one a message and 64 a message, 1 and 4 producers."""
    for producers in (1, 4):
        setup = Setup(SMALL, options.model(SMALL), producers, SMALL_ITEMS)
        chunks = Setup(SMALL, setup.model, producers, SMALL_ITEMS // CHUNK, CHUNK)
        contenders = _baselines(setup, options.thorough) + _chunked(chunks, options.thorough)
        if options.pool:
            large = Setup(SMALL, setup.model, producers, 16, 8 * CHUNK)
            contenders += [
                _pool(f"pool, runs of {CHUNK}", chunks, "runs", max_batch=256),
                _pool(f"pool, {CHUNK} items a slot", chunks, "runs", max_batch=256, items_per_slot=CHUNK),
                _pool(f"pool, {CHUNK} a slot, runs of 8", large, "runs", max_batch=1024, items_per_slot=CHUNK),
            ]
        title = f"{SMALL.name}, {producers} producer{'s' * (producers > 1)}, room for {SMALL_ITEMS:,} items"
        note = (
            f"{FAIR} '{CHUNK} a message' is the same baseline with its items chunked by hand; 'runs of 8' has room for "
            "8,192 items."
        )
        yield Table("b", title, "items/s", False, note, _compete(contenders, options))


def latency(options: Options) -> Iterator[Table]:
    """Case c: one 1 KB item at a time, beside a bare ZeroMQ relay."""
    setup = Setup(SMALL, options.model(SMALL), 1, 64)
    series = {name: Series(name, engine) for name, engine in (("relay", "none"), ("ring", "onnxruntime"))}
    costs: dict[str, Cost] = {}
    with contextlib.ExitStack() as stack:
        costs["relay"] = Cost()
        with costs["relay"].starting():
            connects: dict[str, Callable[[], Exchanger]] = {"relay": stack.enter_context(relay())}
        others: dict[str, Callable[[], AbstractContextManager[Started]]] = {"ring": partial(ring, setup)}
        if options.pool:
            for name, transport in (("pool", "lifeline"), ("pool, zmq", "zmq")):
                contender = _pool(name, setup, "single", max_batch=16, transport=transport)
                series[name] = Series(name, contender.engine, pool=True)
                others[name] = contender.start
        for name, start in others.items():
            costs[name] = Cost()
            with costs[name].starting():
                connects[name] = stack.enter_context(start()).connects[0]
        crew = stack.enter_context(contextlib.closing(Crew([partial(Alternating, connects, SMALL)])))
        rounds = _take_turns(crew, costs, series, options)
    for percent in (50, 99):
        yield Table(
            "c",
            f"latency of one {SMALL.name[:-1]}, p{percent}",
            "us",
            True,
            "The relay carries an empty frame through three processes and computes nothing; ring and pool "
            "write, compute and check. CPU counts the pool's and the ring's idle time too.",
            [_percentile(one, [took[one.name] for took in rounds], percent) for one in series.values()],
        )


def _take_turns(
    crew: Crew, costs: dict[str, Cost], series: dict[str, Series], options: Options
) -> list[dict[str, list[int]]]:
    """Run the rounds of case c; fills items and CPU of `series`, returns the times by name, ns."""
    rounds = []
    for _ in range(options.rounds):
        cpu_s = {name: cost.cpu_s() for name, cost in costs.items()}
        samples: dict[str, Samples] = crew.run(options.latency_s)[0].report
        for name, cost in costs.items():
            series[name].cpu_s += cost.cpu_s() - cpu_s[name] + samples[name].cpu_s
            series[name].items += samples[name].exchanges
        rounds.append({name: one.took_ns for name, one in samples.items()})
    return rounds


def _percentile(series: Series, rounds: list[list[int]], percent: int) -> Series:
    values = [float(np.percentile(took_ns, percent)) / 1e3 for took_ns in rounds]
    return Series(series.name, series.engine, series.pool, values, series.items, series.cpu_s)


def crowd(options: Options) -> Iterator[Table]:
    """Case d: 16 producers with one 1 KB item each; how many runs a batch has."""
    setup = Setup(SMALL, options.model(SMALL), 16, 64)
    alone = Setup(SMALL, setup.model, 16, 16)
    contenders = [Contender("ring", "onnxruntime", partial(ring, alone))]
    if options.pool:
        contenders.append(_pool("pool", setup, "single", max_batch=16))
    note = "Each producer waits for its result before it sends again; a batch of one run is one copy."
    yield Table("d", "1 KB items, 16 producers, one in flight each", "items/s", False, note,
                _compete(contenders, options))  # fmt: skip


CASES: Final = {"a": images, "b": small, "c": latency, "d": crowd}
