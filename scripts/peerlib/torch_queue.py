"""Shared tensors through `torch.multiprocessing`.

As its "best practices" say, tensors that travel are shared once and used again: each producer has as many as it keeps
in flight, writes an item into one and puts it on a queue.  What the queue carries is the tensor's handle (with the
default sharing strategy a file descriptor), and the worker maps it.  Answers are a few numbers and go back pickled.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scripts.benchlib.crew import CONTEXT, Driver, Stream, end, end_with_parent
from scripts.benchlib.workload import Array, Source, check

from .contestant import Connects, Contestant
from .job import Job

if TYPE_CHECKING:
    from multiprocessing.queues import Queue, SimpleQueue

    import numpy.typing as npt

Work = tuple[int, Any]
"""(producer, tensor)"""


def _worker(job: Job, work: Queue[Work], done: list[SimpleQueue[Array]]) -> None:
    end_with_parent()
    import torch

    torch.set_num_threads(1)
    compute = job.load()
    while True:
        producer, tensor = work.get()
        y = np.empty((1, job.workload.outputs), np.float32)
        compute(tensor.numpy(), y)
        done[producer].put(y)


class TorchTransport:
    def __init__(self, producer: int, window: int, shape: tuple[int, ...], work: Queue[Work],
                 done: SimpleQueue[Array]) -> None:  # fmt: skip
        import torch

        self._producer, self._work, self._done = producer, work, done
        self._free = deque(torch.zeros((1, *shape)).share_memory_() for _ in range(window))
        self._used: deque[Any] = deque()

    def send(self, items: Array) -> None:
        tensor = self._free.popleft()
        np.copyto(tensor.numpy(), items)
        self._work.put((self._producer, tensor))
        self._used.append(tensor)

    def collect(self, expected: npt.NDArray[np.float64]) -> None:
        check(self._done.get(), expected)
        self._free.append(self._used.popleft())

    def close(self) -> None:
        self._work.cancel_join_thread()  # type: ignore[attr-defined,unused-ignore]


def _connect(job: Job, window: int, producer: int, work: Queue[Work], done: SimpleQueue[Array]) -> Driver:
    transport = TorchTransport(producer, window, job.workload.shape, work, done)
    return Stream(transport, Source(job.workload, 1), window, 1)


class TorchQueue(Contestant):
    name = "torch"
    modules = ("torch",)
    copies = 0
    why = "the worker maps the tensor that the producer wrote"
    note = "shared tensors that are used again, through a queue"

    @contextlib.contextmanager
    def producers(self, job: Job, count: int) -> Iterator[Connects]:
        import torch.multiprocessing  # registers how tensors are pickled, with multiprocessing's own queues

        context = torch.multiprocessing.get_context("spawn")
        work: Queue[Work] = context.Queue()
        done: list[SimpleQueue[Array]] = [CONTEXT.SimpleQueue() for _ in range(count)]
        window = job.pick(images=64, small=256) // count or 1
        worker = CONTEXT.Process(target=_worker, args=(job, work, done))
        worker.start()
        try:
            yield [partial(_connect, job, window, i, work, done[i]) for i in range(count)]
        finally:
            end(worker)
