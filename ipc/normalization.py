"""Pixels into what a network was trained on: ``(pixel * scale - mean) / std``, one mean and deviation for each channel.

A builder puts this into the network, as ``pixel * gain + bias``, so that producers write pixels; `trtpool check` does
the same in NumPy, for a network without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from .errors import ConfigError, ModelError

PIXEL_SCALE: Final = 1 / 255
"""From pixels of 0 to 255 to 0 to 1, where means and deviations mostly are."""

NORMS: Final = {
    "none": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and deviation of red, green and blue, on a scale of 0 to 1."""


class Normalization(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How pixels are normalised.

    Attributes:
        mean, std: one number, or one for each channel, in the network's order of channels.
        scale: what pixels are multiplied with before.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = PIXEL_SCALE

    def __str__(self) -> str:
        mean, std = (" ".join(f"{number:g}" for number in numbers) for numbers in (self.mean, self.std))
        pixel = "pixel / 255" if self.scale == PIXEL_SCALE else f"pixel * {self.scale:g}"
        return f"({pixel} - mean {mean}) / std {std}"

    @property
    def channels(self) -> int:
        """How many channels it is for; 1: any number."""
        return max(len(self.mean), len(self.std))

    def check(self) -> None:
        """Raise `ConfigError` if this cannot be computed, with what to give instead."""
        if not self.mean or not self.std or 1 < min(len(self.mean), len(self.std)) < self.channels:
            raise ConfigError(
                f"--normalize: there are {len(self.mean)} means and {len(self.std)} deviations; give one of each, or "
                "as many as there are channels"
            )
        if not np.isfinite([*self.mean, *self.std, self.scale]).all() or self.scale == 0 or 0 in self.std:
            raise ConfigError(f"--normalize: {self} is no number; give a std and a scale that are finite and not 0")

    def gain_and_bias(self, shape: Sequence[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Float32 arrays of `shape`, as `channel_shape` gives it, for ``pixel * gain + bias``."""
        mean, std = (np.broadcast_to(np.array(numbers), self.channels) for numbers in (self.mean, self.std))
        gain, bias = self.scale / std, -mean / std
        return gain.astype(np.float32).reshape(shape), bias.astype(np.float32).reshape(shape)


def channel_shape(name: str, dims: Sequence[int | None], channels: int) -> tuple[int, ...]:
    """The shape in which a number for each channel meets an input: ``(3, 1, 1)`` for NCHW, ``(3,)`` for NHWC.

    Args:
        name: the input, for errors.
        dims: its axes, batch first; None where one is open.
        channels: 1 for a number that is for all.

    Raises:
        ModelError: no axis can be that of the channels.
    """
    if channels == 1:
        return ()
    rank = len(dims)
    # An axis of that size first; else an open one where ONNX has channels: a wrong guess fails when it runs.
    places = dict.fromkeys((1, rank - 1, *([0] if rank == 3 else [])) if rank > 1 else ())
    found = [axis for axis in places if dims[axis] == channels]
    if not found and rank > 2 and dims[1] is None:
        found = [1]
    if not found:
        shown = ", ".join("?" if dim is None else str(dim) for dim in dims)
        raise ModelError(
            f"--normalize has numbers for {channels} channels, and input {name} ({shown}) has no such axis; "
            "give one mean and one std, or as many as it has channels"
        )
    return (channels, *(1 for _ in range(rank - found[0] - 1)))
