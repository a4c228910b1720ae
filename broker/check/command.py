"""The command `trtpool check`: its options, and its verdict."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from trtpool.broker.building import is_intact, record_of
from trtpool.broker.cli_build_options import parse_normalize
from trtpool.broker.cli_options import parse_gpus, parse_shapes
from trtpool.broker.jobs.images import FITS, ImageOptions
from trtpool.broker.models import Model
from trtpool.broker.planning import is_plan
from trtpool.broker.pool import Pool
from trtpool.ipc.building import PlanRecord
from trtpool.ipc.errors import ConfigError, ModelError
from trtpool.ipc.normalization import Normalization
from trtpool.ipc.settings import FLAVOURS, ShapeRange

from .compare import Limits, OutputMeter, OutputReport
from .data import Data, batches
from .feeds import Feeder, Side, check_alike

DIFFERENT: Final = 23
"""Exit code of a check whose verdict is no."""

MOST_BYTES: Final = 64 * 1024 * 1024
"""About as much of inputs and outputs is in memory at once, for each model."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `trtpool check --json` prints.

    Attributes:
        ok: the verdict.
        problems: why not.
        candidate, reference: the files.
        data: what the items were.
        items: how many.
        normalized: what is done to pixels, by input, in one model, or as was told; ``""`` what was told for all images.
        limits: what would have been good.
        outputs: one for each.
    """

    ok: bool
    problems: tuple[str, ...]
    candidate: str
    reference: str
    data: str
    items: int
    normalized: dict[str, Normalization]
    limits: Limits
    outputs: tuple[OutputReport, ...]


_DATA_OPTIONS: Final = (
    click.option(
        "--data",
        multiple=True,
        metavar="FILE|GLOB|FOLDER|-",
        help="Items for both: images, .npy, Parquet, Arrow, tar shards, as for `trtpool run`; for several inputs a "
        "folder with INPUT.npy for each [default: random].  Again for more.",
    ),
    click.option("--items", type=click.IntRange(1), help="Use the first so many [default: all; 32 random ones]."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of random items."),
    click.option(
        "--normalize",
        multiple=True,
        callback=parse_normalize,
        metavar="[INPUT=]mean=M,M,M,std=S,S,S",
        help="What floating-point inputs need done to pixels, as for `trtpool build` [default: what the record beside "
        "a model says; images for two models of floats are divided by 255].",
    ),
    click.option("--fit", type=click.Choice(FITS), help="[default: crop for classifiers, else letterbox]"),
    click.option("--channels", type=click.Choice(["rgb", "bgr"]), default="rgb", show_default=True),
    click.option("--pad", type=click.IntRange(0, 255), default=0, show_default=True, help="Pixel value of margins."),
    click.option("--image-library", type=click.Choice(["pillow", "opencv"]), default="pillow", show_default=True),
)

_LIMIT_OPTIONS: Final = (
    click.option("--max-error", type=click.FloatRange(0), default=0.05, show_default=True, help="Largest error."),
    click.option("--mean-error", type=click.FloatRange(0), default=0.01, show_default=True, help="Mean error."),
    click.option(
        "--top1", type=click.FloatRange(0, 1), default=0.99, show_default=True, help="Share of items of the same class."
    ),
    click.option(
        "--scores",
        multiple=True,
        metavar="OUTPUT",
        help="An output with class scores along its last axis.  Again for each.",
    ),
)

_POOL_OPTIONS: Final = (
    click.option(
        "--gpus", callback=parse_gpus, metavar="0", help="GPU for MODEL [default: 0 for a plan, else the CPU]."
    ),
    click.option("--flavour", type=click.Choice([*FLAVOURS]), default=None, help="TensorRT to use."),
    click.option("--allow-host-code", "host_code", is_flag=True, help="Let a plan run code of its own here."),
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        callback=parse_shapes,
        metavar="INPUT=3x640x640",
        help="Item shape of an input that a model leaves open.  Again for each.",
    ),
    click.option(
        "--no-batch", is_flag=True, help="Run each item as a call of its own: for models without a batch axis."
    ),
)


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed((*_DATA_OPTIONS, *_LIMIT_OPTIONS, *_POOL_OPTIONS)):
        command = option(command)
    return command


@click.command()
@click.argument("model", metavar="MODEL", type=click.Path(path_type=Path))
@click.option(
    "--against", type=click.Path(path_type=Path), required=True, metavar="REFERENCE", help="The model as it was."
)
@_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def check(
    *,
    model: Path,
    against: Path,
    data: tuple[str, ...],
    items: int | None,
    seed: int,
    normalize: dict[str, Normalization],
    fit: str | None,
    channels: str,
    pad: int,
    image_library: str,
    max_error: float,
    mean_error: float,
    top1: float,
    scores: tuple[str, ...],
    gpus: tuple[str, ...],
    flavour: str | None,
    host_code: bool,
    shapes: dict[str, ShapeRange],
    no_batch: bool,
    as_json: bool,
) -> None:
    """Measure what a change of precision costs: run MODEL and REFERENCE on the same items, and compare the answers.

    ONNX files run on the CPU, plans on a GPU.  The error of a number is its distance from the reference, relative to
    the largest number of that item's output.  The exit code is 23 if it is above a limit.  docs/precision.md has more.

    \b
    Examples:
      trtpool check resnet50.plan --against resnet50.onnx --data photos/
      trtpool check pixels.onnx --against resnet50.onnx --data photos/ --items 500 --top1 0.995
      trtpool check text.plan --against text.onnx --data arrays/ --shape input_ids=128 --json
    """  # noqa: D301  # click wants the character itself, to leave the lines as they are
    for path in (model, against):
        if not path.is_file():
            raise ModelError(f"there is no file {path}; name an .onnx file or a plan")
    images = ImageOptions(library=image_library, fit=fit or "", channels=channels, pad=pad)
    limits = Limits(max_error=max_error, mean_error=mean_error, top1=top1)
    both = {"shapes": shapes, "no_batch": ("model",) if no_batch else ()}
    on_gpu = {"flavour": flavour or "", "host_code": host_code}
    with _pool(model, gpus, both, on_gpu) as candidate, _pool(against, (), both, on_gpu) as reference:
        sides = [Side(pool.models[0].spec, _inside(path)) for pool, path in ((candidate, model), (reference, against))]
        check_alike(sides[0].spec, sides[1].spec)
        feeder = Feeder(sides[0], sides[1], normalize, images)
        source = Data(data, items, seed, feeder)
        meters = _meters(sides[0], sides[1], scores)
        keys: list[str] = []
        specs = [spec for side in sides for spec in (*side.spec.inputs, *side.spec.outputs)]
        for batch in batches(source.rows(), specs, MOST_BYTES):
            rows = [row for _, row in batch]
            ours, theirs = (
                pool.infer(arrays) for pool, arrays in zip((candidate, reference), feeder.feed(rows), strict=True)
            )
            keys += [key for key, _ in batch]
            for name, meter in meters.items():
                _add(meter, name, ours, theirs)
    if not keys:
        raise ConfigError(f"--data {' '.join(data)}: there are no rows, so there is nothing to compare")
    outputs = tuple(meter.report(keys) for meter in meters.values())
    problems = tuple(problem for output in outputs for problem in output.problems(limits))
    report = Report(
        ok=not problems,
        problems=problems,
        candidate=os.fspath(model),
        reference=os.fspath(against),
        data=source.told,
        items=len(keys),
        normalized={**sides[1].inside, **sides[0].inside, **normalize},
        limits=limits,
        outputs=outputs,
    )
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        _show(report)
    sys.exit(0 if report.ok else DIFFERENT)


def _pool(path: Path, gpus: tuple[str, ...], both: Mapping[str, Any], on_gpu: Mapping[str, Any]) -> Pool:
    wanted = gpus or (("0",) if is_plan(path) else ())
    return Pool(Model(path=path, name="model"), gpus=wanted or None, **both, **(on_gpu if wanted else {}))


def _inside(path: Path) -> Mapping[str, Normalization]:
    """What a model does to pixels itself, by the record that was left beside it."""
    if not is_intact(path):
        return {}
    return msgspec.json.decode(record_of(path).read_bytes(), type=PlanRecord).options.normalize


def _meters(candidate: Side, reference: Side, scores: Sequence[str]) -> dict[str, OutputMeter]:
    ours = {spec.name: spec for spec in candidate.spec.outputs}
    if unknown := set(scores) - ours.keys():
        raise ConfigError(f"--scores {min(unknown)}: the models' outputs are {', '.join(ours)}")
    return {
        spec.name: OutputMeter(ours[spec.name], spec, scores=spec.name in scores) for spec in reference.spec.outputs
    }


def _add(meter: OutputMeter, name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if ours[name].shape != theirs[name].shape:
        raise ConfigError(
            f"output {name!r} has shape {ours[name].shape} in one model and {theirs[name].shape} in the other, and so "
            "cannot be compared; compare the outputs that come before it"
        )
    meter.add(ours[name], theirs[name])


def _show(report: Report) -> None:
    click.echo(f"{report.items} items: {report.data}")
    for name, normalization in report.normalized.items():
        click.echo(f"{name or 'images'}: {normalization}")
    rows: list[tuple[str, ...]] = [
        ("output", "dtypes", "largest", "max error", "mean error", "top-1", "equal", "worst")
    ]
    rows += [
        (
            output.name,
            output.dtype if output.dtype == output.reference_dtype else f"{output.dtype}, {output.reference_dtype}",
            *(
                "-" if number is None else f"{number:.3g}"
                for number in (output.largest, output.max_error, output.mean_error)
            ),
            *("-" if share is None else f"{share:.2%}" for share in (output.top1, output.equal)),
            output.worst or "-",
        )
        for output in report.outputs
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for problem in report.problems:
        click.echo(f"too far: {problem}")
    click.echo("verdict: " + ("good, within the limits" if report.ok else "not good"))
