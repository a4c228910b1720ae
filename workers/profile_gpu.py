"""A profile on a GPU: the engine on its lanes, in each way that a pool could run it.

For each batch size: in series and with several batches in flight, as a pool runs them; without CUDA graphs; from memory
that is not pinned.  And the bus alone, by bare copies, to compare the engine's copies with.
"""

from __future__ import annotations

import collections
import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from time import perf_counter_ns
from typing import Any, Final, NamedTuple

import msgspec

from trtpool.ipc.errors import DeviceUnavailable
from trtpool.ipc.profiling import BatchFigures, BusPoint, Measured, Overlap, Phases, ProfileRequest
from trtpool.ipc.settings import EngineSettings
from trtpool.ipc.tensors import ModelSpec

from .cuda import Cuda, CudaError
from .profile_mapped import measure_mapped
from .profile_planes import (
    LEAST_RUNS,
    WARM_UP_RUNS,
    Arena,
    Sample,
    Say,
    arena,
    batch_bytes,
    batches_of,
    in_series,
    ordinary,
    rows_of,
)
from .registration import Registration, pieces
from .tensorrt_engine import TensorrtEngine
from .topology import bind_to_gpu

MORE_LANES: Final = 1
"""Lanes beyond those of the settings that are tried."""

MOST_LANES: Final = 16

BUS_SIZES: Final = (4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20)
"""Bytes of bare copies; the largest that the arena has room for."""

BUS_TRIES: Final = 10


class _Ways(NamedTuple):
    """One batch size, with or without graphs."""

    graph: bool
    series: Phases
    overlaps: tuple[Overlap, ...]


class _Pinned(NamedTuple):
    """What was measured in a pinned arena, by batch size; `plain` is empty if there are no graphs to leave out.

    `mapped` is what `measure_mapped` found.
    """

    spec: ModelSpec
    bus: tuple[BusPoint, ...]
    graphs: dict[int, _Ways]
    plain: dict[int, _Ways]
    mapped: dict[int, tuple[Phases, Phases]]


def measure(request: ProfileRequest, say: Say, cuda: Cuda | None = None) -> Measured:
    """All figures of a plan on this process's GPU.

    Args:
        request: what to measure.
        say: called with what is being done.
        cuda: the device.

    Raises:
        TrtpoolError: the plan or the GPU cannot be used, or there is too little memory for these batches.
        EngineError: a batch failed.
    """
    try:
        return _measure(request, say, cuda or Cuda())
    except CudaError as error:
        raise DeviceUnavailable(f"the GPU failed during the profile: {error}") from error


def _measure(request: ProfileRequest, say: Say, cuda: Cuda) -> Measured:
    bind_to_gpu(cuda.pci_bus_id())
    settings = request.engine
    most = msgspec.structs.replace(settings, lanes=min(MOST_LANES, settings.lanes + MORE_LANES), graphs=True)
    spec, bus, graphs, plain, mapped = _pinned(request, most, cuda, say)
    pageable = _pageable(request, most, cuda, spec, [*graphs], say)
    figures = tuple(
        BatchFigures(
            items=items,
            in_bytes=batch_bytes(spec.inputs, items),
            out_bytes=batch_bytes(spec.outputs, items),
            graph=ways.graph,
            series=ways.series,
            overlaps=ways.overlaps,
            plain=plain[items].series if ways.graph else None,
            plain_overlap=plain[items].overlaps[-1] if ways.graph else None,
            pageable=pageable[items],
            copied=mapped[items][0] if items in mapped else None,
            in_place=mapped[items][1] if items in mapped else None,
        )
        for items, ways in graphs.items()
    )
    return Measured(
        spec=spec, device=cuda.device_name(), lanes=settings.lanes, threads=0, cpus=request.cpus, batches=figures,
        bus=bus,
    )  # fmt: skip


def _pinned(request: ProfileRequest, settings: EngineSettings, cuda: Cuda, say: Say) -> _Pinned:
    """All that is measured in a pinned arena, which is gone after it."""
    say(f"loading {request.source.path}")
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(_engine(request, settings, cuda))
        spec = engine.spec
        batches = batches_of(spec, request, say)
        planes = stack.enter_context(arena(spec, batches[-1] * settings.lanes))
        registration = stack.enter_context(
            contextlib.closing(Registration(cuda, planes.address, planes.size, planes.fd))
        )
        say("bare copies over the bus")
        bus = measure_bus(cuda, planes, registration.bounds)
        engine.bind(planes.inputs, planes.outputs, batches[-1], registration.bounds)
        graphs = {items: _ways(engine, items, request.seconds, say) for items in batches}
        engine.close()  # before the next takes as much memory
        plain: dict[int, _Ways] = {}
        if any(ways.graph for ways in graphs.values()):
            other = stack.enter_context(_engine(request, msgspec.structs.replace(settings, graphs=False), cuda))
            other.bind(planes.inputs, planes.outputs, batches[-1], registration.bounds)
            plain = {items: _ways(other, items, request.seconds, say, every=False) for items in batches}
            other.close()
        # Most batches lie in one registration, and those that do not are no hint worth its trouble.
        whole = not registration.bounds
        mapped = measure_mapped(request, batches, cuda, planes, say) if whole else {}
        return _Pinned(spec, bus, graphs, plain, mapped)


@contextlib.contextmanager
def _engine(request: ProfileRequest, settings: EngineSettings, cuda: Cuda) -> Iterator[TensorrtEngine]:
    with contextlib.closing(TensorrtEngine(request.source, settings, cuda)) as engine:
        yield engine


def _pageable(
    request: ProfileRequest, settings: EngineSettings, cuda: Cuda, spec: ModelSpec, batches: Sequence[int], say: Say
) -> dict[int, Phases]:
    """In series, from and to memory that is not pinned."""
    inputs, outputs = ordinary(spec, batches[-1])
    with _engine(request, msgspec.structs.replace(settings, lanes=1), cuda) as engine:
        engine.bind(inputs, outputs, batches[-1])
        found = {}
        for items in batches:
            say(f"batches of {items}, from memory that is not pinned")
            engine.warm_up(items, engine.spec.largest)
            found[items] = in_series(lambda items=items: run(engine, items), request.seconds)  # type: ignore[misc]
    return found


# ---------------------------------------------------------------------------------- batches


def _ways(engine: TensorrtEngine, items: int, seconds: float, say: Say, *, every: bool = True) -> _Ways:
    """Batches of `items` in series, and on lanes: on 1, 2 and so on with `every`, else on all only."""
    engine.warm_up(items, engine.spec.largest)
    graph = engine.uses_graph(items, engine.spec.largest)
    say(f"batches of {items}, {'with' if graph else 'without'} a CUDA graph")
    series = in_series(lambda: run(engine, items), seconds)
    lanes = range(1 if every else engine.lanes, engine.lanes + 1)
    return _Ways(graph, series, tuple(overlapped(engine, items, count, seconds) for count in lanes))


def run(engine: TensorrtEngine, items: int) -> Sample:
    """One batch from slot 0 on lane 0, waited for."""
    batch = rows_of(items)
    began_ns = perf_counter_ns()
    engine.launch(0, batch, engine.spec.largest)
    enqueued_ns = perf_counter_ns()
    times = engine.wait(0)
    ended_ns = perf_counter_ns()
    return Sample(
        enqueued_ns - began_ns, times.copy_in_ns, times.compute_ns, times.copy_out_ns, ended_ns - began_ns
    )  # fmt: skip


def overlapped(engine: TensorrtEngine, items: int, lanes: int, seconds: float) -> Overlap:
    """Keep `lanes` lanes busy for `seconds`, each with slots of its own, waiting for the oldest batch each time."""
    batches, shapes = [rows_of(items, lane * items) for lane in range(lanes)], engine.spec.largest
    flying: collections.deque[int] = collections.deque()
    for lane in range(lanes):
        engine.launch(lane, batches[lane], shapes)
        flying.append(lane)

    def turn() -> None:
        lane = flying.popleft()
        engine.wait(lane)
        engine.launch(lane, batches[lane], shapes)
        flying.append(lane)

    for _ in range(WARM_UP_RUNS * lanes):
        turn()
    done = 0
    began_ns = perf_counter_ns()
    until = time.monotonic() + seconds
    while done < LEAST_RUNS * lanes or time.monotonic() < until:
        turn()
        done += 1
    elapsed_ns = perf_counter_ns() - began_ns  # as many are in flight as when it began
    while flying:
        engine.wait(flying.popleft())
    return Overlap(lanes, done, elapsed_ns)


# ---------------------------------------------------------------------------------- the bus


def measure_bus(cuda: Cuda, planes: Arena, bounds: list[int]) -> tuple[BusPoint, ...]:
    """Bare copies of the arena's first bytes to device memory and back, by events; the arena stays as it is."""
    sizes = [size for size in BUS_SIZES if size <= planes.size] or [planes.size]
    with contextlib.ExitStack() as stack:
        device = cuda.malloc(sizes[-1])
        stack.callback(cuda.free, device)
        stream = cuda.new_stream()
        stack.callback(cuda.destroy_stream, stream)
        events = [cuda.new_event() for _ in range(2)]
        for event in events:
            stack.callback(cuda.destroy_event, event)
        points = []
        for size in sizes:
            # In first: what goes out is then what the arena holds.
            into, out = (
                _copy_ns(cuda, device, [*pieces(planes.address, size, bounds)], stream, events, to_device=to_device)
                for to_device in (True, False)
            )
            points.append(BusPoint(size, into, out))
    return tuple(points)


def _copy_ns(
    cuda: Cuda, device: int, parts: list[tuple[int, int]], stream: Any, events: list[Any], *, to_device: bool
) -> float:
    """Median nanoseconds of a copy of `parts` of host memory, one after the other."""
    began, ended = events
    took = []
    for _ in range(BUS_TRIES):
        cuda.record(began, stream)
        address = device
        for host, size in parts:
            if to_device:
                cuda.copy_in(address, host, size, stream)
            else:
                cuda.copy_out(host, address, size, stream)
            address += size
        cuda.record(ended, stream)
        cuda.wait_event(ended)
        took.append(cuda.elapsed_ns(began, ended))
    return statistics.median(took)
