"""The command line of `scripts/bench_peers.py`."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import click
from rich.console import Console

from . import report
from .contestant import Contestant
from .job import KINDS
from .roster import CONTESTANTS
from .rounds import Options, run


def choose(only: str | None) -> dict[str, type[Contestant]]:
    """The contestants that `only` names, in the order of the table."""
    names = list(CONTESTANTS) if only is None else only.split(",")
    if unknown := [name for name in names if name not in CONTESTANTS]:
        raise click.BadParameter(f"no {', '.join(unknown)}; there are {', '.join(CONTESTANTS)}", param_hint="--only")
    return {name: one for name, one in CONTESTANTS.items() if name in names}


@click.command(epilog="A peer that is not installed is reported and left out: pip install '.[peers]'.")
@click.option("--quick", is_flag=True, help="One round of short windows: shows that all work, and little about speed.")
@click.option("--only", metavar="NAMES", help=f"Contestants.  [default: {','.join(CONTESTANTS)}]")
@click.option("--kinds", metavar="NAMES", default=",".join(KINDS), show_default=True, help="Kinds of work.")
@click.option("--rounds", type=click.IntRange(1, 100), help="Turns of each contestant.  [default: 5, quick 1]")
@click.option("--window-s", type=click.FloatRange(0.1, 60), help="Length of a window.  [default: 2, quick 0.5]")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the order of turns within a round.")
@click.option("--engine", type=click.Choice(["numpy", "onnxruntime"]), default="numpy", show_default=True,
              help="What averages in the peers' workers; trtpool always runs the model in onnxruntime.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all rounds here.")
def main(
    *,
    quick: bool,
    only: str | None,
    kinds: str,
    rounds: int | None,
    window_s: float | None,
    seed: int,
    engine: str,
    json_path: Path | None,
) -> None:
    """Measure trtpool beside its peers, on the same work with the answers checked.

    \b
    images   3 x 224 x 224 float32 (602,112 bytes), averaged in one worker; 1 and 4 producers
    small    256 float32 (1 KB), the same; 1 and 4 producers
    latency  one such small item at a time

    Exits with 1 if a contestant failed or left a process behind.
    """  # noqa: D301  # click wants the character itself, to leave the lines as they are
    if json_path is not None and not json_path.parent.is_dir():
        raise click.BadParameter(f"{json_path.parent} is not a directory", param_hint="--json")
    if unknown := [kind for kind in kinds.split(",") if kind not in KINDS]:
        raise click.BadParameter(f"no {', '.join(unknown)}; there are {', '.join(KINDS)}", param_hint="--kinds")
    contestants = choose(only)
    options = Options(
        rounds or (1 if quick else 5), window_s or (0.5 if quick else 2.0), seed, engine, kinds.split(",")
    )
    console = Console(width=None if sys.stdout.isatty() else report.WIDTH)
    machine = report.machine()
    console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
    console.print()
    started_s = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are ended
    outcome = run(contestants, options, say=lambda text: click.echo(text, err=True))
    report.show(console, outcome, contestants)
    took_s = round(time.monotonic() - started_s, 1)
    console.print(f"took {took_s} s")
    if json_path is not None:
        kept = {"machine": machine, "took_s": took_s, **report.as_dict(outcome, options, contestants)}
        json_path.write_text(json.dumps(kept, indent=1))
    sys.exit(1 if outcome.failed else 0)
