"""The command `trtpool run`: its options, and what they mean together."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

import click
import msgspec

from trtpool.broker.cli_build_options import build_options
from trtpool.broker.cli_options import ENGINE_OPTIONS, add_options
from trtpool.broker.cli_types import BATCH_OPTIONS, split
from trtpool.ipc.errors import ConfigError, ModelError
from trtpool.ipc.normalization import NORMS
from trtpool.ipc.settings import BuildSettings, ShapeRange

from .images import FITS, ImageOptions
from .job import Job
from .journal import JobSettings
from .show import Display, show_outcome
from .sinks import sink_of
from .sources import Inputs, find
from .work import JobOptions

_OF_MODELS: Final = ("slots", "max_batch", "max_delay_us")
"""The names of `BATCH_OPTIONS`."""

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
@click.argument("more", metavar="", nargs=-1)  # what a shell makes of a glob without quotes
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="FILE|GLOB|FOLDER|-",
    help="What to read: images, Parquet, Arrow, .npy, tar shards; - takes a list from standard input.  Again for more.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="What to write: .parquet, .arrow, .jsonl or .npy.",
)
@click.option("--producers", type=click.IntRange(1, 1024), help="Processes that read and decode [default: CPUs].")
@click.option(
    "--column",
    "columns",
    multiple=True,
    callback=_parse_columns,
    metavar="[INPUT=]COLUMN",
    help="Column of Parquet or Arrow to read, or suffix of members of tar shards.  Again for each input.",
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
@add_options(ENGINE_OPTIONS)
@add_options(BATCH_OPTIONS)
@build_options
def run(
    *,
    model: Path,
    more: tuple[str, ...],
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
      trtpool run resnet50.plan --gpus 0 --input 'shards/*.tar' --column jpg --output logits.parquet
      find scans -name '*.tif' | trtpool run det.onnx --input - --post my_job:boxes --output boxes.jsonl
    """  # noqa: D301  # click wants the character itself, to leave the lines as they are
    if more:
        raise click.UsageError(
            f"there are {len(more)} words too many, from {more[0]} on; quote globs, as in --input 'pages/*.png', and "
            "write --input before each of several files"
        )
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other; leave one of them out")
    if norm and (mean or std):
        raise ConfigError("--norm and --mean or --std contradict each other; leave one of them out")
    image = ImageOptions(
        library=image_library, fit=fit or "", norm=norm or "", mean=mean, std=std, channels=channels, pad=pad
    )
    path, size, mtime_ns = _model_file(model)
    settings = JobSettings(
        model=(path, size, mtime_ns),
        inputs=inputs,
        columns=columns,
        decode=decode,
        post=post,
        image=image,
        sink=sink_of(output),
        pool=_computes(pool["shapes"], pool["build"], pool["no_batch"]),
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
        pool={**_for_pool(model, pool), "recall_timeout_s": 0.0},
    )

    def find_inputs() -> Inputs:
        return find(inputs, _read_list, any_file=bool(decode), columns=[column for _, column in columns])

    with Display() as display:
        job = Job(settings, how, find_inputs, output, display)
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


def _for_pool(model: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as `Pool` calls them; ``--max-batch det=8`` is the same as ``--max-batch 8``, there being one model."""
    names = {"allow_host_code": "host_code", "partial": "partial_batches"}
    options = {names.get(name, name): value for name, value in given.items() if value is not None}
    numbers = {option: options.pop(option) for option in _OF_MODELS}
    common, per_model = split(numbers)
    own = per_model.pop(model.stem, {})
    if per_model:
        other = next(iter(per_model))
        option = next(iter(per_model[other])).replace("_", "-")
        raise ConfigError(f"--{option} {other}=...: the job has one model, {model.stem}; leave the name out")
    return {**options, **common, **own, "gpus": given["gpus"] or None}


def _computes(shapes: dict[str, ShapeRange], build: BuildSettings, no_batch: tuple[str, ...]) -> str:
    """The options of the pool on which results depend."""
    return msgspec.json.encode({"shapes": shapes, "build": build, "no_batch": no_batch}, order="sorted").decode()


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
