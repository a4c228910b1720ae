"""`trtpool top`: look, show, wait, again.  What is shown is made in `top`."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live

from trtpool.ipc.client import Client
from trtpool.ipc.remote import connect

from .cli_options import pool_options
from .nvml import Nvml
from .top import Look, Top

FIRST_LOOK_S = 0.5
"""Something is to be seen soon."""


@click.command()
@pool_options
@click.option("--once", is_flag=True, help="Print one look, over the interval, and end.")
@click.option(
    "--interval-s",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds from one look to the next.",
)
def top(name: str, run_dir: Path | None, once: bool, interval_s: float) -> None:
    """Watch what a pool is doing: rates, batches, latency, devices, clients.  Leave with q."""
    if not once and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("this is no terminal; print one look with --once", click.get_current_context())
    with connect(name, run_dir=run_dir) as client:
        (_show_once if once else _watch)(client, interval_s)


def _show_once(client: Client, interval_s: float) -> None:
    """Print what happens within `interval_s`."""
    with Nvml() as nvml:
        before = _look(client, nvml)
        time.sleep(interval_s)
        Console().print(Top(before, _look(client, nvml)).show(rows=1000))


def _watch(client: Client, interval_s: float) -> None:
    """Show what happens, until ``q`` or Ctrl-C."""
    console = Console()
    with (
        Nvml() as nvml,
        _keys() as key,
        Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        before, wait_s = _look(client, nvml), min(FIRST_LOOK_S, interval_s)
        while key(wait_s) != "q":
            now = _look(client, nvml)
            live.update(Top(before, now).show(console.height), refresh=True)
            before, wait_s = now, interval_s


def _look(client: Client, nvml: Nvml) -> Look:
    report = client.status()
    on_gpus = [worker.pid for worker in report.workers if worker.gpu is not None]
    return Look(report, time.monotonic(), nvml.figures(on_gpus))


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Gives the next key that is typed, or "" after so many seconds; the terminal is as before at the end."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def key(timeout_s: float) -> str:
        ready, _, _ = select.select([fd], [], [], timeout_s)
        return (os.read(fd, 1).decode("latin-1") or "q") if ready else ""  # nothing to read: the terminal is gone

    tty.setcbreak(fd)
    try:
        yield key
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
