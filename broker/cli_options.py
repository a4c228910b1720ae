"""Options that several commands have, and how their texts are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from trtpool.ipc.errors import ConfigError
from trtpool.ipc.settings import ShapeRange

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
