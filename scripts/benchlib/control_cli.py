"""The command line of `scripts/bench_control.py`."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table as Grid

from . import report
from .broker_cli import short
from .control import CASES, EVENTS, WHO, Costs, measure
from .sweep_run import Sweep

COUNTS: Final = ("wake-ups", *dict.fromkeys(EVENTS.values()))


def _title(name: str, costs: Costs) -> str:
    phases = ", ".join(f"{phase.replace('_', ' ')} {short(took)}" for phase, took in costs.phases_us.items())
    return (
        f"{name}: {CASES[name].title}\n{short(costs.items_per_s)} items/s, {short(costs.items_per_batch)} in a batch; "
        f"a run takes {short(costs.p50_us)} us, p99 {short(costs.p99_us)}; "
        f"medians, {short(costs.timed_p50_us)} without the calls around them: {phases}"
    )


def _grid(name: str, costs: Costs) -> Grid:
    grid = Grid(title=_title(name, costs), title_justify="left")
    for heading in ("for each item", "CPU us", *COUNTS):
        grid.add_column(heading, justify="left" if heading == "for each item" else "right")
    for who in WHO:
        counts = costs.counts[who]
        cells = (short(counts[one]) if one in counts else "-" for one in COUNTS)
        grid.add_row(who, short(costs.cpu_us[who]), *cells)
    return grid


def _functions(costs: Costs, lines: int) -> Grid:
    grid = Grid(title="Python's own time, by function itself", title_justify="left")
    for who in WHO:
        grid.add_column(who)
        grid.add_column("%", justify="right")
    for row in range(lines):
        cells: list[str] = []
        for who in WHO:
            found = costs.functions[who][row : row + 1]
            cells += [found[0][0], f"{100 * found[0][1]:.1f}"] if found else ["", ""]
        grid.add_row(*cells)
    return grid


@click.command(epilog="Example: bench_control.py --only single,runs16 --py-spy")
@click.option("--only", help=f"Cases to run, of {', '.join(CASES)}.  [default: all]")
@click.option(
    "--window-s", type=click.FloatRange(0.1), default=4.0, show_default=True, help="How long each is counted."
)
@click.option("--gpu", help="Run on this GPU instead of the CPU, with the plans of --engines.")
@click.option(
    "--engines",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with mlp.plan, for --gpu.",
)
@click.option("--busy-poll", is_flag=True, help="A pool that spins.")
@click.option("--spin-us", type=click.IntRange(0), help="That of the pool.  [default: its own]")
@click.option("--py-spy", "sample", is_flag=True, help="Sample one process of each kind too, in a window of its own.")
@click.option("--lines", type=click.IntRange(1), default=16, show_default=True, help="Functions to show with --py-spy.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
def main(
    *,
    only: str | None,
    window_s: float,
    gpu: str | None,
    engines: Path | None,
    busy_poll: bool,
    spin_us: int | None,
    sample: bool,
    lines: int,
    json_path: Path | None,
) -> None:
    """Count what an item costs each process of a pool: CPU, wake-ups, and system calls where perf may count them.

    And how long a run takes, and its phases.  Unlike bench_broker.py all processes run, so load on the machine shows.
    """
    names = list(CASES) if only is None else only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise click.BadParameter(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}", param_hint="--only")
    if (gpu is None) != (engines is None):
        raise click.UsageError("--gpu and --engines go together")
    if json_path is not None and not json_path.parent.is_dir():
        raise click.UsageError(f"{json_path.parent} is not a directory")
    console = Console(width=None if sys.stdout.isatty() else 160)
    machine = report.machine()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
    measured: dict[str, Costs] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trtpool-bench-")))
        plan = None if engines is None else engines / "mlp.plan"
        sweep = stack.enter_context(
            Sweep(folder, gpu, None if plan is None else lambda _: plan, busy_poll=busy_poll, spin_us=spin_us)
        )
        for name in names:
            try:
                case = CASES[name]
                if gpu is not None:
                    case = case._replace(point=case.point.for_plan())
                costs = measured[name] = measure(sweep, case, window_s, folder if sample else None)
            except (FileNotFoundError, ValueError) as error:
                raise click.ClickException(str(error)) from None
            console.print(_grid(name, costs))
            if sample:
                console.print(_functions(costs, lines))
    if any(costs.uncounted for costs in measured.values()):
        reason = next(costs.uncounted for costs in measured.values() if costs.uncounted)
        console.print(f"system calls were not counted: {reason}", highlight=False)
    if json_path is not None:
        content = {
            "machine": machine,
            "command": sys.argv,
            "cases": {name: asdict(costs) for name, costs in measured.items()},
        }
        json_path.write_text(json.dumps(content, indent=1))
