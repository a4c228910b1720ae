"""The command line of `scripts/bench.py`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console

from . import report
from .cases import CASES, Options


def _cases(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
    cases = value.split(",")
    if unknown := [case for case in cases if case not in CASES]:
        raise click.BadParameter(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    return cases


@click.command(epilog="Ratios that are marked '=' are within 1.3 of each other and mean nothing.")
@click.option("--quick", is_flag=True, help="A minute instead of some five: fewer baselines, shorter windows.")
@click.option("--only", callback=_cases, default=",".join(CASES), show_default=True, help="Cases to run.")
@click.option("--rounds", type=click.IntRange(1, 100), help="Windows of each contender.  [default: 5, quick 3]")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all rounds here.")
@click.option("--no-pool", is_flag=True, help="The baselines alone.")
def main(quick: bool, only: list[str], rounds: int | None, json_path: Path | None, no_pool: bool) -> None:
    """Measure trtpool beside what people use instead.

    \b
    a  600 KB images through a model that averages them, 1 and 4 producers
    b  the same with 1 KB items, one and 64 a message
    c  latency of one 1 KB item, beside a bare ZeroMQ relay
    d  16 producers with one 1 KB item each: runs per batch
    """  # noqa: D301  # click wants the character itself, to leave the lines as they are
    console = Console(width=None if sys.stdout.isatty() else 170)
    if json_path is not None and not json_path.parent.is_dir():
        raise click.BadParameter(f"{json_path.parent} is not a directory", param_hint="--json")
    machine = report.machine()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
    console.print()
    started_s = time.monotonic()
    tables = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        options = Options(
            rounds=rounds or (3 if quick else 5),
            window_s=0.2 if quick else 0.6,
            latency_s=1.0 if quick else 4.0,
            thorough=not quick,
            pool=not no_pool,
            folder=Path(folder),
        )
        for case in only:
            for table in CASES[case](options):
                report.show(console, table)
                tables.append(report.as_dict(table))
    took_s = round(time.monotonic() - started_s, 1)
    console.print(f"took {took_s} s")
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": machine, "took_s": took_s, "tables": tables}, indent=1))
