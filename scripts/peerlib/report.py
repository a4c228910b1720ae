"""How an outcome is shown, and kept."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

from rich.console import Console
from rich.table import Table as Grid
from scripts.benchlib.report import machine as own_machine

from .contestant import Contestant
from .results import EVEN, Figure, Ratio, Row, Table, peers, ratio
from .rounds import Options, Outcome

WIDTH: Final = 230
PACKAGES: Final = ("iceoryx2", "torch", "mosec", "nvidia-pytriton", "tritonclient", "litserve", "ray")

Contestants = Mapping[str, type[Contestant]]


def machine() -> dict[str, Any]:
    """What ran this, with the versions of the peers that are there."""
    known = own_machine()
    for name in PACKAGES:
        try:
            known["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            known["packages"][name] = "not installed"
    return known


def show(console: Console, outcome: Outcome, contestants: Contestants) -> None:
    """Print all tables, then who was missing or failed, and what one must know beside the figures."""
    for table in outcome.tables:
        _show_table(console, table, contestants)
    for name, why in outcome.missing.items():
        console.print(f"missing: {name}: {why}", highlight=False, markup=False)
    for (kind, name), why in outcome.failed.items():
        console.print(f"FAILED: {name} at {kind}: {why}", highlight=False, markup=False)
    console.print()
    console.print("Copies of each input byte of a large item between the producer's write and the engine's read:")
    for name, one in contestants.items():
        note = f" ({one.note})" if one.note else ""
        console.print(f"  {name}: {one.copies}: {one.why}{note}", highlight=False, markup=False)
    console.print(
        f"\nFigures are medians over rounds (lowest - highest); ratios are taken within a round, and between 1/{EVEN} "
        f"and {EVEN} are even. The best peer is the best of those in the same round, rows in brackets left out. Least "
        "share: items of the producer that was served least, over an equal share.",
        highlight=False, markup=False,
    )  # fmt: skip


def _show_table(console: Console, table: Table, contestants: Contestants) -> None:
    owns = [row for row in table.rows.values() if row.own]
    grid = Grid(title=table.title, title_justify="left")
    grid.add_column("contestant", no_wrap=True)
    for what in table.figures:
        grid.add_column("CPU s / 1,000" if what == "CPU s" else what, justify="right", no_wrap=True)
    grid.add_column("copies", justify="right")
    for row in owns:
        grid.add_column(f"{row.name}: times better", justify="right", no_wrap=True)
    for row in table.rows.values():
        cells = [
            row.name if row.bar else f"({row.name})",
            *(spread(row.figure(what), _text_of(what)) for what in table.figures),
        ]
        cells.append(str(contestants[row.name].copies))
        cells += ["" if row.own else times(ratio(table.figures[0], own, [row])) for own in owns]
        grid.add_row(*cells, style="bold" if row.own else None)
    console.print(grid)
    for row in owns:
        for what in (table.figures[0], "CPU s"):
            against = ratio(what, row, peers(table))
            console.print(f"{row.name} over the best peer, {what}: {times(against)}", highlight=False, markup=False)
    console.print()


def number(value: float) -> str:
    """A number as short as its size allows."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _text_of(what: str) -> Callable[[float], str]:
    return "{:.2f}".format if what == "least share" else number


def spread(figure: Figure, text: Callable[[float], str] = number) -> str:
    """Median and range of a figure, each as `text` has it; "failed" without any."""
    if figure.median is None:
        return "failed"
    if len(figure.known) == 1:
        return text(figure.median)
    return f"{text(figure.median)} ({text(min(figure.known))} - {text(max(figure.known))})"


def times(one: Ratio | None) -> str:
    """Median and range of a ratio."""
    if one is None:
        return "-"
    text = f"{one.median:.3g}"
    if len(one.values) > 1:
        text += f" ({min(one.values):.3g} - {max(one.values):.3g})"
    return f"{text}, even" if one.even else text


def as_dict(outcome: Outcome, options: Options, contestants: Contestants) -> dict[str, Any]:
    """Everything, for JSON: all windows, and what follows from them."""
    return {
        "options": asdict(options),
        "tables": [
            {
                "title": table.title,
                "kind": table.kind,
                "producers": table.producers,
                "rows": [_row_as_dict(table, row, contestants) for row in table.rows.values()],
            }
            for table in outcome.tables
        ],
        "missing": outcome.missing,
        "failed": [{"kind": kind, "name": name, "why": why} for (kind, name), why in outcome.failed.items()],
    }


def _row_as_dict(table: Table, row: Row, contestants: Contestants) -> dict[str, Any]:
    one = contestants[row.name]
    ratios = {
        own.name: against.values
        for own in table.rows.values()
        if own.own and not row.own and (against := ratio(table.figures[0], own, [row])) is not None
    }
    return {
        "name": row.name,
        "figures": {what: row.figure(what).values for what in table.figures},
        "medians": {what: row.figure(what).median for what in table.figures},
        "items": [window and window.items for window in row.windows],
        "copies": one.copies,
        "copies_are": one.why,
        "note": one.note,
        "times_better": ratios,
    }
