"""Warm-up: every batch size runs once before a worker is ready, so that no request is the first of its kind.

The first run of a size costs more than those after it: onnxruntime plans its memory, TensorRT chooses and loads what it
needs, and a lane captures a CUDA graph.  The largest size goes first, since memory then grows once, and those that are
left when the time is up are the least likely.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Final

from .engine import Engine, EngineError

log = logging.getLogger("trtpool.worker")

WARM_UP_S: Final = 5.0
"""No run is begun later than this: a worker that starts again must not stay away for long."""

MAX_SIZES: Final = 64
"""Most sizes of a model that are warmed up: as many as a lane keeps graphs of."""


def sizes(max_batch: int, least: int = 1) -> list[int]:
    """Batch sizes to warm up: the largest, then powers of two, then the others from the smallest on.

    Those below `least` are filled up to it, and so are none of their own.
    """
    powers = [1 << power for power in range(max_batch.bit_length())]
    others = range(1, min(max_batch, MAX_SIZES))
    distinct = (size for size in [max_batch, *powers, *others] if size >= min(least, max_batch))
    return list(dict.fromkeys(distinct))[:MAX_SIZES]


def warm_up(engines: Sequence[tuple[Engine, int]], clock: Callable[[], float] = time.monotonic) -> None:
    """Have engines, each with its largest batch, run every size; all models' likely sizes first.

    A model that refuses a batch of zeros is left as it is: real inputs may suit it better.
    """
    until = clock() + WARM_UP_S
    refused: set[int] = set()
    for same_rank in zip_longest(*(sizes(max_batch, engine.spec.batch_least) for engine, max_batch in engines)):
        for number, ((engine, _), items) in enumerate(zip(engines, same_rank, strict=True)):
            if items is None or number in refused:
                continue
            if clock() >= until:
                log.info("not every batch size was warmed up within %g s", WARM_UP_S)
                return
            try:
                engine.warm_up(items)
            except EngineError as error:
                refused.add(number)
                log.info("model %s is not warmed up, since it refuses zeros: %s", engine.spec.name, error)
