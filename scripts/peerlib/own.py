"""trtpool, with one-item slots in runs and with 64 items a slot; the code is that of `benchlib.poolside`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

from scripts.benchlib.baselines import Setup
from scripts.benchlib.cases import CHUNK, IMAGE_SLOTS, SMALL_ITEMS

from .contestant import Connects, Contestant
from .job import Job

RUN_IMAGES = 8


class Runs(Contestant):
    """Producers lease, write and submit runs of one-item slots; one at a time it is single leases.

    Its engine is always onnxruntime, since the pool runs models: the same means, by a graph of one ReduceMean.

    Attributes:
        slots_a_run: slots of small items that are leased and submitted at once.
        items_per_slot: for small items.
        room: how many small items the arena holds.
        busy_poll: all processes spin, one at a time.
    """

    name = "trtpool"
    modules = ("trtpool", "onnxruntime")
    copies = 0
    why = "the worker reads the slot that the producer wrote; scattered rows of 1 KB may be gathered first: 1"
    own = True
    slots_a_run: ClassVar[int] = CHUNK
    items_per_slot: ClassVar[int] = 1
    room: ClassVar[int] = SMALL_ITEMS
    max_batch: ClassVar[int] = 256
    busy_poll: ClassVar[bool] = False

    @contextlib.contextmanager
    def producers(self, job: Job, count: int) -> Iterator[Connects]:
        from scripts.benchlib.poolside import PoolSetup, pool  # imports trtpool

        if job.one_at_a_time:
            setup = PoolSetup(
                Setup(job.workload, job.model, count, 64), "single", max_batch=16, busy_poll=self.busy_poll
            )
        else:
            items = job.pick(images=RUN_IMAGES, small=self.slots_a_run * self.items_per_slot)
            messages = job.pick(images=IMAGE_SLOTS, small=self.room) // items
            base = Setup(job.workload, job.model, count, messages, items)
            per_slot = job.pick(images=1, small=self.items_per_slot)
            setup = PoolSetup(base, "runs", job.pick(images=RUN_IMAGES, small=self.max_batch), per_slot)
        with pool(setup) as started:
            yield started.connects


class ShortRuns(Runs):
    name = "trtpool-16"
    kinds = ("small",)
    slots_a_run = 16
    note = "runs of 16 one-item slots, where trtpool has runs of 64"


class Slots64(Runs):
    name = "trtpool-64"
    kinds = ("small",)
    slots_a_run = 8
    items_per_slot = CHUNK
    room = 16 * 8 * CHUNK
    max_batch = 1024
    note = f"items_per_slot={CHUNK}, runs of 8 slots"


class Spinning(Runs):
    name = "trtpool-spin"
    kinds = ("latency",)
    busy_poll = True
    note = "with --busy-poll: broker, worker and producer each keep a CPU busy, and need three"
