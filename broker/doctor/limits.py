"""Limits on descriptors, processes and CPUs."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from typing import Final

from .finding import Finding, Host

OWN_FILES: Final = 64
"""Descriptors that a broker has without clients, with some to spare."""

FILES_A_CLIENT: Final = 2
"""Its lifeline and its pidfd, in the broker, and as duplicates in the supervisor."""

FEW_CLIENTS: Final = 1000
FEW_PROCESSES: Final = 64


def look(host: Host) -> Iterator[Finding]:
    """Open files, processes, CPUs."""
    yield _files()
    yield _processes(host)
    yield _cpus(host)


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Finding("files", "ok", "open files are not limited")
    clients = max(0, (soft - OWN_FILES) // FILES_A_CLIENT)
    text = f"{soft} open files, enough for about {clients} clients of a pool"
    if clients >= FEW_CLIENTS:
        return Finding("files", "ok", text)
    if clients >= FEW_CLIENTS // 4:
        return Finding("files", "ok", f"{text}; for more raise the limit before the start: ulimit -n")
    most = "any number" if hard == resource.RLIM_INFINITY else str(hard)
    return Finding("files", "warning", text, f"ulimit -n before the start ({most} at most), docker: --ulimit nofile=N")


def _processes(host: Host) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    cgroup = host.number("sys/fs/cgroup/pids.max")
    left = None if cgroup is None else max(0, cgroup - (host.number("sys/fs/cgroup/pids.current") or 0))
    if left is not None and left < FEW_PROCESSES:
        return Finding(
            "processes", "warning", f"the cgroup lets {left} more processes or threads start, and a worker has many",
            "raise its limit (docker: --pids-limit, systemd: TasksMax=, Kubernetes: podPidsLimit)",
        )  # fmt: skip
    if soft != resource.RLIM_INFINITY and soft < FEW_PROCESSES:
        return Finding(
            "processes", "warning", f"{soft} processes and threads of this user (ulimit -u), and a worker has many",
            "raise it before the start: ulimit -u",
        )  # fmt: skip
    return Finding("processes", "ok", "enough processes and threads may be started")


def _cpus(host: Host) -> Finding:
    allowed = len(os.sched_getaffinity(0))
    count, _, period = (host.text("sys/fs/cgroup/cpu.max") or "max").partition(" ")
    share = int(count) / int(period) if count.isdecimal() and period.isdecimal() and int(period) else float(allowed)
    if share < min(2, allowed):
        return Finding(
            "cpus", "warning", f"the cgroup gives {share:g} CPUs of {allowed}: broker and workers are throttled",
            "give it 2 or more (docker: --cpus, Kubernetes: resources.limits.cpu)",
        )  # fmt: skip
    if share < allowed:
        return Finding(
            "cpus", "ok", f"the cgroup gives {share:g} CPUs of {allowed}; choose --workers and --threads for so many",
        )  # fmt: skip
    return Finding("cpus", "ok", f"{allowed} CPU{'s' if allowed != 1 else ''}")
