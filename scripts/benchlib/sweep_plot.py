"""Figures from what ``scripts/bench.py --sweep --json FILE`` wrote: a panel for each parameter that was varied.

Measuring and drawing are apart, since a host with a GPU need not have matplotlib, which only this file imports.  A
GPU's figures are drawn as they are; those of a CPU, which mean something beside each other only, relative to the base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

COLUMNS: Final = 3
PANEL_INCHES: Final = (4.2, 3.2)
DPI: Final = 120
FEW_DECADES: Final = 300
UNITS: Final = ((1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki"))


class CannotDraw(Exception):
    """matplotlib is missing, or the file is of no sweep; the text says what to do."""


class Curve(NamedTuple):
    """One line of each panel: its label, its colour, how it is drawn, and its figure in a point of the JSON."""

    label: str
    colour: str
    style: str
    figure: str


class Figure(NamedTuple):
    """A picture with a panel for each group."""

    name: str
    title: str
    unit: str
    curves: tuple[Curve, ...]


FIGURES: Final = (
    Figure("throughput", "items per second", "items/s", (Curve("items/s", "tab:blue", "-o", "items_per_s"),)),
    Figure(
        "latency",
        "latency",
        "us",
        (
            Curve("under load, p99", "tab:red", "--o", "p99_us"),
            Curve("under load, median", "tab:red", "-o", "p50_us"),
            Curve("one at a time, p99", "tab:green", "--o", "alone_p99_us"),
            Curve("one at a time, median", "tab:green", "-o", "alone_p50_us"),
        ),
    ),
)


def draw(source: Path, folder: Path) -> list[Path]:
    """Draw all figures into `folder`; returns the files.

    Raises:
        CannotDraw: see there.
    """
    content = read(source)
    pyplot = _pyplot()
    return [_draw(pyplot, content, figure, folder / f"{source.stem}-{figure.name}.png") for figure in FIGURES]


def read(source: Path) -> dict[str, Any]:
    """What a sweep wrote.

    Raises:
        CannotDraw: it is something else.
    """
    try:
        content = json.loads(source.read_text())
    except ValueError as error:
        raise CannotDraw(f"{source} is not JSON: {error}") from error
    if not isinstance(content, dict) or "sweep" not in content:
        raise CannotDraw(f"{source} is of no sweep; write one with scripts/bench.py --sweep --json {source.name}")
    return content


def _pyplot() -> Any:
    try:
        import matplotlib as mpl

        mpl.use("Agg")  # files need no display
        from matplotlib import pyplot
    except ImportError as error:
        raise CannotDraw(f"--plot needs matplotlib ({error}): pip install 'trtpool[plots]'") from error
    return pyplot


def series(group: dict[str, Any], figure: str, *, relative: bool) -> tuple[list[int], list[float]]:
    """Values of a group's parameter, and a figure at each; points that were not measured are left out.

    With `relative` figures are over that of the group's base, and there are none without it.
    """
    measured = [(one["value"], one["measured"][figure]) for one in group["points"] if one["measured"] is not None]
    if relative:
        base = dict(measured).get(group["base"])
        measured = [(value, found / base) for value, found in measured] if base else []
    return [value for value, _ in measured], [found for _, found in measured]


def tick(value: float) -> str:
    """A parameter's value in few letters."""
    for size, unit in UNITS:
        if value >= size and value >= 10_000:
            text = f"{value / size:.1f}".removesuffix(".0")
            return f"{text}{unit}"
    return f"{value:g}"


def _draw(pyplot: Any, content: dict[str, Any], figure: Figure, path: Path) -> Path:
    groups = content["groups"]
    if not groups:
        raise CannotDraw("the sweep has no groups; was it ended before the first one was complete?")
    relative = content["gpu"] is None
    columns = min(COLUMNS, len(groups))
    rows = math.ceil(len(groups) / columns)
    width, height = PANEL_INCHES
    page, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows + 0.9), squeeze=False)
    panels = list(axes.flat)
    for panel, group in zip(panels, groups, strict=False):
        _draw_group(panel, group, figure, relative=relative)
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    for row in axes:
        row[0].set_ylabel(f"{figure.unit}, base = 1" if relative else figure.unit)
    page.suptitle(f"{figure.title}: {_where(content)}", fontsize=11)
    if len(figure.curves) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        page.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9, frameon=False)
    page.tight_layout(rect=(0, 0.05 if len(figure.curves) > 1 else 0, 1, 1))
    page.savefig(path, dpi=DPI)
    pyplot.close(page)
    return path


def _draw_group(panel: Any, group: dict[str, Any], figure: Figure, *, relative: bool) -> None:
    panel.set_title(group["title"], fontsize=10)
    drawn = 0
    for curve in figure.curves:
        values, figures = series(group, curve.figure, relative=relative)
        drawn += len(values)
        panel.plot(values, figures, curve.style, color=curve.colour, label=curve.label, markersize=4, linewidth=1.4)
    if not drawn:  # a logarithmic axis needs something
        why = "its base was not measured" if relative else "not measured"
        panel.text(0.5, 0.5, why, transform=panel.transAxes, ha="center", va="center")
        panel.set_axis_off()
        return
    values = [one["value"] for one in group["points"]]
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(values, [tick(value) for value in values], fontsize=8)
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(_readable(relative=relative))
    _fill_decade(panel)
    panel.axvline(group["base"], color="0.8", linewidth=6, zorder=0)
    panel.set_xlabel(f"base: {tick(group['base'])}", fontsize=9)
    panel.tick_params(axis="y", labelsize=8)
    panel.grid(axis="y", color="0.9")


def _fill_decade(panel: Any) -> None:
    """Show a whole decade at least, and labels within it if there are few."""
    low, high = panel.get_ylim()
    if high / low < 10:
        middle = math.sqrt(low * high)
        low, high = middle / 10**0.55, middle * 10**0.55
        panel.set_ylim(low, high)
    if high / low < FEW_DECADES:
        panel.yaxis.get_major_locator().set_params(subs=(1, 2, 5))


def _readable(*, relative: bool) -> Callable[[float, int], str]:
    def text(value: float, _: int) -> str:
        return f"{value:g}" if relative or value < 1000 else f"{value:,.0f}"

    return text


def _where(content: dict[str, Any]) -> str:
    """The machine and the date, for a heading."""
    machine = content["machine"]
    what = ", ".join(machine.get("gpus") or [f"{machine['cores']} cores of {machine['cpu']}, relative to the base"])
    return f"{what}, {machine['date'][:10]}"
