"""Bars and lines as SVG, for a page that needs nothing else: no scripts, no fonts, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Final, NamedTuple

WIDTH: Final = 760
LABEL: Final = 200
VALUE: Final = 110
BAR: Final = 18
GAP: Final = 8

COLOURS: Final = ("#4c78a8", "#f58518", "#54a24b", "#b8b8b8", "#e45756", "#72b7b2", "#b279a2", "#9d755d")
"""Told apart by most people who do not see all colours; every mark says its name too."""


class Part(NamedTuple):
    """A piece of a bar: what it is, and how long."""

    name: str
    value: float


class Bar(NamedTuple):
    """A bar of pieces, with a label before it and a text after it."""

    label: str
    parts: Sequence[Part]
    text: str


def bars(title: str, rows: Sequence[Bar], unit: str) -> str:
    """Horizontal bars from 0, each of its parts in a colour by the part's name; with a legend if there are several."""
    names = [*{part.name: None for row in rows for part in row.parts}]
    colour = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    longest = max((sum(part.value for part in row.parts) for row in rows), default=0.0)
    scale = (WIDTH - LABEL - VALUE) / longest if longest > 0 else 0.0
    top = _legend_height(names)
    marks = _legend(names, colour)
    for number, row in enumerate(rows):
        y = top + number * (BAR + GAP)
        x = float(LABEL)
        marks.append(_text(LABEL - 8, y + BAR - 5, row.label, anchor="end"))
        for part in row.parts:
            wide = part.value * scale
            said = f"{row.label}, {part.name}: {part.value:.4g} {unit}"
            marks.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{BAR}" fill="{colour[part.name]}">'
                f"<title>{escape(said)}</title></rect>"
            )
            x += wide
        marks.append(_text(x + 6, y + BAR - 5, row.text))
    return _svg(title, marks, top + len(rows) * (BAR + GAP))


class Line(NamedTuple):
    """Points ``(x, y)`` that belong together; `dots`: without a line between them."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


def lines(title: str, series: Sequence[Line], *, x_name: str, y_name: str, x_texts: dict[float, str]) -> str:
    """Lines over a logarithmic x axis, marked at `x_texts`; y from 0.  All x must be above 0."""
    tall, left, right = 260, 60, 40
    names = [line.name for line in series]
    colour = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    xs = [math.log2(x) for line in series for x, _ in line.points]
    low, high = min(xs), max(xs)
    most = max(y for line in series for _, y in line.points) or 1.0
    top = _legend_height(names)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return left + share * (WIDTH - left - right), top + 10 + (tall - 10) * (1 - y / most)

    marks = _legend(names, colour)
    marks.append(f'<path class="axis" d="M{left} {top} V{top + tall} H{WIDTH - right}"/>')
    for share in (0.5, 1.0):
        marks.append(_text(left - 6, place(2**low, share * most)[1] + 4, f"{share * most:.3g}", anchor="end"))
    for x, text in x_texts.items():
        marks.append(_text(place(x, 0)[0], top + tall + 16, text, anchor="middle"))
    marks.append(_text(left, top + tall + 34, f"{y_name} over {x_name}"))
    for line in series:
        spots = [place(x, y) for x, y in line.points]
        if not line.dots:
            way = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            marks.append(f'<polyline points="{way}" fill="none" stroke="{colour[line.name]}" stroke-width="2"/>')
        for (x, y), (_, value) in zip(spots, line.points, strict=True):
            marks.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour[line.name]}">'
                f"<title>{escape(f'{line.name}: {value:.4g}')}</title></circle>"
            )
    return _svg(title, marks, top + tall + 40)


def _legend(names: Sequence[str], colour: dict[str, str]) -> list[str]:
    marks = []
    if len(names) > 1:
        for number, name in enumerate(names):
            x, y = 10 + number % 4 * 185, number // 4 * 20
            marks.append(f'<rect x="{x}" y="{y + 2}" width="12" height="12" fill="{colour[name]}"/>')
            marks.append(_text(x + 18, y + 13, name))
    return marks


def _legend_height(names: Sequence[str]) -> int:
    return 8 + -(-len(names) // 4) * 20 if len(names) > 1 else 4


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, marks: Sequence[str], height: int) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(marks)}</svg></figure>'
    )
