"""What is different in a container: shared memory, and who sees whom.

A pool needs of a container's producers nothing but the run directory: descriptors of the arena are handed over a Unix
socket in it.  So most of what shared memory in containers usually needs, such as --ipc or --shm-size, has no effect.
"""

from __future__ import annotations

from collections.abc import Iterator

from .finding import Finding, Host

ALL_USERS = 2**32 - 1
"""How many user numbers a namespace maps that maps all."""


def look(host: Host) -> Iterator[Finding]:
    """The container itself, and its user namespace."""
    kind = host.in_container
    if kind:
        yield Finding(
            "container", "ok",
            f"{kind}; /dev/shm is not used, so --shm-size and --ipc need no change: share the run directory alone",
        )  # fmt: skip
    else:
        yield Finding("container", "ok", "none, as far as can be seen")
    yield from _users(host)


def _users(host: Host) -> Iterator[Finding]:
    rows = [line.split() for line in (host.text("proc/self/uid_map") or "").splitlines()]
    if any(len(row) != 3 or not all(map(str.isdecimal, row)) for row in rows) or not rows:
        return
    if any(int(row[2]) == ALL_USERS and row[0] == row[1] for row in rows):
        return
    unknown = host.number("proc/sys/kernel/overflowuid") or 65534
    yield Finding(
        "users", "warning",
        f"this is a user namespace that knows {sum(int(row[2]) for row in rows)} users: all others look like user "
        f"{unknown}, whom a pool cannot let in",
        "run pool and producers with the same mapping of users (rootless and userns-remap: one daemon, one user), or "
        "ignore this if the producers run beside the pool",
    )  # fmt: skip
