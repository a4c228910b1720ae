"""What came of a case: rows of windows, ratios between them, aims, and what stands in an aim's way."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from .gpu_window import Window

CEILING: Final = "ceiling"
BESIDE: Final = "ceiling + writers"
SERIES: Final = "series"
TODAY: Final = "today"
POOL: Final = "pool"
BEFOREHAND: Final = "pool, pre-written"
BUS: Final = "bus"
ALONE: Final = "writers alone"

HIDDEN: Final = (BUS, ALONE)
"""Rows that are measured to explain the others."""


@dataclass
class Row:
    """One contender.

    Attributes:
        name: see the names above.
        item_bytes: bytes of an item's inputs; 1 where items are bytes.
        output_bytes: bytes of an item's outputs.
        windows: one a round, None where there was none.
        busy: of each window, the fraction of it in which the GPU was busy; None where nobody knows.
        failure: why it has no more windows.
    """

    name: str
    item_bytes: int = 1
    output_bytes: int = 0
    windows: list[Window | None] = field(default_factory=list)
    busy: list[float | None] = field(default_factory=list)
    failure: str = ""

    @property
    def done(self) -> list[Window]:
        return [window for window in self.windows if window is not None]

    def rate(self, turn: int) -> float | None:
        """Input bytes/s in a round."""
        window = self.windows[turn] if turn < len(self.windows) else None
        return None if window is None else window.items_per_s * self.item_bytes

    def median(self, of: Callable[[Window], float]) -> float | None:
        """The median over the windows; None without any."""
        return statistics.median(map(of, self.done)) if self.done else None

    @property
    def items_per_s(self) -> float | None:
        return self.median(lambda window: window.items_per_s)

    @property
    def busy_fraction(self) -> float | None:
        known = [one for one in self.busy if one is not None]
        return statistics.median(known) if known else None

    def figure(self, name: str) -> float | None:
        """The median of one of `Window.figures`."""
        values = [window.figures[name] for window in self.done if name in window.figures]
        return statistics.median(values) if values else None

    def cpu_s_per_1000(self, who: str) -> float | None:
        """CPU seconds per 1,000 items, over all windows."""
        spent = [window.cpu_s[who] for window in self.done if who in window.cpu_s]
        items = sum(window.items for window in self.done)
        return 1000 * sum(spent) / items if spent and items else None

    def cpu_share(self, who: str) -> float | None:
        """CPUs that it keeps busy, over all windows."""
        spent = [window.cpu_s[who] for window in self.done if who in window.cpu_s]
        return sum(spent) / sum(window.took_s for window in self.done) if spent else None


class Aim(NamedTuple):
    """The bytes/s of one row over the sum of others', in the same round.

    Attributes:
        row, over: names of rows.
        least: what it shall be at least; None: it is reported.
    """

    row: str
    over: tuple[str, ...]
    least: float | None = None

    def __str__(self) -> str:
        over = " + ".join(self.over)
        return f"{self.row} / {f'({over})' if len(self.over) > 1 else over}"


class Ratio(NamedTuple):
    """What came of an aim; `values` are one a round."""

    aim: Aim
    values: list[float]

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def met(self) -> bool | None:
        """None for what is only reported."""
        return None if self.aim.least is None else self.median is not None and self.median >= self.aim.least


@dataclass
class Result:
    """What came of a case; `facts` are the contenders', by row."""

    case: str
    title: str
    max_batch: int
    aims: tuple[Aim, ...]
    rows: dict[str, Row]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    took_s: float = 0.0

    def ratio(self, aim: Aim) -> Ratio:
        """An aim's values, of the rounds in which all of its rows have one."""
        names = (aim.row, *aim.over)
        if any(name not in self.rows for name in names):
            return Ratio(aim, [])
        values = []
        for turn in range(max(len(self.rows[name].windows) for name in names)):
            upper, *lower = (self.rows[name].rate(turn) for name in names)
            known = [one for one in lower if one]
            if upper is not None and len(known) == len(lower):
                values.append(upper / sum(known))
        return Ratio(aim, values)

    def fact(self, row: str, name: str) -> float | None:
        value = self.facts.get(row, {}).get(name)
        return float(value) if isinstance(value, (int, float)) else None


class Limit(NamedTuple):
    """Something that could hold the pool up, and how much of it the pool uses: at 1 it does."""

    name: str
    used: float


def limits(result: Result, row: str = POOL) -> list[Limit]:
    """What could hold `row` up, the most used first."""
    pool = result.rows[row]
    rate = pool.items_per_s
    if rate is None:
        return []
    found: list[tuple[str, float | None]] = [
        ("the producers' own writes", _over(rate, _get(result, ALONE))),
        ("the producers' time", _time_used(pool)),
        ("the bus, inwards", _over(rate * pool.item_bytes, _get(result, BUS))),
        ("the bus, outwards", _over(rate * pool.output_bytes, _figure(result, BUS, "out_per_s"))),
        ("the broker's thread", pool.cpu_share("broker")),
        ("the worker's main thread", pool.cpu_share("worker main thread")),
        ("the interpreter of the worker", pool.cpu_share("worker")),
        ("the engine on the GPU", _engine_used(result, rate)),
    ]
    return sorted((Limit(name, used) for name, used in found if used is not None), key=lambda one: -one.used)


def _get(result: Result, name: str) -> float | None:
    return result.rows[name].items_per_s if name in result.rows else None


def _figure(result: Result, row: str, name: str) -> float | None:
    return result.rows[row].figure(name) if row in result.rows else None


def _over(value: float, by: float | None) -> float | None:
    return value / by if by else None


def _time_used(pool: Row) -> float | None:
    waiting, leasing = pool.figure("waiting"), pool.figure("leasing")
    return None if waiting is None or leasing is None else 1 - waiting - leasing


def _engine_used(result: Result, rate: float) -> float | None:
    """Of the time, that in which the engine runs, by what a batch takes it alone."""
    engine_ms = result.fact(CEILING, "engine_ms")
    return None if engine_ms is None else rate / result.max_batch * engine_ms / 1000


def medians_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest, highest."""
    return statistics.median(values), min(values), max(values)
