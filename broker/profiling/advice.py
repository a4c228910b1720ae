"""What the figures of a profile mean, and what to do: a pure function of them.

With enough batches in flight, copies, compute and the CPU's work of different batches overlap, and the slowest of them
sets the pace: it is the *bound*.  A remedy gains what it takes off the bound, until another part is the slowest.  Gains
are factors of items/s.  Some were measured, by doing it; others are estimated:

- *fewer bytes*: a copy of n bytes takes ``fixed + n / rate``, which the bare copies give, scaled to what the
  engine's own copy took; the engine is taken to compute as long as before;
- *more workers on a GPU*: each hands over its own batches, so the CPU's work is divided;
- *workers with one thread on the CPU*: each as fast as one alone, which they are until memory is the limit;
- *another GPU*: one more of the same, on a bus of its own.

Limits of "bound" and "unstable" are those of NVIDIA's trtexec (`sampleReporting.cpp` in TensorRT's repository):
enqueue over 0.8 of compute, a copy over compute, a variation of compute over 1 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal

import msgspec

from trtpool.ipc.profiling import BatchFigures, BusPoint, Measured, Overlap, Phases
from trtpool.ipc.tensors import TensorSpec

ENQUEUE_BOUND: Final = 0.8
UNSTABLE_GPU: Final = 0.01
"""Coefficient of variation of compute."""

UNSTABLE_CPU: Final = 0.1
"""By how much the slowest tenth of the calls exceeds the median.  A CPU has other work too, and a single call that was
interrupted would decide a coefficient of variation."""

WORTH: Final = 1.05
"""A remedy that gains less is not named: it is within what such measurements vary by."""

Kind = Literal["compute-bound", "transfer-bound", "enqueue-bound"]


class Remedy(msgspec.Struct, frozen=True):
    """What could be done, or is done already.

    Attributes:
        what: "fp16-io", "uint8-io", "batch", "lanes", "graphs", "pinned", "overlap", "workers" or "gpu".
        text: for people, without the gain.
        gain: items/s with it as a factor of items/s without.
        measured: it was done, and this came out; else it is estimated.
        in_use: a pool does it already, and this is what it gains.
    """

    what: str
    text: str
    gain: float
    measured: bool
    in_use: bool = False


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """About one batch size.

    Attributes:
        items: the batch size.
        items_per_s: as a pool runs it, on one worker that always has work.
        kind: what sets the pace.
        text: the same for people, with the reason.
        in_gbs, out_gbs: achieved by the engine's copies; 0 where nothing is copied.
        warnings: such as an unstable clock; and hints.
        remedies: those worth it, the best first, then what is in use.
    """

    items: int
    items_per_s: float
    kind: Kind
    text: str
    in_gbs: float
    out_gbs: float
    warnings: tuple[str, ...]
    remedies: tuple[Remedy, ...]


class Advice(msgspec.Struct, frozen=True):
    """All of it.

    Attributes:
        verdicts: one for each batch size, in order.
        bus_in_gbs, bus_out_gbs: the fastest bare copy each way; 0 on the CPU.
        summary: of the batch size with the most items/s.
    """

    verdicts: tuple[Verdict, ...]
    bus_in_gbs: float
    bus_out_gbs: float
    summary: str


def judge(measured: Measured) -> Advice:
    """What `measured` means."""
    verdicts = tuple(_judge(measured, figures) for figures in measured.batches)
    best = max(verdicts, key=lambda verdict: verdict.items_per_s)
    bus_in, bus_out = (
        max((_rate(point.size, time) for point, time in zip(measured.bus, times, strict=True)), default=0.0)
        for times in ([point.in_ns for point in measured.bus], [point.out_ns for point in measured.bus])
    )
    return Advice(verdicts, bus_in, bus_out, _summary(best))


def _summary(best: Verdict) -> str:
    todo = [remedy for remedy in best.remedies if not remedy.in_use]
    first = f"Best here: batches of {best.items}, {best.items_per_s:,.0f} items/s, {best.text}."
    if not todo:
        return f"{first} Nothing to gain here."
    if best.kind == "compute-bound" and all(remedy.what == "gpu" for remedy in todo):
        return f"{first} Nothing to gain here but by a faster engine (`trtpool build --fp16`) or another GPU."
    top = todo[0]
    return f"{first} First: {top.text} ({top.gain:.2f}x, {'measured' if top.measured else 'estimated'})."


# ---------------------------------------------------------------------------------- one batch size


def period_ns(measured: Measured, figures: BatchFigures) -> float:
    """From one batch's end to the next as a pool with these settings runs them."""
    chosen = _chosen(measured, figures)
    return chosen.period_ns if chosen else figures.series.end_to_end.median_ns


def _chosen(measured: Measured, figures: BatchFigures) -> Overlap | None:
    """With the lanes of the settings, or as many as the plan allows."""
    within = [overlap for overlap in figures.overlaps if overlap.lanes <= measured.lanes]
    return within[-1] if within else None


def _items_per_s(measured: Measured, figures: BatchFigures) -> float:
    return _ratio(1e9 * figures.items, period_ns(measured, figures))


def _judge(measured: Measured, figures: BatchFigures) -> Verdict:
    series = figures.series
    kind, text = _bound(series)
    remedies = [remedy for remedy in _remedies(measured, figures, kind) if remedy.gain >= WORTH]
    remedies.sort(key=lambda remedy: (remedy.in_use, remedy.what == "gpu", -remedy.gain))
    return Verdict(
        items=figures.items,
        items_per_s=_items_per_s(measured, figures),
        kind=kind,
        text=text,
        in_gbs=_rate(figures.in_bytes, series.copy_in.median_ns),
        out_gbs=_rate(figures.out_bytes, series.copy_out.median_ns),
        warnings=tuple(_warnings(measured, figures)),
        remedies=tuple(remedies),
    )


def _bound(series: Phases) -> tuple[Kind, str]:
    """What sets the pace when batches overlap, and why."""
    compute, enqueue = series.compute.median_ns, series.enqueue.median_ns
    copies = {"in": series.copy_in.median_ns, "out": series.copy_out.median_ns}
    way = max(copies, key=copies.__getitem__)
    copy = copies[way]
    bounds: list[tuple[float, Kind, str]] = []
    if copy > compute:
        bounds.append((copy, "transfer-bound", f"copies {way} take {_ms(copy)}, compute {_ms(compute)}"))
    if enqueue > ENQUEUE_BOUND * compute:
        text = f"the CPU takes {_ms(enqueue)} to hand a batch over, compute {_ms(compute)}"
        bounds.append((enqueue, "enqueue-bound", text))
    if not bounds:
        bounds.append((compute, "compute-bound", f"compute takes {_ms(compute)}, the rest less"))
    _, kind, why = max(bounds)
    return kind, f"{kind}: {why}"


def _warnings(measured: Measured, figures: BatchFigures) -> Iterator[str]:
    compute = figures.series.compute
    beyond = _ratio(compute.p90_ns, compute.median_ns) - 1
    if measured.bus and compute.variation > UNSTABLE_GPU:
        yield (
            f"unstable clock: compute varies by {compute.variation:.1%}; lock the GPU's clocks "
            "(nvidia-smi --lock-gpu-clocks), see that it is not hot and that nothing else uses it, then measure again"
        )
    elif not measured.bus and beyond > UNSTABLE_CPU:
        yield (
            f"unstable: a tenth of the calls compute for {beyond:.0%} longer than the median, or more; end what else "
            "runs here, or measure for longer with --seconds"
        )
    if _still_rises(measured, figures):
        yield "items/s still rise at this size; measure larger batches too, with --batch"
    if figures.copied is not None and figures.in_place is not None:
        copied, in_place = (one.copy_in.median_ns + one.compute.median_ns for one in (figures.copied, figures.in_place))
        if _ratio(copied, in_place) >= WORTH:
            yield (
                f"a hint: an engine that reads its inputs in place takes {_ms(in_place)}, against {_ms(copied)} with a "
                "copy, one batch at a time; a pool always copies"
            )
    if measured.bus and not figures.graph:
        yield "no CUDA graph: this engine cannot be captured, so each batch costs the CPU a full enqueue"
    if figures.overlaps and figures.overlaps[-1].lanes < measured.lanes:
        yield (
            f"the plan allows {figures.overlaps[-1].lanes} lanes of {measured.lanes}; build it again with "
            "`trtpool build` for more"
        )


def _still_rises(measured: Measured, figures: BatchFigures) -> bool:
    """Whether this is the largest size measured, clearly faster than the one before, and not the model's largest."""
    limit = measured.spec.batch_limit
    if figures is not measured.batches[-1] or len(measured.batches) < 2 or limit == figures.items:
        return False
    before = _items_per_s(measured, measured.batches[-2])
    return _ratio(_items_per_s(measured, figures), before) >= WORTH


# ---------------------------------------------------------------------------------- remedies


def _remedies(measured: Measured, figures: BatchFigures, kind: Kind) -> Iterator[Remedy]:
    yield from _larger_batch(measured, figures)
    if not measured.bus:
        yield from _more_workers(measured, figures)
        return
    yield from _fewer_bytes(measured, figures)
    yield from _lanes(measured, figures)
    yield from _in_use(measured, figures)
    if kind == "enqueue-bound":
        parts = _parts(figures.series)
        halved = {**parts, "enqueue": parts["enqueue"] / 2}
        text = "two workers on the GPU, each with a CPU of its own: --workers-per-gpu 2"
        yield Remedy("workers", text, _ratio(max(parts.values()), max(halved.values())), measured=False)
    yield Remedy("gpu", "another GPU on a bus of its own, if producers keep up", 2.0, measured=False)


def _larger_batch(measured: Measured, figures: BatchFigures) -> Iterator[Remedy]:
    best = max(measured.batches, key=lambda other: _items_per_s(measured, other))
    gain = _ratio(_items_per_s(measured, best), _items_per_s(measured, figures))
    larger = "larger" if best.items > figures.items else "smaller"
    yield Remedy("batch", f"{larger} batches: --max-batch {best.items}", gain, measured=True)


def _more_workers(measured: Measured, figures: BatchFigures) -> Iterator[Remedy]:
    if figures.one_thread is None:
        return
    gain = _ratio(figures.series.end_to_end.median_ns * measured.threads, figures.one_thread.end_to_end.median_ns)
    count = measured.threads
    text = f"{count} workers of one thread in place of one of {count}: --workers {count} --threads 1"
    yield Remedy("workers", text, gain, measured=False)


def _fewer_bytes(measured: Measured, figures: BatchFigures) -> Iterator[Remedy]:
    spec = measured.spec
    before = max(_parts(figures.series).values())
    for what, dtype, size_in in (("fp16-io", "fp16", _as_fp16), ("uint8-io", "uint8", _as_uint8)):
        if not any(_is_wide(tensor, 2 if what == "fp16-io" else 1) for tensor in spec.inputs):
            continue
        smaller_in = _scaled(figures.in_bytes, spec.inputs, size_in)
        # `--io uint8` is about inputs alone.
        smaller_out = _scaled(figures.out_bytes, spec.outputs, _as_fp16) if what == "fp16-io" else figures.out_bytes
        parts = _parts(figures.series)
        parts["copy in"] *= _copy_factor(measured.bus, figures.in_bytes, smaller_in, lambda point: point.in_ns)
        parts["copy out"] *= _copy_factor(measured.bus, figures.out_bytes, smaller_out, lambda point: point.out_ns)
        text = f"fewer bytes: {dtype} inputs{' and outputs' if smaller_out < figures.out_bytes else ''}, --io {dtype}"
        yield Remedy(what, text, _ratio(before, max(parts.values())), measured=False)


def _lanes(measured: Measured, figures: BatchFigures) -> Iterator[Remedy]:
    chosen = _chosen(measured, figures)
    if chosen is None:
        return
    best = min(figures.overlaps, key=lambda overlap: overlap.period_ns)
    more = "more" if best.lanes > chosen.lanes else "fewer"
    gain = _ratio(chosen.period_ns, best.period_ns)
    yield Remedy("lanes", f"{more} lanes: --lanes {best.lanes}", gain, measured=True)
    if figures.plain_overlap is not None:
        slower = _ratio(figures.overlaps[-1].period_ns, figures.plain_overlap.period_ns)
        yield Remedy("graphs", "no CUDA graphs: --no-graphs", slower, measured=True)


def _in_use(measured: Measured, figures: BatchFigures) -> Iterator[Remedy]:
    chosen = _chosen(measured, figures)
    alone = figures.series.end_to_end.median_ns
    if chosen is not None:
        text = f"{chosen.lanes} batches in flight, against one after the other"
        yield Remedy("overlap", text, _ratio(alone, chosen.period_ns), measured=True, in_use=True)
    if figures.plain_overlap is not None:
        gain = _ratio(figures.plain_overlap.period_ns, figures.overlaps[-1].period_ns)
        yield Remedy("graphs", "CUDA graphs, against plain enqueues", gain, measured=True, in_use=True)
    if figures.pageable is not None:
        gain = _ratio(figures.pageable.end_to_end.median_ns, alone)
        yield Remedy("pinned", "pinned memory, against ordinary, in series", gain, measured=True, in_use=True)


# ---------------------------------------------------------------------------------- arithmetic


def _parts(series: Phases) -> dict[str, float]:
    """What overlaps with itself never, and with each other always: nanoseconds."""
    return {
        "enqueue": series.enqueue.median_ns,
        "copy in": series.copy_in.median_ns,
        "compute": series.compute.median_ns,
        "copy out": series.copy_out.median_ns,
    }


def _is_wide(tensor: TensorSpec, itemsize: int) -> bool:
    """Whether its numbers are floats of more bytes than that."""
    return tensor.dtype.startswith("float") and tensor.itemsize > itemsize


def _as_fp16(tensor: TensorSpec) -> float:
    return 2 / tensor.itemsize if _is_wide(tensor, 2) else 1.0


def _as_uint8(tensor: TensorSpec) -> float:
    return 1 / tensor.itemsize if _is_wide(tensor, 1) else 1.0


def _scaled(size: int, tensors: tuple[TensorSpec, ...], factor: Callable[[TensorSpec], float]) -> float:
    """Bytes of a batch of `size` bytes with each tensor smaller by its factor."""
    whole = sum(tensor.item_bytes for tensor in tensors)
    return size * _ratio(sum(tensor.item_bytes * factor(tensor) for tensor in tensors), whole)


def _copy_factor(bus: tuple[BusPoint, ...], size: float, smaller: float, time_of: Callable[[BusPoint], float]) -> float:
    """How much of its time a copy takes with `smaller` bytes in place of `size`."""
    least, most = bus[0], bus[-1]
    if most.size == least.size:
        return _ratio(smaller, size)
    per_byte = (time_of(most) - time_of(least)) / (most.size - least.size)
    fixed = max(0.0, time_of(least) - least.size * per_byte)
    return _ratio(fixed + smaller * per_byte, fixed + size * per_byte)


def _rate(size: float, time_ns: float) -> float:
    """GB/s; 0 where nothing was timed."""
    return size / time_ns if time_ns > 0 else 0.0


def _ratio(one: float, other: float) -> float:
    """1 where there is nothing to compare."""
    return one / other if one > 0 and other > 0 else 1.0


def _ms(time_ns: float) -> str:
    return f"{time_ns / 1e6:.3f} ms"
