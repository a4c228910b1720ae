"""Options that several commands have: how their texts are read."""

from __future__ import annotations

from collections.abc import Sequence

import click

from trtpool.ipc.errors import ConfigError

from .gpus import gpu_list


def parse_shapes(_ctx: click.Context, _parameter: click.Parameter, values: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``[MODEL:]INPUT=3x640x640``, again and again."""
    shapes = {}
    for value in values:
        name, equals, dimensions = value.rpartition("=")
        try:
            shape = tuple(int(dimension) for dimension in dimensions.split("x")) if dimensions else ()
        except ValueError:
            shape, equals = (), ""
        if not name or not equals or any(dimension < 1 for dimension in shape):
            raise click.BadParameter(f"{value!r} is not NAME=3x640x640, an input's name and its item shape")
        shapes[name] = shape
    return shapes


def parse_gpus(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """``0,1``; none if it was not given."""
    try:
        return () if value is None else gpu_list(value)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from error
