"""`trtpool profile`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click
import msgspec
from rich.console import Console

from trtpool import __version__
from trtpool.broker.cli_build_options import build_options
from trtpool.broker.cli_options import flavour_option, host_code_option, parse_gpus, parse_shapes
from trtpool.broker.modules import child_environment
from trtpool.broker.planning import is_plan, probe, requests
from trtpool.broker.pool import make_settings
from trtpool.ipc.errors import ConfigError, ModelError
from trtpool.ipc.profiling import Measured, ProfileRequest
from trtpool.ipc.settings import (
    DEFAULT_LANES,
    BuildSettings,
    EngineSettings,
    InspectRequest,
    PoolSettings,
    ShapeRange,
)

from .advice import judge
from .asking import ask
from .page import page
from .show import show

DEFAULT_BATCHES: Final = (1, 8, 32, 64)
MAX_BATCH: Final = 2**24


def _parse_batches(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """``1,8,32``; none if it was not given."""
    if value is None:
        return ()
    sizes = tuple(int(part) if part.strip().isdecimal() else 0 for part in value.split(","))
    if len(sizes) > 64 or not all(0 < size <= MAX_BATCH for size in sizes):
        raise click.BadParameter(f"{value!r} is not a list of batch sizes, such as 1,8,32")
    return sizes


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--gpus", callback=parse_gpus, metavar="0", help="The GPU to profile on, by index in PCI order, UUID or MIG id."
)
@click.option(
    "--batch",
    "batches",
    callback=_parse_batches,
    metavar="1,8,32",
    help="Batch sizes [default: those of 1, 8, 32 and 64 that the model takes].",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    callback=parse_shapes,
    metavar="INPUT=3x640x640",
    help="Item shape of an input that the model leaves open; of a range the largest is run.  Again for each.",
)
@build_options
@click.option(
    "--lanes",
    type=click.IntRange(1, 16),
    default=DEFAULT_LANES,
    show_default=True,
    help="Batches that a pool would have in flight; one more is tried too.",
)
@flavour_option
@host_code_option
@click.option(
    "--threads", type=click.IntRange(0, 4096), default=0, help="Threads in an engine call on the CPU [default: all]."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, 3600),
    default=1.0,
    show_default=True,
    help="How long each measurement goes on; there are several for each batch size.",
)
@click.option("--json", "as_json", is_flag=True, help="Print figures and verdicts as JSON.")
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write a report with plots, one file that needs no network.",
)
def profile(
    *,
    model: str,
    gpus: tuple[str, ...],
    batches: tuple[int, ...],
    shapes: dict[str, ShapeRange],
    build: BuildSettings,
    lanes: int,
    flavour: str | None,
    allow_host_code: bool,
    threads: int,
    seconds: float,
    as_json: bool,
    html: Path | None,
) -> None:
    """Measure where a model's time goes, and say what would make it faster.

    MODEL is an ONNX file, or with --gpus a TensorRT plan; with --gpus an ONNX file is built first, as a pool does.  No
    pool is needed, and none should run on that GPU meanwhile: it would be measured too.

    \b
    Examples:
      trtpool profile det.onnx
      trtpool profile resnet50.plan --gpus 0 --batch 1,8,32,64
      trtpool profile resnet50.onnx --gpus 0 --fp16 --io uint8 --html resnet50.html
    """  # noqa: D301  # click wants the character itself, to leave the lines as they are
    if len(gpus) > 1:
        raise ConfigError(f"--gpus {','.join(gpus)}: profile one GPU at a time, such as --gpus {gpus[0]}")
    if html is not None and not html.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {html.absolute().parent} to write the report to; make it first")
    engine = EngineSettings(
        threads=threads, shapes=shapes, lanes=lanes, flavour=flavour or "", host_code=allow_host_code
    )
    settings = make_settings([model], Path("/"), gpus=gpus, engine=engine, build=build)
    source = settings.models[0]
    if not Path(source.path).exists():
        raise ModelError(f"there is no file {source.path}; name an .onnx file, or with --gpus a plan")
    try:
        measured = _measure(settings, batches, seconds)
    except KeyboardInterrupt:
        click.echo("trtpool: the profile was stopped", err=True)
        raise click.exceptions.Exit(1) from None
    advice = judge(measured)
    if as_json:
        report = {"version": __version__, "measured": measured, "advice": advice}
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        show(Console(highlight=False, markup=False, soft_wrap=True), measured, advice)
    if html is not None:
        try:
            html.write_text(page(measured, advice), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {html}: {error.strerror}; name another file with --html") from error


def _measure(settings: PoolSettings, batches: tuple[int, ...], seconds: float) -> Measured:
    """Have it measured, and show what is being done."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with console.status("starting") as status:
        wanted = _request(settings, console.print)
        request = ProfileRequest(
            source=wanted.source,
            engine=wanted.engine,
            batches=batches or DEFAULT_BATCHES,
            strict=bool(batches),
            seconds=seconds,
            cpus=len(os.sched_getaffinity(0)),
        )
        environment = child_environment(settings.gpus[0] if settings.gpus else None)
        return ask(request, environment, status.update if console.is_terminal else console.print)


def _request(settings: PoolSettings, say: Callable[[str], None]) -> InspectRequest:
    """How the model is to be loaded: on a GPU, its plan, which is built if there is none."""
    requests(settings)  # says what is wrong, before anything is built
    if settings.gpus:
        infos = probe(settings.gpus)
        if not is_plan(settings.models[0].path):
            from trtpool.broker.building import ensure_plans

            settings = ensure_plans(settings, infos, say)
    return requests(settings)[0]
