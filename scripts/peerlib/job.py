"""What contestants are measured at."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from scripts.benchlib.workload import IMAGES, SMALL, Array, Compute, Workload, load


@dataclass(frozen=True)
class Kind:
    """One kind of work.

    Attributes:
        name: for the command line.
        workload: the items.
        producers: the numbers of producers that are tried; none for what goes one item at a time.
    """

    name: str
    workload: Workload
    producers: tuple[int, ...]


KINDS: Final = {
    kind.name: kind
    for kind in (Kind("images", IMAGES, (1, 4)), Kind("small", SMALL, (1, 4)), Kind("latency", SMALL, ()))
}


@dataclass(frozen=True)
class Job:
    """What a contestant is started for.

    Attributes:
        kind: the work.
        model: the ONNX file that computes it.
        engine: "numpy" or "onnxruntime": what computes in a peer's worker.
        folder: for files of the contestant's own; removed afterwards.
    """

    kind: Kind
    model: Path
    engine: str
    folder: Path

    @property
    def workload(self) -> Workload:
        return self.kind.workload

    @property
    def one_at_a_time(self) -> bool:
        return not self.kind.producers

    def pick(self, images: int, small: int) -> int:
        """The figure for this kind of item; 1 if items go one at a time."""
        return 1 if self.one_at_a_time else images if self.kind.name == "images" else small

    def load(self) -> Compute:
        return load(self.engine, self.model)


def absent(modules: Sequence[str]) -> str:
    """Why the first of `modules` that cannot be found is missing; empty if all are there."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return f"no module {module}: pip install '.[peers]' in a clone; what has no wheel here stays missing"
    return ""


UNSTACKED_BYTES: Final = 64 << 10


def answer(compute: Compute, job: Job, items: Sequence[Array]) -> Array:
    """What a server's worker does with a batch that comes as a list: ``(len(items), outputs)``.

    Small items are stacked, as frameworks do; stacking large ones costs more than it saves.
    """
    y = np.empty((len(items), job.workload.outputs), np.float32)
    if job.workload.item_bytes < UNSTACKED_BYTES and len(items) > 1:
        compute(np.stack(items), y)
    else:
        for row, item in enumerate(items):
            compute(item[None], y[row : row + 1])
    return y
