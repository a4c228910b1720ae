"""A pool and its producers at one point of a sweep, and what came of it."""

from __future__ import annotations

import contextlib
import statistics
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec.structs import astuple

import trtpool
from trtpool.ipc.report import ModelReport
from trtpool.ipc.timings import PHASES, Timings

from .crew import CONTEXT, STUCK_S, Crew, Turn
from .gpu_items import Expected, Load, Source, Tensor, sample
from .gpu_window import CpuTimes, below, spent
from .sweep import BASE, Point
from .workload import Workload

LEAD_S: Final = 0.15
"""Work goes on before a window begins, so that filling the pipeline is not measured."""

SPREAD_S: Final = 0.02
"""And for each producer so much longer, since many of them do not start at once on few cores."""

SETTLE: Final = 20
"""The first exchanges of one item at a time, a quarter at most, are not counted: processes wake from the load."""

LEAST: Final = 8
"""And no fewer are done, however long they take."""

PREPARED_BYTES: Final = 64 << 20
"""What a producer prepares, about."""

MANY, FEW = 7, 2
"""Different slots that it prepares, primes; few of them if they are large."""

LOAD, ALONE = 0, 1
TIMED: Final = 2
"""Added to one of these: producers report phases."""


@dataclass(frozen=True)
class Budget:
    """How long to measure a point.

    Attributes:
        rounds: windows under load.
        window_s: of each.
        alone_s: for one item at a time.
    """

    rounds: int
    window_s: float
    alone_s: float


@dataclass
class Measured:
    """What a point came to; medians of its rounds.

    Attributes:
        items_per_s: all producers together.
        p50_us, p99_us: from a run's submission until its producer has the result.
        alone_p50_us, alone_p99_us: the same of single slots, one at a time, while nobody else does anything.
        items_per_batch, runs_per_batch: under load.
        cpu_us_per_item: by who.
        rounds: items/s of each.
    """

    items_per_s: float
    p50_us: float
    p99_us: float
    alone_p50_us: float
    alone_p99_us: float
    items_per_batch: float
    runs_per_batch: float
    cpu_us_per_item: dict[str, float] = field(default_factory=dict)
    rounds: list[float] = field(default_factory=list)


Describe = Callable[[trtpool.Result, int], Sequence[int]]


def _outcome(result: trtpool.Result, sent_ns: int) -> Sequence[int]:
    now_ns = time.monotonic_ns()
    return now_ns, now_ns - sent_ns, result.items


def _phases(result: trtpool.Result, _sent_ns: int) -> Sequence[int]:
    return astuple(result.timings)


class SweepProducer:
    """Reports an `array` of three numbers for each submission that ended: when (ns), after how long (ns), items.

    With `TIMED` there are as many as `PHASES` instead: how long each of these took (ns).

    Args:
        handle: the pool's.
        load: what to write.
        window: runs in flight.
        number: counted from 0; only that one works if one item at a time is asked for.
        mode: `LOAD` or `ALONE`, perhaps with `TIMED`, read at the start of each run.
    """

    def __init__(
        self, handle: trtpool.PoolHandle, load: Load, window: int, number: int, mode: Synchronized[int]
    ) -> None:
        self._client = handle.connect()
        self._load, self._window, self._number, self._mode = load, window, number, mode
        self._source = Source(load)
        self._output = self._client.models[0].spec.outputs[0].name
        self._expected = Expected([self._one(row) for row in range(self._source.rows)])

    def _one(self, row: int) -> Any:
        """What one prepared slot must give."""
        with self._client.lease(timeout_s=STUCK_S) as lease:
            for name, prepared in self._source.row(row).items():
                np.copyto(lease.inputs[name], prepared)
            return sample(lease.submit().result(timeout_s=STUCK_S).outputs[self._output], 1)

    def run(self, until_s: float) -> array[int]:
        mode = self._mode.value
        describe = _phases if mode & TIMED else _outcome
        if not mode & ALONE:
            return self._under_load(until_s, describe)
        return self._alone(until_s, describe) if self._number == 0 else array("q")

    def _under_load(self, until_s: float, describe: Describe) -> array[int]:
        done = array("q")
        pending: deque[list[tuple[trtpool.Lease, trtpool.Submitted, slice, int]]] = deque()
        while True:
            while len(pending) < self._window and time.monotonic() < until_s:
                pending.append(self._send())
            if not pending:
                return done
            for lease, submitted, rows, sent_ns in pending.popleft():
                result = submitted.result(timeout_s=STUCK_S)
                done.extend(describe(result, sent_ns))
                self._expected.check(result.outputs[self._output], rows)
                lease.release()

    def _send(self) -> list[tuple[trtpool.Lease, trtpool.Submitted, slice, int]]:
        """Write and submit a run, which is one lease or, in a crowd, several."""
        sent = []
        at = self._source.take(self._load.run).start
        for lease in self._client.lease_many(self._load.run, timeout_s=STUCK_S):
            rows = slice(at, at + lease.count)
            self._source.write(lease.inputs, rows)
            sent_ns = time.monotonic_ns()
            sent.append((lease, lease.submit(), rows, sent_ns))
            at += lease.count
        return sent

    def _alone(self, until_s: float, describe: Describe) -> array[int]:
        done = array("q")
        exchanges = 0
        while time.monotonic() < until_s or exchanges < LEAST:
            rows = self._source.take(1)
            with self._client.lease(timeout_s=STUCK_S) as lease:
                for name, prepared in self._source.row(rows.start).items():
                    np.copyto(lease.inputs[name], prepared)
                sent_ns = time.monotonic_ns()
                result = lease.submit().result(timeout_s=STUCK_S)
                done.extend(describe(result, sent_ns))
                exchanges += 1
                self._expected.check(result.outputs[self._output], rows)
        return done[len(done) // exchanges * min(SETTLE, exchanges // 4) :]

    def close(self) -> None:
        self._client.close()


def rate(reports: Sequence[array[int]], began_ns: int, ended_ns: int) -> float:
    """Items/s between the first submission that ended in a window and the last.

    Raises:
        ValueError: fewer than two ended, so the window was too short.
    """
    inside = sorted(
        (at_ns, items)
        for report in reports
        for at_ns, items in zip(report[0::3], report[2::3], strict=True)
        if began_ns <= at_ns <= ended_ns
    )
    if len(inside) < 2 or inside[-1][0] == inside[0][0]:
        raise ValueError(f"{len(inside)} runs ended within the window; make it longer with --window-s")
    return 1e9 * sum(items for _, items in inside[1:]) / (inside[-1][0] - inside[0][0])


def quantiles_us(reports: Sequence[array[int]], began_ns: int = 0, ended_ns: int = 2**63) -> tuple[float, float]:
    """Median and 99th percentile of the latencies in a window."""
    took = sorted(
        took_ns
        for report in reports
        for at_ns, took_ns in zip(report[0::3], report[1::3], strict=True)
        if began_ns <= at_ns <= ended_ns
    )
    if not took:
        raise ValueError("nothing ended within the window; make it longer with --window-s")
    return took[len(took) // 2] / 1e3, took[len(took) * 99 // 100] / 1e3


def phases_us(reports: Sequence[array[int]]) -> dict[str, float]:
    """The median of each phase of the submissions that were `TIMED`."""
    taken = [
        [took_ns for report in reports for took_ns in report[number :: len(PHASES)]] for number in range(len(PHASES))
    ]
    return {name: statistics.median(took) / 1e3 for name, took in zip(PHASES, taken, strict=True)}


def timed_p50_us(reports: Sequence[array[int]]) -> float:
    """The median latency of the submissions that were `TIMED`."""
    size = len(PHASES)
    taken = [Timings(*report[at : at + size]).latency_ns for report in reports for at in range(0, len(report), size)]
    return statistics.median(taken) / 1e3


class Sweep:
    """Holds the pools of the base, which idles meanwhile, and of the last point; a context manager that ends them.

    A pool takes seconds to start on a GPU, and one that idles takes nothing from another.

    Args:
        folder: for models.
        gpu: as users name it; None: the CPU.
        plan: finds the plan for items of so many bytes.
        huge_pages, busy_poll, spin_us: see `trtpool.Pool`.
    """

    def __init__(
        self,
        folder: Path,
        gpu: str | None,
        plan: Callable[[int], Path] | None,
        *,
        huge_pages: bool = False,
        busy_poll: bool = False,
        spin_us: int | None = None,
    ) -> None:
        self._folder, self._gpu, self._plan = folder, gpu, plan
        self._huge_pages, self._busy_poll, self._spin_us = huge_pages, busy_poll, spin_us
        self._pools: dict[Point, tuple[trtpool.Pool, contextlib.ExitStack]] = {}

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all pools.  The next point starts another."""
        for point in list(self._pools):
            self._end(point)

    def _end(self, point: Point) -> None:
        _, stack = self._pools.pop(point)
        stack.close()

    def _model(self, item_bytes: int) -> Path:
        if self._plan is not None:
            return self._plan(item_bytes)
        path = self._folder / f"mean{item_bytes}.onnx"
        if not path.exists():
            Workload("items", (item_bytes // 4,), period=MANY).write_model(path)
        return path

    def _started(self, point: Point) -> trtpool.Pool:
        key = point.pool
        if key not in self._pools:
            for other in self._pools.keys() - {BASE.pool}:
                self._end(other)
            stack = contextlib.ExitStack()
            self._pools[key] = stack.enter_context(self._start(point)), stack
        return self._pools[key][0]

    def _start(self, point: Point) -> trtpool.Pool:
        options: dict[str, Any] = {"device": "cpu", "threads": 1, "workers": point.workers}
        if self._gpu is not None:
            options = {"gpus": [self._gpu], "lanes": point.lanes, "workers_per_gpu": point.workers}
        return trtpool.Pool(
            model=str(self._model(point.item_bytes)),
            slots=point.slots,
            items_per_slot=point.items_per_slot,
            max_batch=point.max_batch,
            max_slots_per_producer=point.cap,
            huge_pages=self._huge_pages,
            busy_poll=self._busy_poll,
            spin_us=self._spin_us,
            **options,
        )

    @contextlib.contextmanager
    def producing(self, point: Point) -> Iterator[tuple[trtpool.Pool, Crew, Synchronized[int]]]:
        """Producers come, and leave; the pool stays.  Yields it with them, and what sets what they do next."""
        pool = self._started(point)
        spec = pool.models[0].spec
        inputs = tuple(Tensor(one.name, str(one.numpy_dtype), tuple(one.shape)) for one in spec.inputs)
        mode: Synchronized[int] = CONTEXT.Value("b", LOAD)
        slot_bytes = point.item_bytes * point.items_per_slot
        period = MANY if (MANY + point.run) * slot_bytes <= PREPARED_BYTES else FEW
        connects = [
            partial(
                SweepProducer,
                pool.handle(),
                Load(inputs, point.items_per_slot, point.run, period, seed=1000 * number),
                point.window,
                number,
                mode,
            )
            for number in range(point.producers)
        ]
        with contextlib.closing(Crew(connects)) as crew:
            yield pool, crew, mode

    def measure(self, point: Point, budget: Budget) -> Measured:
        """What a point comes to."""
        with self.producing(point) as (pool, crew, mode):
            return _measure(pool, crew, mode, budget, SPREAD_S * point.producers)


def _measure(pool: trtpool.Pool, crew: Crew, mode: Synchronized[int], budget: Budget, spread_s: float) -> Measured:
    cpu = CpuTimes(below())
    before_s, before = cpu.read(), _model(pool)
    rates, latencies, items = [], [], 0
    for _ in range(budget.rounds):
        length_s = LEAD_S + spread_s + budget.window_s
        turns = crew.run(length_s)
        reports = [turn.report for turn in turns]
        began_ns, ended_ns = common(turns, length_s)
        rates.append(rate(reports, began_ns, ended_ns))
        latencies.append(quantiles_us(reports, began_ns, ended_ns))
        items += sum(sum(report[2::3]) for report in reports)
    cpu_s, after = spent(before_s, cpu.read()), _model(pool)
    mode.value = ALONE
    alone = quantiles_us([turn.report for turn in crew.run(budget.alone_s)])
    batches = max(1, after.batches - before.batches)
    return Measured(
        statistics.median(rates),
        statistics.median(p50 for p50, _ in latencies),
        statistics.median(p99 for _, p99 in latencies),
        *alone,
        (after.items - before.items) / batches,
        (after.runs - before.runs) / batches,
        {who: 1e6 * seconds / items for who, seconds in cpu_s.items()},
        rates,
    )


def _model(pool: trtpool.Pool) -> ModelReport:
    return pool.status().models[0]


def common(turns: Sequence[Turn], length_s: float) -> tuple[int, int]:
    """When all had begun, and the lead was over, and when none had begun to end."""
    began_s = max(turn.started_s for turn in turns) + LEAD_S
    ended_s = min(turn.started_s for turn in turns) + length_s
    return int(1e9 * began_s), int(1e9 * ended_s)
