"""The command `trtpool build`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from trtpool.ipc.arena import format_bytes
from trtpool.ipc.building import BuildRequest, Line
from trtpool.ipc.errors import ConfigError, ModelError
from trtpool.ipc.settings import BuildSettings, ModelSource

from .building import build_plan, cache_root
from .cli_build_options import build_options
from .gpus import gpu_list
from .modules import child_environment
from .planning import is_plan

PLAIN_EVERY: Final = 0.1
"""Without a terminal, progress is a line each time that this much more is done."""


def _parse_compute_capability(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"|[0-9]{1,2}\.[0-9]", value):
        raise click.BadParameter(f"{value!r} is not a compute capability, such as 8.9")
    return value


@click.command()
@click.argument("model", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The plan to write [default: MODEL.plan beside the model]; or, if it ends in .onnx, the changed ONNX file.",
)
@build_options
@click.option(
    "--flavour", type=click.Choice(["tensorrt", "rtx"]), help="TensorRT to build with [default: the one installed]."
)
@click.option(
    "--compute-capability",
    default="",
    callback=_parse_compute_capability,
    metavar="8.9",
    help="GPU to build for, which need not be here.  TensorRT for RTX only.",
)
@click.option("--gpu", metavar="0", help="GPU to build on, by index in PCI order, UUID or MIG id [default: the first].")
def build(
    *,
    model: Path,
    output: Path | None,
    build: BuildSettings,
    flavour: str | None,
    compute_capability: str,
    gpu: str | None,
) -> None:
    """Build an ONNX file into a TensorRT plan for the GPU of this machine.

    Beside the plan, FILE.json records how it was built.  A plan runs on that kind of GPU, with that version of
    TensorRT.  With -o FILE.onnx no plan is built: the model is written as --normalize, --io and --fp16 change it,
    for a pool on the CPU, or for other tools.

    \b
    Examples:
      trtpool build resnet50.onnx -o resnet50.plan --fp16
      trtpool build resnet50.onnx --fp16 --io uint8 --shapes images=1:32:64
      trtpool build resnet50.onnx --io images=uint8 --io logits=fp16
      trtpool build resnet50.onnx --normalize mean=0.485,0.456,0.406,std=0.229,0.224,0.225
      trtpool build resnet50.onnx -o resnet50-pixels.onnx --normalize imagenet
      trtpool build det.onnx --shapes x=1x3x640x640:4x3x640x640:8x3x1280x1280
      trtpool build det.onnx --flavour rtx --compute-capability 8.9
    """  # noqa: D301  # click wants the character itself, to leave the lines as they are
    source = Path(os.path.abspath(model))
    target = Path(os.path.abspath(output or source.with_suffix(".plan")))
    if is_plan(source):
        raise ModelError(f"{source} is a plan already; name the ONNX file")
    if target == source or target.is_dir():
        raise ConfigError(f"the plan cannot be written to {target}; name a file of its own with -o, such as model.plan")
    onnx = target.suffix == ".onnx"
    if onnx:
        for option, given in (
            ("--shapes", build.profiles),
            ("--workspace", build.workspace_bytes),
            ("--optimization-level", build.optimization_level >= 0),
            ("--flavour", flavour),
            ("--compute-capability", compute_capability),
            ("--gpu", gpu),
        ):
            if given:
                raise ConfigError(f"{option} is for a plan, and {target.name} is an ONNX file; leave it out")
    request = BuildRequest(
        source=ModelSource(os.fspath(source), source.stem),
        flavour=flavour or "",
        build=msgspec.structs.replace(build, compute_capability=compute_capability),
        output=os.fspath(target),
        timing_cache="" if onnx else _timing_cache(),
        onnx=onnx,
    )
    env = child_environment(gpu_list(gpu)[0] if gpu else None)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with _stoppable(), _bar(console) if console.is_terminal else nullcontext(_Lines(console)) as show:
        record = build_plan(request, target.parent / f".{target.name}.{os.getpid()}", env, show)
    how = "written" if onnx else "built"
    click.echo(f"{target}: {format_bytes(record.plan_bytes)}, {how} in {record.seconds:.1f} s")


def _timing_cache() -> str:
    """The folder for TensorRT's timings; "", for none, where this user has no home."""
    with contextlib.suppress(ConfigError):
        return os.fspath(cache_root() / "timing")
    return ""


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let the first signal end the build, and none disturb the cleaning up after it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        click.echo("trtpool: the build was stopped, and nothing was written", err=True)
        raise click.exceptions.Exit(1) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------- progress


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Callable[[Line], None]]:
    """A progress bar on a terminal; it only turns where TensorRT does not say how far it is (8.6)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(line: Line) -> None:
            if line.said:
                bar.console.print(line.said)
            if line.progress:
                phase, of = line.progress.phase, line.progress.of
                bar.update(task, description=phase, completed=line.progress.done, total=of or None)

        yield show


class _Lines:
    """Progress without a terminal: a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told = 0.0

    def __call__(self, line: Line) -> None:
        if line.said:
            self._console.print(line.said)
        if line.progress and line.progress.of:
            done = line.progress.done / line.progress.of
            if done >= self._told + PLAIN_EVERY:
                self._told = done
                self._console.print(f"{done:.0%} {line.progress.phase}")
