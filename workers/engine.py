"""The engine protocol: what a worker needs from whatever runs the model.

An engine is loaded, bound once to the planes of its model, and then told which rows to
run.  It reads its inputs from those rows and writes its outputs to those rows; nothing
is passed in and nothing is returned but times.

One contract suite (`tests/workers/test_engine_contract.py`) runs against every engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from trtpool.ipc import messages as m
from trtpool.ipc.tensors import ModelSpec

Shapes = tuple[tuple[int, ...], ...]


class Rows(NamedTuple):
    """Adjacent slots to run: `count` slots from `first`, holding `items` items.

    All slots are full but the last, so the items are ``planes[first].reshape(-1)`` items
    0 to `items`, dense.
    """

    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs of it
    items: int


Batch = Sequence[Rows | m.Rows]
"""What to run, in this order; the rows of a message serve as they came."""


class Times(NamedTuple):
    """What one batch cost, in nanoseconds; phases an engine does not have are 0.

    `gathered_items` counts the items that were copied through scratch memory, because many
    scattered small rows cost more as calls than as one copy (CPU engine only).  `shapes` are those of one item of each
    output that varies, in the order of `ModelSpec.varying`.  `filled_items` counts how often the last item was copied
    to the device again, to fill the batch up (GPU engine only, where the shape of an output depends on the data).
    """

    copy_in_ns: int
    compute_ns: int
    copy_out_ns: int
    gathered_items: int = 0
    shapes: Shapes = ()
    filled_items: int = 0


Planes = Mapping[str, npt.NDArray[Any]]
"""Tensor name to plane, an array of shape ``(slots, items_per_slot, *item_shape)``, C-contiguous.

A shared tensor's has 1 in place of `items_per_slot`."""


class Engine(Protocol):
    """A loaded model on one device."""

    @property
    def spec(self) -> ModelSpec: ...

    def bind(self, inputs: Planes, outputs: Planes, max_batch: int) -> None:
        """Bind to the planes of the model, once, and allocate all scratch memory.

        Raises:
            ValueError: a plane does not have the shape, dtype or layout that `spec` asks for.
        """

    def warm_up(self, items: int) -> None:
        """Do what the first batch of `items` items costs more than later ones; planes stay as they are.

        Raises:
            EngineError: the engine refuses a batch of zeros.
        """

    def run(self, batch: Batch, shapes: Shapes = ()) -> Times:
        """Run the items of `batch` (at most `max_batch`) and return when their outputs are written.

        Args:
            batch: the rows, whose shared inputs are equal.
            shapes: of every item, for each input that varies, in the order of `ModelSpec.varying`.  Items that are
                smaller than the largest lie dense from their row's start, and so are outputs written.

        Raises:
            EngineError: the engine failed; the outputs of the batch are undefined.
        """

    def close(self) -> None:
        """Free the device memory.  Calling it again does nothing."""


class LaneEngine(Engine, Protocol):
    """An engine that has several batches in flight, each on a lane of its own.

    `run` is `launch` on lane 0, `block`, and `poll`.
    """

    @property
    def lanes(self) -> int:
        """How many batches it can have in flight; known after `bind`."""

    def launch(self, lane: int, batch: Batch, shapes: Shapes = ()) -> None:
        """Enqueue a batch on a lane that is free, and return at once; for `shapes` see `run`.

        Raises:
            EngineError: the batch was refused or failed; nothing of it runs any more.
        """

    def poll(self, lane: int) -> Times | None:
        """The times of the batch on `lane` if it has ended, with its outputs written; the lane is free then.

        None: it runs.

        Raises:
            EngineError: it failed; the outputs are undefined.
        """

    def ended(self, lane: int) -> bool:
        """Whether the batch on `lane` has ended, as `block` waits for; nothing else changes.

        Raises:
            EngineError: it failed.
        """

    def block(self, lane: int) -> None:
        """Wait until the batch on `lane` has ended, one that was launched meanwhile included.

        Other threads run meanwhile, and may call all else.

        Raises:
            EngineError: it failed, as `poll` says too.
        """


class EngineError(Exception):
    """The engine refused or failed a batch; the text is the engine's own."""


class BatchRefused(EngineError):
    """The engine refused this batch, or its answer does not fit the rows; batches on other lanes are as they were."""
