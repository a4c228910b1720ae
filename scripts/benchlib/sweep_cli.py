"""Runs the groups of a sweep, prints a table of each, and keeps all figures; see `sweep`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table as Grid

from . import report
from .sweep import BASE, PLANS, TITLES, Group, Point, groups
from .sweep_run import Budget, Measured, Sweep

FULL: Final = Budget(rounds=3, window_s=0.6, alone_s=0.4)
QUICK: Final = Budget(rounds=1, window_s=0.5, alone_s=0.3)
WIDTH: Final = 170

NOTE: Final = (
    "Base: {base}.  A producer keeps 64 slots in flight, two runs at least; all together half of the slots at most. "
    "Latency: from a run's submission until its producer has the result; alone: of single slots, one at a time, while "
    "nobody else does anything.  CPU: producers / broker / workers."
)


@dataclass(frozen=True)
class Choice:
    """What the command line says; None where it says nothing."""

    gpu: str | None
    engines: Path | None
    quick: bool
    only: str | None
    rounds: int | None
    window_s: float | None
    limit_s: float
    huge_pages: bool
    busy_poll: bool
    json_path: Path | None

    @property
    def budget(self) -> Budget:
        default = QUICK if self.quick else FULL
        return Budget(self.rounds or default.rounds, self.window_s or default.window_s, default.alone_s)


@dataclass
class Row:
    """One point of a group: what it came to, or why to nothing."""

    value: int
    point: Point
    measured: Measured | None = None
    why: str = ""

    def relative(self, base: Measured | None) -> float | None:
        """Items/s over those of the same group's base."""
        if self.measured is None or base is None:
            return None
        return self.measured.items_per_s / base.items_per_s


def base_of(group: Group, rows: list[Row]) -> Measured | None:
    """What the group's base came to."""
    return next((row.measured for row in rows if row.value == group.base), None)


def main(choice: Choice) -> None:
    """Run the groups one after the other; a point that fails is reported, and the others go on.

    Raises:
        click.BadParameter: a parameter to vary is unknown.
    """
    try:
        chosen = groups(choice.only, gpu=choice.gpu is not None, quick=choice.quick)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--only") from error
    until_s = time.monotonic() + choice.limit_s
    began_s = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    kept: dict[str, Any] = {
        "sweep": 1, "machine": report.machine(), "command": sys.argv, "gpu": choice.gpu,
        "base": asdict(BASE), "budget": asdict(choice.budget), "groups": [],
    }  # fmt: skip
    failed = 0
    with TemporaryDirectory(prefix="bench-") as folder:
        plan = None
        if choice.gpu is not None:
            kept["machine"]["gpus"], plan = _prepare_gpu(console, choice, Path(folder))
        _head(console, kept["machine"])
        with Sweep(Path(folder), choice.gpu, plan, huge_pages=choice.huge_pages, busy_poll=choice.busy_poll) as sweep:
            for group in chosen:
                rows = [_row(sweep, group, value, choice, until_s) for value in group.values]
                failed += sum(row.measured is None for row in rows)
                console.print(grid(group, rows))
                console.print()
                kept["groups"].append(as_dict(group, rows))
                kept["took_s"] = round(time.monotonic() - began_s, 1)
                _keep(choice.json_path, kept)
    console.print(NOTE.format(base=describe(BASE)), highlight=False)
    console.print(f"took {kept.get('took_s', 0.0):.0f} s", highlight=False)
    if failed:
        console.print(f"{failed} points were not measured, for the reasons above", highlight=False)
        sys.exit(1)


def _head(console: Console, machine: dict[str, Any]) -> None:
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False, markup=False)
    console.print()


def _prepare_gpu(console: Console, choice: Choice, folder: Path) -> tuple[list[str], Any]:
    """The GPU by name, and what finds plans, which are found or built before anything is measured."""
    from . import gpu_cli
    from .gpu_watch import GpuWatch

    assert choice.gpu is not None
    assert choice.engines is not None
    plans = {}
    for item_bytes, (name, _) in PLANS.items():
        path = gpu_cli.find_or_build(console, name, choice.engines, folder, choice.gpu)
        if isinstance(path, Path):
            plans[item_bytes] = path
        else:
            console.print(path, highlight=False, markup=False)
    with GpuWatch([choice.gpu]) as watch:
        names = [f"{one.name}, {one.link}" for one in watch.gpus.values()]

    def plan(item_bytes: int) -> Path:
        if item_bytes not in plans:
            raise FileNotFoundError(f"there is no plan for items of {item_bytes:,} bytes; see above")
        return plans[item_bytes]

    return names, plan


def _row(sweep: Sweep, group: Group, value: int, choice: Choice, until_s: float) -> Row:
    row = Row(value, group.point(value, gpu=choice.gpu is not None))
    if time.monotonic() > until_s:
        row.why = "time is up; --limit-s gives more, --only asks for less"
        return row
    try:
        row.measured = sweep.measure(row.point, choice.budget)
    except Exception as error:  # noqa: BLE001  # the next point may do better, and time on a GPU is dear
        row.why = f"{type(error).__name__}: {error}"
        sweep.close()
    return row


def describe(point: Point) -> str:
    """All of a point in words."""
    return (
        f"{point.producers} producers, runs of {point.run}, {point.slots:,} slots of {point.items_per_slot} items of "
        f"{point.item_bytes:,} bytes, batches of {point.max_batch} at most, {point.workers} worker"
    )


def besides(group: Group, point: Point) -> str:
    """What else of a point differs from the base."""
    short = {"slots": "slots", "run": "a run", "max_batch": "a batch"}
    return ", ".join(
        f"{getattr(point, name):,} {word}"
        for name, word in short.items()
        if name != group.name and getattr(point, name) != getattr(BASE, name)
    )


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def grid(group: Group, rows: list[Row]) -> Grid:
    """The table of one group."""
    table = Grid(title=TITLES[group.name], title_justify="left")
    for heading in (TITLES[group.name], "items/s", "x base", "lowest - highest", "p50 us", "p99 us", "alone p50 us",
                    "alone p99 us", "items / batch", "runs / batch", "CPU us / item"):  # fmt: skip
        table.add_column(heading, justify="right")
    table.add_column("besides")
    base = base_of(group, rows)
    for row in rows:
        label = f"{row.value:,}{' (base)' * (row.value == group.base)}"
        one = row.measured
        if one is None:
            table.add_row(label, *[""] * 10, row.why.strip().splitlines()[-1], style="red")
            continue
        relative = row.relative(base)
        cpu = " / ".join(number(one.cpu_us_per_item.get(who, 0.0)) for who in ("producers", "broker", "worker"))
        table.add_row(
            label, number(one.items_per_s), "" if relative is None else f"{relative:.3g}",
            f"{number(min(one.rounds))} - {number(max(one.rounds))}", number(one.p50_us), number(one.p99_us),
            number(one.alone_p50_us), number(one.alone_p99_us), f"{one.items_per_batch:.1f}",
            f"{one.runs_per_batch:.2f}", cpu, besides(group, row.point),
            style="bold" if row.value == group.base else None,
        )  # fmt: skip
    return table


def as_dict(group: Group, rows: list[Row]) -> dict[str, Any]:
    """One group for JSON."""
    base = base_of(group, rows)
    return {
        "name": group.name,
        "title": TITLES[group.name],
        "base": group.base,
        "points": [
            {
                "value": row.value,
                "point": asdict(row.point),
                "window": row.point.window,
                "measured": None if row.measured is None else asdict(row.measured),
                "relative": row.relative(base),
                "why": row.why,
            }
            for row in rows
        ],
    }


def _keep(path: Path | None, content: dict[str, Any]) -> None:
    """Write what there is so far; whole, whenever this is ended."""
    if path is None:
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)
