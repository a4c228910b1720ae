"""Which slices are drawn beside each other, and where the phases of a device lie.

Slices of one track never overlap: there are as many tracks as it takes, the first that is free taken first.

A worker tells how long a batch's copy-in, compute and copy-out took, by events on a GPU's stream, and when it found its
outputs written, and not which lane it was on.  So the phases are put right before that end, one after the other, on a
lane that is free then: they are late by what it took the worker to notice.  Where they would overlap what is there
already, or begin before the batch was sent, they are squeezed into what is left.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Final, NamedTuple

from .story import Execution, Slice

PHASES: Final = ("copy in", "compute", "copy out")


class Phase(NamedTuple):
    """A part of an execution on a lane."""

    lane: int
    start_ns: int
    end_ns: int
    name: str
    execution: Execution


def rows_of(slices: Iterable[Slice]) -> list[tuple[int, Slice]]:
    """A track for each slice, counted from 0; no two on one overlap."""
    busy: list[tuple[int, int]] = []  # until when, track
    free: list[int] = []
    placed = []
    for one in sorted(slices, key=lambda one: (one.start_ns, one.end_ns)):
        while busy and busy[0][0] <= one.start_ns:
            heapq.heappush(free, heapq.heappop(busy)[1])
        row = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (one.end_ns, row))
        placed.append((row, one))
    return placed


def lanes_of(executions: Iterable[Execution], lanes: int, from_ns: int) -> list[Phase]:
    """The phases of all executions of one worker, on so many lanes; nothing lies before `from_ns`.

    What ended without a result is drawn after all that had one, from when it was sent, and only where a lane was free
    to its end: a device may not have begun with it.
    """
    ended = [from_ns] * max(1, lanes)
    whole = [one for one in executions if one.device_ns is not None]
    phases: list[Phase] = []
    for one in sorted(whole, key=lambda one: one.end_ns - _took_ns(one)):
        phases += _place(one, ended)
    for one in sorted((one for one in executions if one.device_ns is None), key=lambda one: one.sent_ns):
        lane = min(range(len(ended)), key=ended.__getitem__)
        start_ns = max(one.sent_ns, ended[lane])
        if start_ns < one.end_ns:
            phases.append(Phase(lane, start_ns, one.end_ns, one.how, one))
            ended[lane] = one.end_ns
    return phases


def _took_ns(one: Execution) -> int:
    return sum(one.device_ns or ())


def _place(one: Execution, ended: list[int]) -> list[Phase]:
    """Put one on a lane; `ended` is when each lane's last ended."""
    assert one.device_ns is not None
    start_ns = max(one.end_ns - _took_ns(one), one.sent_ns)
    free = [lane for lane, end_ns in enumerate(ended) if end_ns <= start_ns]
    lane = free[0] if free else min(range(len(ended)), key=ended.__getitem__)
    start_ns = max(start_ns, ended[lane])
    room_ns, took_ns = one.end_ns - start_ns, _took_ns(one)
    if room_ns <= 0 or not took_ns:
        return []
    phases, spent_ns = [], 0
    for name, phase_ns in zip(PHASES, one.device_ns, strict=True):
        begin_ns = start_ns + spent_ns * room_ns // took_ns
        spent_ns += phase_ns
        end_ns = start_ns + spent_ns * room_ns // took_ns
        if end_ns > begin_ns:
            phases.append(Phase(lane, begin_ns, end_ns, name, one))
    ended[lane] = one.end_ns
    return phases
