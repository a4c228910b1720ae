"""The GPU that a plan is built for: the one that is here, or another."""

from __future__ import annotations

from typing import NamedTuple

from trtpool.ipc.errors import ConfigError, DeviceUnavailable, MissingExtra

from .devices import look
from .flavours import Flavour


class Target(NamedTuple):
    """The GPU to build for: its name, "" if it is not here, and its compute capability, such as "8.9"."""

    gpu: str
    compute_capability: str


def find_target(flavour: Flavour, wanted: str) -> Target:
    """The GPU to build for.  Asking for it also makes sure of a driver, without which TensorRT 8.6 crashes.

    Args:
        flavour: the TensorRT.
        wanted: a compute capability, such as "8.9"; empty: that of the GPU here.

    Raises:
        ConfigError: this flavour builds for the GPU that is here alone.
        DeviceUnavailable: there is none.
        MissingExtra: cuda-python is not installed.
    """
    if wanted:
        if flavour.name != "rtx":
            raise ConfigError(
                f"--compute-capability builds for a GPU that need not be here, which {flavour} cannot; "
                "leave it out, or add --flavour rtx"
            )
        return Target("", wanted)
    try:
        gpu = look()
    except (DeviceUnavailable, MissingExtra) as error:
        hint = "; or build for another GPU: --compute-capability 8.9" if flavour.name == "rtx" else ""
        raise type(error)(f"{error}{hint}") from error
    return Target(gpu.name, gpu.compute_capability)
