"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click


def pool_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that say which pool is meant."""
    name = click.option("--name", default="default", show_default=True, help="The pool's name.")
    run_dir = click.option(
        "--run-dir",
        type=click.Path(path_type=Path),
        help="Its run directory [default: $TRTPOOL_RUN_DIR, or a directory for the name].",
    )
    return name(run_dir(command))
