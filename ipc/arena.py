"""The arena's memory: one sealed memfd, mapped by everyone.

A memfd has no name, so nothing is left in a file system when its last user ends, and a container's
``/dev/shm`` limit does not apply.  It is sealed against shrinking, growing and further seals: a peer that
could shrink it would end us all by SIGBUS, and one that could add ``F_SEAL_FUTURE_WRITE`` would stop every
later worker from mapping it.  Its pages are allocated at start (`posix_fallocate`), since a sparse file of
any size can be made and the failure would come later, as SIGBUS.

Huge pages are a pool of their own that the host's administrator reserves.  They count neither as available memory nor
towards a container's memory limit, so what decides is how many are free; where they are too few, normal pages do.

See memfd_create(2), fcntl(2) "File Sealing", posix_fallocate(3), Documentation/admin-guide/mm/hugetlbpage.rst.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from pathlib import Path
from typing import Final

from .errors import ArenaTooLarge, ProtocolError
from .memory import Room, room

log = logging.getLogger("trtpool.arena")

SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

HUGE_PAGE_BYTES: Final = 2 << 20
HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
"""Where the kernel counts its huge pages of that size."""

_MADV_POPULATE_READ: Final = 22  # not in the mmap module yet; shared memory's pages become writable by it too

_NO_PAGES: Final = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)


def format_bytes(count: int) -> str:
    """`count` bytes for people: ``"1.5 GiB"``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def free_huge_pages() -> int:
    """Huge pages of `HUGE_PAGE_BYTES` that nobody has, or has reserved; 0 where the kernel has no such pages."""
    try:
        return max(0, _huge_pages("free") - _huge_pages("resv"))
    except (OSError, ValueError):
        return 0


def _huge_pages(which: str) -> int:
    return int((HUGE_PAGES / f"{which}_hugepages").read_text())


def create_segment(size: int, *, huge_pages: bool = False, limit_bytes: int | None = None) -> int:
    """Make a segment of `size` bytes, allocated and sealed, and return its descriptor.

    Args:
        size: bytes; a multiple of the page size, which is `HUGE_PAGE_BYTES` with `huge_pages`.
        huge_pages: use huge pages if enough are free, else warn and use normal pages.
        limit_bytes: the most that may be taken; by default nine tenths of what is available now, or all huge pages.

    Raises:
        ArenaTooLarge: more than the limit, or the kernel has no pages left.
    """
    if huge_pages:
        fd = _create_huge(size, limit_bytes)
        if fd is not None:
            return fd
    if limit_bytes is None:
        _check_room(size, room())
    else:
        _check_limit(size, limit_bytes)
    try:
        return _allocate(size)
    except OSError as error:
        if error.errno in _NO_PAGES:
            raise ArenaTooLarge(
                f"the kernel could not allocate {format_bytes(size)} for the arena ({error.strerror}); "
                "lower --slots, --items-per-slot or --max-batch"
            ) from error
        raise


def _create_huge(size: int, limit_bytes: int | None) -> int | None:
    """The descriptor of a segment on huge pages; None, with a warning, when there are not enough."""
    if limit_bytes is not None:
        _check_limit(size, limit_bytes)
    needed, free = size // HUGE_PAGE_BYTES, free_huge_pages()
    why = ""
    if needed <= free:
        try:
            return _allocate(size, os.MFD_HUGETLB | os.MFD_HUGE_2MB)
        except OSError as error:
            why = f" ({error.strerror})"  # others took them meanwhile, or a hugetlb limit of the container's
    try:
        enough = _huge_pages("nr") + max(0, needed - free)
    except (OSError, ValueError):
        log.warning("this kernel has no huge pages of 2 MiB: the arena is on normal pages")
        return None
    log.warning(
        "the arena needs %d huge pages of 2 MiB and %d are free%s: it is on normal pages; "
        "reserve them with `sysctl vm.nr_hugepages=%d` and start again",
        needed, free, why, enough,
    )  # fmt: skip
    return None


def _check_room(size: int, left: Room) -> None:
    """Refuse what takes nearly all: the pool's processes need some too, and of those the kernel would kill one."""
    if size > left.size * 9 // 10:
        raise ArenaTooLarge(
            f"the arena needs {format_bytes(size)}, more than nine tenths of the {format_bytes(left.size)} that are "
            f"left in {left.where}; lower --slots, --items-per-slot or --max-batch, or {left.remedy}"
        )


def _check_limit(size: int, limit: int) -> None:
    if size > limit:
        raise ArenaTooLarge(
            f"the arena needs {format_bytes(size)} and {format_bytes(limit)} may be taken; "
            "lower --slots, --items-per-slot or --max-batch"
        )


def _allocate(size: int, flags: int = 0) -> int:
    """A memfd with all of its pages, sealed."""
    fd = os.memfd_create("trtpool-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
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


class Residence:
    """Which parts of a mapping this process has page tables for; `touch` makes them before they are needed.

    The first write to each page of a mapping is a page fault of its own, in every process: writing a 49 MB image to
    rows that this process had not touched yet took 20 ms, and 4 ms later on.  Asking for the same pages in one call
    took 3 ms (AMD EPYC, Linux 6.18; `MADV_POPULATE_WRITE` took 9).

    Args:
        mapping: a whole segment.
    """

    STEP_BYTES: Final = 2 << 20

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._missing = bytearray(b"\1" * -(-len(mapping) // self.STEP_BYTES))

    def touch(self, offset: int, size: int) -> None:
        """Make sure of `size` bytes, at least one, from `offset`."""
        first, end = offset // self.STEP_BYTES, (offset + size - 1) // self.STEP_BYTES + 1
        step = self._missing.find(1, first, end)
        while step >= 0:
            self._missing[step] = 0
            start = step * self.STEP_BYTES
            try:
                self._mapping.madvise(_MADV_POPULATE_READ, start, min(self.STEP_BYTES, len(self._mapping) - start))
            except OSError:  # Linux before 5.14: page by page, as they are used
                self._missing = bytearray(len(self._missing))
                return
            step = self._missing.find(1, step + 1, end)
