"""Item shapes that users give: one, or a range of them, as ``3x32..640`` on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def ends(given: Sequence[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The largest and the smallest shape of a range."""
    pairs = [size if isinstance(size, tuple) else (size, size) for size in given]
    return tuple(high for _, high in pairs), tuple(low for low, _ in pairs)


def show_range(given: Sequence[Any]) -> str:
    """A shape or a range of them as the command line has it, such as ``3x32..640``."""
    return "x".join("..".join(map(str, size)) if isinstance(size, tuple) else str(size) for size in given)
