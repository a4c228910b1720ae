"""Prepared inputs for any model, the results that they must give, and processes that only write them."""

from __future__ import annotations

import functools
import mmap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SAMPLES: Final = 8
"""Numbers of each slot's result that are looked at."""
TOLERANCE: Final = 0.02
"""Of the largest number; a batch of another size may run other kernels, in float16."""
GOLDEN: Final = 0.6180339887498949


class Tensor(NamedTuple):
    """An input or output; `shape` is that of one item."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Load:
    """How producers, or whoever stands in for them, write.

    Attributes:
        inputs: what one item is.
        items_per_slot: items in a slot.
        run: slots written at a time.
        period: slots that differ; a prime, so that a slot which is used again gets something else than before.
        seed: of the random numbers.
    """

    inputs: tuple[Tensor, ...]
    items_per_slot: int
    run: int
    period: int
    seed: int = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of the inputs of one slot."""
        return self.items_per_slot * sum(tensor.item_bytes for tensor in self.inputs)

    @property
    def run_items(self) -> int:
        return self.run * self.items_per_slot


def prepare(tensor: Tensor, items_per_slot: int, slots: int, seed: int) -> Array:
    """`slots` different random slots, shape ``(slots, items_per_slot, *shape)``, without an axis of length 1 for items.

    They share their noise and differ in what it is added to, so that a model which averages still tells them apart.
    """
    lead = (items_per_slot,) if items_per_slot > 1 else ()
    noise = np.random.default_rng(seed).random((*lead, *tensor.shape), dtype=np.float32)
    dtype = np.dtype(tensor.dtype)
    out = np.empty((slots, *noise.shape), dtype)
    for slot in range(slots):
        level = slot * GOLDEN % 1  # neighbours far apart
        if dtype.kind == "f":
            out[slot] = 2 * noise + (2 * level - 2)
        elif dtype.kind == "b":
            out[slot] = noise < (slot + 1) / (slots + 1)
        else:
            out[slot] = 127 * noise + 128 * level if dtype.kind == "u" else 63 * noise + 64 * level
    return out


class Source:
    """Prepared slots, handed out round and round."""

    def __init__(self, load: Load) -> None:
        self.rows = load.period + load.run
        self._arrays = {
            tensor.name: prepare(tensor, load.items_per_slot, self.rows, load.seed + number)
            for number, tensor in enumerate(load.inputs)
        }
        self._period, self._at = load.period, 0

    def take(self, count: int) -> slice:
        """The next `count` rows."""
        here = slice(self._at, self._at + count)
        self._at = (self._at + count) % self._period
        return here

    def write(self, target: Mapping[str, Array], rows: slice) -> None:
        """Write prepared rows to where they go: arrays of shape ``(count, *slot)``, by tensor name."""
        for name, array in self._arrays.items():
            np.copyto(target[name], array[rows])

    def row(self, row: int) -> dict[str, Array]:
        """One slot's inputs."""
        return {name: array[row] for name, array in self._arrays.items()}


def sample(output: Array, slots: int) -> npt.NDArray[np.float64]:
    """A few numbers of each slot's result, shape ``(slots, SAMPLES)`` or less."""
    flat = output.reshape(slots, -1)
    return flat[:, _picks(flat.shape[1])].astype(np.float64)


@functools.cache
def _picks(numbers: int) -> npt.NDArray[np.intp]:
    return np.linspace(0, numbers - 1, min(SAMPLES, numbers)).astype(np.intp)


class Expected:
    """The results that prepared rows must give, sampled one after the other beforehand.

    Attributes:
        told_apart: the fraction of pairs that differ by more than the tolerance; of others a mix-up goes unseen.
    """

    def __init__(self, samples: Sequence[npt.NDArray[np.float64]]) -> None:
        self._samples = np.concatenate(samples)
        largest = float(np.abs(self._samples).max(initial=0.0))
        if not np.isfinite(self._samples).all():
            raise ValueError("the model's results are not finite; is the plan sound?")
        self._tolerance = TOLERANCE * largest + 1e-9
        count = len(self._samples)
        apart = np.abs(self._samples[:, None] - self._samples[None]).max(axis=2) > self._tolerance
        self.told_apart = float(apart.sum()) / max(1, count * (count - 1))

    def check(self, output: Array, rows: slice) -> None:
        """Compare a result with that of the prepared rows.

        Raises:
            ValueError: it is another's, or of nobody.
        """
        want = self._samples[rows]
        error = np.abs(sample(output, len(want)) - want).max()
        if not error <= self._tolerance:  # NaN is wrong too
            raise ValueError(f"wrong result for prepared slots {rows.start} to {rows.stop}: off by {error:.3g}")


class Pace:
    """When to do the next of what is to be done every `interval_s`; lost time is caught up with, 5 at most."""

    def __init__(self, interval_s: float, now_s: float) -> None:
        self._interval_s, self._due_s = interval_s, now_s

    def wait_s(self, now_s: float) -> float:
        """Seconds to wait before the next."""
        self._due_s = max(self._due_s, now_s - 5 * self._interval_s)
        wait_s = max(0.0, self._due_s - now_s)
        self._due_s += self._interval_s
        return wait_s


class Written(NamedTuple):
    """What a writer did: items, and seconds in all and of these in copying."""

    items: int
    took_s: float
    writing_s: float


class Writer:
    """A producer without a pool: writes prepared items round a ring of private memory, at a given rate.

    The ring is shared memory, as the arena is, so that its pages are of the same kind.

    Args:
        load: what to write.
        slots: of the ring.
        rate: items/s, read at the start of each run; 0: as fast as it goes.
    """

    def __init__(self, load: Load, slots: int, rate: Synchronized[float]) -> None:
        self._load, self._rate = load, rate
        self._source = Source(load)
        self._runs = max(2, slots // load.run)
        lead = (load.items_per_slot,) if load.items_per_slot > 1 else ()
        self._ring = {}
        for tensor in load.inputs:
            shape = (self._runs, load.run, *lead, *tensor.shape)
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
            self._ring[tensor.name] = np.frombuffer(mmap.mmap(-1, size), tensor.dtype).reshape(shape)
        for array in self._ring.values():
            array[...] = 1  # its pages are there before the first window
        self._at = 0

    def run(self, until_s: float) -> Written:
        load, rate = self._load, self._rate.value
        began_s = now_s = time.monotonic()
        pace = Pace(load.run_items / rate if rate else 0.0, now_s)
        items, writing_s = 0, 0.0
        while now_s < until_s:
            if wait_s := pace.wait_s(now_s):
                time.sleep(min(wait_s, until_s - now_s))
                now_s = time.monotonic()
                if now_s >= until_s:
                    break
            self._source.write({name: ring[self._at] for name, ring in self._ring.items()}, self._source.take(load.run))
            self._at = (self._at + 1) % self._runs
            items += load.run_items
            before_s, now_s = now_s, time.monotonic()
            writing_s += now_s - before_s
        return Written(items, now_s - began_s, writing_s)

    def close(self) -> None: ...
