"""Ray Data: rows of numbers, a stage of tasks that makes items of them, and `map_batches` with one actor that computes.

The stream never ends by itself: `iter_batches` takes results while a window lasts, and Ray keeps as much in flight as
its back-pressure allows.  Batches are whole blocks, taken without a copy (`zero_copy_batch`).  The stages ask for
different CPUs, since Ray would fuse them into one process otherwise, and nothing would be transported.
There is no latency to measure: rows come in blocks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from scripts.benchlib.workload import Source, check

from .contestant import Connects, Contestant
from .job import Job
from .ray_cluster import cluster

BLOCKS = 1 << 10
"""More than any window takes."""
BLOCK_IMAGES = 128
BLOCK_SMALL = 1024
BLOCK_BULK = 1 << 15
"""Rows of a block, each of which is a task of each stage: of images as many as stay below the 128 MiB that Ray cuts
blocks to; of small items as many as others have in flight, which is Ray's least size of a block, 1 MiB; or in bulk."""
SETTLE_S = 2.0
"""From the first result on, until the stages have filled what is between them."""

Batch = dict[str, npt.NDArray[Any]]


class Prepared:
    """Items of `Source` by row number, made once in each process."""

    _made: dict[str, Prepared] = {}  # noqa: RUF012  # one for all tasks of a process

    def __init__(self, job: Job) -> None:
        period = job.workload.period
        self.items, self.expected = Source(job.workload, period).take(period)
        self.period = period

    @classmethod
    def of(cls, job: Job) -> Prepared:
        if job.kind.name not in cls._made:
            cls._made[job.kind.name] = cls(job)
        return cls._made[job.kind.name]


def _produce(batch: Batch, job: Job) -> Batch:
    prepared = Prepared.of(job)
    return {"id": batch["id"], "x": prepared.items[batch["id"] % prepared.period]}


class Mean:
    def __init__(self, job: Job) -> None:
        self._compute, self._outputs = job.load(), job.workload.outputs

    def __call__(self, batch: Batch) -> Batch:
        y = np.empty((len(batch["x"]), self._outputs), np.float32)
        self._compute(batch["x"], y)
        return {"id": batch["id"], "y": y}


class DataDriver:
    """Takes results of a stream that goes on between windows."""

    def __init__(self, job: Job, address: str, producers: int, block: int) -> None:
        import ray
        import ray.data

        ray.init(address=address, log_to_driver=False)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        self._ray, self._prepared = ray, Prepared.of(job)
        dataset = (
            ray.data.range(BLOCKS * block, override_num_blocks=BLOCKS)
            .map_batches(_produce, fn_args=(job,), batch_size=None, num_cpus=1, concurrency=producers)
            .map_batches(
                Mean, fn_constructor_args=(job,), batch_size=None, zero_copy_batch=True, num_cpus=2, concurrency=1
            )
        )
        self._batches = iter(dataset.iter_batches(batch_size=None, batch_format="numpy"))
        next(self._batches)
        self.run(time.monotonic() + SETTLE_S)

    def run(self, until_s: float) -> int:
        done = 0
        while time.monotonic() < until_s:
            batch = next(self._batches)
            check(batch["y"], self._prepared.expected[batch["id"] % self._prepared.period])
            done += len(batch["id"])
        return done

    def exchange(self, items: object, expected: object) -> None:
        raise NotImplementedError("Ray Data takes no single items; leave it out of the latency kind")

    def close(self) -> None:
        del self._batches
        self._ray.shutdown()


class RayData(Contestant):
    name = "ray-data"
    modules = ("ray", "pyarrow")
    kinds: ClassVar[tuple[str, ...]] = ("images", "small")
    least_window_s = 4.0  # results come in blocks, and the window begins with some that were made before
    copies = 2
    why = "to an Arrow block, and into the object store, where the actor reads"

    block_small: ClassVar[int] = BLOCK_SMALL

    @contextlib.contextmanager
    def serve(self, job: Job) -> Iterator[None]:  # noqa: ARG002  # the interface's
        with cluster() as self._address:
            yield

    @contextlib.contextmanager
    def producers(self, job: Job, count: int) -> Iterator[Connects]:
        block = job.pick(images=BLOCK_IMAGES, small=self.block_small)
        yield [partial(DataDriver, job, self._address, count, block)]


class RayDataBulk(RayData):
    name = "ray-data-bulk"
    kinds = ("small",)
    note = f"Ray Data with {BLOCK_BULK:,} items a block: no bar for items that come one by one"
    bar = False
    block_small = BLOCK_BULK
