#!/usr/bin/env python
"""Draw what `trtpool trace` wrote: ``draw_trace.py trace.json picture.svg [--from-ms 100] [--ms 60]``.

A track for each lane, for the queue of each model, and for what each producer waits for, fills and reads, as Perfetto
shows them, for documents and reports.  Needs matplotlib: ``pip install 'trtpool[plots]'``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

COLOURS: Final = {
    "copy in": "#e69f00", "compute": "#009e73", "copy out": "#cc79a7", "lost": "#d55e00", "running": "#b7e4d6",
    "lease": "#d55e00", "fill": "#0072b2", "read": "#56b4e9",
}  # fmt: skip
"""Okabe and Ito's, which the colour-blind can tell apart."""
QUEUE_COLOUR: Final = "#777777"
PLAIN: Final = "#bbbbbb"
NAMES: Final = {"lease": "waits for slots", "fill": "fills", "read": "reads"}
"""What is called otherwise in the key."""


@dataclass
class Row:
    """A track: its name, and its slices as begin and length in milliseconds, and kind."""

    name: str
    slices: list[tuple[float, float, str]] = field(default_factory=list)


@dataclass
class Picture:
    """What is to be drawn; `levels` are steps, as times and queued items, by model."""

    title: str
    rows: list[Row]
    levels: dict[str, tuple[list[float], list[float]]]
    ms: float


def picture_of(
    trace: dict[str, Any], from_ms: float = 0.0, ms: float | None = None, title: str = "", most: int = 3
) -> Picture:
    """What there is of a trace from `from_ms` after its beginning, for `ms`, or to its end.

    Of tracks of one kind of one process the first `most` are drawn.
    """
    start_us = trace["otherData"]["start_ns"] / 1000 + from_ms * 1000
    left_ms = trace["otherData"]["end_ns"] / 1e6 - start_us / 1000
    ms = left_ms if ms is None else min(ms, left_ms)
    if ms <= 0:
        raise click.ClickException(f"the trace ends before {from_ms:g} ms; draw an earlier part with --from-ms")
    names, order, rows = {}, {}, {}
    levels: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for event in sorted(trace["traceEvents"], key=lambda event: event["ph"] != "M"):  # names first
        if event["ph"] == "M" and event["name"] == "process_name":
            names[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "M" and event["name"] == "process_sort_index":
            order[event["pid"]] = event["args"]["sort_index"]
        elif event["ph"] == "M" and event["name"] == "thread_name":
            rows[event["pid"], event["tid"]] = Row(event["args"]["name"])
        elif event["ph"] == "C" and event["name"].startswith("queued items "):
            times, items = levels[event["name"].removeprefix("queued items ")]
            times.append((event["ts"] - start_us) / 1000)
            items.append(event["args"]["items"])
        elif event["ph"] == "X":
            begin, end = (event["ts"] - start_us) / 1000, (event["ts"] + event["dur"] - start_us) / 1000
            begin, end = max(begin, 0.0), min(end, ms)
            if begin < end:
                kind = event["name"] if event["cat"] == "device" else event["cat"]
                slices = rows[event["pid"], event["tid"]].slices
                slices.append((begin, end - begin, kind))
    return Picture(title, _chosen(rows, names, order, most), dict(levels), ms)


def _chosen(rows: dict[tuple[int, int], Row], names: dict[int, str], order: dict[int, int], most: int) -> list[Row]:
    """Rows with something on them, workers first, and each with its process's name."""
    chosen: list[Row] = []
    drawn: dict[tuple[int, str], int] = defaultdict(int)
    for pid, tid in sorted(rows, key=lambda key: (order.get(key[0], 0), key)):
        row = rows[pid, tid]
        if row.slices and drawn[pid, row.name] < most:
            drawn[pid, row.name] += 1
            name = names[pid].partition(":")[0]
            chosen.append(Row(f"{name}  {row.name}", row.slices))
    return chosen


def draw(picture: Picture, path: Path) -> None:
    """Write the picture, in the format of the file's suffix."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise click.ClickException(f"drawing needs matplotlib ({error}): pip install 'trtpool[plots]'") from error
    height = 0.8 * len(picture.levels) + 0.24 * len(picture.rows) + 1.1
    with pyplot.rc_context({"svg.hashsalt": "trtpool", "font.size": 8}):
        ratios = [3.0] * len(picture.levels) + [max(1.0, 1.0 * len(picture.rows))]
        figure, axes = pyplot.subplots(
            len(ratios), 1, sharex=True, squeeze=False, figsize=(10, height), gridspec_kw={"height_ratios": ratios}
        )
        for axis, (model, (times, items)) in zip(axes[:, 0], picture.levels.items(), strict=False):
            axis.fill_between([*times, picture.ms], [*items, items[-1]], step="post", color=QUEUE_COLOUR, linewidth=0)
            axis.set_ylabel(f"queued\n{model}", rotation=0, ha="right", va="center")
            axis.set_ylim(0, max(1, *items) * 1.05)
        axis = axes[-1, 0]
        for number, row in enumerate(picture.rows):
            spans = [(begin, length) for begin, length, _ in row.slices]
            colours = [COLOURS.get(kind, PLAIN) for *_, kind in row.slices]
            axis.broken_barh(spans, (number - 0.4, 0.8), facecolors=colours, edgecolor="white", linewidth=0.3)
        axis.set_yticks(range(len(picture.rows)), [row.name for row in picture.rows])
        axis.set_ylim(len(picture.rows) - 0.4, -0.6)
        axis.set_xlim(0, picture.ms)
        axis.set_xlabel("ms")
        used = {kind for row in picture.rows for *_, kind in row.slices}
        kinds = [kind for kind in COLOURS if kind in used]
        shown = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in kinds]
        keys = [NAMES.get(kind, kind) for kind in kinds]
        figure.legend(shown, keys, loc="upper right", ncols=8, frameon=False)
        figure.suptitle(picture.title, x=0.01, y=0.99, ha="left", fontsize=10)
        figure.tight_layout(rect=(0, 0, 1, 0.97))
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
        pyplot.close(figure)


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--from-ms", type=click.FloatRange(0), default=0.0, help="Begin so many milliseconds into the trace.")
@click.option("--ms", type=click.FloatRange(0, min_open=True), help="Draw so many milliseconds [default: all].")
@click.option(
    "--most",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Draw so many tracks of a kind of a process: those that a producer has much under way in look alike.",
)
@click.option("--title", default="", help="What to write above it.")
def main(trace: Path, picture: Path, from_ms: float, ms: float | None, most: int, title: str) -> None:
    """Draw a part of TRACE, a file of `trtpool trace`, into PICTURE, a .png or .svg."""
    try:
        whole = json.loads(trace.read_bytes())
        drawn = picture_of(whole, from_ms, ms, title, most)
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{trace} is no trace of `trtpool trace` ({error!r})") from error
    draw(drawn, picture)


if __name__ == "__main__":
    main()
