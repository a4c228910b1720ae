"""The timing cache: what TensorRT measured in earlier builds, in a file for each version and kind of GPU."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from .build_target import Target
from .flavours import Flavour


class TimingCache:
    """What TensorRT measured in earlier builds on this GPU; a file that does not fit or cannot be used is left out.

    Args:
        folder: of these files; "": none are kept.
        flavour: the TensorRT; that for RTX has no such cache.
        target: the GPU.
        config: the ``trt.IBuilderConfig`` of the build, which is given what is known.
    """

    def __init__(self, folder: str, flavour: Flavour, target: Target, config: Any) -> None:
        self._config = config
        self._file: Path | None = None
        if not folder or flavour.name == "rtx":
            return
        words = f"{flavour.name} {flavour.dotted} {target.gpu} {target.compute_capability}"
        self._file = Path(folder) / (re.sub(r"[^\w.]+", "-", words) + ".timing")
        known = b""
        with contextlib.suppress(OSError):
            known = self._file.read_bytes()
        for data in dict.fromkeys((known, b"")):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                break

    def save(self) -> None:
        """Keep what this build measured, for the next."""
        cache = self._config.get_timing_cache() if self._file else None
        if self._file is None or cache is None:
            return
        new = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(cache.serialize())
            new.replace(self._file)
