"""What a lock says of the process that holds it: ``PID NAMESPACE``.

A pid means something in its pid namespace alone.  A run directory may be shared between containers, in each of which
the same number is another process: nobody must signal that one.  See pid_namespaces(7).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_MAX_BYTES: Final = 64


def say(fd: int) -> None:
    """Write that it is us.

    Raises:
        OSError: nothing can be written.
    """
    os.pwrite(fd, f"{os.getpid()} {_namespace()}\n".encode(), 0)


def pid_of(fd: int) -> int:
    """The pid, as its own namespace counts; 0: none is written yet."""
    words = os.pread(fd, _MAX_BYTES, 0).split()
    return int(words[0]) if words and words[0].isdigit() else 0


def is_elsewhere(fd: int) -> bool:
    """Whether here the pid is that of another process, or of none."""
    words = os.pread(fd, _MAX_BYTES, 0).decode(errors="replace").split()
    ours = _namespace()
    return bool(ours) and len(words) > 1 and words[1] != ours


def _namespace() -> str:
    """A name for our pid namespace; empty without /proc."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
