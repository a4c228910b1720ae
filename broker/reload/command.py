"""The command `trtpool reload`."""

from __future__ import annotations

from pathlib import Path

import click

from trtpool.broker.cli_options import pool_options
from trtpool.broker.models import new_source
from trtpool.ipc import rundir

from .requests import reload as ask


@click.command()
@click.argument("models", metavar="[NAME=]FILE...", nargs=-1, required=True)
@pool_options
@click.option(
    "--timeout-s",
    type=click.FloatRange(0, min_open=True),
    help="Seconds after which it is called off if the new engines do not answer yet [default: none].",
)
def reload(models: tuple[str, ...], name: str, run_dir: Path | None, timeout_s: float | None) -> None:
    """Load other files in place of what a pool serves, without losing a request.

    A FILE is of the same kind as at the start, and its model must have the same inputs and outputs as the one that it
    replaces: NAME, which may be left out if the pool has one model.  Several are replaced at once.  If one cannot be
    loaded nothing changes.  While the new engines load, the old ones answer, so both need memory.
    """
    path = rundir.run_dir_of(name, run_dir)
    generation = ask(path, [new_source(model) for model in models], timeout_s=timeout_s, say=click.echo)
    click.echo(f"reloaded: all answers are of generation {generation} from now on")
