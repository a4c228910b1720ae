"""The command line of `scripts/bench_broker.py`."""

from __future__ import annotations

import cProfile
import json
import pstats
import sys
import time
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table as Grid

from . import report
from .broker_cost import CHUNK, QUIET, Cost, measure
from .broker_rig import Case

CASES: Final = {
    case.name: case
    for case in (
        Case("single", "1 producer, one item at a time", 1, 1, 1, lanes=1),
        Case("runs1", "4 producers, 64 runs of 1 slot in flight each", 4, 64, 1),
        Case("runs16", "4 producers, 8 runs of 16 slots", 4, 8, 16),
        Case("runs16 apart", "4 producers, 4 runs of 16 slots, a turn for each frame", 4, 4, 16, apart=True),
        Case("runs16 brief", "the same, of a model that takes 40 us", 4, 4, 16, apart=True, run_us=40),
        Case("runs64", "4 producers, 4 runs of 64 slots", 4, 4, 64),
        Case("items64", "4 producers, 4 runs of 1 slot of 64 items", 4, 4, 1, items_per_slot=64, max_batch=512),
        Case(
            "items64 x 64", "4 producers, 2 runs of 64 slots of 64 items", 4, 2, 64, items_per_slot=64, max_batch=4096
        ),
    )
}
ITEMS: Final = {
    "single": 20_000,
    "runs1": 60_000,
    "runs16": 300_000,
    "runs16 apart": 300_000,
    "runs16 brief": 300_000,
    "runs64": 600_000,
    "items64": 2_000_000,
}
MANY: Final = 20_000_000
"""Items of a case that is not named: a few seconds' worth, as of those that are."""
FEWER: Final = 10
"""How many times fewer with --quick."""
PROFILE_LINES: Final = 30

ROWS: Final = {
    "items_per_cpu_s": "items / CPU second",
    "quiet_items_per_cpu_s": "the same, quiet turns",
    "ns_per_item": "CPU ns / item",
    "ns_per_slot": "CPU ns / slot",
    "us_per_message": "CPU us / message",
    "us_per_turn": "CPU us / turn",
    "quiet_us_per_turn": "the same, quiet turns",
    "turns_per_item": "turns / item",
    "messages_in_per_item": "messages in / item",
    "messages_out_per_item": "messages out / item",
    "frames_in_per_item": "frames in / item",
    "frames_out_per_item": "frames out / item",
    "system_calls_per_item": "system calls / item",
    "python_calls_per_item": "Python calls / item",
    "items_per_batch": "items / batch",
    "runs_per_batch": "runs / batch",
}


def _cases(only: str | None, given: dict[str, int | None]) -> list[Case]:
    """The standard cases that were asked for, or the one that options describe."""
    if any(value is not None for value in given.values()):
        if only is not None:
            raise click.UsageError("--only names standard cases; leave it out to describe one with other options")
        values: dict[str, Any] = {
            "producers": 4,
            "window": 4,
            "run": 1,
            **{name: one for name, one in given.items() if one is not None},
        }
        return [Case("given", "as asked for", **values)]
    names = list(CASES) if only is None else only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise click.BadParameter(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}", param_hint="--only")
    return [CASES[name] for name in names]


def _grid(costs: list[Cost]) -> Grid:
    grid = Grid(
        title="The broker's loop alone",
        title_justify="left",
        caption=f"CPU of its turns, with the kernel's part.  Quiet: the {QUIET:.0%} quickest lots of {CHUNK} turns.",
        caption_justify="left",
    )
    grid.add_column("")
    for cost in costs:
        grid.add_column(cost.case, justify="right")
    figures = [cost.figures() for cost in costs]
    for name, heading in ROWS.items():
        grid.add_row(heading, *(short(one[name]) for one in figures))
    return grid


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@click.command(epilog="Example: bench_broker.py --only runs1,runs16 --profile /tmp/broker.prof")
@click.option("--only", help=f"Cases to run, of {', '.join(CASES)}.  [default: all]")
@click.option("--quick", is_flag=True, help="A tenth of the items.")
@click.option("--items", type=click.IntRange(1), help="Items to time in each case.  [default: some seconds' worth]")
@click.option("--producers", type=click.IntRange(1, 256), help="A case of its own: clients.  [default: 4]")
@click.option("--window", type=click.IntRange(1, 4096), help="The same: runs in flight of each.  [default: 4]")
@click.option("--run", type=click.IntRange(1, 4096), help="The same: slots of a run.  [default: 1]")
@click.option("--items-per-slot", type=click.IntRange(1), help="The same.  [default: 1]")
@click.option("--lanes", type=click.IntRange(1, 64), help="The same: of the worker.  [default: 3]")
@click.option("--max-batch", type=click.IntRange(1), help="The same, in items.  [default: 256]")
@click.option(
    "--profile",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Profile turns into this file (cProfile), and print the top; times are then those of a profiled loop.",
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def main(
    *,
    only: str | None,
    quick: bool,
    items: int | None,
    profile: Path | None,
    json_path: Path | None,
    **given: int | None,
) -> None:
    """Measure what a turn, a message and a slot cost the broker, without clients, workers or other processes.

    The real loop runs in this process; fake peers answer over real sockets between its turns.  What is added up is
    the CPU time of the turns alone, the kernel's included.
    """
    cases = _cases(only, given)
    for case in cases:
        if case.max_batch < case.items_per_slot:
            raise click.BadParameter(
                f"must be at least --items-per-slot, {case.items_per_slot}", param_hint="--max-batch"
            )
    for path in (profile, json_path):
        if path is not None and not path.parent.is_dir():
            raise click.UsageError(f"{path.parent} is not a directory")
    console = Console(width=None if sys.stdout.isatty() else 190)
    machine = report.machine()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
    for case in cases:
        console.print(f"{case.name}: {case.title}", highlight=False)
    profiler = None if profile is None else cProfile.Profile()
    began_s = time.monotonic()
    costs = []
    for case in cases:
        count = items or ITEMS.get(case.name, MANY if case.run * case.items_per_slot >= 1024 else 60_000)
        costs.append(measure(case, max(1, count // FEWER) if quick else count, profiler))
    console.print(_grid(costs))
    took_s = round(time.monotonic() - began_s, 1)
    console.print(f"took {took_s} s", highlight=False)
    if profiler is not None and profile is not None:
        stats = pstats.Stats(profiler)
        stats.sort_stats("tottime").print_stats(PROFILE_LINES)
        stats.dump_stats(profile)
    if json_path is not None:
        content = {
            "machine": machine,
            "command": sys.argv,
            "took_s": took_s,
            "profiled": profile is not None,
            "cases": [cost.as_dict() for cost in costs],
        }
        json_path.write_text(json.dumps(content, indent=1))
