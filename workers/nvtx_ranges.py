"""NVTX ranges, so that NVIDIA's profilers show which batch copies and kernels belong to.

Only in a worker that a profiler has attached to: `nsys profile trtpool start ...` tells so by the environment, which
workers inherit.  Any other worker has a `LaneLoop` as it is, and does not even import `nvtx`.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from trtpool.ipc import messages as m

from .joining import Job
from .lane_loop import LaneLoop

log = logging.getLogger("trtpool.worker")

DOMAIN: Final = "trtpool"

_SIGNS: Final = ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID")
"""What a profiler sets in the environment: the library that NVTX calls, and Nsight Systems its session."""


class MarkedLaneLoop(LaneLoop):
    """A loop whose launches are ranges in the domain "trtpool", such as "batch 7.0: 8 items of det".

    The numbers are the batch's and the attempt's, as in logs and traces.
    """

    nvtx: Any
    """The package `nvtx`."""

    def _launch(self, job: Job, rows: Sequence[m.Rows]) -> None:
        run = job.run
        items, name = sum(one.items for one in rows), self._joined.models[run.model].spec.name
        with self.nvtx.annotate(f"batch {run.batch}.{run.attempt}: {items} items of {name}", domain=DOMAIN):
            super()._launch(job, rows)


def loop_type(environ: Mapping[str, str] = os.environ) -> type[LaneLoop]:
    """The loop for a worker: with ranges if there is a profiler to see them, and `nvtx` is installed."""
    if not any(environ.get(sign) for sign in _SIGNS):
        return LaneLoop
    try:
        nvtx = importlib.import_module("nvtx")
    except ImportError:
        log.warning("a profiler is attached and would show batches by name with nvtx: pip install 'trtpool[nvtx]'")
        return LaneLoop
    return type("MarkedLaneLoop", (MarkedLaneLoop,), {"nvtx": nvtx})
