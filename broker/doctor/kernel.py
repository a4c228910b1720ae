"""System calls that a pool is built on; a container's seccomp profile, or an old kernel, may refuse them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import socket
from collections.abc import Iterator
from typing import Final

from trtpool.ipc.process import SO_PEERPIDFD

from .finding import Finding, Host

SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def look(host: Host) -> Iterator[Finding]:
    """Make each of the calls once, and undo it."""
    yield _memfd(host)
    yield _pidfd(host)
    yield _peer_pidfd()


def _memfd(host: Host) -> Finding:
    """The arena is a sealed memfd, mapped by all."""
    try:
        fd = os.memfd_create("trtpool-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, mmap.PAGESIZE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            mmap.mmap(fd, mmap.PAGESIZE).close()
        finally:
            os.close(fd)
    except OSError as error:
        remedy = _remedy(host, error, "memfd_create", "3.17")
        if host.number("proc/sys/vm/memfd_noexec") == 2:
            remedy = "the host allows no memfd that could be executed: sysctl vm.memfd_noexec=1"
        return Finding("memfd", "problem", f"no shared memory can be made: memfd: {error.strerror}", remedy)
    return Finding("memfd", "ok", "shared memory (memfd, sealed) can be made and mapped")


def _pidfd(host: Host) -> Finding:
    """The end of a process is known, and it is signalled, by pidfd."""
    try:
        fd = os.pidfd_open(os.getpid())
        try:
            signal.pidfd_send_signal(fd, 0)
        finally:
            os.close(fd)
    except OSError as error:
        remedy = _remedy(host, error, "pidfd_open and pidfd_send_signal", "5.3")
        return Finding("pidfd", "problem", f"processes cannot be watched: pidfd: {error.strerror}", remedy)
    return Finding("pidfd", "ok", "processes can be watched and signalled (pidfd)")


def _peer_pidfd() -> Finding:
    """Without it a client is found by its pid, which is 0 for one in another pid namespace."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        try:
            raw = ours.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4)
        except OSError as error:
            why = "Linux has it since 6.5" if error.errno == errno.ENOPROTOOPT else error.strerror
            return Finding(
                "peer-pidfd",
                "warning",
                f"the kernel hands out no pidfd of a peer (SO_PEERPIDFD: {why}), so producers in containers with pid "
                "namespaces of their own cannot attach",
                "update the kernel, or share the pid namespace (docker run --pid=container:POOL, Kubernetes: "
                "shareProcessNamespace)",
            )
        with contextlib.suppress(OSError):
            os.close(int.from_bytes(raw, "little", signed=True))
    return Finding("peer-pidfd", "ok", "producers in other pid namespaces, as in containers, can attach (SO_PEERPIDFD)")


def _remedy(host: Host, error: OSError, calls: str, since: str) -> str:
    """What to do about a call that the kernel refuses; seccomp(2) says which answers a filter gives."""
    filtered = "Seccomp:\t2" in (host.text("proc/self/status") or "")
    if filtered and error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        return (
            f"a seccomp filter is active: allow {calls} in the container's profile, update the container runtime, or "
            "try docker run --security-opt seccomp=unconfined"
        )
    if error.errno == errno.ENOSYS:
        return f"use Linux {since} or newer, outside of sandboxes that lack {calls}"
    return f"see what forbids {calls} here: a security module (dmesg, audit log) or a sandbox"
