"""The command `trtpool run`: its options, and what they mean together."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

import click
import msgspec

from trtpool.broker.cli_build import build_options
from trtpool.broker.cli_options import add_options, parse_gpus, parse_shapes
from trtpool.ipc.errors import ConfigError, ModelError
from trtpool.ipc.settings import DEFAULT_LANES, FLAVOURS, BuildSettings

from .images import FITS, NORMS, ImageOptions
from .job import Job
from .journal import JobSettings
from .show import Display, show_outcome
from .sinks import sink_of
from .sources import find
from .work import JobOptions

ROWS_WITH_ERRORS: Final = 21
"""Exit code of a job that is done and has rows without a result."""


def _parse_columns(
    _ctx: click.Context, _parameter: click.Parameter, values: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    columns = []
    for value in values:
        name, _, column = value.rpartition("=")
        if not column:
            raise click.BadParameter(f"{value!r} is not COLUMN or INPUT=COLUMN")
        columns.append((name, column))
    return tuple(columns)


def _parse_numbers(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in value.split(",")) if value else ()
    except ValueError:
        numbers = (0.0,) * 4
    if len(numbers) not in (0, 1, 3):
        raise click.BadParameter(f"{value!r} is not one number or three, such as 0.485,0.456,0.406")
    return numbers


_POOL_OPTIONS: Final = (
    click.option("--gpus", callback=parse_gpus, metavar="0,1", help="GPUs, as for `trtpool start` [default: the CPU]."),
    click.option("--workers", type=click.IntRange(1, 256), help="Worker processes on the CPU [default: 1]."),
    click.option("--workers-per-gpu", type=click.IntRange(1, 16), default=1, show_default=True, help="On each GPU."),
    click.option("--threads", type=click.IntRange(0, 4096), default=0, help="Threads in an engine call on the CPU."),
    click.option("--lanes", type=click.IntRange(1, 16), default=DEFAULT_LANES, help="Batches in flight on a GPU."),
    click.option("--flavour", type=click.Choice([*FLAVOURS]), default=None, help="TensorRT to use."),
    click.option("--allow-host-code", "host_code", is_flag=True, help="Let a plan run code of its own here."),
    click.option("--huge-pages", is_flag=True, help="Put the arena on huge pages."),
    click.option("--max-batch", type=click.IntRange(1, 2**24), help="Items in the largest batch."),
    click.option("--max-delay-us", type=click.IntRange(0, 60_000_000), default=0, help="How long a batch may fill."),
    click.option("--slots", type=click.IntRange(1, 2**24), help="Slots in the arena [default: from the others]."),
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        callback=parse_shapes,
        metavar="INPUT=3x640x640",
        help="Item shape of an input that the model leaves open.  Again for each.",
    ),
)

_IMAGE_OPTIONS: Final = (
    click.option("--fit", type=click.Choice(FITS), help="[default: crop for classifiers, else letterbox]"),
    click.option("--norm", type=click.Choice([*NORMS]), help="[default: unit, which is 0 to 1, for floats]"),
    click.option("--mean", callback=_parse_numbers, metavar="M[,M,M]", help="Means, instead of --norm, of 0 to 1."),
    click.option("--std", callback=_parse_numbers, metavar="S[,S,S]", help="Deviations, instead of --norm."),
    click.option("--channels", type=click.Choice(["rgb", "bgr"]), default="rgb", show_default=True),
    click.option("--pad", type=click.IntRange(0, 255), default=0, show_default=True, help="Pixel value of margins."),
    click.option(
        "--image-library",
        type=click.Choice(["pillow", "opencv"]),
        default="pillow",
        show_default=True,
        help="What decodes and scales.",
    ),
)


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="FILE|GLOB|FOLDER|-",
    help="What to read: images, Parquet, .npy; - takes a list of files from standard input.  Again for more.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="What to write: .parquet, .jsonl or .npy.",
)
@click.option("--producers", type=click.IntRange(1, 1024), help="Processes that read and decode [default: CPUs].")
@click.option(
    "--column",
    "columns",
    multiple=True,
    callback=_parse_columns,
    metavar="[INPUT=]COLUMN",
    help="Parquet column to read.  Again for each input.",
)
@click.option("--decode", default="", metavar="MODULE:FUNCTION", help="Called as f(item, inputs) to write a row.")
@click.option("--post", default="", metavar="MODULE:FUNCTION", help="Called as f(item, outputs) for a row's columns.")
@add_options(_IMAGE_OPTIONS)
@click.option("--resume", is_flag=True, help="Go on with a job that was interrupted; nothing if it is done.")
@click.option("--overwrite", is_flag=True, help="Replace the output, and forget an interrupted job.")
@click.option("--unordered", is_flag=True, help="Leave rows in the order in which they are done.")
@click.option("--max-errors", type=click.IntRange(0), help="Stop after more rows with errors [default: never].")
@click.option(
    "--rows-per-group",
    type=click.IntRange(1, 2**20),
    help="Rows that are written together, a row group in Parquet [default: about 16 MiB, at most 1024].",
)
@add_options(_POOL_OPTIONS)
@build_options
def run(
    *,
    model: Path,
    inputs: tuple[str, ...],
    output: Path,
    producers: int | None,
    columns: tuple[tuple[str, str], ...],
    decode: str,
    post: str,
    fit: str | None,
    norm: str | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels: str,
    pad: int,
    image_library: str,
    resume: bool,
    overwrite: bool,
    unordered: bool,
    max_errors: int | None,
    rows_per_group: int | None,
    **pool: Any,
) -> None:
    """Run a model over files, from start to end, into one file.

    A pool is started for the job, and ends with it.  What is done is kept in OUTPUT.job until all is, for --resume.
    A row that cannot be read or that fails becomes an error row: column "error" says why.  docs/run.md has the rest.

    \b
    Examples:
      trtpool run det.onnx --input 'pages/*.png' --output out.parquet --shape x=3x640x640 --producers 8
      trtpool run resnet50.plan --gpus 0 --input photos/ --norm imagenet --output logits.npy
      trtpool run embed.onnx --input texts.parquet --column ids --output vectors.parquet --resume
      find scans -name '*.tif' | trtpool run det.onnx --input - --post my_job:boxes --output boxes.jsonl
    """  # noqa: D301  # click wants the character itself, to leave the lines as they are
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other; leave one of them out")
    if norm and (mean or std):
        raise ConfigError("--norm and --mean or --std contradict each other; leave one of them out")
    image = ImageOptions(
        library=image_library, fit=fit or "", norm=norm or "", mean=mean, std=std, channels=channels, pad=pad
    )
    path, size, mtime_ns = _model_file(model)
    options = {name: value for name, value in pool.items() if value is not None}
    options["gpus"] = pool["gpus"] or None
    settings = JobSettings(
        model=(path, size, mtime_ns),
        inputs=inputs,
        columns=columns,
        decode=decode,
        post=post,
        image=image,
        sink=sink_of(output),
        pool=_computes(pool["shapes"], pool["build"]),
    )
    cpus = len(os.sched_getaffinity(0))
    count = producers or (cpus if pool["gpus"] else max(1, cpus // 2))
    how = JobOptions(
        producers=count,
        rows_per_group=rows_per_group or 0,
        max_errors=max_errors,
        ordered=not unordered,
        resume=resume,
        overwrite=overwrite,
        # A producer that the sink holds up holds slots, and need not be reported for it.
        pool={**options, "recall_timeout_s": 0.0},
    )
    with Display() as display:
        job = Job(settings, how, lambda: find(inputs, _read_list, any_file=bool(decode)), output, display)
        with _stopping(job.stop):
            outcome = job.run()
    if outcome is None:
        click.echo(f"{output} is done already")
        return
    show_outcome(outcome, count)
    sys.exit(ROWS_WITH_ERRORS if outcome.errors else 0)


def _model_file(model: Path) -> tuple[str, int, int]:
    try:
        stat = model.stat()
    except OSError as error:
        raise ModelError(f"there is no file {model}; name an .onnx file, or with --gpus a plan") from error
    return os.path.abspath(model), stat.st_size, stat.st_mtime_ns


def _computes(shapes: dict[str, tuple[int, ...]], build: BuildSettings) -> str:
    """The options of the pool on which results depend."""
    return msgspec.json.encode({"shapes": shapes, "build": build}, order="sorted").decode()


def _read_list() -> bytes:
    return sys.stdin.buffer.read()


@contextlib.contextmanager
def _stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Let a signal ask for an early end; the second one has its usual effect."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def ask(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        stop()

    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
