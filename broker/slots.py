"""Slot states, their legal transitions, and the ring that slots are granted from.

::

                        .--------- SUBMIT ---------.
                        v                          |
    FREE -> LEASED -> QUEUED -> RUNNING ---------> DONE -> FREE
              |         ^----------'               |
              |         RETRY                      |
              '------------- RELEASE --------------'

`TRANSITIONS` is the whole truth; `move` applies it to adjacent slots at once, with `bytes.translate`, so
that its cost hardly depends on how many there are.
"""

from __future__ import annotations

import heapq
import itertools
import re
from enum import IntEnum
from typing import Final


class State(IntEnum):
    """Where a slot stands. FREE, seen from a lease, means: no longer this lease's."""

    FREE = 0
    LEASED = 1
    QUEUED = 2
    RUNNING = 3
    DONE = 4


class Event(IntEnum):
    """What can happen to a slot that is leased."""

    SUBMIT = 0
    DISPATCH = 1
    RETRY = 2
    FINISH = 3
    DROP = 4
    RELEASE = 5
    ABANDON = 6
    ORPHAN = 7


# Plain integers, for what happens to every run: on Python 3.10 it takes as long to look up a member of an enum as to
# apply it.
SUBMIT: Final = int(Event.SUBMIT)
DISPATCH: Final = int(Event.DISPATCH)
FINISH: Final = int(Event.FINISH)
RELEASE: Final = int(Event.RELEASE)

TRANSITIONS: Final[dict[Event, dict[State, State]]] = {
    # What is done may be used again by who holds it, without being given back.
    Event.SUBMIT: {State.LEASED: State.QUEUED, State.DONE: State.QUEUED},
    Event.DISPATCH: {State.QUEUED: State.RUNNING},
    # Its batch failed or its worker ended.
    Event.RETRY: {State.RUNNING: State.QUEUED},
    # Its outputs are written, or it failed for good.
    Event.FINISH: {State.RUNNING: State.DONE},
    # Deadline, cancel, or its owner left: it ends without running.
    Event.DROP: {State.QUEUED: State.DONE},
    Event.RELEASE: {State.LEASED: State.FREE, State.DONE: State.FREE},
    # Its owner's process ended. What runs goes on: a device may be writing to it.
    Event.ABANDON: {
        State.FREE: State.FREE,
        State.LEASED: State.FREE,
        State.QUEUED: State.FREE,
        State.RUNNING: State.RUNNING,
        State.DONE: State.FREE,
    },
    # What ran for an owner whose process had ended.
    Event.ORPHAN: {State.RUNNING: State.FREE},
}

_ILLEGAL: Final = 0xFF
_TABLES: Final = [
    bytes(TRANSITIONS[event].get(State(code), _ILLEGAL) if code < len(State) else _ILLEGAL for code in range(256))
    for event in Event
]


class IllegalTransition(Exception):
    """A slot's state does not allow the event; nothing was changed."""


def move(states: bytearray, event: int, first: int, count: int) -> None:
    """Apply `event`, an `Event`, to slots `first` to `first + count`.

    Raises:
        IllegalTransition: one of them is in a state, or out of bounds, where the event is illegal.
    """
    table = _TABLES[event]
    if count == 1 and 0 <= first < len(states):  # half the cost of the general way
        new = table[states[first]]
        if new != _ILLEGAL:
            states[first] = new
            return
    elif count == len(states) and not first:  # all of a lease, as nearly always
        after = states.translate(table)
        if _ILLEGAL not in after:
            states[:] = after
            return
    end = first + count
    after = states[first:end].translate(table)
    if len(after) != count or _ILLEGAL in after:
        seen = {State(code).name for code in states[first:end]} or {"nothing"}
        legal = {state.name for state in TRANSITIONS[Event(event)]}
        raise IllegalTransition(
            f"{Event(event).name} of {count} slots from {first} of {len(states)}: they are {', '.join(sorted(seen))}, "
            f"which must be {' or '.join(sorted(legal))}"
        )
    states[first:end] = after


_FREE_RUN: Final = re.compile(rb"\x00+")
_TAKEN: Final = b"\x01"
_MORE_HOLES: Final = 64

MAX_RUNS: Final = 4096
"""Most runs that are granted together: what a frame has room for.  More scattered slots count as not free yet."""


class Ring:
    """The slots of one model, granted next-fit round a ring.

    Slots that producers keep and reuse scatter, and scattered slots make batches of many copies.  Granted
    round a ring, neighbours are granted, and so nearly always submitted, one after the other.  At the end of
    a free run it goes on at the next that holds a batch, else at the longest, since holes left by single
    slots would fill with single slots for ever: in a simulation of 64 producers with 2 in flight, and half as
    many slots spare, batches had 3.8 runs when every hole was taken, and 1.6 so.

    Where no free run holds a batch, to find the longest by looking at all slots would cost each grant as much as there
    are slots.  So from the first such grant on *holes* are kept: a heap of free runs, the longest first, with the
    length of each, and a batch for all that are longer.  What is taken or given back adds the holes that it leaves, and
    what is no hole any more is thrown away when it comes to the top.  After a round of the ring in which batches were
    found, they are kept no more.

    Slots that were used a moment ago are still in the processors' caches, and those of a large arena are not.  So the
    ring is no longer than it must be: from slot `span` on it begins again, as soon as a batch and half a span are free
    at its beginning.  Whoever gives slots back in order, as producers nearly do, goes on in whole batches, and the
    arena beyond is touched only by those who need it.

    Args:
        slots: how many.
        batch: slots of a batch.
        span: slots after which it may begin again; by default only at the end.

    Attributes:
        cursor: where the next are looked for first.
    """

    def __init__(self, slots: int, batch: int = 1, span: int = 0) -> None:
        self._span = span or slots
        self._again = bytes(min(slots, max(batch, self._span // 2)))
        self.free = slots
        self.slots = slots
        self._batch = batch
        self._used = bytearray(slots)
        self.cursor = 0
        self._holes: list[tuple[int, int]] | None = None  # minus the length, and the first
        self._found = 0  # slots granted since holes were of use

    def take(self, count: int) -> list[tuple[int, int]] | None:
        """Take `count` slots as runs ``(first, count)``: one run where there is one, or None if too few are free."""
        if count > self.free:
            return None
        cursor = self.cursor
        if cursor >= self._span and self._used.startswith(self._again) and count <= len(self._again):
            self.cursor = cursor = 0
        if self._holes is None and self._used.startswith(bytes(count), cursor):  # as nearly always
            self._used[cursor : cursor + count] = b"\x01" * count
            self.cursor = cursor + count
            self.free -= count
            return [(cursor, count)]
        first = self._find(count)
        runs = [(first, count)] if first >= 0 else self._collect(count)
        if len(runs) > MAX_RUNS:
            return None
        for start, length in runs:
            self._used[start : start + length] = b"\x01" * length
        start, length = runs[-1]
        self.cursor = start + length
        self.free -= count
        if self._holes is not None:
            self._took(runs, count)
        return runs

    def _find(self, count: int) -> int:
        """Where to take `count` side by side, or -1: at the cursor, at a run for a batch, or at the longest."""
        used, cursor = self._used, self.cursor
        if used.startswith(bytes(count), cursor):
            return cursor
        length, start = self._longest() if self._holes is not None else (self._batch, 0)
        if length == self._batch:
            wanted = bytes(max(count, self._batch))
            first = used.find(wanted, cursor)
            if first < 0:
                first = used.find(wanted)
            if first >= 0 or count > self._batch:
                return first
            if self._holes is None:
                self._look_for_holes()
            length, start = self._longest()
        self._found = 0
        return start if length >= count else -1

    def _longest(self) -> tuple[int, int]:
        """The longest hole's length, at most a batch, and its first slot.  Some slot must be free."""
        holes = self._holes
        assert holes is not None
        while not self._is_hole(-holes[0][0], holes[0][1]):
            heapq.heappop(holes)
        return -holes[0][0], holes[0][1]

    def _is_hole(self, length: int, first: int) -> bool:
        used, end = self._used, first + length
        if not used.startswith(bytes(length), first):
            return False
        return length == self._batch or ((not first or used[first - 1] > 0) and (end == self.slots or used[end] > 0))

    def _look_for_holes(self) -> None:
        spans = (match.span() for match in _FREE_RUN.finditer(self._used))
        self._holes = [(-min(end - start, self._batch), start) for start, end in spans]
        heapq.heapify(self._holes)

    def _took(self, runs: list[tuple[int, int]], count: int) -> None:
        """Note what is left of the holes that these runs were taken from."""
        for start, length in runs:
            end = start + length
            if start and not self._used[start - 1]:
                self._add_hole(start - 1, start)
            if end < self.slots and not self._used[end]:
                self._add_hole(end, end)
        self._found += count
        if self._found > self.slots:
            self._holes = None

    def _add_hole(self, first: int, end: int) -> None:
        """Note the hole around slots from `first` to `end`, which are free; it is looked at for a batch each way."""
        used, batch, holes = self._used, self._batch, self._holes
        assert holes is not None
        bound = max(0, first - batch)
        before = used.rfind(_TAKEN, bound, first)
        first = bound if before < 0 else before + 1
        bound = min(self.slots, first + batch)
        if end < bound:
            after = used.find(_TAKEN, end, bound)
            bound = bound if after < 0 else after
        heapq.heappush(holes, (first - bound, first))
        if len(holes) > self.slots + _MORE_HOLES:  # at most half of these are any more
            self._look_for_holes()

    def _collect(self, count: int) -> list[tuple[int, int]]:
        """Runs that add up to `count`, going round once from the cursor."""
        used, cursor = self._used, self.cursor
        runs = []
        for match in itertools.chain(_FREE_RUN.finditer(used, cursor), _FREE_RUN.finditer(used, 0, cursor)):
            start, end = match.span()
            length = min(count, end - start)
            runs.append((start, length))
            count -= length
            if not count:
                break
        return runs

    def give_back(self, first: int, count: int) -> None:
        """Free slots that were taken."""
        end = first + count
        if self._used.count(1, first, end) != count:
            raise IllegalTransition(f"slots {first} to {end} were not all taken")
        self._used[first:end] = bytes(count)
        self.free += count
        if self._holes is not None:
            self._add_hole(first, end)

    def mark(self, first: int, states: bytes | bytearray) -> None:
        """Take the slots from `first` whose state is not FREE, in a ring that is being restored."""
        taken = bytes(state != State.FREE for state in states)
        held = self._used[first : first + len(taken)]
        self._used[first : first + len(taken)] = bytes(a | b for a, b in zip(taken, held, strict=True))
        self.free -= sum(taken)

    def validate(self, taken: bytearray) -> None:
        """Check against `taken`, one byte a slot, 1 where somebody has it."""
        assert self._used == taken, "the ring and the leases disagree"
        assert self.free == self._used.count(0), "the ring has lost count"
