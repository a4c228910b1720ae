"""What is done to a row before the model and after it: the built-in functions, and users' by dotted name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trtpool.ipc.errors import ConfigError, InvalidInput
from trtpool.ipc.tensors import ModelSpec, TensorSpec, check_array

from .images import ImageOptions, ImageWriter, image_layout
from .reading import Item

Arrays = Mapping[str, npt.NDArray[Any]]


def load_function(dotted: str, option: str) -> Callable[..., Any]:
    """A function named as ``my.module:function``; modules are also looked for in the current directory.

    Raises:
        ConfigError: it is not there; what importing it said is in the text.
    """
    module, colon, name = dotted.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"{option} {dotted}: name a function as my.module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise ConfigError(
                f"{option} {dotted} cannot be imported: there is no module {error.name} in {here}, nor installed; "
                "go to its folder, or set PYTHONPATH"
            ) from error
        raise ConfigError(f"{option} {dotted} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{option} {dotted} is not a function; its type is {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def reason(error: BaseException) -> str:
    """An error as an error row gives it."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# ---------------------------------------------------------------------------------- decoding


def make_decoder(dotted: str, model: ModelSpec, options: ImageOptions) -> Callable[[Item, Arrays], None]:
    """What writes a row into a slot's input arrays.

    Args:
        dotted: the user's function, or "" for the built-in one.
        model: whose inputs.
        options: for images; complete.
    """
    if dotted:
        return _UserDecoder(load_function(dotted, "--decode"), model)
    return BuiltInDecoder(model, options)


class _UserDecoder:
    """Calls ``function(item, inputs)``; arrays that it returns instead of writing them are checked and copied."""

    def __init__(self, function: Callable[..., Any], model: ModelSpec) -> None:
        self._function = function
        self._specs = {spec.name: spec for spec in model.inputs}

    def __call__(self, item: Item, inputs: Arrays) -> None:
        returned = self._function(item, inputs)
        if isinstance(returned, np.ndarray):
            if len(self._specs) > 1:
                raise InvalidInput(f"--decode returned one array; give a dict with {', '.join(self._specs)}")
            returned = {next(iter(self._specs)): returned}
        if isinstance(returned, Mapping):
            if set(returned) != set(self._specs):
                raise InvalidInput(f"--decode returned {', '.join(map(str, returned))}, not {', '.join(self._specs)}")
            for name, array in returned.items():
                inputs[name][...] = check_array(self._specs[name], array, ())


class BuiltInDecoder:
    """Arrays of an input's shape are copied into it, all else must be an image.

    Args:
        model: whose inputs.
        options: for images; complete.
    """

    def __init__(self, model: ModelSpec, options: ImageOptions) -> None:
        self._specs = model.inputs
        self._options = options
        self._image: ImageWriter | None = None

    def __call__(self, item: Item, inputs: Arrays) -> None:
        values = item.value if isinstance(item.value, dict) else {self._specs[0].name: item.value}
        for spec in self._specs:
            self._write(spec, values[spec.name], inputs[spec.name])

    def _write(self, spec: TensorSpec, value: Any, out: npt.NDArray[Any]) -> None:
        if isinstance(value, np.ndarray) and not is_picture(spec, value):
            if value.shape != spec.shape and value.size == out.size and value.ndim == 1:
                value = value.reshape(spec.shape)  # a list column has lost the shape
            if value.shape != spec.shape:
                raise InvalidInput(f"input {spec.name!r} takes shape {spec.shape}, the row has {value.shape}")
            if not np.can_cast(value.dtype, spec.numpy_dtype, "same_kind"):
                raise InvalidInput(f"input {spec.name!r} takes {spec.dtype}, the row has {value.dtype}")
            np.copyto(out, value, casting="same_kind")
            return
        if isinstance(value, str):
            raise InvalidInput(f"input {spec.name!r} cannot be made from text; name a function with --decode")
        if self._image is None:
            self._image = ImageWriter(spec, self._options)
        self._image.write(value, out)


def is_picture(spec: TensorSpec, value: npt.NDArray[Any]) -> bool:
    """Whether an array is decoded pixels that must still be fitted into an input."""
    pixels = value.dtype == np.uint8 and (value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (1, 3)))
    return pixels and value.shape != spec.shape and image_layout(spec) is not None


# ---------------------------------------------------------------------------------- afterwards


def make_post(dotted: str) -> Callable[[Item, Arrays], Mapping[str, Any]] | None:
    """What makes a row's columns of its outputs: the user's function, or None to store the outputs as they are.

    The function gets ``(item, outputs)`` and returns a dict of columns, or one value, which is then called "result".
    """
    if not dotted:
        return None
    function = load_function(dotted, "--post")

    def post(item: Item, outputs: Arrays) -> Mapping[str, Any]:
        made = function(item, outputs)
        return made if isinstance(made, Mapping) else {"result": made}

    return post


def schema_of(dotted: str) -> Any:
    """The `pyarrow.Schema` that a ``--post`` function carries as its attribute `schema`, if any."""
    return getattr(load_function(dotted, "--post"), "schema", None) if dotted else None
