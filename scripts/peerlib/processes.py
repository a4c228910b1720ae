"""The processes below one: what CPU time they took, and that all have ended.

A server may start others that outlive it, or end and be reaped during a window, so neither a list of processes nor
their own times will do.  What is counted is, over all that are below a process now, their own time *and* that of the
children they have reaped: whoever reaps a child takes over its time and that of its own reaped children, so nothing
is lost or counted twice.  For that no orphan may leave: `adopt_orphans` gives them to the caller, not to init.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Final, NamedTuple

import psutil

PR_SET_CHILD_SUBREAPER: Final = 36
TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


class Process(NamedTuple):
    """One process, as ``/proc/PID/stat`` has it; `ticks` are its own and its reaped children's."""

    pid: int
    parent: int
    name: str
    ended: bool
    ticks: int


def adopt_orphans(adopt: bool = True) -> None:
    """From now on processes below this one whose parent ends become its children; or init's again."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed: this needs Linux 3.4 or newer")


def read(pid: int) -> Process | None:
    """The process `pid`; None if there is none any more."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    head, _, tail = text.rpartition(")")  # a name may hold brackets and blanks
    fields = tail.split()
    return Process(pid, int(fields[1]), head.partition("(")[2], fields[0] in "ZX", sum(map(int, fields[11:15])))


def below(root: int) -> list[Process]:
    """All processes below `root`, zombies included, without `root`."""
    children: dict[int, list[Process]] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208  # names alone are needed, of hundreds
        if entry.isdigit() and (process := read(int(entry))) is not None:
            children.setdefault(process.parent, []).append(process)
    found, parents = [], [root]
    while parents:
        next_ones = children.get(parents.pop(), [])
        found += next_ones
        parents += [process.pid for process in next_ones]
    return found


def cpu_s() -> float:
    """User and system seconds of this process, of all below it and of all that have ended there."""
    here = read(os.getpid())
    assert here is not None
    return TICK_S * (here.ticks + sum(process.ticks for process in below(here.pid)))


def left(known: set[int], timeout_s: float) -> list[Process]:
    """Wait until no process is below this one but `known`; those that are there all the same after `timeout_s`."""
    until_s = time.monotonic() + timeout_s
    while True:
        reap(known)
        remaining = [process for process in below(os.getpid()) if process.pid not in known and not process.ended]
        if not remaining or time.monotonic() > until_s:
            return remaining
        psutil.wait_procs([one for one in map(_handle, remaining) if one is not None], timeout=0.2)


def kill(known: set[int], timeout_s: float = 10.0) -> None:
    """Kill all below this process but `known`, and what they start meanwhile."""
    until_s = time.monotonic() + timeout_s
    while (remaining := left(known, 0.0)) and time.monotonic() < until_s:
        for process in remaining:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        left(known, 0.2)


def reap(known: set[int]) -> None:
    """Reap adopted children that have ended; `known` ones are somebody else's to wait for."""
    for process in below(os.getpid()):
        if process.ended and process.parent == os.getpid() and process.pid not in known:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


def _handle(process: Process) -> psutil.Process | None:
    try:
        return psutil.Process(process.pid)
    except psutil.NoSuchProcess:
        return None
