"""Memory for the arena: how much, on which pages, and whether it may be locked."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import Final

from trtpool.ipc.arena import HUGE_PAGE_BYTES, format_bytes
from trtpool.ipc.memory import room

from .finding import Finding, Host

LITTLE_BYTES: Final = 512 << 20
"""A pool's own processes take about this much: an interpreter each, and an engine."""

HUGE: Final = "sys/kernel/mm/hugepages/hugepages-2048kB"


def look(host: Host) -> Iterator[Finding]:
    """Room, commit limit, huge pages, lockable memory."""
    yield _room(host)
    yield from _commit(host)
    yield _huge_pages(host)
    yield _memlock()
    if "microsoft" in (host.text("proc/version") or "").lower():
        yield Finding(
            "pinning", "warning", "this is WSL, which pins only a part of the memory for GPUs",
            "if a start fails to register the arena, lower --slots, or use Linux itself",
        )  # fmt: skip


def _room(host: Host) -> Finding:
    left = room(host.root / "proc")
    text = f"{format_bytes(left.size)} are free in {left.where}; an arena may take nine tenths of it"
    if left.size < LITTLE_BYTES:
        return Finding("memory", "warning", text, left.remedy)
    return Finding("memory", "ok", text)


def _commit(host: Host) -> Iterator[Finding]:
    """With strict accounting the kernel refuses memory that is free, proc_sys_vm(5)."""
    if host.number("proc/sys/vm/overcommit_memory") != 2:
        return
    figures = dict(line.split(":", 1) for line in (host.text("proc/meminfo") or "").splitlines() if ":" in line)
    try:
        left = 1024 * (int(figures["CommitLimit"].split()[0]) - int(figures["Committed_AS"].split()[0]))
    except (KeyError, ValueError, IndexError):
        return
    yield Finding(
        "overcommit", "warning", f"the kernel promises no more memory than {format_bytes(max(0, left))} from here on",
        "an arena beyond that is refused: sysctl vm.overcommit_memory=0, or raise vm.overcommit_ratio",
    )  # fmt: skip


def _huge_pages(host: Host) -> Finding:
    total, free = host.number(f"{HUGE}/nr_hugepages"), host.number(f"{HUGE}/free_hugepages")
    if total is None or free is None:
        return Finding(
            "huge-pages", "ok", "the kernel shows none of 2 MiB here; only start --huge-pages would use them"
        )
    reserved = host.number(f"{HUGE}/resv_hugepages") or 0
    usable = max(0, free - reserved)
    if not total:
        return Finding(
            "huge-pages", "ok",
            "none are reserved; for start --huge-pages reserve some: sysctl vm.nr_hugepages=N, 2 MiB each",
        )  # fmt: skip
    if not usable:
        return Finding(
            "huge-pages", "warning", f"all {total} of 2 MiB are in use, so start --huge-pages will take normal ones",
            f"end what uses them, or reserve more: sysctl vm.nr_hugepages={2 * total}",
        )  # fmt: skip
    return Finding("huge-pages", "ok", f"{usable} of {total} are free, {format_bytes(usable * HUGE_PAGE_BYTES)}")


def _memlock() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("memlock", "ok", "memory may be locked without limit")
    # Whether a GPU can have memory pinned is tried, and told with the GPU.
    return Finding("memlock", "ok", f"{format_bytes(soft)} may be locked (ulimit -l); a pool on the CPU locks none")
