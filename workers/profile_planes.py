"""What profiles on the CPU and on GPUs have in common: batch sizes, planes with something in them, timing in series."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from trtpool.ipc.arena import create_segment, format_bytes, map_segment
from trtpool.ipc.errors import ArenaTooLarge, ConfigError
from trtpool.ipc.layout import ModelPlan, plan, plane_array, row_items
from trtpool.ipc.profiling import Phases, ProfileRequest, spread
from trtpool.ipc.tensors import ModelSpec, TensorSpec

from .engine import Planes, Rows

Say = Callable[[str], None]

LEAST_RUNS: Final = 10
"""Batches that are measured however long they take."""

MOST_RUNS: Final = 50_000
"""And at most, however short: the 99th percentile needs no more, and each is kept."""

WARM_UP_RUNS: Final = 3


def batches_of(spec: ModelSpec, request: ProfileRequest, say: Say) -> tuple[int, ...]:
    """The batch sizes of `request` that the model takes, rising.

    Raises:
        ConfigError: it takes none, or with `strict` not all of them.
    """
    asked = sorted(set(request.batches))
    limit = spec.batch_limit
    taken = tuple(items for items in asked if not limit or items <= limit)
    if taken != tuple(asked):
        if request.strict or not taken:
            raise ConfigError(
                f"model {spec.name!r} takes batches of at most {limit}, so --batch {asked[-1]} is too large; lower it, "
                f"or {'build the plan' if request.engine.device == 'gpu' else 'export the model'} for larger batches"
            )
        left_out = ", ".join(map(str, asked[len(taken) :]))
        say(f"batches of {left_out} are left out, since the model takes at most {limit}")
    if taken[0] < spec.batch_least:
        say(f"batches of fewer than {spec.batch_least} are filled up to that, so they cost as much")
    return taken


def rows_of(items: int, first: int = 0) -> tuple[Rows, ...]:
    """A batch that is one run of slots of one item, from slot `first`."""
    return (Rows(first, items, items),)


def batch_bytes(tensors: tuple[TensorSpec, ...], items: int) -> int:
    """Bytes of a batch of `items` items."""
    return sum(row_items(tensor, items) * tensor.item_bytes for tensor in tensors)


# ---------------------------------------------------------------------------------- memory


class Arena(NamedTuple):
    """Planes as a pool has them: slots of one item in a memfd, which has `size` bytes at `address`."""

    fd: int
    address: int
    size: int
    inputs: Planes
    outputs: Planes


@contextlib.contextmanager
def arena(spec: ModelSpec, slots: int) -> Iterator[Arena]:
    """An arena for one model, its inputs filled; its memory goes with the last array over it.

    Raises:
        ArenaTooLarge: there is not so much memory.
    """
    layout = plan([ModelPlan(spec, slots, 1, slots)])
    try:
        fd = create_segment(layout.segment_bytes)
    except ArenaTooLarge as error:
        raise ArenaTooLarge(
            f"the batches to be profiled need {format_bytes(layout.segment_bytes)}, which is more than can be had "
            "here; profile smaller ones with --batch, or with fewer --lanes"
        ) from error
    try:
        segment = map_segment(fd, layout.segment_bytes)
        (model,) = layout.models
        inputs, outputs = (
            {plane.spec.name: plane_array(segment, model, plane) for plane in planes}
            for planes in (model.inputs, model.outputs)
        )
        fill(spec, inputs)
        yield Arena(fd, np.frombuffer(segment, np.uint8).ctypes.data, layout.segment_bytes, inputs, outputs)
    finally:
        os.close(fd)


def ordinary(spec: ModelSpec, slots: int) -> tuple[Planes, Planes]:
    """Planes in memory of this process's own, which nobody pins; inputs, filled, and outputs."""
    inputs, outputs = (
        {
            # Written, not `zeros`: pages that were never touched are all one page.
            tensor.name: np.full((slots, row_items(tensor, 1), *tensor.shape), 0, tensor.numpy_dtype)
            for tensor in tensors
        }
        for tensors in (spec.inputs, spec.outputs)
    )
    fill(spec, inputs)
    return inputs, outputs


def fill(spec: ModelSpec, inputs: Planes) -> None:
    """Put noise into the inputs: floats from 0 to 1, any bytes and truth values, and zeros for other integers.

    Those may be indices, of which only 0 is sure to be one.  All slots have the same item.
    """
    random = np.random.default_rng(0)
    for tensor in spec.inputs:
        inputs[tensor.name][...] = _noise(tensor, random)


def _noise(tensor: TensorSpec, random: np.random.Generator) -> npt.NDArray[Any]:
    dtype = tensor.numpy_dtype
    if tensor.dtype == "uint8":
        return random.integers(0, 256, tensor.shape, np.uint8)
    if tensor.dtype == "bool":
        return np.asarray(random.integers(0, 2, tensor.shape), np.bool_)
    if dtype.kind in "iu":
        return np.zeros(tensor.shape, dtype)
    return np.asarray(random.random(tensor.shape, np.float32)).astype(dtype)


# ---------------------------------------------------------------------------------- time


class Sample(NamedTuple):
    """One batch, in nanoseconds; see `Phases`."""

    enqueue_ns: int
    copy_in_ns: int
    compute_ns: int
    copy_out_ns: int
    end_to_end_ns: int


def in_series(run: Callable[[], Sample], seconds: float) -> Phases:
    """Run batches one after the other for `seconds`, and at least `LEAST_RUNS` of them."""
    for _ in range(WARM_UP_RUNS):
        run()
    samples: list[Sample] = []
    until = time.monotonic() + seconds
    while len(samples) < LEAST_RUNS or (time.monotonic() < until and len(samples) < MOST_RUNS):
        samples.append(run())
    return Phases(*(spread(times_ns) for times_ns in zip(*samples, strict=True)))
