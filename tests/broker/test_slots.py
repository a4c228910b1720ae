from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtpool.broker.slots import TRANSITIONS, Event, IllegalTransition, Ring, State, move


@pytest.mark.parametrize(("event", "state"), list(itertools.product(Event, State)))
def test_the_table_is_what_move_does(event, state):
    states = bytearray([state] * 3)
    if state in TRANSITIONS[event]:
        move(states, event, 1, 2)
        assert states == bytes([state, TRANSITIONS[event][state], TRANSITIONS[event][state]])
    else:
        with pytest.raises(IllegalTransition, match=rf"{event.name} of 2 slots.*{state.name}"):
            move(states, event, 1, 2)
        assert states == bytes([state] * 3)


def test_the_drawing_is_complete():
    """Every state but FREE is left by some event and every one is reached."""
    assert {state for table in TRANSITIONS.values() for state in table} == set(State)
    assert {state for table in TRANSITIONS.values() for state in table.values()} == set(State) - {State.LEASED}
    assert set(TRANSITIONS) == set(Event)


def test_a_move_is_all_or_nothing():
    states = bytearray([State.LEASED, State.LEASED, State.QUEUED])
    with pytest.raises(IllegalTransition, match="they are LEASED, QUEUED, which must be DONE or LEASED"):
        move(states, Event.SUBMIT, 0, 3)
    assert states == bytes([State.LEASED, State.LEASED, State.QUEUED])


@pytest.mark.parametrize(("first", "count"), [(0, 4), (3, 1), (2, 2), (2**31 - 1, 2**31 - 1), (0, 2**31 - 1)])
def test_a_move_out_of_bounds_is_illegal(first, count):
    states = bytearray([State.LEASED] * 3)
    with pytest.raises(IllegalTransition):
        move(states, Event.SUBMIT, first, count)
    assert states == bytes([State.LEASED] * 3)


def longest_free(used: list[bool]) -> int:
    return max((len(list(group)) for taken, group in itertools.groupby(used) if not taken), default=0)


@given(st.data())
def test_the_ring_takes_exactly_what_is_free_and_in_one_run_if_there_is_one(data):
    slots = data.draw(st.integers(1, 40), "slots")
    batch, span = data.draw(st.integers(1, slots), "slots of a batch"), data.draw(st.integers(0, 60), "span")
    ring = Ring(slots, batch, span)
    used = [False] * slots
    held: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 30), "steps")):
        if held and data.draw(st.booleans(), "give back"):
            first, count = held.pop(data.draw(st.integers(0, len(held) - 1), "which"))
            part = data.draw(st.integers(1, count), "how many of it")
            ring.give_back(first, part)
            used[first : first + part] = [False] * part
            if part < count:
                held.append((first + part, count - part))
        else:
            count = data.draw(st.integers(1, slots), "take")
            free, longest = used.count(False), longest_free(used)
            runs = ring.take(count)
            if count > free:
                assert runs is None
                continue
            assert runs is not None
            assert sum(length for _, length in runs) == count
            assert len(runs) == 1 or count > longest
            for first, length in runs:
                assert length > 0
                assert used[first : first + length] == [False] * length
                used[first : first + length] = [True] * length
            held += runs
        assert ring.free == used.count(False)
        ring.validate(bytearray(used))


def plainly(used: list[bool], cursor: int, count: int, batch: int, span: int) -> int:
    """Where a run of `count` is taken from by what `Ring` promises, looking at every slot; -1: nowhere in one run."""
    first = min(len(used), max(batch, span // 2))
    if cursor >= span and count <= first and not any(used[:first]):
        cursor = 0
    spans = [list(group) for taken, group in itertools.groupby(range(len(used)), used.__getitem__) if not taken]
    here = next((span[-1] + 1 - cursor for span in spans if cursor in span), 0)
    if here >= count:
        return cursor
    large = [span for span in spans if len(span) >= max(count, batch)]
    after = [max(span[0], cursor) for span in large if span[-1] + 1 - max(span[0], cursor) >= max(count, batch)]
    if large:
        return min(after) if after else large[0][0]
    longest = max(spans, key=len)
    return longest[0] if len(longest) >= count else -1


@given(st.data())
def test_the_ring_takes_the_same_runs_as_one_that_looks_at_every_slot(data):
    """Most slots are held by others, so that the ring comes to keep holes, and throws them away, all the time."""
    slots, batch = data.draw(st.integers(4, 32), "slots"), data.draw(st.integers(1, 8), "slots of a batch")
    span = data.draw(st.integers(1, slots), "span")
    ring, used = Ring(slots, batch, span), [True] * slots
    ring.take(slots)
    for _ in range(data.draw(st.integers(1, 80), "steps")):
        taken = [slot for slot in range(slots) if used[slot]]
        if taken and (not ring.free or data.draw(st.booleans(), "give back")):
            first = data.draw(st.sampled_from(taken), "which")
            end = next((slot for slot in range(first, slots) if not used[slot]), slots)
            count = data.draw(st.integers(1, end - first), "how many")
            ring.give_back(first, count)
            used[first : first + count] = [False] * count
            continue
        count = data.draw(st.integers(1, min(ring.free, 6)), "take")
        wanted = plainly(used, ring.cursor, count, batch, span)
        runs = ring.take(count)
        assert runs is not None
        if wanted >= 0:
            assert runs == [(wanted, count)]
        for first, length in runs:
            used[first : first + length] = [True] * length
        ring.validate(bytearray(used))


def test_holes_are_kept_no_more_once_batches_were_found_for_a_round():
    ring = Ring(64, batch=4)
    ring.take(64)
    for first in range(0, 64, 8):
        ring.give_back(first, 2)
    assert ring.take(1) == [(0, 1)]
    assert ring._holes is not None
    for first in range(0, 64, 8):
        ring.give_back(first + 2, 6)
    granted = 0
    while ring._holes is not None:
        assert granted <= 64
        for first, count in ring.take(4) or ():
            granted += count
            ring.give_back(first, count)
    assert granted > 32


def test_neighbours_are_granted_one_after_the_other_round_the_ring():
    ring = Ring(6)
    assert [ring.take(2) for _ in range(3)] == [[(0, 2)], [(2, 2)], [(4, 2)]]
    ring.give_back(0, 2)
    ring.give_back(2, 1)
    assert ring.take(3) == [(0, 3)]
    assert ring.take(1) is None
    ring.give_back(1, 1)
    ring.give_back(4, 2)
    assert ring.take(1) == [(4, 1)], "the next after the cursor, not the first that is free"


@pytest.mark.parametrize(("in_flight", "used"), [(1, 10), (2, 12), (10, 28), (100, 208)])
def test_no_more_of_the_ring_is_used_than_it_must_be(in_flight, used):
    """Runs of 2 that are given back in order: those in flight and a batch, and neighbours all the way."""
    ring = Ring(1000, batch=8, span=8)
    held: deque[tuple[int, int]] = deque()
    granted = []
    for _ in range(2000):
        if len(held) == in_flight:
            ring.give_back(*held.popleft())
        runs = ring.take(2)
        assert runs is not None
        (run,) = runs
        held.append(run)
        granted.append(run[0])
    assert max(granted) + 2 <= used
    assert {second for first, second in itertools.pairwise(granted) if second != first + 2} == {0}


def test_scattered_slots_are_taken_as_runs_from_the_cursor_on():
    ring = Ring(6)
    ring.take(6)
    for first in (0, 2, 4):
        ring.give_back(first, 1)
    assert ring.take(2) == [(0, 1), (2, 1)]
    ring.give_back(0, 1)
    assert ring.take(2) == [(4, 1), (0, 1)]


def test_at_the_end_of_a_run_it_goes_on_where_a_batch_has_room():
    ring = Ring(16, batch=4)
    ring.take(16)
    for first, count in ((1, 1), (3, 3), (8, 5)):
        ring.give_back(first, count)
    assert [ring.take(1) for _ in range(5)] == [[(first, 1)] for first in range(8, 13)]
    assert ring.take(1) == [(3, 1)], "no run holds a batch: the longest"
    assert ring.take(3) == [(4, 2), (1, 1)]


@pytest.mark.parametrize(("first", "count"), [(2, 1), (1, 2), (0, 5), (4, 1)])
def test_what_was_not_taken_cannot_be_given_back(first, count):
    ring = Ring(4)
    ring.take(2)
    with pytest.raises(IllegalTransition, match="not all taken"):
        ring.give_back(first, count)
    assert ring.free == 2
    ring.validate(bytearray(b"\1\1\0\0"))


def test_validate_sees_a_slot_that_nobody_has():
    ring = Ring(2)
    ring.take(1)
    with pytest.raises(AssertionError, match="disagree"):
        ring.validate(bytearray(2))
    ring.free = 2
    with pytest.raises(AssertionError, match="lost count"):
        ring.validate(bytearray(b"\1\0"))
