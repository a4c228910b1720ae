"""What users write today: arrays over a `multiprocessing.Queue`, one worker, pageable memory, one stream.

::

    producer: np.copyto -> put        worker: get -> stack -> cudaMemcpy -> engine -> cudaMemcpy -> put        get
                 pickle, pipe ..... unpickle

The bytes of an item are written six times in host memory on the way: by the producer, pickled, into the pipe, out of
it, unpickled, stacked; and the driver stages them once more.
"""

from __future__ import annotations

import queue as queues
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .crew import CONTEXT, Crew, end, end_with_parent
from .gpu_items import Array, Expected, Load, Source, Tensor, sample
from .gpu_loops import see_only
from .gpu_window import LEAD_S, TAIL_S, CpuTimes, Window, below, edge, spent

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.queues import Queue

HOST_WRITES: Final = 6
START_S: Final = 120.0
GATHER_S: Final = 0.005
"""How long the worker waits for one more item before it runs a batch that is not full."""
EDGE_S: Final = 1.0

Message = tuple[int, Array]
"""(producer, an item's input)"""


@dataclass(frozen=True)
class TodaySetup:
    """The queue's contender.

    Attributes:
        plan: its file.
        gpu: as users name it.
        max_batch: items in a batch.
        producers: how many.
        window: items that each keeps in flight.
        load: what they write, an item at a time; its `inputs` are those of the plan.
    """

    plan: Path
    gpu: str
    max_batch: int
    producers: int
    window: int
    load: Load


class Counts:
    """Items and batches that the worker has done, for other processes to read."""

    def __init__(self) -> None:
        self.items: Synchronized[int] = CONTEXT.Value("q", 0)
        self.batches: Synchronized[int] = CONTEXT.Value("q", 0)


def _work(
    setup: TodaySetup, control: Connection[Any, Any], work: Queue[Message], done: list[Queue[Array]], counts: Counts
) -> None:
    """The worker's main function; says what the plan's inputs and outputs are, then serves."""
    end_with_parent()
    see_only(setup.gpu)
    from .gpu_raw import Cuda, Engine

    cuda = Cuda()
    engine = Engine(cuda, setup.plan)
    device = {
        t.name: int(cuda("cudaMalloc", setup.max_batch * t.item_bytes)) for t in (*engine.inputs, *engine.outputs)
    }
    stream = cuda.stream()
    context = engine.context(stream, device)
    (x,), y = engine.inputs, engine.outputs[0]
    control.send((engine.inputs, engine.outputs))
    while True:
        senders, items = _gather(work, setup.max_batch)
        batch = np.stack(items)
        cuda("cudaMemcpy", device[x.name], batch.ctypes.data, batch.nbytes, cuda.h2d)
        engine.enqueue(context, len(batch), stream)
        cuda.wait(stream)
        results = np.empty((len(batch), *y.shape), y.dtype)
        cuda("cudaMemcpy", results.ctypes.data, device[y.name], results.nbytes, cuda.d2h)
        for sender, result in zip(senders, results, strict=True):
            done[sender].put(result)
        counts.items.value += len(batch)
        counts.batches.value += 1


def _gather(work: Queue[Message], most: int) -> tuple[list[int], list[Array]]:
    """The next batch: whose its items are, and the items."""
    messages = [work.get()]
    try:
        while len(messages) < most:
            messages.append(work.get(timeout=GATHER_S))
    except queues.Empty:
        pass
    return [sender for sender, _ in messages], [item for _, item in messages]


class Sender:
    """A producer; `run` reports the items that it got back."""

    def __init__(self, load: Load, window: int, number: int, work: Queue[Message], done: Queue[Array]) -> None:
        self._source = Source(load)
        (self._name,) = self._source.row(0)
        self._window, self._number, self._work, self._done = window, number, work, done
        samples = []
        for row in range(self._source.rows):
            work.put((number, self._source.row(row)[self._name]))
            samples.append(sample(done.get(), 1))
        self._expected = Expected(samples)

    def run(self, until_s: float) -> int:
        pending: deque[slice] = deque()
        items = 0
        while True:
            while len(pending) < self._window and time.monotonic() < until_s:
                rows = self._source.take(1)
                item = np.empty_like(self._source.row(0)[self._name])
                self._source.write({self._name: item[None]}, rows)
                self._work.put((self._number, item))
                pending.append(rows)
            if not pending:
                return items
            self._expected.check(self._done.get()[None], pending.popleft())
            items += 1

    def close(self) -> None:
        self._work.cancel_join_thread()


class Today:
    """See the module; a `Performer`."""

    def __init__(self, setup: TodaySetup) -> None:
        self._work: Queue[Message] = CONTEXT.Queue()
        self._done: list[Queue[Array]] = [CONTEXT.Queue() for _ in range(setup.producers)]
        self._counts = Counts()
        ours, theirs = CONTEXT.Pipe()
        self._worker = CONTEXT.Process(target=_work, args=(setup, theirs, self._work, self._done, self._counts))
        self._worker.start()
        theirs.close()
        inputs, outputs = self._hear(ours)
        self.facts: dict[str, object] = {
            "inputs": [tensor._asdict() for tensor in inputs],
            "outputs": [tensor._asdict() for tensor in outputs],
            "host_writes": HOST_WRITES,
        }
        loads = [replace(setup.load, inputs=inputs, seed=1000 * number) for number in range(setup.producers)]
        self._crew = Crew(
            [
                partial(Sender, load, setup.window, number, self._work, self._done[number])
                for number, load in enumerate(loads)
            ]
        )
        self._thread = ThreadPoolExecutor(1)
        worker = self._worker.pid
        assert worker is not None
        producers = [pid for pid in below()["producers"] if pid != worker]
        self._cpu = CpuTimes({"worker": [worker], "producers": producers})

    def _hear(self, control: Connection[Any, Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if not control.poll(START_S):
            raise RuntimeError("the worker has hung at its start")
        try:
            inputs, outputs = control.recv()
        except EOFError:
            raise RuntimeError("the worker failed at its start; what it said is above") from None
        return inputs, outputs

    def window(self, window_s: float) -> Window:
        running = self._thread.submit(self._crew.run, LEAD_S + window_s + TAIL_S)
        time.sleep(LEAD_S)
        first, batches, before = edge(self._items, limit_s=EDGE_S), self._counts.batches.value, self._cpu.read()
        time.sleep(window_s)
        last, batches_after, after = edge(self._items, limit_s=EDGE_S), self._counts.batches.value, self._cpu.read()
        running.result()
        items, batches = last.value - first.value, batches_after - batches
        return Window(items, batches, first.at_s, last.at_s, batches, batches, cpu_s=spent(before, after))

    def _items(self) -> float:
        return self._counts.items.value

    def close(self) -> None:
        self._crew.close()
        self._thread.shutdown(wait=False)
        end(self._worker)
