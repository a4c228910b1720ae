"""How busy GPUs are, sampled in a thread through NVML, which is what `nvidia-smi` asks.

NVML says for which part of its last sample period, 1/6 s to 1 s, any kernel ran: coarse, and the same for all.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

from trtpool.broker.gpus import VISIBLE, gpu_environment

EVERY_S: Final = 0.05
LIBRARY: Final = "libnvidia-ml.so.1"
FOLDERS: Final = ("", "/usr/local/nvidia/lib64/", "/usr/lib/x86_64-linux-gnu/", "/usr/lib64/")
"""Where it may lie; containers have it in the first of these that is named, and do not always say so."""


def _load() -> ctypes.CDLL:
    """NVML.

    Raises:
        OSError: it is in none of `FOLDERS`.
    """
    for folder in FOLDERS[:-1]:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(folder + LIBRARY)
    return ctypes.CDLL(FOLDERS[-1] + LIBRARY)


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


@dataclass
class Gpu:
    """One GPU.

    Attributes:
        name: such as "NVIDIA H100 80GB HBM3".
        link: the bus that it can use, such as "PCIe 5 x16".
        samples: ``(time.monotonic(), busy in percent)``.
    """

    name: str
    link: str
    samples: list[tuple[float, float]] = field(default_factory=list)

    def busy(self, began_s: float, ended_s: float) -> float | None:
        """The mean of the samples between two times, as a fraction; None without any."""
        inside = [percent for at_s, percent in self.samples if began_s <= at_s <= ended_s]
        return sum(inside) / len(inside) / 100 if inside else None


class GpuWatch:
    """Samples GPUs while it is entered; where NVML does not answer, `why` says so and there are no samples.

    Args:
        gpus: as users name them.
    """

    def __init__(self, gpus: Sequence[str]) -> None:
        self.gpus = {gpu: Gpu("unknown", "unknown") for gpu in gpus}
        self.why = ""
        self._handles: dict[str, Any] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        try:
            self._nvml = _load()
            self._call("nvmlInit_v2")
            for gpu in gpus:
                self._handles[gpu] = self._handle(gpu_environment(gpu)[VISIBLE])
                self.gpus[gpu] = self._describe(self._handles[gpu])
        except (OSError, RuntimeError, AttributeError) as error:
            self.why = f"GPUs are not watched: {error}"
            self._handles.clear()

    def busy(self, gpus: Sequence[str], began_s: float, ended_s: float) -> float | None:
        """The mean over some GPUs of what `Gpu.busy` says."""
        found = [self.gpus[gpu].busy(began_s, ended_s) for gpu in gpus if gpu in self.gpus]
        known = [one for one in found if one is not None]
        return sum(known) / len(known) if known else None

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._nvml, name)(*arguments):
            raise RuntimeError(f"{name} answered {code}")

    def _handle(self, visible: str) -> Any:
        """NVML's handle of a GPU, which is named by its index in PCI order or its UUID."""
        handle = ctypes.c_void_p()
        if visible.isdecimal():
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(int(visible)), ctypes.byref(handle))
        else:
            self._call("nvmlDeviceGetHandleByUUID", visible.encode(), ctypes.byref(handle))
        return handle

    def _describe(self, handle: Any) -> Gpu:
        name = ctypes.create_string_buffer(96)
        self._call("nvmlDeviceGetName", handle, name, ctypes.c_uint(96))
        generation, width = ctypes.c_uint(), ctypes.c_uint()
        try:
            self._call("nvmlDeviceGetMaxPcieLinkGeneration", handle, ctypes.byref(generation))
            self._call("nvmlDeviceGetMaxPcieLinkWidth", handle, ctypes.byref(width))
            link = f"PCIe {generation.value} x{width.value}"
        except RuntimeError:  # a virtual machine may not tell
            link = "unknown"
        return Gpu(name.value.decode(), link)

    def _sample(self) -> None:
        found = _Utilization()
        while not self._ended.wait(EVERY_S):
            for gpu, handle in self._handles.items():
                try:
                    self._call("nvmlDeviceGetUtilizationRates", handle, ctypes.byref(found))
                except RuntimeError as error:
                    self.why = f"GPUs are not watched: {error}"
                    return
                self.gpus[gpu].samples.append((time.monotonic(), float(found.gpu)))

    def __enter__(self) -> GpuWatch:
        if self._handles:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(1.0)
