"""Descriptors that are held so that there are some when they must be had, even if clients took all others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from trtpool.ipc import lifeline


class Reserve:
    """Holds none until it is first refilled, or spent.

    Args:
        count: how many it holds when it is full.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._fds: list[int] = []

    @contextlib.contextmanager
    def spent(self) -> Iterator[None]:
        """Within this there is room for so many descriptors; those that were not used are held again at its end."""
        self.close()
        try:
            yield
        finally:
            self.refill()

    def refill(self) -> None:
        """Hold as many as there are; those that there are none for now are got the next time."""
        with contextlib.suppress(OSError):
            while len(self._fds) < self._count:
                self._fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def close(self) -> None:
        """Hold none."""
        lifeline.close_all(self._fds)
        self._fds.clear()
