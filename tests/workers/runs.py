"""Batches of any shape, as a hypothesis strategy."""

from __future__ import annotations

from hypothesis import strategies as st

from trtpool.workers.engine import Rows


@st.composite
def batches(draw: st.DrawFn, slots: int, per_slot: int, most: int) -> list[Rows]:
    """Any runs that do not overlap, in any order, of at most `most` items."""
    rows, first, left = [], draw(st.integers(0, 2)), most
    while first < slots and left:
        items = draw(st.integers(1, min(left, (slots - first) * per_slot)))
        rows.append(Rows(first, -(-items // per_slot), items))
        left -= items
        first += rows[-1].count + draw(st.integers(0, 2))
    return draw(st.permutations(rows))
