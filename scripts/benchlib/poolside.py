"""The pool's side, written as its users would write it.

========= =======================================================================
map       `Client.map`, one item a slot, the window full
runs      `Client.lease_many`: several slots written and submitted at a time
single    `Client.lease`: one slot, its result awaited before the next
========= =======================================================================
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

import trtpool

from .baselines import Setup
from .crew import STUCK_S, Counters, Driver, Started, Stream
from .workload import Array, Source, check

Expected = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PoolSetup:
    """A `Setup`, and how the pool holds its items.

    Attributes:
        base: its `slots * count` is what the arena holds, in items.
        style: "map", "runs" or "single".
        items_per_slot: a divisor of `base.count`.
        max_batch: items.
        transport: what carries the messages.
        busy_poll: all processes spin instead of sleeping.
    """

    base: Setup
    style: str
    max_batch: int
    items_per_slot: int = 1
    transport: str = "lifeline"
    busy_poll: bool = False

    @property
    def slots(self) -> int:
        return self.base.slots * self.base.count // self.items_per_slot

    @property
    def run(self) -> int:
        """Slots leased at once."""
        return self.base.count // self.items_per_slot

    @property
    def window(self) -> int:
        """Messages in flight for each producer: all of them together hold at most half of the slots.

        One client alone may hold three quarters, and small runs are granted in advance only while a quarter is free.
        """
        return max(1, min(self.base.window, self.slots // 2 // self.run // self.base.producers))


class RunsTransport:
    """Leases `run` slots for each message; they come as one lease or, in a crowd, as several."""

    def __init__(self, client: Any, run: int) -> None:
        self._client, self._run = client, run
        self._pending: deque[list[tuple[Any, Any, int]]] = deque()

    def send(self, items: Array) -> None:
        sent, at = [], 0
        for lease in self._client.lease_many(self._run):
            count = len(items) // self._run * lease.count
            plane = lease.inputs["x"]
            np.copyto(plane, items[at : at + count].reshape(plane.shape))
            del plane
            sent.append((lease, lease.submit(), count))
            at += count
        self._pending.append(sent)

    def collect(self, expected: Expected) -> None:
        at = 0
        for lease, submitted, count in self._pending.popleft():
            check(submitted.result(timeout_s=STUCK_S).outputs["y"], expected[at : at + count])
            lease.release()
            at += count

    def close(self) -> None:
        self._client.close()


class Mapper:
    """Drives `Client.map`; reports items done."""

    def __init__(self, client: Any, source: Source, window: int) -> None:
        self._client, self._source, self._window = client, source, window

    def run(self, until_s: float) -> int:
        def pairs() -> Iterator[tuple[Array, Expected]]:
            while time.monotonic() < until_s:
                yield self._source.take(1)

        def write(pair: tuple[Array, Expected], inputs: Mapping[str, Array]) -> None:
            np.copyto(inputs["x"], pair[0][0])

        done = 0
        for (_, expected), result in self._client.map(write, pairs(), window=self._window):
            check(result.outputs["y"], expected)
            done += 1
        return done

    def exchange(self, items: Array, expected: Expected) -> None:
        with self._client.lease() as slot:
            np.copyto(slot.inputs["x"], items[0])
            check(slot.submit().result(timeout_s=STUCK_S).outputs["y"], expected)

    def close(self) -> None:
        self._client.close()


class Singles(Mapper):
    """One item at a time, its result awaited; reports items done."""

    def run(self, until_s: float) -> int:
        done = 0
        while time.monotonic() < until_s:
            self.exchange(*self._source.take(1))
            done += 1
        return done


def _connect(setup: PoolSetup, handle: Any) -> Driver:
    client = handle.connect()
    source = Source(setup.base.workload, setup.base.count)
    if setup.style == "runs":
        return Stream(RunsTransport(client, setup.run), source, setup.window, setup.base.count)
    return (Mapper if setup.style == "map" else Singles)(client, source, setup.window)


@contextlib.contextmanager
def pool(setup: PoolSetup) -> Iterator[Started]:
    """Start a pool of one CPU worker with one thread."""
    with (
        trtpool.Pool(
            model=str(setup.base.model), device="cpu", workers=1, threads=1, slots=setup.slots,
            items_per_slot=setup.items_per_slot, transport=setup.transport, max_batch=setup.max_batch,
            busy_poll=setup.busy_poll,
        ) as running,
        running.handle().connect() as client,
    ):  # fmt: skip

        def counters() -> Counters:
            model = client.status().models[0]
            return Counters(model.items, model.batches, model.runs)

        yield Started([partial(_connect, setup, running.handle())] * setup.base.producers, counters)
