"""The command `trtpool trace`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from trtpool.broker.cli_options import pool_options
from trtpool.ipc import rundir

from .asking import DEFAULT_BUFFER_MIB, MAX_BUFFER_MIB, Recording


@click.command()
@pool_options
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True, help="How long to record."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("trace.json"),
    show_default=True,
    help="The file to write; one that is there is replaced.",
)
@click.option(
    "--buffer-mib",
    type=click.IntRange(1, MAX_BUFFER_MIB),
    default=DEFAULT_BUFFER_MIB,
    show_default=True,
    help="Memory for what is recorded; what has no room is dropped, and counted.",
)
def trace(name: str, run_dir: Path | None, seconds: float, output: Path, buffer_mib: int) -> None:
    """Record what a pool does, for Perfetto (https://ui.perfetto.dev) or chrome://tracing.

    Lanes of workers with copy-in, compute and copy-out, what producers wait for, fill and read, and the queues.
    Ctrl-C ends it early, and writes what there is.  Only the user who started the pool may trace it.

    Example: trtpool trace --seconds 5 -o trace.json
    """
    path = rundir.run_dir_of(name, run_dir)
    recording = Recording(path, output, buffer_mib=buffer_mib)
    with contextlib.suppress(KeyboardInterrupt):
        click.echo(f"recording for {seconds:g} s; Ctrl-C ends it early", err=True)
        recording.wait(seconds)
    made = recording.stop()
    if made.ended:
        click.echo(f"trtpool: the trace ended early: {made.ended}", err=True)
    if made.dropped:
        click.echo(
            f"trtpool: the buffer was full after {made.seconds:.3f} s and {made.dropped} events were dropped; record "
            "for a shorter time, or give a larger --buffer-mib",
            err=True,
        )
    click.echo(f"{made.path}: {made.seconds:.3f} s, {made.events} events; open it in https://ui.perfetto.dev")
