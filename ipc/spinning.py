"""To look for a while before sleeping, for as long as that pays.

To be woken costs as much as handling a run of items: the kernel has to raise the other CPU from its idle state, which
on a virtual machine is slow, and whoever wakes pays for that too.  Who finds the next message while still looking saves
both, at the price of the CPU it looks with.  How long to look is learnt as Linux learns it for the CPUs of virtual
machines (Documentation/virt/kvm/halt-polling.rst)::

    found it while looking                      the window stays
    slept, and all in all waited less than most the window doubles, from START_NS up to that
    waited longer                               the window closes

So a pool under load looks between messages, and an idle one sleeps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

START_NS: Final = 10_000

DEFAULT_SPIN_US: Final = 200
"""KVM's own largest window (`halt_poll_ns`)."""

MANY_CPUS: Final = 8
"""With fewer, who spins takes the CPU from whoever is to send what it waits for."""


def default_spin_us() -> int:
    """The largest window for a process that may use as many CPUs as this one."""
    return DEFAULT_SPIN_US if len(os.sched_getaffinity(0)) >= MANY_CPUS else 0


class Spin:
    """How long one place waits before it sleeps.

    Args:
        most_us: the largest window in microseconds; 0: never look.

    Attributes:
        window_ns: how long to look now.
    """

    __slots__ = ("_most_ns", "window_ns")

    def __init__(self, most_us: int) -> None:
        self._most_ns = most_us * 1000
        self.window_ns = 0

    def wait(self, look: Callable[[], T | None], sleep: Callable[[], T], limit_ns: int | None = None) -> T:
        """What `look` returns if that is not None, within the window; else what `sleep` returns.

        Args:
            look: must not block.
            sleep: blocks.
            limit_ns: look no longer than this.
        """
        if not self._most_ns:
            return sleep()
        began_ns = time.monotonic_ns()
        window_ns = self.window_ns
        if window_ns:
            until_ns = began_ns + (window_ns if limit_ns is None else min(window_ns, limit_ns))
            while time.monotonic_ns() < until_ns:
                found = look()
                if found is not None:
                    return found
        slept = sleep()
        if time.monotonic_ns() - began_ns > self._most_ns:
            self.window_ns = 0
        elif window_ns < self._most_ns:
            self.window_ns = min(self._most_ns, 2 * window_ns or START_NS)
        return slept
