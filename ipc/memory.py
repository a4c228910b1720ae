"""How much memory may still be taken here, and who says so: the machine, or one of the cgroups that this process is in.

A cgroup's limit counts for all below it, so what is left is the least that any of them leaves, from this process's own
up to the root of what is mounted.  /proc/self/cgroup says where it is in each hierarchy, and /proc/self/mountinfo where
that is mounted, and from which of its folders on::

    cgroup     4:memory:/docker/ab12        0::/user.slice/job.scope
    mountinfo  /docker/ab12 is at           / is at
               /sys/fs/cgroup/memory        /sys/fs/cgroup
    so look at /sys/fs/cgroup/memory        /sys/fs/cgroup/user.slice/job.scope, /sys/fs/cgroup/user.slice

A cgroup whose limit is passed has a process of it killed, and never an error told: so it is asked beforehand.

See cgroups(7), proc(5), Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

PROC: Final = Path("/proc")


class Room(NamedTuple):
    """Memory that is left.

    Attributes:
        size: its bytes.
        where: what limits it, to be read after "in".
        remedy: how to have more.
    """

    size: int
    where: str
    remedy: str


class _Files(NamedTuple):
    """What one version of cgroups calls the limit, what is used of it, and, of that, the cache of files not in use."""

    limit: str
    used: str
    cache: str


_V2: Final = _Files("memory.max", "memory.current", "inactive_file")
_V1: Final = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def room(proc: Path = PROC) -> Room:
    """What may still be taken by the process that asks.

    Args:
        proc: where its files about processes are.
    """
    least = Room(_machine_bytes(proc), "this machine", "end what else takes memory here")
    for folder, files in _cgroups(proc):
        left = _left(folder, files)
        if left is not None and left < least.size:
            limit = folder / files.limit
            least = Room(left, f"the cgroup of {limit}", "raise that limit (docker: --memory, systemd: MemoryMax=)")
    return least


def _machine_bytes(proc: Path) -> int:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (proc / "meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left(folder: Path, files: _Files) -> int | None:
    """Bytes that a cgroup leaves; None if it has no limit."""
    try:
        left = int((folder / files.limit).read_text()) - int((folder / files.used).read_text())  # "max": ValueError
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError, StopIteration):
        # What was read from files counts as used, up to the limit, and is given up for anything else.
        lines = (folder / "memory.stat").read_text().splitlines()
        left += int(next(line for line in lines if line.split()[0] == files.cache).split()[1])
    return max(0, left)


def _cgroups(proc: Path) -> Iterator[tuple[Path, _Files]]:
    """The folders of the cgroups that this process is in, from its own upwards; a hybrid host has both versions."""
    try:
        memberships = (proc / "self/cgroup").read_text().splitlines()
        mounts = [_mount(line) for line in (proc / "self/mountinfo").read_text().splitlines()]
    except (OSError, ValueError):
        return
    for line in memberships:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            kind, files = "cgroup2", _V2
        elif "memory" in controllers.split(","):
            kind, files = "memory", _V1
        else:
            continue
        for root, at in [(root, at) for mounted, root, at in mounts if mounted == kind][:1]:
            for folder in _upwards(at, _below(PurePosixPath(path), root)):
                yield folder, files


def _mount(line: str) -> tuple[str, PurePosixPath, Path]:
    """Of a line of mountinfo: "cgroup2", "memory" or another kind; which folder of it is mounted; and where."""
    before, _, after = line.partition(" - ")
    root, at = (_unescape(word) for word in before.split()[3:5])
    kind, _, options = after.split(" ", 2)
    if kind == "cgroup" and "memory" in options.split(","):
        kind = "memory"
    return kind, PurePosixPath(root), Path(at)


def _unescape(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), word)


def _below(path: PurePosixPath, root: PurePosixPath) -> tuple[str, ...]:
    """The parts of a cgroup's path below the folder that is mounted; none, if it is not below it."""
    with contextlib.suppress(ValueError):
        parts = path.relative_to(root).parts
        if ".." not in parts:  # above what a namespace shows
            return parts
    return ()


def _upwards(at: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    for count in range(len(parts), -1, -1):
        yield at.joinpath(*parts[:count])
