"""The options by which commands are told how to log; see `trtpool.ipc.logs`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import click

from trtpool.ipc import logs


def log_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options for the level and the format of logs, of this process and of its children."""

    @functools.wraps(command)
    def call(*, log_level: str | None, log_format: str | None, **options: Any) -> None:
        for name, value in ((logs.LEVEL, log_level), (logs.FORMAT, log_format)):
            if value is not None:
                os.environ[name] = value  # which children inherit
        command(**options)

    level = click.option(
        "--log-level",
        type=click.Choice(logs.LEVELS[:-1]),
        help="What is logged to standard error; debug: each work and batch [default: $TRTPOOL_LOG, or warning].",
    )
    format_ = click.option(
        "--log-format",
        type=click.Choice(logs.FORMATS),
        help="How; json: an object a line [default: $TRTPOOL_LOG_FORMAT, or text].",
    )
    return level(format_(call))
