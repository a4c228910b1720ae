"""What `python -m trtpool.workers.probe` says: one JSON object a line, each as soon as it is known.

A package that crashes on import ends the process, so each is announced before it is looked at.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from .settings import GpuInfo


class Probing(msgspec.Struct, frozen=True, tag="probing"):
    """`what`, a package or "gpus", is looked at next."""

    what: str


class PackageFound(msgspec.Struct, frozen=True, tag="package"):
    """An optional package.

    Attributes:
        name: the module's.
        version: as it says itself; empty: it cannot be imported.
        error: why; empty: it is not installed.
    """

    name: str
    version: str = ""
    error: str = ""


class GpuFound(msgspec.Struct, frozen=True, tag="gpu"):
    """A GPU that CUDA can use.

    Attributes:
        gpu: what it is.
        free_bytes: of its memory.
        pin_error: why shared memory cannot be pinned for it; empty: it can.
    """

    gpu: GpuInfo
    free_bytes: int
    pin_error: str = ""


class GpusRefused(msgspec.Struct, frozen=True, tag="refused"):
    """CUDA cannot be used, or not one of its GPUs: an error's class in `trtpool.ipc.errors`, and its text."""

    kind: str
    text: str


Probed: TypeAlias = Probing | PackageFound | GpuFound | GpusRefused

PACKAGES = ("onnxruntime", "onnx", "tensorrt", "tensorrt_rtx", "tensorrt_lean", "cuda.bindings.runtime", "ray")
"""Modules of optional packages, in the order they are looked at."""
