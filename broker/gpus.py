"""Which GPUs a pool uses: how users name them, and the environment in which a process sees one of them alone.

The place of a GPU in the user's list is the pool's number for it, which workers, clients and logs use.  A worker's
process sees that GPU only, as CUDA's device 0::

    --gpus 2,0      worker 1 on GPU 0: CUDA_VISIBLE_DEVICES=2
                    worker 2 on GPU 1: CUDA_VISIBLE_DEVICES=0

See the CUDA C++ Programming Guide, "CUDA Environment Variables".
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Final

from trtpool.ipc.errors import ConfigError, DeviceUnavailable

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
ORDER: Final = "CUDA_DEVICE_ORDER"

_GPU: Final = re.compile(r"[0-9]{1,3}|(GPU|MIG)-[A-Za-z0-9/-]{1,100}")


def gpu_list(gpus: int | str | Sequence[int | str]) -> tuple[str, ...]:
    """GPUs as users name them, such as ``0``, ``"0,1"`` or ``[0, "GPU-<uuid>"]``, as a tuple of different names.

    Raises:
        ConfigError: that is no list of different GPUs.
    """
    parts = gpus.split(",") if isinstance(gpus, str) else [gpus] if isinstance(gpus, int) else gpus
    names = tuple(str(int(text)) if text.isdecimal() else text for text in (str(part).strip() for part in parts))
    if not names or not all(map(_GPU.fullmatch, names)) or len(set(names)) != len(names):
        raise ConfigError(f"{gpus!r} is not a list of different GPUs, such as 0,1 or GPU-<uuid>")
    return names


def gpu_environment(gpu: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What to set so that a process sees `gpu` and no other.

    An index counts in PCI order, as `nvidia-smi` shows it.  Where `environment` restricts us to some GPUs already, as
    Slurm, Ray and containers do, it counts in that list, as it does in every CUDA program.

    Raises:
        DeviceUnavailable: that list is shorter.
    """
    listed = environment.get(VISIBLE)
    if listed is None or not gpu.isdecimal():
        return {VISIBLE: gpu, ORDER: "PCI_BUS_ID"}
    allowed = _allowed(listed)
    if int(gpu) >= len(allowed):
        has = f"has {len(allowed)} GPU{'s' if len(allowed) != 1 else ''}"
        raise DeviceUnavailable(
            f"--gpus {gpu}: {VISIBLE}={listed} {has}, counted from 0; choose among them, or change {VISIBLE}"
        )
    # Numbers in the list mean what whoever set it takes them for.
    return {VISIBLE: allowed[int(gpu)], ORDER: environment.get(ORDER, "PCI_BUS_ID")}


def _allowed(listed: str) -> list[str]:
    """The GPUs that `CUDA_VISIBLE_DEVICES` allows; CUDA itself ends the list at the first that is none."""
    allowed: list[str] = []
    for part in map(str.strip, listed.split(",")):
        if not _GPU.fullmatch(part):
            break
        allowed.append(part)
    return allowed
