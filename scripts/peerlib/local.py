"""What Python itself offers; the code is that of `benchlib.baselines`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

from scripts.benchlib.baselines import BASELINES, Setup
from scripts.benchlib.cases import CHUNK, IMAGE_SLOTS, SMALL_ITEMS

from .contestant import Connects, Contestant
from .job import Job


class _Baseline(Contestant):
    """One of `BASELINES`.

    Attributes:
        baseline: its name there.
        chunk: items a message, for small items.
    """

    baseline: ClassVar[str]
    chunk: ClassVar[int] = 1

    @contextlib.contextmanager
    def producers(self, job: Job, count: int) -> Iterator[Connects]:
        chunk = job.pick(images=1, small=self.chunk)
        slots = job.pick(images=IMAGE_SLOTS, small=SMALL_ITEMS // chunk)
        setup = Setup(job.workload, job.model, count, slots, chunk, job.engine)
        with BASELINES[self.baseline](setup) as started:
            yield started.connects


class Ring(_Baseline):
    name = baseline = "ring"
    copies = 0
    why = "the worker reads the slot that the producer wrote"


class ChunkedRing(_Baseline):
    name = "ring-64"
    baseline = "ring"
    chunk = CHUNK
    kinds = ("small",)
    copies = 0
    why = Ring.why
    note = f"the ring with {CHUNK} items a message, chunked by hand in the producer: no bar for one-item messages"
    bar = False


class Queue(_Baseline):
    name = baseline = "queue"
    copies = 5
    why = "pickled, into the pipe, out of it in pieces, the pieces put together, unpickled"


class Executor(_Baseline):
    name = baseline = "executor"
    copies = 5
    why = Queue.why
    note = "a future cannot cross processes, so each producer has an executor of one worker: 4 producers, 4 workers"
