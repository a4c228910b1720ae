"""Options that several commands have, and how their texts are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from trtpool.ipc.errors import ConfigError
from trtpool.ipc.settings import DEFAULT_BATCH_TIMEOUT_S, DEFAULT_LANES, DEFAULT_START_TIMEOUT_S, FLAVOURS, ShapeRange

from .gpus import gpu_list


def pool_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say which pool is meant."""
    name = click.option("--name", default="default", show_default=True, help="The pool's name.")
    run_dir = click.option(
        "--run-dir",
        type=click.Path(path_type=Path),
        help="Its run directory [default: $TRTPOOL_RUN_DIR, or a directory for the name].",
    )
    return name(run_dir(command))


def add_options(options: Sequence[Callable[[Any], Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds options to a command, in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def parse_shapes(_ctx: click.Context, _parameter: click.Parameter, values: Sequence[str]) -> dict[str, ShapeRange]:
    """``[MODEL:]INPUT=3x640x640``, an axis perhaps a range such as ``32..640``, again and again."""
    shapes = {}
    for value in values:
        name, equals, sizes = value.rpartition("=")
        shape = tuple(map(_parse_axis, sizes.split("x"))) if sizes else ()
        if not name or not equals or None in shape:
            raise click.BadParameter(
                f"{value!r} is not NAME=3x640x640, an input's name and its item shape, with a range such as 32..640 "
                "where items differ"
            )
        shapes[name] = tuple(axis for axis in shape if axis is not None)
    return shapes


def _parse_axis(text: str) -> int | tuple[int, ...] | None:
    """A size, or a range of them; None: it is neither."""
    try:
        sizes = [int(size) for size in text.split("..")]
    except ValueError:
        return None
    if len(sizes) > 2 or min(sizes) < 1 or sizes != sorted(sizes):
        return None
    return sizes[0] if len(sizes) == 1 else tuple(sizes)


def parse_gpus(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """``0,1``; none if it was not given."""
    try:
        return () if value is None else gpu_list(value)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from error


flavour_option = click.option(
    "--flavour", type=click.Choice([*FLAVOURS]), default=None, help="TensorRT to use [default: what the plan is for]."
)
host_code_option = click.option(
    "--allow-host-code/--no-allow-host-code",
    default=False,
    help="Let a plan run code of its own here; trust it like a program.",
)


ENGINE_OPTIONS: Final = (
    click.option(
        "--gpus",
        callback=parse_gpus,
        metavar="0,1",
        help="GPUs, by index in PCI order, UUID or MIG id; a worker on each.",
    ),
    click.option("--workers", type=click.IntRange(1, 256), help="Worker processes on the CPU [default: 1]."),
    click.option(
        "--workers-per-gpu",
        type=click.IntRange(1, 16),
        default=1,
        show_default=True,
        help="Worker processes on each GPU.",
    ),
    click.option(
        "--threads",
        type=click.IntRange(0, 4096),
        default=0,
        help="Threads in an engine call on the CPU [default: share].",
    ),
    click.option(
        "--lanes",
        type=click.IntRange(1, 16),
        default=DEFAULT_LANES,
        show_default=True,
        help="Batches that a worker on a GPU has in flight at once.",
    ),
    flavour_option,
    click.option("--graphs/--no-graphs", default=True, help="Capture the engine's work into CUDA graphs, or do not."),
    host_code_option,
    click.option(
        "--huge-pages/--no-huge-pages", default=False, help="Put the arena on huge pages, if enough are free."
    ),
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        callback=parse_shapes,
        metavar="[MODEL:]INPUT=3x640x640",
        help="Item shape of an input that the model leaves open, such as 3x640x640, or 3x32..640x32..640 where items "
        "differ; or the largest of an output.  Again for each.",
    ),
    click.option(
        "--no-batch",
        multiple=True,
        metavar="MODEL",
        help="Run each item as a call of its own: for a model without a batch axis in front.  Again for each.",
    ),
    click.option(
        "--partial-batches",
        "partial",
        type=click.Choice(["pad", "refuse"]),
        default="pad",
        show_default=True,
        help="For a model with one batch size: fill smaller batches up, or take whole ones only, one in each slot.",
    ),
    click.option(
        "--batch-timeout-s",
        type=click.FloatRange(0, 86_400),
        default=DEFAULT_BATCH_TIMEOUT_S,
        show_default=True,
        help="How long a batch may run before its worker is killed and it is run again; 0: for ever.",
    ),
    click.option(
        "--start-timeout-s",
        type=click.FloatRange(0, 86_400),
        default=DEFAULT_START_TIMEOUT_S,
        show_default=True,
        help="How long a worker may take to become ready before it is killed; 0: for ever.",
    ),
)
"""Of each command that starts a pool: what its workers run on, and how."""
