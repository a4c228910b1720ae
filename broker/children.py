"""The processes that a supervisor started: each is watched by its pidfd, reaped at its end, and none is left behind.

They are `python -m MODULE`, never forks, with their configuration as JSON on the standard input and the descriptors
named in it passed on.  Starting one takes descriptors; some are held back for that, whatever clients take.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from typing import Final, NamedTuple

import msgspec

from .modules import child_environment, start_module
from .reserve import Reserve

RESERVE: Final = 16
"""Descriptors that are not spent on keeping clients for another broker: what starting a worker or a broker takes."""


class Child(NamedTuple):
    """A process, and its pidfd, which is closed when it is reaped."""

    process: subprocess.Popen[bytes]
    pidfd: int


class Children:
    """See the module.

    Args:
        epoll: what watches them.
    """

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._reserve = Reserve(RESERVE)
        self._of: dict[int, subprocess.Popen[bytes]] = {}

    def __len__(self) -> int:
        """How many were not reaped."""
        return len(self._of)

    def __contains__(self, pidfd: int) -> bool:
        """Whether this is the pidfd of one that was not reaped."""
        return pidfd in self._of

    def room(self) -> contextlib.AbstractContextManager[None]:
        """Within this there are descriptors to start a child with, even if clients took all others."""
        return self._reserve.spent()

    def spawn(self, module: str, config: msgspec.Struct, fds: list[int], gpu: str | None = None) -> Child:
        """Start one.

        Args:
            module: what it runs.
            config: what it reads.
            fds: what it inherits.
            gpu: the only GPU that it sees.
        """
        process = start_module(module, child_environment(gpu), stdout=2, pass_fds=fds)
        pidfd = os.pidfd_open(process.pid)
        self._of[pidfd] = process
        self._epoll.register(pidfd, select.EPOLLIN)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it ended at once, which its pidfd tells
            process.stdin.write(msgspec.json.encode(config))
        return Child(process, pidfd)

    def reap(self, pidfd: int) -> int:
        """Let go of one that ended; returns what `subprocess` calls its return code."""
        process = self._of.pop(pidfd)
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        return process.wait()

    def close(self) -> None:
        """Kill all, and wait for their ends."""
        self._reserve.close()
        for pidfd, process in self._of.items():
            process.kill()
            process.wait()
            os.close(pidfd)
        self._of.clear()
