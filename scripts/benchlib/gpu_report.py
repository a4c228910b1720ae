"""Tables of ``--gpu``, what they mean in words, and the same as JSON."""

from __future__ import annotations

import dataclasses
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table as Grid

from .gpu_results import (
    ALONE,
    BESIDE,
    BUS,
    CEILING,
    HIDDEN,
    POOL,
    TODAY,
    Ratio,
    Result,
    Row,
    limits,
    medians_of,
)

WIDTH: Final = 110
WHO: Final = ("producers", "broker", "worker")


def show(console: Console, result: Result) -> None:
    """Print a case: a row for each contender, then the figures behind them, then the aims."""
    console.print(f"[bold]{result.case}[/bold]: {result.title}  [{result.took_s:.0f} s]", highlight=False)
    console.print(_grid(result))
    for line in (*_failures(result), *figures(result), *verdicts(result)):
        console.print(
            textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False),
            highlight=False,
            markup=False,
        )
    console.print()


def _grid(result: Result) -> Grid:
    grid = Grid(box=None, padding=(0, 1, 0, 0), collapse_padding=True, pad_edge=False, header_style="dim")
    grid.add_column("", no_wrap=True)
    headings = (
        "items/s", "low - high", "GB/s\nin", "of\nceiling", "of it +\nwriters", "GPU\n%", "mean\nbatch",
        "copies/item\nin+out", "CPU s/\nprod.", "1000\nbroker", "items\nworker",
    )  # fmt: skip
    for heading in headings:
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows.values():
        if row.name not in HIDDEN:
            grid.add_row(*_cells(result, row), style="bold" if row.name.startswith("pool") else None)
    return grid


def _cells(result: Result, row: Row) -> list[str]:
    if not row.done:
        return [row.name, "failed"]
    rates = [window.items_per_s for window in row.done]
    middle, lowest, highest = medians_of(rates)
    items, batches = (sum(getattr(window, name) for window in row.done) for name in ("items", "batches"))
    copies = [
        sum(getattr(window, name) for window in row.done) / max(1.0, items) for name in ("copies_in", "copies_out")
    ]
    return [
        row.name + " (failed later)" * bool(row.failure),
        _number(middle),
        f"{_number(lowest)} - {_number(highest)}",
        short(middle * row.item_bytes / 1e9),
        _paired(result, row, CEILING),
        _paired(result, row, BESIDE),
        "-" if row.busy_fraction is None else f"{100 * row.busy_fraction:.0f}",
        short(items / batches) if batches else "-",
        "+".join(short(one) for one in copies),
        *(short(row.cpu_s_per_1000(who)) for who in WHO),
    ]


def _paired(result: Result, row: Row, other: str) -> str:
    """The median ratio of a row to another, in the same round."""
    if other not in result.rows or row.name == other:
        return ""
    pairs = [(row.rate(turn), result.rows[other].rate(turn)) for turn in range(len(row.windows))]
    values = [a / b for a, b in pairs if a is not None and b]
    return short(statistics.median(values)) if values else "-"


def _failures(result: Result) -> list[str]:
    """Why contenders are over, by their last words; all of them were on standard error."""
    return [f"{row.name} FAILED: {row.failure.splitlines()[-1]}" for row in result.rows.values() if row.failure]


def figures(result: Result) -> list[str]:
    """What explains the table; a figure that nobody has is left out."""
    rows = result.rows
    lines = [
        _line("alone, a batch", *(
            (name, result.fact(CEILING, key), unit)
            for name, key, unit in (
                ("copy-in", "copy_in_ms", "ms"), ("engine", "engine_ms", "ms"), ("copy-out", "copy_out_ms", "ms"),
                ("enqueue", "enqueue_us", "us of CPU"), ("graph", "graph_us", "us of CPU"),
            )
        ), ("launch in the ceiling", _figure(rows, CEILING, "launch_us"), "us")),
    ]  # fmt: skip
    if BUS in rows and rows[BUS].done:
        inwards, outwards = rows[BUS].items_per_s, rows[BUS].figure("out_per_s")
        lines.append(_line("bus", ("in", _scaled(inwards, 1e-9), "GB/s"), ("out", _scaled(outwards, 1e-9), "GB/s")))
    lines += [_pool_line(row) for row in rows.values() if row.name.startswith("pool")]
    lines += [_producers_line(row) for row in rows.values() if row.name.startswith("pool")]
    alone = rows[ALONE].items_per_s if ALONE in rows else None
    lines.append(
        _line(
            "writers",
            ("alone, at full speed", alone, "items/s"),
            ("beside the ceiling", _figure(rows, BESIDE, "written_per_s"), "items/s"),
            ("writing", _scaled(_figure(rows, BESIDE, "writers_writing"), 100), "% of the time"),
        )
    )
    if host_writes := result.fact(TODAY, "host_writes"):
        lines.append(f"today writes each item {host_writes:.0f} times in host memory, the pool once")
    return [line for line in lines if line]


def _pool_line(row: Row) -> str:
    return _line(
        row.name,
        ("runs a batch", row.figure("runs_per_batch"), ""),
        ("copy-in", row.figure("copy_in_ms"), "ms"),
        ("engine with its queue", row.figure("compute_ms"), "ms"),
        ("copy-out", row.figure("copy_out_ms"), "ms"),
        ("queued", row.figure("queue_ms"), "ms"),
        ("broker", _scaled(row.cpu_share("broker"), 100), "% of a CPU"),
        ("worker", _scaled(row.cpu_share("worker"), 100), "%"),
        ("its main thread", _scaled(row.cpu_share("worker main thread"), 100), "%"),
    )


def _producers_line(row: Row) -> str:
    return _line(
        f"{row.name}: of the producers' time",
        ("writing", _scaled(row.figure("writing"), 100), "%"),
        ("for slots", _scaled(row.figure("leasing"), 100), "%"),
        ("for results", _scaled(row.figure("waiting"), 100), "%"),
        ("failed items", row.figure("failed_items") or None, ""),
        ("results told apart", _scaled(row.figure("told_apart"), 100), "%"),
    )


def verdicts(result: Result) -> list[str]:
    """Each aim, whether it was met, and where one was not, what stands in its way."""
    lines, missed = [], False
    for aim in result.aims:
        ratio = result.ratio(aim)
        lines.append(f"{'aim' if aim.least else 'and'}: {aim} = {_spread(ratio.values)}{_verdict(ratio)}")
        missed = missed or ratio.met is False
    row = POOL if POOL in result.rows else None
    if missed and row and result.rows[row].done:
        used = ", ".join(f"{limit.name} {100 * limit.used:.0f} %" for limit in limits(result)[:5])
        lines.append(f"what the pool uses of what could limit it: {used}")
    return lines


def _verdict(ratio: Ratio) -> str:
    if ratio.met is None:
        return ""
    if not ratio.values:
        return f", at least {ratio.aim.least}: NOT MEASURED"
    return f", at least {ratio.aim.least}: {'met' if ratio.met else 'MISSED'}"


def summary(results: Sequence[Result]) -> list[str]:
    """All aims in a line each."""
    return [
        f"{result.case:18} {aim!s:40} {_spread(ratio.values):>24}{_verdict(ratio)}"
        for result in results
        for aim in result.aims
        if (ratio := result.ratio(aim)).aim.least is not None or aim.over == (TODAY,)
    ]


def as_dict(result: Result) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
        "case": result.case,
        "title": result.title,
        "took_s": round(result.took_s, 1),
        "aims": [
            {"aim": str(ratio.aim), "least": ratio.aim.least, "values": ratio.values, "median": ratio.median,
             "met": ratio.met}
            for ratio in map(result.ratio, result.aims)
        ],
        "limits": {limit.name: limit.used for limit in limits(result)} if POOL in result.rows else {},
        "facts": result.facts,
        "rows": [_row_dict(row) for row in result.rows.values()],
    }  # fmt: skip


def _row_dict(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "failure": row.failure,
        "item_bytes": row.item_bytes,
        "output_bytes": row.output_bytes,
        "items_per_s": row.items_per_s,
        "gpu_busy": row.busy_fraction,
        "cpu_s_per_1000": {who: row.cpu_s_per_1000(who) for window in row.done[:1] for who in window.cpu_s},
        "cpus": {who: row.cpu_share(who) for window in row.done[:1] for who in window.cpu_s},
        "windows": [None if window is None else dataclasses.asdict(window) for window in row.windows],
        "busy": row.busy,
    }


# ------------------------------------------------------------------ words and numbers


def _line(name: str, *parts: tuple[str, float | None, str]) -> str:
    """``name: what 1.5 ms, what 3 us``; "" without a number."""
    shown = [f"{what} {short(value)} {unit}".rstrip() for what, value, unit in parts if value is not None]
    return f"{name}: {', '.join(shown)}" if shown else ""


def _figure(rows: dict[str, Row], row: str, name: str) -> float | None:
    return rows[row].figure(name) if row in rows else None


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value * by


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "not measured"
    middle, lowest, highest = (short(value) for value in medians_of(values))
    return f"{middle} ({lowest} - {highest})"


def _number(value: float) -> str:
    """At most seven characters."""
    if value >= 1e6:
        return f"{value / 1e6:.2f}M"
    if value >= 1e5:
        return f"{value / 1e3:.1f}k"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def short(value: float | None) -> str:
    """Three digits that matter, and no exponent."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return _number(value)
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 2 else 3
    return f"{value:.{digits}f}" if value else "0"
