"""What is to be looked at when: a heap of timers.

A timer is never taken back.  When it fires, what it is of says whether there is still anything to do, and timers of
what is over are thrown away now and then, since far deadlines of work that ended long ago would pile up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final, TypeAlias

from .batching import Work
from .records import Line, Model, Request, Worker
from .slots import State

PRUNE_TIMERS: Final = 1024
"""Timers of what is over are thrown away at twice as many as were left the last time, and not before so many."""

STOOD_STILL_NS: Final = 1_000_000_000
"""A timer that fires so late says that the broker itself stood still, and then perhaps the others did too: a container
that was paused, a machine without memory.  Nobody is taken for hung, or for idle, because of that."""

Timed: TypeAlias = Request | Work | Line | Worker | Model
"""What there are timers for."""


def is_due(what: Timed) -> bool:
    """Whether a timer still has something to do."""
    if isinstance(what, Request):
        return not what.over
    if isinstance(what, (Worker, Model)):
        return what.watched
    return isinstance(what, Line) or what.lease.states[what.at] == State.QUEUED


class Timers:
    """See the module's docstring.

    Attributes:
        heap: when each fires, its number, and what it is of; always the same list.
        started: how many there have ever been.  Of those that fire at the same time, the older goes first.
    """

    def __init__(self) -> None:
        self.heap: list[tuple[int, int, Timed]] = []
        self.started = 0
        self._prune_at = PRUNE_TIMERS

    def start(self, when_ns: int, what: Timed) -> None:
        """Have `what` looked at, or let the loop wake, at `when_ns`."""
        self.started += 1
        heapq.heappush(self.heap, (when_ns, self.started, what))
        if len(self.heap) >= self._prune_at:
            self.heap[:] = [timer for timer in self.heap if is_due(timer[2])]
            heapq.heapify(self.heap)
            self._prune_at = max(PRUNE_TIMERS, 2 * len(self.heap))

    def fired(self, now_ns: int) -> Iterator[tuple[Timed, int]]:
        """Take those out whose time has come, with those that are started meanwhile: what of, and how late it is."""
        while self.heap and self.heap[0][0] <= now_ns:
            when_ns, _, what = heapq.heappop(self.heap)
            yield what, now_ns - when_ns

    def restore(self, timers: list[tuple[int, int, Timed]], started: int) -> None:
        """Go on from those of a core that was saved."""
        self.heap[:] = timers
        heapq.heapify(self.heap)
        self.started = started
