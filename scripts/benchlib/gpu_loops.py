"""The contenders that are one process with a GPU of its own: the loops of `gpu_raw`, and the bus by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from trtpool.broker.gpus import gpu_environment

from .crew import CONTEXT, Crew, Turn
from .gpu_items import Load, Writer, Written
from .gpu_raw import Cuda, Engine, Lane
from .gpu_window import LEAD_S, TAIL_S, CpuTimes, Window, below, spent

LANES: Final = 3
BUS_BYTES: Final = 64 << 20
BUS_COPIES: Final = 16


def see_only(gpu: str) -> None:
    """Let this process see one GPU; before CUDA is loaded."""
    os.environ.update(gpu_environment(gpu))


class Writers:
    """Writer processes that stand in for producers.

    Args:
        load: what each writes.
        count: how many there are.
        slots: of all their rings together.
    """

    def __init__(self, load: Load, count: int, slots: int) -> None:
        self._rate = CONTEXT.Value("d", 0.0)
        self._count = count
        connects = [
            partial(Writer, replace(load, seed=1000 * number), slots // count, self._rate) for number in range(count)
        ]
        self._crew = Crew(connects)
        self._thread = ThreadPoolExecutor(1)

    def start(self, seconds: float, items_per_s: float) -> Future[list[Turn]]:
        """Let them write for so long, all together so much; 0: as fast as they can."""
        self._rate.value = items_per_s / self._count
        return self._thread.submit(self._crew.run, seconds)

    def close(self) -> None:
        self._crew.close()
        self._thread.shutdown(wait=False)


def _written(turns: list[Turn]) -> dict[str, float]:
    reports: list[Written] = [turn.report for turn in turns]
    return {
        "written_per_s": sum(one.items / one.took_s for one in reports if one.took_s),
        "writers_writing": sum(one.writing_s for one in reports) / (sum(one.took_s for one in reports) or 1.0),
    }


@dataclass(frozen=True)
class LoopSetup:
    """A raw loop.

    Attributes:
        plan: its file.
        gpu: as users name it.
        max_batch: items in each batch.
        load: what writers write; its `inputs` are those of the plan.
        series: one stream, waiting after each part, instead of three in turn.
        writers: processes that write meanwhile when asked to; 0: none.
        slots: of their rings together: as many as the pool's arena has.
    """

    plan: Path
    gpu: str
    max_batch: int
    load: Load
    series: bool = False
    writers: int = 0
    slots: int = 0


class Loop:
    """See `LoopSetup`; a `Performer`.

    Options of a window: `writers_per_s`, the items/s that the writers write together meanwhile (0: they rest);
    `alone`: they write as fast as they can, and nothing else runs.
    """

    def __init__(self, setup: LoopSetup) -> None:
        see_only(setup.gpu)
        self._setup = setup
        self._cuda = Cuda()
        engine = Engine(self._cuda, setup.plan)
        self._lanes = [Lane(self._cuda, engine, setup.max_batch) for _ in range(1 if setup.series else LANES)]
        self._lanes[0].launch()
        self._lanes[0].wait()
        self._lanes[0].check()
        self.facts: dict[str, object] = {
            "device": self._cuda.device_name(),
            "inputs": [tensor._asdict() for tensor in engine.inputs],
            "outputs": [tensor._asdict() for tensor in engine.outputs],
            "graph": self._lanes[0].graph is not None,
            **self._lanes[0].alone(),
        }
        self._copies = len(engine.inputs), len(engine.outputs)
        self._writers = None
        if setup.writers:
            self._writers = Writers(replace(setup.load, inputs=engine.inputs), setup.writers, setup.slots)
        self._cpu = CpuTimes({"worker": [os.getpid()], **below()})

    def window(self, window_s: float, writers_per_s: float = 0.0, alone: float = 0.0) -> Window:
        if alone:
            return self._write_alone(window_s)
        writing = None
        if self._writers and writers_per_s:
            writing = self._writers.start(LEAD_S + window_s + TAIL_S, writers_per_s)
        began_s = time.monotonic() + LEAD_S
        ends, launch_s, cpu_s = self._run(began_s, began_s + window_s)
        figures = {"launch_us": 1e6 * launch_s / max(1, len(ends))}
        if writing is not None:
            figures |= _written(writing.result())
        batches = len(ends) - 1
        if batches < 1:
            raise RuntimeError(f"the window of {window_s:g} s is too short: not two batches ended in it")
        return Window(
            items=batches * self._setup.max_batch,
            batches=batches,
            began_s=ends[0],
            ended_s=ends[-1],
            copies_in=batches * self._copies[0],
            copies_out=batches * self._copies[1],
            cpu_s=cpu_s,
            figures=figures,
        )

    def _run(self, began_s: float, until_s: float) -> tuple[list[float], float, dict[str, float]]:
        """Run batches until then: when each after `began_s` ended, and from there seconds of launching, and of CPU."""
        ends: list[float] = []
        before: dict[str, float] = {}
        launch_s = 0.0
        for ended_s, launching_s in self._series() if self._setup.series else self._overlap():
            if ended_s >= began_s:
                ends.append(ended_s)
                launch_s += launching_s
                before = before or self._cpu.read()
            if ended_s >= until_s:
                break
        return ends, launch_s, spent(before, self._cpu.read())

    def _series(self) -> Iterator[tuple[float, float]]:
        """Batch after batch: when each ended, and 0."""
        while True:
            self._lanes[0].in_series()
            yield time.monotonic(), 0.0

    def _overlap(self) -> Iterator[tuple[float, float]]:
        """The lanes in turn: when each batch ended, and the seconds that the launch before it took."""
        lanes, clock = self._lanes, time.monotonic
        try:
            for lane in lanes:
                lane.launch()
            launching_s = 0.0
            while True:
                for lane in lanes:
                    lane.wait()
                    ended_s = clock()
                    yield ended_s, launching_s
                    began_s = clock()
                    lane.launch()
                    launching_s = clock() - began_s
        finally:
            for lane in lanes:
                lane.wait()

    def _write_alone(self, window_s: float) -> Window:
        if self._writers is None:
            raise RuntimeError("this loop has no writers")
        before = self._cpu.read()
        turns = self._writers.start(window_s, 0.0).result()
        figures = _written(turns)
        began_s, ended_s = min(turn.started_s for turn in turns), max(turn.ended_s for turn in turns)
        items = figures["written_per_s"] * (ended_s - began_s)
        return Window(items, 0, began_s, ended_s, cpu_s=spent(before, self._cpu.read()), figures=figures)

    def close(self) -> None:
        if self._writers is not None:
            self._writers.close()


@dataclass(frozen=True)
class BusSetup:
    gpu: str


class Bus:
    """Copies of 64 MiB of pinned memory on two streams, each way by itself; a `Performer`.

    `Window.items` are bytes to the device; `figures["out_per_s"]` is bytes/s from it.
    """

    def __init__(self, setup: BusSetup) -> None:
        see_only(setup.gpu)
        cuda = self._cuda = Cuda()
        self._streams = [cuda.stream(), cuda.stream()]
        self._buffers = [(int(cuda("cudaMalloc", BUS_BYTES)), cuda.pinned(BUS_BYTES)) for _ in self._streams]
        for _, (_, array) in self._buffers:
            array[...] = 0x5A
        self.facts: dict[str, object] = {"device": cuda.device_name()}
        self._copy(0.0, to_device=True)

    def window(self, window_s: float) -> Window:
        began_s = time.monotonic()
        count, ended_s = self._copy(window_s / 2, to_device=True)
        back, last_s = self._copy(window_s / 2, to_device=False)
        size = count * BUS_BYTES
        return Window(
            size, 0, began_s, ended_s, copies_in=count, figures={"out_per_s": back * BUS_BYTES / (last_s - ended_s)}
        )

    def _copy(self, seconds: float, *, to_device: bool) -> tuple[int, float]:
        """Copy for so long; how many copies there were, and when the last had ended."""
        cuda, count = self._cuda, 0
        until_s = time.monotonic() + seconds
        while True:
            for number in range(BUS_COPIES):
                device, (host, _) = self._buffers[number % 2]
                ends: tuple[Any, ...] = (device, host) if to_device else (host, device)
                kind = cuda.h2d if to_device else cuda.d2h
                cuda("cudaMemcpyAsync", *ends, BUS_BYTES, kind, self._streams[number % 2])
            for stream in self._streams:
                cuda.wait(stream)
            count += BUS_COPIES
            now_s = time.monotonic()
            if now_s >= until_s:
                return count, now_s

    def close(self) -> None: ...
