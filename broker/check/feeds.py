"""The same items for two models, which may want them in other dtypes.

What an item holds is *raw*: pixels, or the numbers of an array.  An input that takes integers, or normalises inside,
gets it as it is, in its dtype.  Any other gets it

- as --normalize says, or else the other model normalises it inside; else
- divided by 255, if it is an image and neither model takes integers; else
- as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from trtpool.broker.jobs.functions import is_picture, reason
from trtpool.broker.jobs.images import ImageOptions, ImageWriter, complete
from trtpool.ipc.errors import ConfigError, InvalidInput
from trtpool.ipc.normalization import Normalization, channel_shape
from trtpool.ipc.tensors import ModelSpec, TensorSpec

Arrays = dict[str, npt.NDArray[Any]]


class Side(NamedTuple):
    """A model to be compared: what it is, and what it does to pixels inside, by input."""

    spec: ModelSpec
    inside: Mapping[str, Normalization]


class Raw(NamedTuple):
    """What an item holds for one input; `image`: pixels of 0 to 255 that were decoded."""

    array: npt.NDArray[Any]
    image: bool


def check_alike(candidate: ModelSpec, reference: ModelSpec) -> None:
    """Raise `ConfigError` if two models do not take the same items or have other outputs; dtypes may differ."""
    for what, ours, theirs in (
        ("inputs", candidate.inputs, reference.inputs),
        ("outputs", candidate.outputs, reference.outputs),
    ):
        if {(one.name, one.shape, one.shared) for one in ours} != {(one.name, one.shape, one.shared) for one in theirs}:
            raise ConfigError(
                f"the models cannot be compared: one has the {what} {', '.join(map(str, ours))}, the other "
                f"{', '.join(map(str, theirs))}; give the model that this one was made from, and --shape for what they "
                "leave open"
            )
    for spec in (*candidate.inputs, *reference.inputs):
        if spec.least is not None:
            raise ConfigError(f"--shape gives input {spec.name!r} a range; give one shape to compare models in")


class Feeder:
    """Makes raw items, and each model's inputs from them.

    Args:
        candidate, reference: alike, see `check_alike`.
        normalize: what is given for inputs, whatever a model does inside; ``""`` stands for all images.
        images: how images are fitted.
    """

    def __init__(
        self, candidate: Side, reference: Side, normalize: Mapping[str, Normalization], images: ImageOptions
    ) -> None:
        self._sides = candidate, reference
        self._normalize = normalize
        self._images = images
        self._writers: dict[str, ImageWriter] = {}
        self.inputs = reference.spec.inputs
        names = {spec.name for spec in self.inputs}
        if unknown := normalize.keys() - names - {""}:
            raise ConfigError(f"--normalize names {min(unknown)!r}, and the inputs are {', '.join(sorted(names))}")

    # ------------------------------------------------------------------ raw items

    def random(self, rng: np.random.Generator, spec: TensorSpec) -> Raw:
        """A made-up item: pixels where a model takes these, else normal numbers, and 0 or 1 for other integers."""
        kinds = {self._spec_of(side, spec.name).dtype for side in self._sides}
        if self._inside(spec.name) or "uint8" in kinds:
            return Raw(rng.integers(0, 256, spec.shape, np.uint8), image=False)
        if "int8" in kinds:
            return Raw(rng.integers(-128, 128, spec.shape, np.int8), image=False)
        if any(kind == "bool" or "int" in kind for kind in kinds):
            return Raw(rng.integers(0, 2, spec.shape, np.uint8), image=False)
        return Raw(rng.standard_normal(spec.shape, np.float32), image=False)

    def read(self, spec: TensorSpec, value: Any, key: str) -> Raw:
        """An item that was read: an array, or an image as `trtpool run` takes it.

        Raises:
            ConfigError: it does not fit.
        """
        try:
            if isinstance(value, np.ndarray) and not is_picture(spec, value):
                if value.ndim == 1 and value.size == int(np.prod(spec.shape)):
                    value = value.reshape(spec.shape)  # a list column has lost the shape
                if value.shape != spec.shape:
                    raise InvalidInput(f"input {spec.name!r} takes shape {spec.shape}, and this has {value.shape}")
                return Raw(value, image=False)
            pixels = np.empty(spec.shape, np.uint8)
            self._writer(spec).write(value, pixels)
        except (InvalidInput, OSError, ValueError) as error:
            raise ConfigError(f"{key} cannot be used: {reason(error)}; leave it out of --data") from error
        return Raw(pixels, image=True)

    def _writer(self, spec: TensorSpec) -> ImageWriter:
        if spec.name not in self._writers:
            pixels = msgspec.structs.replace(spec, dtype="uint8")
            options = complete(self._images, pixels, self._sides[1].spec.outputs)
            self._writers[spec.name] = ImageWriter(pixels, options)
        return self._writers[spec.name]

    # ------------------------------------------------------------------ models' inputs

    def feed(self, rows: Sequence[Mapping[str, Raw]]) -> Iterator[Arrays]:
        """What the candidate gets, then what the reference gets, for `rows`.

        Raises:
            ConfigError: numbers that an input cannot hold.
        """
        for side in self._sides:
            arrays: Arrays = {}
            for spec in side.spec.inputs:
                if spec.shared:
                    arrays[spec.name] = self._convert(side, spec, rows[0][spec.name])
                else:
                    arrays[spec.name] = np.stack([self._convert(side, spec, row[spec.name]) for row in rows])
            yield arrays

    def _convert(self, side: Side, spec: TensorSpec, raw: Raw) -> npt.NDArray[Any]:
        array, is_integer = raw.array, spec.dtype == "bool" or "int" in spec.dtype
        normalization = None if is_integer or spec.name in side.inside else self.normalization(spec, raw)
        if normalization is not None:
            shape = channel_shape(spec.name, (None, *spec.shape), normalization.channels)
            gain, bias = normalization.gain_and_bias(shape)
            array = array.astype(np.float32) * gain + bias
        converted = array.astype(spec.numpy_dtype)
        if is_integer and not np.array_equal(converted, array):
            raise ConfigError(
                f"input {spec.name!r} takes {spec.dtype}, and --data has other numbers, from {array.min():g} to "
                f"{array.max():g}; give images, or arrays of {spec.dtype}"
            )
        return converted

    def normalization(self, spec: TensorSpec, raw: Raw) -> Normalization | None:
        """What is done to raw numbers before a floating-point input of a model that does not do it inside."""
        inside, given = self._inside(spec.name), self._normalize.get(spec.name)
        if given is None and (raw.image or inside is not None or len(spec.shape) > 1):
            given = self._normalize.get("")
        wanted = given or inside
        if wanted is not None:
            return wanted
        floats = all("float" in self._spec_of(side, spec.name).dtype for side in self._sides)
        return Normalization() if raw.image and floats else None

    def _inside(self, name: str) -> Normalization | None:
        return next((side.inside[name] for side in self._sides if name in side.inside), None)

    @staticmethod
    def _spec_of(side: Side, name: str) -> TensorSpec:
        return next(spec for spec in side.spec.inputs if spec.name == name)
