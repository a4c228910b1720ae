"""Medians, paired ratios, the machine, and how they are shown."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table as Grid

from .cases import Series, Table

MEANINGLESS: Final = 1.3
"""Ratios nearer to 1 than this are within what such machines do by themselves."""

PACKAGES: Final = ("trtpool", "numpy", "onnxruntime", "pyzmq", "msgspec")


def machine() -> dict[str, Any]:
    """What ran this, for the head of a report."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "load_before": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def ratios(table: Table, pool: Series, other: Series) -> list[float]:
    """How many times better `pool` is than `other`, round by round."""
    pairs = zip(pool.values, other.values, strict=True)
    return [b / a if table.lower_is_better else a / b for a, b in pairs]


def as_dict(table: Table) -> dict[str, Any]:
    """The table for JSON, all rounds included."""
    pools = [series for series in table.series if series.pool]
    return {
        "case": table.case,
        "title": table.title,
        "unit": table.unit,
        "note": table.note,
        "series": [
            {
                "name": series.name,
                "engine": series.engine,
                "median": statistics.median(series.values),
                "values": series.values,
                "cpu_s_per_1000": _cpu_s_per_1000(series),
                "items_per_batch": series.items_per_batch,
                "runs_per_batch": series.runs_per_batch,
                "pool_is_times_better": {pool.name: ratios(table, pool, series) for pool in pools if not series.pool},
            }
            for series in table.series
        ],
    }


def show(console: Console, table: Table) -> None:
    """Print `table` as a grid; ratios are median (lowest - highest)."""
    pools = [series for series in table.series if series.pool]
    counted = any(series.runs_per_batch is not None for series in table.series)
    grid = Grid(title=f"({table.case}) {table.title}", title_justify="left", caption=table.note,
                caption_justify="left")  # fmt: skip
    grid.add_column("contender")
    grid.add_column("engine")
    headings = [table.unit, "lowest - highest", "CPU s / 1,000"]
    headings += ["items / batch", "runs / batch"] * counted
    headings += [f"{pool.name}: times better" for pool in pools]
    for heading in headings:
        grid.add_column(heading, justify="right", no_wrap=heading == "lowest - highest")
    for series in table.series:
        cells = [
            series.name, series.engine, _number(statistics.median(series.values)),
            f"{_number(min(series.values))} - {_number(max(series.values))}",
            f"{_cpu_s_per_1000(series):.3g}",
        ]  # fmt: skip
        if counted:
            cells += ["" if n is None else f"{n:.2f}" for n in (series.items_per_batch, series.runs_per_batch)]
        cells += ["" if series.pool else _ratio(ratios(table, pool, series)) for pool in pools]
        grid.add_row(*cells, style="bold" if series.pool else None)
    console.print(grid)
    console.print()


def _cpu_s_per_1000(series: Series) -> float:
    return 1000 * series.cpu_s / max(1, series.items)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _ratio(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    text = f"{middle:.3g} ({min(values):.3g} - {max(values):.3g})"
    return text if max(middle, 1 / middle) >= MEANINGLESS else f"[dim]{text} =[/dim]"
