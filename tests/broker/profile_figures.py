"""Made-up figures of profiles: milliseconds, all batches alike unless said otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trtpool.ipc.profiling import BatchFigures, BusPoint, Measured, Overlap, Phases, Spread, spread
from trtpool.ipc.tensors import ModelSpec, TensorSpec

MIB = 1 << 20


def constant(ms: float, deviation: float = 0.0) -> Spread:
    """Times that are all the same; with a deviation that is a share of them."""
    ns = ms * 1e6
    return Spread(100, ns, ns, ns, ns, ns, ns, deviation * ns)


def phases(
    enqueue: float, copy_in: float, compute: float, copy_out: float, whole: float = 0.0, deviation: float = 0.0
) -> Phases:
    """By default each phase after the other, from end to end."""
    return Phases(
        constant(enqueue), constant(copy_in), constant(compute, deviation), constant(copy_out),
        constant(whole or copy_in + compute + copy_out),
    )  # fmt: skip


def overlaps(*periods: float) -> tuple[Overlap, ...]:
    """Of 1, 2 and so on in flight: milliseconds from one end to the next."""
    return tuple(Overlap(lanes, 100, int(100e6 * ms)) for lanes, ms in enumerate(periods, 1))


def bus(fixed_ms: float = 0.0, rate: float = 50.0, sizes: Sequence[int] = (1 << 12, 64 * MIB)) -> tuple[BusPoint, ...]:
    """Bare copies at `rate` GB/s after `fixed_ms`, twice that time out."""
    times = {size: fixed_ms * 1e6 + size / rate for size in sizes}
    return tuple(BusPoint(size, time, 2 * time) for size, time in times.items())


def model(inputs: Mapping[str, str], outputs: Mapping[str, str], floats: int = 1000) -> ModelSpec:
    """Tensors of `floats` numbers, by dtype."""

    def tensors(given: Mapping[str, str]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, dtype, (floats,)) for name, dtype in given.items())

    return ModelSpec("m", "/m.plan", tensors(inputs), tensors(outputs))


FLOATS = model({"x": "float32"}, {"y": "float32"})


def gpu(*batches: BatchFigures, spec: ModelSpec = FLOATS, lanes: int = 3, **more: Any) -> Measured:
    return Measured(
        spec=spec, device="H100", lanes=lanes, threads=0, cpus=8, batches=batches, **{"bus": bus(), **more}
    )  # fmt: skip


def cpu(*batches: BatchFigures, spec: ModelSpec = FLOATS, threads: int = 4) -> Measured:
    return Measured(spec=spec, device="CPU", lanes=1, threads=threads, cpus=threads, batches=batches)


def batch(items: int, series: Phases, in_bytes: int = 4 * MIB, out_bytes: int = 4 * MIB, **more: Any) -> BatchFigures:
    return BatchFigures(items=items, in_bytes=in_bytes, out_bytes=out_bytes, series=series, **more)


def noisy(median: int, slow: int) -> Spread:
    """Times of which four fifths are `median` ns and the others `slow` ns."""
    return spread([median] * 80 + [slow] * 20)
