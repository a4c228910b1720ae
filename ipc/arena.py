"""The arena's memory: one sealed memfd, mapped by everyone.

A memfd has no name, so nothing is left in a file system when its last user ends, and a container's
``/dev/shm`` limit does not apply.  It is sealed against shrinking, growing and further seals: a peer that
could shrink it would end us all by SIGBUS, and one that could add ``F_SEAL_FUTURE_WRITE`` would stop every
later worker from mapping it.  Its pages are allocated at start (`posix_fallocate`), since a sparse file of
any size can be made and the failure would come later, as SIGBUS.

See memfd_create(2), fcntl(2) "File Sealing", posix_fallocate(3).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Final

from .errors import ArenaTooLarge, ProtocolError

SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def format_bytes(count: int) -> str:
    """`count` bytes for people: ``"1.5 GiB"``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def available_bytes() -> int:
    """Memory that can still be allocated here: the machine's, or less if a cgroup (v2 or v1) says so."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        meminfo = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in meminfo if line.startswith("MemAvailable")).split()[1])
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is a ValueError: no limit
            free = min(free, max(0, int(Path(limit).read_text()) - int(Path(usage).read_text())))
    return free


def create_segment(size: int, *, limit_bytes: int | None = None) -> int:
    """Make a segment of `size` bytes, allocated and sealed, and return its descriptor.

    Args:
        size: bytes; a multiple of the page size.
        limit_bytes: the most that may be taken; by default nine tenths of what is available now.

    Raises:
        ArenaTooLarge: more than the limit, or the kernel has no pages left.
    """
    limit = available_bytes() * 9 // 10 if limit_bytes is None else limit_bytes
    if size > limit:
        raise ArenaTooLarge(
            f"the arena needs {format_bytes(size)} and {format_bytes(limit)} may be taken; "
            "lower --slots, --items-per-slot or --max-batch"
        )
    fd = os.memfd_create("trtpool-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise ArenaTooLarge(
                f"the kernel could not allocate {format_bytes(size)} for the arena ({error.strerror}); "
                "lower --slots, --items-per-slot or --max-batch"
            ) from error
        raise
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_segment(fd: int, size: int) -> None:
    """Check a descriptor that came from another process before it is mapped.

    Raises:
        ProtocolError: it is not a memfd of `size` bytes with all of `SEALS`.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError("the arena's descriptor is not a memfd") from error
    actual = os.fstat(fd).st_size
    if seals & SEALS != SEALS or actual != size:
        raise ProtocolError(f"the arena has seals {seals:#x} and {actual} bytes, expected {SEALS:#x} and {size}")


def map_segment(fd: int, size: int) -> mmap.mmap:
    """Map a segment for reading and writing.

    The descriptor may be closed afterwards.  Never close the mapping: it ends with the last array that views it.

    Raises:
        ProtocolError: see `check_segment`.
    """
    check_segment(fd, size)
    return mmap.mmap(fd, size, mmap.MAP_SHARED)
