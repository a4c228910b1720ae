"""Where run directories are made: whose that is, and whether its file system has sockets and locks.

Shared folders of virtual machines (Docker Desktop's among them) and network file systems often have no Unix sockets.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trtpool.ipc import rundir
from trtpool.ipc.errors import RunDirError

from .finding import Finding


def look(run_dir: Path) -> Iterator[Finding]:
    """Try what `start` does at `run_dir`, beside it, and undo it."""
    try:
        rundir.check_path_length(run_dir)
        rundir.check_way(run_dir if run_dir.parent != rundir.default_root() else run_dir.parent)
        if run_dir.exists():
            rundir.check_private(run_dir, entered=True)
        if run_dir.parent == rundir.default_root() and run_dir.parent.exists():
            rundir.check_private(run_dir.parent, what="directory of run directories")
    except RunDirError as error:
        yield Finding("run-directory", "problem", f"{run_dir} will not do", str(error))
        return
    place = next(part for part in (run_dir, *run_dir.parents) if part.exists())
    yield _try(place, run_dir)


def _try(place: Path, run_dir: Path) -> Finding:
    def bad(why: str, remedy: str) -> Finding:
        return Finding("run-directory", "problem", f"{run_dir}: {why}", remedy)

    other = "choose another place with --run-dir or $TRTPOOL_RUN_DIR, such as /tmp/pool"
    try:
        with tempfile.TemporaryDirectory(prefix="doctor", dir=place) as folder:
            # By a relative path, since the directory's name makes it longer than a socket's may be.
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    sock.bind(f"/proc/self/fd/{fd}/s")
                finally:
                    os.close(fd)
            with (Path(folder) / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return bad(f"the file system of {place} is full", f"make room, or {other}")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return bad(f"nothing can be made in {place}: {error.strerror}", other)
        return bad(f"the file system of {place} has no Unix sockets or no locks ({error.strerror})", other)
    return Finding("run-directory", "ok", f"{run_dir}: sockets and locks work there")
