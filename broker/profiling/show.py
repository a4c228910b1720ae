"""A profile on a terminal: a table of times, a table of throughput, and the verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.table import Table

from trtpool.ipc.arena import format_bytes
from trtpool.ipc.profiling import BatchFigures, Measured, Phases, Spread

from .advice import Advice, Remedy, Verdict

COLUMNS: Final = ("min", "mean", "median", "p90", "p95", "p99")


def phases_of(phases: Phases, *, copies: bool) -> Iterator[tuple[str, Spread]]:
    """The phases by name, in order; copies only where there are any."""
    yield ("enqueue" if copies else "call"), phases.enqueue
    if copies or phases.copy_in.median_ns:
        yield "copy in", phases.copy_in
    yield "compute", phases.compute
    if copies or phases.copy_out.median_ns:
        yield "copy out", phases.copy_out
    yield "end to end", phases.end_to_end


def cells(spread: Spread) -> list[str]:
    """Its milliseconds, in the order of `COLUMNS`."""
    times = (spread.min_ns, spread.mean_ns, spread.median_ns, spread.p90_ns, spread.p95_ns, spread.p99_ns)
    return [ms(time) for time in times]


def ms(time_ns: float) -> str:
    """Milliseconds to four digits or so: ``0.0123``, ``12.3``."""
    value = time_ns / 1e6
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def headline(measured: Measured) -> str:
    """What was measured, and on what."""
    spec = measured.spec
    tensors = f"{', '.join(map(str, spec.inputs))} -> {', '.join(map(str, spec.outputs))}"
    where = measured.device if measured.bus else f"the CPU, {measured.threads} of {measured.cpus} CPUs in a call"
    return f"{spec.name}: {tensors}, on {where}"


def ways_of(figures: BatchFigures) -> Iterator[tuple[str, float]]:
    """The ways in which batches were run, and items/s of each."""
    yield "in series", rate(figures.items, figures.series.end_to_end.median_ns)
    for overlap in figures.overlaps[1:]:
        yield f"{overlap.lanes} in flight", rate(figures.items, overlap.period_ns)
    if figures.plain is not None:
        yield "in series, no graph", rate(figures.items, figures.plain.end_to_end.median_ns)
    if figures.plain_overlap is not None:
        name = f"{figures.plain_overlap.lanes} in flight, no graph"
        yield name, rate(figures.items, figures.plain_overlap.period_ns)
    if figures.pageable is not None:
        yield "in series, not pinned", rate(figures.items, figures.pageable.end_to_end.median_ns)
    if figures.one_thread is not None:
        yield "one thread", rate(figures.items, figures.one_thread.end_to_end.median_ns)


def rate(items: int, period_ns: float) -> float:
    """Items/s."""
    return 1e9 * items / period_ns if period_ns > 0 else 0.0


def speed_line(measured: Measured, advice: Advice, verdict: Verdict) -> str:
    """GB/s of the copies of a batch size beside those of the bus; empty on the CPU."""
    if not measured.bus:
        return ""
    ways = (("in", verdict.in_gbs, advice.bus_in_gbs), ("out", verdict.out_gbs, advice.bus_out_gbs))
    return "; ".join(f"copies {way} {achieved:.1f} of {bus:.1f} GB/s" for way, achieved, bus in ways)


def remedy_line(remedy: Remedy) -> str:
    """The remedy with its gain, such as ``1.85x  larger batches: --max-batch 32 (measured)``."""
    basis = "in use" if remedy.in_use else "measured" if remedy.measured else "estimated"
    return f"{remedy.gain:5.2f}x  {remedy.text} ({basis})"


def show(console: Console, measured: Measured, advice: Advice) -> None:
    """Print it all."""
    console.print(headline(measured))
    console.print()
    times = Table(box=None, title="batches in series, ms", title_justify="left", pad_edge=False)
    times.add_column("batch", justify="right")
    times.add_column("phase")
    for column in COLUMNS:
        times.add_column(column, justify="right")
    for figures in measured.batches:
        for number, (name, spread) in enumerate(phases_of(figures.series, copies=bool(measured.bus))):
            times.add_row("" if number else str(figures.items), name, *cells(spread))
    console.print(times)
    console.print()
    ways = Table(box=None, title="items/s", title_justify="left", pad_edge=False)
    ways.add_column("batch")
    columns = [{name: f"{value:,.0f}" for name, value in ways_of(figures)} for figures in measured.batches]
    for figures in measured.batches:
        ways.add_column(str(figures.items), justify="right")
    for name in {name: None for column in columns for name in column}:
        ways.add_row(name, *(column.get(name, "-") for column in columns))
    console.print(ways)
    for figures, verdict in zip(measured.batches, advice.verdicts, strict=True):
        console.print()
        size = f"{format_bytes(figures.in_bytes)} in, {format_bytes(figures.out_bytes)} out"
        console.print(f"batches of {verdict.items} ({size}): {verdict.text}")
        for line in filter(None, (speed_line(measured, advice, verdict), *verdict.warnings)):
            console.print(f"  {line}")
        for remedy in verdict.remedies:
            console.print(f"  {remedy_line(remedy)}")
    console.print()
    console.print(advice.summary, style="bold")
