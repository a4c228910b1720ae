"""NVTX ranges, so that NVIDIA's profilers show which batch copies and kernels belong to.

Only in a worker that a profiler has attached to: `nsys profile trtpool start ...` tells so by the environment, which
workers inherit.  Any other worker has a `LaneLoop` as it is, and does not even import `nvtx`.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from trtpool.ipc import messages as m

if TYPE_CHECKING:
    from .joining import Job
    from .lane_loop import LaneLoop

log = logging.getLogger("trtpool.worker")

DOMAIN: Final = "trtpool"

_SIGNS: Final = ("NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID")
"""What a profiler sets in the environment: the library that NVTX calls, and Nsight Systems its session."""


def loop_type(plain: type[LaneLoop], environ: Mapping[str, str] = os.environ) -> type[LaneLoop]:
    """The loop for a worker: `plain`, or with ranges if there is a profiler to see them, and `nvtx` is installed."""
    if not any(environ.get(sign) for sign in _SIGNS):
        return plain
    try:
        nvtx = importlib.import_module("nvtx")
    except ImportError:
        log.warning("a profiler is attached and would show batches by name with nvtx: pip install 'trtpool[nvtx]'")
        return plain
    return _marked(plain, nvtx)


def _marked(plain: type[LaneLoop], nvtx: Any) -> type[LaneLoop]:
    class MarkedLaneLoop(plain):  # type: ignore[valid-type, misc]  # a base that is told at run time
        """A loop whose launches are ranges in the domain "trtpool", such as "8 items of det".

        The payload is the batch's number in logs and traces.  The name is without it since nvtx, and the profiler, keep
        each name that they meet (https://nvidia.github.io/NVTX/python/reference.html).
        """

        def _launch(self, job: Job, rows: Sequence[m.Rows]) -> None:
            run = job.run
            name = f"{sum(one.items for one in rows)} items of {self._joined.models[run.model].spec.name}"
            if run.attempt:
                name += f", attempt {run.attempt + 1}"
            with nvtx.annotate(name, domain=DOMAIN, payload=run.batch):
                super()._launch(job, rows)

    return MarkedLaneLoop
