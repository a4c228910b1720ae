"""A profile as one HTML file, with its plots in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from trtpool import __version__
from trtpool.ipc.arena import format_bytes
from trtpool.ipc.profiling import BatchFigures, Measured

from .advice import Advice, Verdict
from .plots import Bar, Line, Part, bars, lines
from .show import COLUMNS, cells, headline, ms, phases_of, remedy_line, speed_line, ways_of

_STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .15rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tbody tr:nth-child(odd) { background: #8881; }
figure { margin: 1.5rem 0; }
figcaption { font-weight: bold; }
svg { width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
svg .axis { fill: none; stroke: currentColor; stroke-opacity: .4; }
.summary { border-left: .3rem solid #4c78a8; padding: .3rem .8rem; background: #8881; }
.warning { color: #c33; }
"""


def page(measured: Measured, advice: Advice) -> str:
    """The whole document; it refers to nothing outside of itself."""
    return "\n".join(_parts(measured, advice))


def _parts(measured: Measured, advice: Advice) -> Iterator[str]:
    name = escape(measured.spec.name)
    yield f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Profile of {name}</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
    yield f"<h1>Profile of {name}</h1><p>{escape(headline(measured))}</p>"
    yield f'<p class="summary">{escape(advice.summary)}</p>'
    yield bars("Time of one item, in series", [_stack(one, gpu=bool(measured.bus)) for one in measured.batches], "us")
    yield bars("Throughput", [*_throughput(measured.batches)], "items/s")
    if measured.bus:
        yield _bus(measured, advice)
    for figures, verdict in zip(measured.batches, advice.verdicts, strict=True):
        yield from _batch(measured, advice, figures, verdict)
    yield f"<p><small>trtpool {escape(__version__)}</small></p></body></html>"


def _stack(figures: BatchFigures, *, gpu: bool) -> Bar:
    series = figures.series
    phases = [("copy in", series.copy_in), ("compute", series.compute), ("copy out", series.copy_out)]
    parts = [Part(name, spread.median_ns / figures.items / 1e3) for name, spread in phases if gpu or spread.median_ns]
    whole = series.end_to_end.median_ns / figures.items / 1e3
    parts.append(Part("the rest", max(0.0, whole - sum(part.value for part in parts))))
    return Bar(f"batches of {figures.items}", parts, f"{whole:.4g} us")


def _throughput(batches: Sequence[BatchFigures]) -> Iterator[Bar]:
    for figures in batches:
        for name, value in ways_of(figures):
            yield Bar(f"{figures.items}, {name}", [Part("items/s", value)], f"{value:,.0f}/s")


def _bus(measured: Measured, advice: Advice) -> str:
    bare_in = [(float(point.size), point.size / point.in_ns) for point in measured.bus if point.in_ns > 0]
    bare_out = [(float(point.size), point.size / point.out_ns) for point in measured.bus if point.out_ns > 0]
    own_in = [(float(b.in_bytes), v.in_gbs) for b, v in zip(measured.batches, advice.verdicts, strict=True)]
    own_out = [(float(b.out_bytes), v.out_gbs) for b, v in zip(measured.batches, advice.verdicts, strict=True)]
    every = (
        Line("bare copy in", bare_in),
        Line("bare copy out", bare_out),
        Line("batches in", own_in, dots=True),
        Line("batches out", own_out, dots=True),
    )
    shown = [line for line in every if line.points]
    texts = {float(point.size): format_bytes(point.size) for point in measured.bus}
    return lines("The bus", shown, x_name="bytes of a copy", y_name="GB/s", x_texts=texts) if shown else ""


def _batch(measured: Measured, advice: Advice, figures: BatchFigures, verdict: Verdict) -> Iterator[str]:
    yield f"<h2>Batches of {figures.items}</h2><p>{escape(verdict.text)}</p>"
    if line := speed_line(measured, advice, verdict):
        size = f"{format_bytes(figures.in_bytes)} in, {format_bytes(figures.out_bytes)} out"
        yield f"<p>{escape(size)}; {escape(line)}</p>"
    for warning in verdict.warnings:
        yield f'<p class="warning">{escape(warning)}</p>'
    if verdict.remedies:
        yield f"<ul>{''.join(f'<li>{escape(remedy_line(remedy))}</li>' for remedy in verdict.remedies)}</ul>"
    head = "".join(f"<th>{column}</th>" for column in ("ms", *COLUMNS))
    rows = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in cells(spread))}</tr>"
        for name, spread in phases_of(figures.series, copies=bool(measured.bus))
    )
    yield f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    others = (
        ("without a CUDA graph", figures.plain),
        ("not pinned", figures.pageable),
        ("one thread", figures.one_thread),
        ("copies in and compute alone", figures.copied),
        ("the same with inputs read in place", figures.in_place),
    )
    said = [f"{name} {ms(other.end_to_end.median_ns)} ms" for name, other in others if other is not None]
    if said:
        yield f"<p>End to end, median: {', '.join(said)}.</p>"
