"""The pool, written as its users would write it: producers lease runs of slots, write, submit, look and release."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import trtpool
from trtpool.ipc.report import ModelReport

from .crew import CONTEXT, STUCK_S, Crew
from .gpu_items import Array, Expected, Load, Source, Tensor, sample
from .gpu_window import LEAD_S, TAIL_S, CpuTimes, Edge, Window, below, edge, spent


@dataclass(frozen=True)
class PoolSetup:
    """A pool and its producers.

    Attributes:
        model: a plan, or with no GPUs an ONNX file.
        gpus: as users name them.
        max_batch, slots, lanes: see `trtpool.Pool`.
        producers: how many.
        window: runs that each keeps in flight.
        load: what they write; its `inputs` are those of the model.
        huge_pages: see `trtpool.Pool`.
    """

    model: Path
    gpus: tuple[str, ...]
    max_batch: int
    slots: int
    producers: int
    window: int
    load: Load
    lanes: int = 3
    huge_pages: bool = False

    def start(self) -> trtpool.Pool:
        """Start it; a producer may hold its share of the slots, so that more can be granted in advance."""
        load = self.load
        options: dict[str, Any] = {"device": "cpu", "threads": 1}
        if self.gpus:
            options = {"gpus": list(self.gpus), "lanes": self.lanes}
        return trtpool.Pool(
            model=str(self.model),
            max_batch=self.max_batch,
            slots=self.slots,
            items_per_slot=load.items_per_slot,
            max_slots_per_producer=max(self.slots // self.producers, (self.window + 1) * load.run),
            huge_pages=self.huge_pages,
            **options,
        )


class Produced(NamedTuple):
    """What a producer did: items, seconds in all, and of these for slots, in copying and for results."""

    items: int
    took_s: float
    leasing_s: float
    writing_s: float
    waiting_s: float
    told_apart: float


class _Sent(NamedTuple):
    lease: trtpool.Lease
    submitted: trtpool.Submitted
    rows: slice


class Producer:
    """Keeps `window` runs in flight.

    Args:
        handle: the pool's.
        load: what to write.
        window: runs in flight.
        writes: 0: submit what is in the slots already, and do not compare results.
    """

    def __init__(self, handle: trtpool.PoolHandle, load: Load, window: int, writes: Synchronized[int]) -> None:
        self._client = handle.connect()
        self._load, self._window, self._writes = load, window, writes
        self._source = Source(load)
        self._output = self._client.models[0].spec.outputs[0].name
        self._expected = Expected([self._one(row) for row in range(self._source.rows)])

    def _one(self, row: int) -> Array:
        """What one prepared slot must give."""
        with self._client.lease() as lease:
            for name, array in self._source.row(row).items():
                np.copyto(lease.inputs[name], array)
            return sample(lease.submit().result(timeout_s=STUCK_S).outputs[self._output], 1)

    def run(self, until_s: float) -> Produced:
        pending: deque[list[_Sent]] = deque()
        clock, items, leasing_s, writing_s, waiting_s = time.monotonic, 0, 0.0, 0.0, 0.0
        writes = bool(self._writes.value)
        began_s = clock()
        while True:
            while len(pending) < self._window and (before_s := clock()) < until_s:
                leases = self._client.lease_many(self._load.run, timeout_s=STUCK_S)
                leased_s = clock()
                leasing_s += leased_s - before_s
                pending.append(self._send(leases, writes=writes))
                writing_s += clock() - leased_s
            if not pending:
                took_s = clock() - began_s
                return Produced(items, took_s, leasing_s, writing_s, waiting_s, self._expected.told_apart)
            for sent in pending.popleft():
                before_s = clock()
                result = sent.submitted.result(timeout_s=STUCK_S)
                waiting_s += clock() - before_s
                items += result.items
                self._look(result, sent.rows, writes=writes)
                sent.lease.release()

    def _send(self, leases: trtpool.Leases, *, writes: bool) -> list[_Sent]:
        """Write and submit the slots of a run, which are one lease or, in a crowd, several."""
        sent = []
        rows = self._source.take(self._load.run)
        at = rows.start
        for lease in leases:
            part = slice(at, at + lease.count)
            if writes:
                self._source.write(lease.inputs, part)
            sent.append(_Sent(lease, lease.submit(), part))
            at += lease.count
        return sent

    def _look(self, result: trtpool.Result, rows: slice, *, writes: bool) -> None:
        output = result.outputs[self._output]
        if writes:
            self._expected.check(output, rows)
        else:
            sample(output, rows.stop - rows.start)

    def close(self) -> None:
        self._client.close()


class _Mark(NamedTuple):
    edge: Edge
    model: ModelReport
    cpu_s: Mapping[str, float]


class PoolPerformer:
    """See `PoolSetup`; a `Performer`.  Option of a window: `writes`, 0 for inputs that were written beforehand."""

    def __init__(self, setup: PoolSetup) -> None:
        self._pool = setup.start()
        try:
            self._begin(setup)
        except BaseException:
            self._pool.close()
            raise

    def _begin(self, setup: PoolSetup) -> None:
        pool, spec = self._pool, self._pool.models[0].spec
        tensors = [
            tuple(Tensor(one.name, str(one.numpy_dtype), tuple(one.shape)) for one in ones)
            for ones in (spec.inputs, spec.outputs)
        ]
        self._setup = setup
        self._copies = len(spec.inputs), len(spec.outputs)
        self._writes: Synchronized[int] = CONTEXT.Value("b", 1)
        loads = [replace(setup.load, inputs=tensors[0], seed=1000 * number) for number in range(setup.producers)]
        self._crew = Crew([partial(Producer, pool.handle(), load, setup.window, self._writes) for load in loads])
        self._thread = ThreadPoolExecutor(1)
        report = pool.status()
        self.facts: dict[str, object] = {
            "inputs": [tensor._asdict() for tensor in tensors[0]],
            "outputs": [tensor._asdict() for tensor in tensors[1]],
            "workers": [worker.device for worker in report.workers],
            "lanes": [worker.lanes for worker in report.workers],
            "slots": report.models[0].slots,
            "arena_bytes": report.arena_bytes,
        }

    def window(self, window_s: float, writes: float = 1.0) -> Window:
        self._writes.value = int(writes)
        self._cpu = CpuTimes(below())
        running = self._thread.submit(self._crew.run, LEAD_S + window_s + TAIL_S)
        time.sleep(LEAD_S)
        first = self._mark()
        time.sleep(window_s)
        last = self._mark()
        reports: list[Produced] = [turn.report for turn in running.result()]
        return self._window(first, last, reports)

    def _mark(self) -> _Mark:
        at = edge(lambda: self._model().items)
        return _Mark(at, self._model(), self._cpu.read())

    def _model(self) -> ModelReport:
        return self._pool.status().models[0]

    def _window(self, first: _Mark, last: _Mark, reports: list[Produced]) -> Window:
        def more(name: str) -> int:
            return int(getattr(last.model, name) - getattr(first.model, name))

        items, batches = last.edge.value - first.edge.value, more("batches")
        took_s = sum(one.took_s for one in reports) or 1.0
        figures = {
            f"{name}_ms": more(f"{name}_ns") / 1e6 / max(1, batches) for name in ("copy_in", "compute", "copy_out")
        }
        figures |= {
            "queue_ms": more("queue_ns") / 1e6 / max(1, more("items")),
            "runs_per_batch": more("runs") / max(1, batches),
            "failed_items": more("failed_items"),
            "gathered_items": more("gathered_items"),
            "leasing": sum(one.leasing_s for one in reports) / took_s,
            "writing": sum(one.writing_s for one in reports) / took_s,
            "waiting": sum(one.waiting_s for one in reports) / took_s,
            "told_apart": min(one.told_apart for one in reports),
        }
        # The counters were read a moment after the edge, so what they say is scaled to the items between the edges.
        scale = items / max(1, more("items"))
        runs = more("runs") * scale
        return Window(
            items,
            batches * scale,
            first.edge.at_s,
            last.edge.at_s,
            runs * self._copies[0],
            runs * self._copies[1],
            spent(first.cpu_s, last.cpu_s),
            figures,
        )

    def close(self) -> None:
        try:
            self._crew.close()
            self._thread.shutdown(wait=False)
        finally:
            self._pool.close()
