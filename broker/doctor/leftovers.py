"""What pools that were killed left behind: run directories whose lock is free, and, should that ever be, processes.

A pool holds the lock of its run directory while it lives, so a free one tells for certain; whoever removes it takes the
lock first, and so cannot meet a pool that starts there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from trtpool.ipc import holder, rundir
from trtpool.ipc.errors import NameInUse, RunDirError

from .finding import Finding, Host

OUR_CHILDREN: Final = ("trtpool.broker", "trtpool.workers")
"""What a supervisor starts; each ends with it."""

REMEDY: Final = "trtpool doctor --fix removes it"


class Stray(NamedTuple):
    """A process of a pool whose supervisor has ended."""

    pid: int
    module: str


def places(run_dir: Path) -> list[Path]:
    """Directories that may be run directories of ours: the one that is asked about, and all in the usual places."""
    found = [run_dir]
    for root in usual_roots():
        with contextlib.suppress(OSError):
            if root.lstat().st_uid == os.getuid() and not root.is_symlink():
                found += sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    return list(dict.fromkeys(found))


def usual_roots() -> list[Path]:
    """What holds run directories: now, and where `$XDG_RUNTIME_DIR` was not set, as in a service."""
    return list(dict.fromkeys((rundir.default_root(), Path("/tmp") / f"trtpool-{os.getuid()}")))  # noqa: S108  # looked at


def look(host: Host, run_dirs: Iterable[Path], *, fix: bool = False) -> Iterator[Finding]:
    """Pools that run, and what is left of others, which with `fix` is removed."""
    found = False
    for path in run_dirs:
        owner = _holder(path)
        if owner is None:
            continue
        found = True
        if owner:
            yield Finding("pools", "ok", f"a pool runs in {path} ({owner})")
        elif not fix:
            yield Finding("leftovers", "warning", f"{path} is left over from a pool that was killed", REMEDY)
        else:
            yield _remove(path)
    for stray in strays(host):
        found = True
        yield (
            _kill(stray, host)
            if fix
            else Finding(
                "leftovers",
                "warning",
                f"process {stray.pid} ({stray.module}) outlived its pool",
                f"{REMEDY}, by SIGKILL",
            )
        )
    if not found:
        yield Finding("leftovers", "ok", "no pool runs here as this user, and nothing is left of any")


def _holder(path: Path) -> str | None:
    """Who the pool is that runs in a directory; "": none does, and one did; None: it is no run directory of ours."""
    try:
        info = path.lstat()
        if info.st_uid != os.getuid() or not stat.S_ISDIR(info.st_mode):
            return None
        fd = os.open(path / rundir.LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # without a lock it was killed while it removed its directory
        return "" if (path / rundir.LIFELINE).is_socket() else None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = holder.pid_of(fd)
        if not pid:  # it has not written it yet
            return "just starting"
        return f"pid {pid} of another container" if holder.is_elsewhere(fd) else f"pid {pid}"
    else:
        return ""
    finally:
        os.close(fd)


def _remove(path: Path) -> Finding:
    try:
        rundir.RunDir.claim(path).release()
    except NameInUse:
        return Finding("pools", "ok", f"a pool has just started in {path}")
    except RunDirError as error:
        return Finding("leftovers", "warning", f"{path} could not be removed", str(error))
    if path.exists():
        return Finding("leftovers", "ok", f"{path}: what a pool had left is removed; other files in it stay")
    return Finding("leftovers", "ok", f"{path}, left over from a pool that was killed, is removed")


def strays(host: Host) -> list[Stray]:
    """Brokers and workers of this user whose parent is no supervisor."""
    found = []
    for folder in sorted((host.root / "proc").glob("[0-9]*"), key=lambda folder: int(folder.name)):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it ended meanwhile, or is not ours to see
            if folder.stat().st_uid == os.getuid() and (module := _module(folder)) in OUR_CHILDREN:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if "trtpool" not in (host.text(f"proc/{parent}/cmdline") or ""):
                    found.append(Stray(int(folder.name), module))
    return found


def _module(folder: Path) -> str:
    """What a ``python -m MODULE`` runs; "" for others."""
    words = (folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    return words[-1] if len(words) >= 3 and words[-2] == "-m" else ""


def _kill(stray: Stray, host: Host) -> Finding:
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(stray.pid)
        try:
            if stray in strays(host):  # looked at again, now that the pid cannot become another's
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
    return Finding("leftovers", "ok", f"process {stray.pid} ({stray.module}), which outlived its pool, was killed")
