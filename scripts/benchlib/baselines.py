"""Three ways to feed one model from several processes without trtpool.

========== ============================================ ==========================================
queue      `multiprocessing.Queue` of arrays            one worker, one result queue a producer
executor   `ProcessPoolExecutor`                        one executor with one worker a producer
ring       `multiprocessing.shared_memory` and two      one worker, each producer has its share
           `SimpleQueue` of slot numbers a producer     of the slots
========== ============================================ ==========================================

A future cannot cross processes, so an executor is each producer's own: with four producers
it has four workers where the others have one.

Each takes `count` items a message, so that chunking by hand can be measured too.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from .crew import CONTEXT, Started, Stream, Transport, end, end_with_parent
from .workload import Array, Compute, Source, Workload, check, load

if TYPE_CHECKING:
    from multiprocessing.queues import Queue, SimpleQueue


@dataclass(frozen=True)
class Setup:
    """What a contender is started with.

    Attributes:
        workload: the kind of items.
        model: its ONNX file.
        producers: how many processes send.
        slots: messages of `count` items that are in flight at most, over all producers.
        count: items in one message.
        engine: "numpy" or "onnxruntime".
    """

    workload: Workload
    model: Path
    producers: int
    slots: int
    count: int = 1
    engine: str = "onnxruntime"

    @property
    def window(self) -> int:
        """Messages that one producer has in flight."""
        return self.slots // self.producers

    def stream(self, transport: Transport) -> Stream:
        return Stream(transport, Source(self.workload, self.count), self.window, self.count)

    def load(self) -> Compute:
        return load(self.engine, self.model)


# --- queue -------------------------------------------------------------------------------------


def _queue_worker(setup: Setup, work: Queue[tuple[int, Array]], done: list[Queue[Array]]) -> None:
    end_with_parent()
    compute = setup.load()
    while True:
        producer, x = work.get()
        y = np.empty((len(x), setup.workload.outputs), np.float32)
        compute(x, y)
        done[producer].put(y)


class QueueTransport:
    def __init__(self, producer: int, work: Queue[tuple[int, Array]], done: Queue[Array]) -> None:
        self._producer, self._work, self._done = producer, work, done

    def send(self, items: Array) -> None:
        self._work.put((self._producer, items.copy()))  # a fresh array: it is pickled later, by a thread

    def collect(self, expected: npt.NDArray[np.float64]) -> None:
        check(self._done.get(), expected)

    def close(self) -> None:
        self._work.cancel_join_thread()


def _queue_connect(setup: Setup, producer: int, work: Queue[tuple[int, Array]], done: Queue[Array]) -> Stream:
    return setup.stream(QueueTransport(producer, work, done))


@contextlib.contextmanager
def queue(setup: Setup) -> Iterator[Started]:
    """Start the queue's worker."""
    work: Queue[tuple[int, Array]] = CONTEXT.Queue()
    done: list[Queue[Array]] = [CONTEXT.Queue() for _ in range(setup.producers)]
    worker = CONTEXT.Process(target=_queue_worker, args=(setup, work, done))
    worker.start()
    try:
        yield Started([partial(_queue_connect, setup, i, work, done[i]) for i in range(setup.producers)])
    finally:
        end(worker)


# --- executor ----------------------------------------------------------------------------------

_loaded: dict[str, Compute] = {}
"""The executor's worker keeps its engine here: an initializer can return nothing."""


def _executor_load(setup: Setup) -> None:
    end_with_parent()
    _loaded["compute"] = setup.load()


def _executor_call(x: Array, outputs: int) -> Array:
    y = np.empty((len(x), outputs), np.float32)
    _loaded["compute"](x, y)
    return y


class ExecutorTransport:
    def __init__(self, setup: Setup) -> None:
        self._outputs = setup.workload.outputs
        self._pending: deque[Future[Array]] = deque()
        self._executor = ProcessPoolExecutor(1, CONTEXT, _executor_load, (setup,))

    def send(self, items: Array) -> None:
        self._pending.append(self._executor.submit(_executor_call, items.copy(), self._outputs))

    def collect(self, expected: npt.NDArray[np.float64]) -> None:
        check(self._pending.popleft().result(), expected)

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def _executor_connect(setup: Setup) -> Stream:
    return setup.stream(ExecutorTransport(setup))


@contextlib.contextmanager
def executor(setup: Setup) -> Iterator[Started]:
    """Nothing to start here: the executors start in the producers."""
    yield Started([partial(_executor_connect, setup)] * setup.producers)


# --- ring --------------------------------------------------------------------------------------

Slot = tuple[int, int]
"""(producer, slot number)"""


def _planes(memory: SharedMemory, setup: Setup) -> tuple[Array, Array]:
    """Inputs ``(slots, count, *shape)`` and, behind them, outputs ``(slots, count, outputs)``."""
    slots, count = setup.slots, setup.count
    inputs: Array = np.ndarray((slots, count, *setup.workload.shape), np.float32, memory.buf)
    outputs: Array = np.ndarray((slots, count, setup.workload.outputs), np.float32, memory.buf, offset=inputs.nbytes)
    return inputs, outputs


def _ring_worker(setup: Setup, memory: SharedMemory, work: SimpleQueue[Slot], done: list[SimpleQueue[int]]) -> None:
    end_with_parent()
    inputs, outputs = _planes(memory, setup)
    compute = setup.load()
    while True:
        producer, slot = work.get()
        compute(inputs[slot], outputs[slot])
        done[producer].put(slot)


class RingTransport:
    """A producer's share of the ring.  Pipes never fill: 1,024 messages are under 32 KiB."""

    def __init__(
        self, setup: Setup, producer: int, memory: SharedMemory,
        work: SimpleQueue[Slot], done: SimpleQueue[int],
    ) -> None:  # fmt: skip
        self._memory, self._work, self._done, self._producer = memory, work, done, producer
        self._inputs, self._outputs = _planes(memory, setup)
        self._free = deque(range(producer * setup.window, (producer + 1) * setup.window))

    def send(self, items: Array) -> None:
        slot = self._free.popleft()
        np.copyto(self._inputs[slot], items)
        self._work.put((self._producer, slot))

    def collect(self, expected: npt.NDArray[np.float64]) -> None:
        slot = self._done.get()
        check(self._outputs[slot], expected)
        self._free.append(slot)

    def close(self) -> None:
        del self._inputs, self._outputs
        self._memory.close()


def _ring_connect(
    setup: Setup, producer: int, memory: SharedMemory, work: SimpleQueue[Slot], done: SimpleQueue[int]
) -> Stream:
    return setup.stream(RingTransport(setup, producer, memory, work, done))


@contextlib.contextmanager
def ring(setup: Setup) -> Iterator[Started]:
    """Start the ring's worker."""
    floats = setup.slots * setup.count * (setup.workload.item_bytes // 4 + setup.workload.outputs)
    memory = SharedMemory(create=True, size=4 * floats)
    work: SimpleQueue[Slot] = CONTEXT.SimpleQueue()
    done: list[SimpleQueue[int]] = [CONTEXT.SimpleQueue() for _ in range(setup.producers)]
    worker = CONTEXT.Process(target=_ring_worker, args=(setup, memory, work, done))
    worker.start()
    try:
        yield Started([partial(_ring_connect, setup, i, memory, work, done[i]) for i in range(setup.producers)])
    finally:
        end(worker)
        memory.close()
        memory.unlink()


BASELINES: Final = {"queue": queue, "executor": executor, "ring": ring}
