"""`trtpool start --config pool.toml`: a file that says what the command line can say.

::

    name = "ocr"                     # each key is an option of `trtpool start`, for all models
    gpus = [0, 1]
    max-batch = 16

    [models.det]                     # a model, and what it has otherwise
    path = "det.onnx"                # relative to this file's folder
    slots = 32
    weight = 3
    shape = { x = [3, 640, 640] }

A value takes the way of a word on the command line, through the same option, so both have the same bounds, and an
option that is new there is known here.  The command line goes before the file.

Errors name the line.  `tomllib` does not tell lines, so one is found by reading ever more of the file: a key stands on
the first line without which it is not there yet.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import click
from click.core import ParameterSource

from trtpool.ipc.errors import ConfigError

from .models import did_you_mean, model_source

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOT_IN_FILES: Final = ("config", "models")
PATHS: Final = ("run-dir",)
"""Options that are paths, relative to the file's folder."""
OF_POOLS: Final = ("allow-user", "no-batch")
"""Options that may be given again, and are of no model."""

Key = tuple[str, ...]


class Told(NamedTuple):
    """A value of an option in the file: its key, what it is called there, and the words for it."""

    key: Key
    words: list[str]


class ConfigFile:
    """A file, read.

    Args:
        path: where it is.
        options: the options that it may set, by what they are called in it.

    Attributes:
        models: by name, each model's file, absolute.

    Raises:
        ConfigError: it cannot be read, or something in it is not possible; the text says where and what.
    """

    def __init__(self, path: Path, options: Mapping[str, click.Option]) -> None:
        self._path = path
        self._options = options
        try:
            self._text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        try:
            tables = tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is no TOML: {error}") from error
        self.models: dict[str, str] = {}
        self._told: dict[str, list[Told]] = {}
        models = tables.pop("models", {})
        if not isinstance(models, dict):
            self.refuse(("models",), "must be tables, one for each model, such as [models.det]")
        for key, value in tables.items():
            self._tell((key,), key, value)
        for name, table in models.items():
            self._read_model(name, table)

    def values(self, context: click.Context) -> dict[str, Any]:
        """What the options come to, by parameter."""
        values = {}
        for key, told in self._told.items():
            option = self._options[key]
            words = [word for one in told for word in one.words]
            for one in told:  # each by itself, to know which is wrong
                self._process(option, one.words, context, one.key)
            values[option.name or key] = self._process(option, words, context, told[0].key)
        return values

    def refuse(self, key: Key, text: str) -> NoReturn:
        """Raise a ConfigError about a key, which is there."""
        raise ConfigError(f"{self._path}, line {self._line_of(key)}: {'.'.join(key)} {text}")

    # ------------------------------------------------------------------ tables

    def _read_model(self, name: str, table: object) -> None:
        key = ("models", name)
        if not name or any(character in name for character in "=:/"):
            self.refuse(key, "is no name for a model: it may not be empty or have =, : or / in it")
        if not isinstance(table, dict):
            self.refuse(key, f'must be a table, such as [models.{name}] with path = "{name}.onnx"')
        path = table.pop("path", None)
        if not isinstance(path, str) or not path:
            self.refuse(key if path is None else (*key, "path"), 'needs a file, such as path = "model.onnx"')
        self.models[name] = os.path.abspath(self._path.parent / path)
        for option, value in table.items():
            self._tell((*key, option), option, value, name)

    def _tell(self, key: Key, name: str, value: object, model: str = "") -> None:
        name = name.replace("_", "-")
        option = self._options.get(name)
        known = [one for one, other in self._options.items() if not model or (other.multiple and one not in OF_POOLS)]
        if option is None or name not in known:
            what = "is no option of a model" if model else "is no option of `trtpool start`"
            self.refuse(key, f"{what}{did_you_mean(name, known)}; there are {', '.join(sorted(known))}")
        words = self._words(key, option, value)
        prefix = f"{model}{':' if isinstance(value, dict) or '=' in words[0] else '='}" if model and words else ""
        if name in PATHS:
            words = [os.path.abspath(self._path.parent / word) for word in words]
        self._told.setdefault(name, []).append(Told(key, [prefix + word for word in words]))

    def _words(self, key: Key, option: click.Option, value: object) -> list[str]:
        """A value as words of the command line."""
        if option.is_flag:
            if not isinstance(value, bool):
                self.refuse(key, f"must be true or false, not {_show(value)}")
            return ["true" if value else "false"]
        if isinstance(value, dict):
            if not option.multiple or not value:
                self.refuse(key, f"must be {_expected(option)}, not a table")
            return [f"{name}={self._word((*key, name), option, one)}" for name, one in value.items()]
        if isinstance(value, list) and option.multiple:
            return [self._word(key, option, one) for one in value]
        return [self._word(key, option, value)]

    def _word(self, key: Key, option: click.Option, value: object) -> str:
        if isinstance(value, list):
            if option.multiple:  # a shape, with a list of two for an axis that is a range
                pairs = [one if isinstance(one, list) else [one] for one in value]
                return "x".join("..".join(self._word(key, option, end) for end in pair) for pair in pairs)
            return ",".join(self._word(key, option, one) for one in value)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number and not isinstance(value, str):
            self.refuse(key, f"must be {_expected(option)}, not {_show(value)}")
        if _is_number(option) and not number:
            self.refuse(key, f"must be a number, not {_show(value)}")
        return str(value)

    def _process(self, option: click.Option, words: list[str], context: click.Context, key: Key) -> Any:
        value: Any = tuple(words) if option.multiple else words[-1]
        if option.is_flag:
            value = words[-1] == "true"
        try:
            return option.process_value(context, value)
        except click.BadParameter as error:
            self.refuse(key, f"is not possible: {error.message.rstrip('.')}")

    # ------------------------------------------------------------------ lines

    def _line_of(self, key: Key) -> int:
        lines = self._text.splitlines(keepends=True)
        start = 1
        for end in range(1, len(lines) + 1):
            try:
                table: Any = tomllib.loads("".join(lines[:end]))
            except tomllib.TOMLDecodeError:  # in the middle of a value
                continue
            for part in key:
                if not isinstance(table, dict) or part not in table:
                    break
                table = table[part]
            else:
                return start
            start = end + 1
        return start


def _show(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def _is_number(option: click.Option) -> bool:
    kind = getattr(option.type, "number", option.type)
    return isinstance(kind, (click.types.IntParamType, click.types.FloatParamType))


def _expected(option: click.Option) -> str:
    return "a number" if _is_number(option) else "a string"


def options_of(command: click.Command) -> dict[str, click.Option]:
    """The options of a command that a file may set, by their names without dashes."""
    return {
        option.opts[-1].removeprefix("--"): option
        for option in command.params
        if isinstance(option, click.Option) and option.name not in NOT_IN_FILES and not option.is_eager
    }


def _start_with_file(start: Callable[..., None], **given: Any) -> None:
    """Call `start` with what the command line gave, and what it left to the file of ``--config``.

    Raises:
        ConfigError: the file is not possible; see `ConfigFile`.
    """
    context = click.get_current_context()
    path: Path | None = given.pop("config")
    if path is None:
        if not given["models"]:
            raise click.UsageError("Missing argument 'MODEL...', or --config", context)
        start(**given)
        return
    file = ConfigFile(path, options_of(context.command))
    for name, value in file.values(context).items():
        if context.get_parameter_source(name) is ParameterSource.DEFAULT:
            given[name] = value
        elif isinstance(value, dict) and "" not in given[name]:  # what is for all models there, is for all
            given[name] = {**value, **given[name]}
    models = [model_source(model) for model in given["models"]]
    named = {model.name: model.path for model in models}
    if len(named) == len(models):  # else it is said of them that two have one name
        merged = {**file.models, **named}
        given["models"] = tuple(f"{name}={path}" for name, path in merged.items())
    start(**given)


def with_file(start: Callable[..., None]) -> Callable[..., None]:
    """Adds to a command what the file of ``--config`` says; outermost, so that it sees what click gives."""
    return functools.wraps(start)(functools.partial(_start_with_file, start))
