"""What the driver says of GPUs, through NVML, if it is there: a hint for people, on which nothing relies.

A GPU is known by the worker processes on it, so numbers and environments of both sides need not agree.  From another
pid namespace it is not found.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection
from typing import Any, NamedTuple


class GpuFigures(NamedTuple):
    """Of one GPU: how much of the time a kernel ran, lately, and its memory."""

    busy_percent: int
    used_bytes: int
    total_bytes: int


class Nvml:
    """A context manager; without a driver, or without nvidia-ml-py, it knows nothing."""

    def __init__(self) -> None:
        self._nvml: Any = None

    def __enter__(self) -> Nvml:
        with contextlib.suppress(Exception):  # whatever is amiss with it
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            self._nvml = nvml
        return self

    def __exit__(self, *_: object) -> None:
        if self._nvml is not None:
            with contextlib.suppress(Exception):
                self._nvml.nvmlShutdown()
            self._nvml = None

    def figures(self, pids: Collection[int]) -> dict[int, GpuFigures]:
        """By process, those of the GPU that it is on."""
        found: dict[int, GpuFigures] = {}
        if self._nvml is None:
            return found
        with contextlib.suppress(Exception):
            for index in range(self._nvml.nvmlDeviceGetCount()):
                found |= self._of(self._nvml.nvmlDeviceGetHandleByIndex(index), pids)
        return found

    def _of(self, gpu: Any, pids: Collection[int]) -> dict[int, GpuFigures]:
        here = {process.pid for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(gpu)}.intersection(pids)
        if not here:
            return {}
        memory = self._nvml.nvmlDeviceGetMemoryInfo(gpu)
        figures = GpuFigures(
            int(self._nvml.nvmlDeviceGetUtilizationRates(gpu).gpu), int(memory.used), int(memory.total)
        )
        return dict.fromkeys(here, figures)
