"""Models as users name them: a file, ``NAME=FILE``, a `Model`, or a dictionary of what a `Model` takes."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from trtpool.ipc.errors import ConfigError
from trtpool.ipc.settings import ModelOptions, ModelSource, ShapeRange


class Model(ModelOptions, frozen=True, forbid_unknown_fields=True):
    """A model of a `trtpool.Pool`, with settings of its own; what is not given is as the pool's.

    Attributes:
        path: an ONNX file, or a TensorRT plan for a GPU.
        name: what clients call it; by default the file's stem.
        shapes: item shapes, by input name, for inputs that the model leaves open; as those of `trtpool.Pool`, also
            ranges, ``(3, (32, 640), (32, 640))``, and the largest items of outputs.
        slots, items_per_slot, max_batch, max_delay_us, max_slots_per_producer, weight: see
            `trtpool.ipc.settings.ModelOptions`.

    `trtpool.Pool` raises `ConfigError` for what is not possible.
    """

    path: str | os.PathLike[str]
    name: str = ""
    shapes: dict[str, ShapeRange] | None = None


AnyModel: TypeAlias = str | os.PathLike[str] | Model | Mapping[str, Any]

_KEYS = tuple(field.name for field in msgspec.structs.fields(Model))
_OPTIONS = {field.name: field.type for field in msgspec.structs.fields(ModelOptions)}


def model_source(text: str | os.PathLike[str]) -> ModelSource:
    """A model as users name it: a file, or ``NAME=FILE``; without a name it is the file's stem."""
    name, equals, path = os.fspath(text).partition("=")
    if not equals or os.sep in name:
        name, path = "", os.fspath(text)
    if not path:
        raise ConfigError(f"no file is named in {os.fspath(text)!r}; write FILE or NAME=FILE")
    return ModelSource(os.path.abspath(path), name or Path(path).stem)


def new_source(text: str | os.PathLike[str]) -> ModelSource:
    """A file that is to take the place of another: ``FILE``, or ``NAME=FILE``; without a name it has none."""
    source = model_source(text)
    return source if "=" in os.fspath(text).partition(os.sep)[0] else ModelSource(source.path, "")


def read_models(
    models: Sequence[AnyModel],
) -> tuple[tuple[ModelSource, ...], dict[str, dict[str, Any]], dict[str, ShapeRange]]:
    """Take models apart.

    Returns:
        Where they are; by model name, what of `ModelOptions` was given; by ``MODEL:INPUT``, their item shapes.

    Raises:
        ConfigError: a key or a value is not possible.
    """
    sources, options, shapes = [], {}, {}
    for model in models:
        if isinstance(model, (str, os.PathLike)):
            sources.append(model_source(model))
            continue
        given = msgspec.structs.asdict(model) if isinstance(model, Model) else dict(model)
        source = _source_of(given)
        sources.append(source)
        shapes.update(_shapes_of(source.name, given.get("shapes") or {}))
        chosen = {key: given[key] for key in _OPTIONS if given.get(key) is not None}
        for key, value in chosen.items():
            check_option(source.name, key, value)
        if chosen:
            options[source.name] = chosen
    return tuple(sources), options, shapes


def _shapes_of(model: str, shapes: object) -> dict[str, ShapeRange]:
    try:
        given = msgspec.convert(shapes, dict[str, ShapeRange])
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"model {model!r}: shapes={shapes!r} is not possible: give item shapes by input name, such as "
            "{'x': (3, 640, 640)}, or {'x': (3, (32, 640), (32, 640))} where items differ"
        ) from error
    return {f"{model}:{key}": shape for key, shape in given.items()}


def _source_of(given: Mapping[str, Any]) -> ModelSource:
    for key in given:
        if key not in _KEYS:
            raise ConfigError(f"a model has no setting {key!r}{did_you_mean(key, _KEYS)}; there are {', '.join(_KEYS)}")
    path, name = given.get("path"), given.get("name") or ""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigError(f"a model needs a path, the name of its file, and has {path!r}")
    if not isinstance(name, str):
        raise ConfigError(f"model {os.fspath(path)}: its name must be a string, and is {name!r}")
    return ModelSource(os.path.abspath(path), name or Path(path).stem)


def check_option(model: str, key: str, value: object) -> None:
    """Refuse an impossible value of one of `ModelOptions`.

    Raises:
        ConfigError: it is of another type, or out of bounds; the text says which are possible.
    """
    try:
        msgspec.convert(value, _OPTIONS[key])
    except msgspec.ValidationError as error:
        expected = str(error).replace("`", "").replace(" | null", "").partition(" - at ")[0]
        raise ConfigError(f"model {model!r}: {key}={value!r} is not possible: {expected}") from error


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """A hint at the name that was meant, if one is near."""
    near = difflib.get_close_matches(key, known, 1)
    return f", did you mean {near[0]!r}?" if near else ""
