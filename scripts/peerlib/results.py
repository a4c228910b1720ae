"""What was measured, and what follows from it: medians, ratios within a round, the best peer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from .contestant import Measured

EVEN: Final = 1.3
"""Ratios nearer to 1 than this are within what such machines do by themselves."""


@dataclass(frozen=True)
class Figure:
    """One number of one contestant, a value a round; None for a round that failed."""

    values: tuple[float | None, ...]

    @property
    def median(self) -> float | None:
        return statistics.median(self.known) if self.known else None

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]


@dataclass
class Row:
    """One contestant in one table, a window a round; None for one that failed."""

    name: str
    own: bool = False
    bar: bool = True
    windows: list[Measured | None] = field(default_factory=list)

    def figure(self, what: str) -> Figure:
        """The figure `what`: "items/s", "p50 us", "p99 us", "CPU s" or "least share"."""
        return Figure(tuple(None if one is None or not one.items else _FIGURES[what](one) for one in self.windows))


_FIGURES: Final[dict[str, Callable[[Measured], float]]] = {
    "items/s": lambda one: one.items / one.took_s,
    "p50 us": lambda one: float(np.percentile(one.took_ns, 50)) / 1e3,
    "p99 us": lambda one: float(np.percentile(one.took_ns, 99)) / 1e3,
    "CPU s": lambda one: 1000 * one.cpu_s / one.items,
    "least share": lambda one: one.least_share,
}
LOWER_IS_BETTER: Final = ("p50 us", "p99 us", "CPU s")


@dataclass
class Table:
    """One kind of work with so many producers.

    Attributes:
        title: for the reader.
        kind, producers: what was measured; no producers for one item at a time.
        figures: the columns; the first one is compared.
        rows: by contestant.
    """

    title: str
    kind: str
    producers: int
    figures: tuple[str, ...]
    rows: dict[str, Row] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """How many times better one is than another, by round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def even(self) -> bool:
        """They are too near to each other for this machine to tell."""
        return 1 / EVEN < self.median < EVEN


def ratio(what: str, one: Row, others: Sequence[Row]) -> Ratio | None:
    """How many times better `one` is at `what` than the best of `others` in the same round.

    Rounds in which either side failed are left out; None if no round is left.
    """
    values = []
    theirs = [other.figure(what).values for other in others]
    for turn, ours in enumerate(one.figure(what).values):
        known = [value for value in (row[turn] for row in theirs) if value is not None]
        if ours and known:
            values.append(min(known) / ours if what in LOWER_IS_BETTER else ours / max(known))
    return Ratio(tuple(values)) if values else None


def peers(table: Table) -> list[Row]:
    """Those of which the best is the bar."""
    return [row for row in table.rows.values() if row.bar and not row.own]
