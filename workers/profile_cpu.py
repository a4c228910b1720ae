"""A profile on the CPU: the engine's calls, with all threads of a worker's share and with one."""

from __future__ import annotations

import contextlib
from time import perf_counter_ns

import msgspec

from trtpool.ipc.profiling import BatchFigures, Measured, Phases, ProfileRequest
from trtpool.ipc.settings import InspectRequest

from .engine import Batch, Engine, Shapes
from .loading import load
from .profile_planes import Sample, Say, arena, batch_bytes, batches_of, in_series, rows_of


def measure(request: ProfileRequest, say: Say) -> Measured:
    """All figures of a model on the CPU.

    Raises:
        TrtpoolError: the model cannot be served, or not in these batches.
        EngineError: it failed.
    """
    threads = request.engine.threads or request.cpus
    say(f"loading {request.source.path}")
    with contextlib.closing(load(InspectRequest(request.source, request.engine), request.cpus)) as engine:
        spec = engine.spec
        batches = batches_of(spec, request, say)
        with arena(spec, batches[-1]) as planes:
            engine.bind(planes.inputs, planes.outputs, batches[-1])
            whole = {items: _series(engine, items, request.seconds, say, threads) for items in batches}
            alone: dict[int, Phases] = {}
            if threads > 1:
                one = InspectRequest(request.source, msgspec.structs.replace(request.engine, threads=1))
                with contextlib.closing(load(one)) as other:
                    other.bind(planes.inputs, planes.outputs, batches[-1])
                    alone = {items: _series(other, items, request.seconds, say, 1) for items in batches}
    figures = tuple(
        BatchFigures(
            items=items,
            in_bytes=batch_bytes(spec.inputs, items),
            out_bytes=batch_bytes(spec.outputs, items),
            series=whole[items],
            one_thread=alone.get(items),
        )
        for items in batches
    )
    return Measured(spec=spec, device="CPU", lanes=1, threads=threads, cpus=request.cpus, batches=figures)


def _series(engine: Engine, items: int, seconds: float, say: Say, threads: int) -> Phases:
    say(f"batches of {items}, {threads} thread{'s' if threads > 1 else ''}")
    batch, shapes = rows_of(items), engine.spec.largest
    return in_series(lambda: _run(engine, batch, shapes), seconds)


def _run(engine: Engine, batch: Batch, shapes: Shapes) -> Sample:
    began_ns = perf_counter_ns()
    times = engine.run(batch, shapes)
    took_ns = perf_counter_ns() - began_ns
    besides_ns = took_ns - times.copy_in_ns - times.compute_ns - times.copy_out_ns
    return Sample(besides_ns, times.copy_in_ns, times.compute_ns, times.copy_out_ns, took_ns)
