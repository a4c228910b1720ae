"""What `trtpool profile` asks its child, and the figures that come back.

``python -m trtpool.workers.profile`` reads a `ProfileRequest` as JSON on standard input and writes one `ProfileLine` of
JSON after the other to standard output, the last of them with `measured` or `refusal`.

One batch, and what is measured of it::

    CPU   |- enqueue -|                                    handing it over, until the call returns
    GPU       |--- copy in ---|---- compute ----|- copy out -|     by events on the stream
          |---------------------- end to end ----------------|     until the outputs can be read

All times are nanoseconds and all sizes bytes, so bytes / ns are GB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np

from .settings import EngineSettings, ModelSource, Refusal
from .tensors import ModelSpec

Items = Annotated[int, msgspec.Meta(ge=1, le=2**24)]


class ProfileRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Standard input of `python -m trtpool.workers.profile`, as JSON.

    Attributes:
        source, engine: the model, and how a pool would load it.
        batches: batch sizes in items.
        strict: refuse a size that the model does not take; else leave it out.
        seconds: how long each measurement goes on, after the first few batches.
        cpus: CPUs that are a worker's share.
    """

    source: ModelSource
    engine: EngineSettings
    batches: Annotated[tuple[Items, ...], msgspec.Meta(min_length=1, max_length=64)]
    strict: bool = False
    seconds: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 1.0
    cpus: Annotated[int, msgspec.Meta(ge=1)] = 1


class Spread(msgspec.Struct, frozen=True):
    """How times are spread, in nanoseconds; `count` is how many there are."""

    count: int
    min_ns: float
    mean_ns: float
    median_ns: float
    p90_ns: float
    p95_ns: float
    p99_ns: float
    deviation_ns: float

    @property
    def variation(self) -> float:
        """Coefficient of variation: deviation / mean."""
        return self.deviation_ns / self.mean_ns if self.mean_ns else 0.0


def spread(times_ns: Sequence[int]) -> Spread:
    """Of at least one time."""
    array = np.asarray(times_ns, np.float64)
    median, p90, p95, p99 = map(float, np.percentile(array, (50, 90, 95, 99)))
    return Spread(len(array), float(array.min()), float(array.mean()), median, p90, p95, p99, float(array.std()))


class Phases(msgspec.Struct, frozen=True):
    """Batches of one size run one after the other, each alone; see the module.

    On the CPU nothing is copied, and `enqueue` is what a call costs besides the engine.
    """

    enqueue: Spread
    copy_in: Spread
    compute: Spread
    copy_out: Spread
    end_to_end: Spread


class Overlap(msgspec.Struct, frozen=True):
    """Batches of one size with `lanes` of them in flight at once: `batches` ended in `elapsed_ns`."""

    lanes: int
    batches: int
    elapsed_ns: int

    @property
    def period_ns(self) -> float:
        """From one batch's end to the next, on average."""
        return self.elapsed_ns / self.batches


class BatchFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one batch size.

    Attributes:
        items: the size.
        in_bytes, out_bytes: of a batch, each way.
        graph: whether `series`, `pageable` and `overlaps` launch a CUDA graph.
        series: as a pool runs it, one batch at a time.
        overlaps: the same with several in flight, by rising number of lanes; empty on the CPU.
        plain: in series without a graph; None if there is none to leave out.
        plain_overlap: `plain` with the most lanes of `overlaps`.
        pageable: in series from memory that is not pinned; None on the CPU.
        in_place: in series with the engine reading its inputs from pinned memory, without a graph and without copies
            out; `copied` is the same with inputs copied.  None where that was not measured.
        one_thread: in series with one thread in the engine's call; None on a GPU, or where that is all there is.
    """

    items: int
    in_bytes: int
    out_bytes: int
    series: Phases
    graph: bool = False
    overlaps: tuple[Overlap, ...] = ()
    plain: Phases | None = None
    plain_overlap: Overlap | None = None
    pageable: Phases | None = None
    one_thread: Phases | None = None
    copied: Phases | None = None
    in_place: Phases | None = None


class BusPoint(msgspec.Struct, frozen=True):
    """A bare copy of `size` bytes of pinned memory, alone: its median each way."""

    size: int
    in_ns: float
    out_ns: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What the child found.

    Attributes:
        spec: the model.
        device: the GPU's name, or "CPU".
        lanes: batches that a pool with these settings has in flight; 1 on the CPU.
        threads: of an engine call on the CPU; 0 on a GPU.
        cpus: as in the request.
        bus: bare copies by rising size; empty on the CPU.
        batches: by rising size.
    """

    spec: ModelSpec
    device: str
    lanes: int
    threads: int
    cpus: int
    batches: tuple[BatchFigures, ...]
    bus: tuple[BusPoint, ...] = ()


class ProfileLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the child's answer, and exactly one of these: what it does now, or the outcome."""

    said: str | None = None
    measured: Measured | None = None
    refusal: Refusal | None = None
