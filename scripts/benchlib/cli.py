"""The command line of `scripts/bench.py`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from . import report
from .cases import CASES, Options


def _cases(only: str | None) -> list[str]:
    cases = list(CASES) if only is None else only.split(",")
    if unknown := [case for case in cases if case not in CASES]:
        raise click.BadParameter(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}", param_hint="--only")
    return cases


_FOR_GPU: Final = ("engines", "window_s", "limit_s", "huge_pages")


@click.command(epilog="Ratios that are marked '=' are within 1.3 of each other and mean nothing.")
@click.option("--quick", is_flag=True, help="A minute instead of some five: fewer baselines, shorter windows.")
@click.option("--only", help=f"Cases to run.  [default: all of {','.join(CASES)}; with --gpu, see there]")
@click.option("--rounds", type=click.IntRange(1, 100), help="Windows of each contender.  [default: 5, quick 3]")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all rounds here.")
@click.option("--no-pool", is_flag=True, help="The baselines alone.")
@click.option("--gpu", metavar="0", help="Measure on this GPU instead; on two, such as 0,1, also both at once.")
@click.option(
    "--engines",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --gpu: the folder of the plans; one that is missing is built.",
)
@click.option(
    "--window-s",
    type=click.FloatRange(0.1, 60),
    help="With --gpu, --sweep: a window's length.  [default: 0.8, quick 0.4; --sweep 0.6, 0.5]",
)
@click.option(
    "--limit-s",
    type=click.FloatRange(10),
    default=450,
    show_default=True,
    help="With --gpu, --sweep: begin no round, no point after so many seconds.",
)
@click.option("--huge-pages", is_flag=True, help="With --gpu, --sweep: the pool's arena on huge pages.")
@click.option("--busy-poll", is_flag=True, help="With --sweep: all processes spin instead of sleeping.")
@click.option(
    "--sweep",
    is_flag=True,
    help="Vary one parameter of a pool at a time instead, with or without --gpu; --only names them.",
)
@click.option(
    "--plot",
    metavar="FILE.json",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing: draw what --sweep --json wrote, as PNG files beside it.",
)
@click.option(
    "--plot-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --plot: the folder for the PNG files.",
)
@click.pass_context
def main(
    context: click.Context,
    /,
    *,
    quick: bool,
    only: str | None,
    rounds: int | None,
    json_path: Path | None,
    no_pool: bool,
    gpu: str | None,
    busy_poll: bool,
    sweep: bool,
    plot: Path | None,
    plot_dir: Path | None,
    **for_gpu: Any,
) -> None:
    """Measure trtpool beside what people use instead.

    \b
    a  600 KB images through a model that averages them, 1 and 4 producers
    b  the same with 1 KB items, one and 64 a message
    c  latency of one 1 KB item, beside a bare ZeroMQ relay
    d  16 producers with one 1 KB item each: runs per batch

    With --gpu, TensorRT plans beside the loop that one would write by hand:

    \b
    resnet50, resnet50_io16, resnet50_u8  images of 224 x 224, batches of 64
    reduce, reduce4                       1600 x 2560, all transfer, batches of 8 and 4
    ppocr                                 1600 x 2560, text detection, batches of 2
    mlp, mlp1                             1 KB items, batches of 256 and 1
    resnet50_pair, resnet50_io16_pair, reduce_pair  on two GPUs

    With --sweep, the pool alone, one parameter at a time (--only producers,slots):

    \b
    producers, run, slots, items_per_slot, item_bytes, workers; with --gpu also lanes
    """  # noqa: D301  # click wants the character itself, to leave the lines as they are
    if json_path is not None and not json_path.parent.is_dir():
        raise click.BadParameter(f"{json_path.parent} is not a directory", param_hint="--json")
    if plot is not None or plot_dir is not None:
        _draw(plot, plot_dir)
        return
    if sweep:
        if no_pool:
            raise click.UsageError("--no-pool leaves nothing to --sweep")
        _main_sweep(gpu, quick=quick, only=only, rounds=rounds, json_path=json_path, busy_poll=busy_poll, **for_gpu)
        return
    if busy_poll:
        raise click.UsageError("--busy-poll is for --sweep")
    if gpu is not None:
        _main_gpu(gpu, quick=quick, only=only, rounds=rounds, json_path=json_path, no_pool=no_pool, **for_gpu)
        return
    given = [name for name in _FOR_GPU if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if given:
        raise click.UsageError(f"--{given[0].replace('_', '-')} is for --gpu or --sweep")
    cases = _cases(only)
    console = Console(width=None if sys.stdout.isatty() else 170)
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
        for case in cases:
            for table in CASES[case](options):
                report.show(console, table)
                tables.append(report.as_dict(table))
    took_s = round(time.monotonic() - started_s, 1)
    console.print(f"took {took_s} s")
    if json_path is not None:
        json_path.write_text(json.dumps({"machine": machine, "took_s": took_s, "tables": tables}, indent=1))


def _main_gpu(gpu: str, *, no_pool: bool, engines: Path | None, **choice: Any) -> None:
    if no_pool:
        raise click.UsageError("--no-pool is not for --gpu; --only leaves out cases")
    if engines is None:
        raise click.UsageError("--gpu needs --engines, the folder of the plans; an empty one will do to build them")
    from . import gpu_cli

    gpu_cli.main(gpu_cli.Choice(gpu=gpu, engines=engines, **choice))


def _main_sweep(gpu: str | None, *, engines: Path | None, **choice: Any) -> None:
    if gpu is not None and engines is None:
        raise click.UsageError("--gpu needs --engines, the folder of the plans; an empty one will do to build them")
    if gpu is None and engines is not None:
        raise click.UsageError("--engines is for --gpu; on the CPU models are written as they are needed")
    if gpu is not None and "," in gpu:
        raise click.BadParameter("a sweep takes one GPU", param_hint="--gpu")
    from . import sweep_cli

    sweep_cli.main(sweep_cli.Choice(gpu=gpu, engines=engines, **choice))


def _draw(plot: Path | None, plot_dir: Path | None) -> None:
    if plot is None:
        raise click.UsageError("--plot-dir is for --plot FILE.json, which says what to draw")
    from . import sweep_plot

    try:
        for path in sweep_plot.draw(plot, plot_dir or plot.parent):
            click.echo(path)
    except (sweep_plot.CannotDraw, OSError) as error:
        raise click.ClickException(str(error)) from error
