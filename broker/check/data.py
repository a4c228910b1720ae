"""Where the items of a check come from: `--data`, read as `trtpool run` reads its inputs, or made up."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from trtpool.broker.jobs.functions import reason
from trtpool.broker.jobs.reading import Reader
from trtpool.broker.jobs.sources import Inputs, choose, find
from trtpool.ipc.errors import ConfigError, InvalidInput
from trtpool.ipc.tensors import TensorSpec

from .feeds import Feeder, Raw

CHUNK: Final = 64
Row = dict[str, Raw]
Named = tuple[str, Row]
"""What an item is called, and what it holds."""


class Data:
    """The items of a check.

    Args:
        paths: what ``--data`` named; empty: random items.
        items: the most to use; None: all, or `RANDOM_ITEMS`.
        seed: of random items.
        feeder: makes raw items.

    Attributes:
        told: what the items are, in words.

    Raises:
        ConfigError: there are none, or they are not for these inputs.
        MissingExtra: pyarrow or an image library is needed to read them.
    """

    RANDOM_ITEMS: Final = 32

    def __init__(self, paths: Sequence[str], items: int | None, seed: int, feeder: Feeder) -> None:
        self._feeder = feeder
        self._items = items
        self._rng = np.random.default_rng(seed)
        self._specs = feeder.inputs
        self._shared: Row = {}
        self._single = [spec for spec in self._specs if not spec.shared]
        if not paths:
            self.told = f"random numbers (seed {seed}), which say little about a trained model: give --data"
            self._rows: Callable[[], Iterator[Named]] = self._random
        elif (folder := Path(paths[0])).is_dir() and len(paths) == 1 and self._named(folder):
            self.told = f"the arrays in {folder}"
            self._rows = lambda: self._arrays(folder)
        else:
            try:
                inputs = find(paths, sys.stdin.buffer.read, any_file=False)
                columns = self._columns(inputs)
            except ConfigError as error:
                raise type(error)(str(error).replace("--input", "--data")) from error
            self.told = " ".join(paths)
            self._rows = lambda: self._read(inputs, columns)

    def rows(self) -> Iterator[Named]:
        """Each item's name, and its raw arrays by input.

        Raises:
            ConfigError: one cannot be read.
        """
        for spec in self._specs:
            if spec.shared and spec.name not in self._shared:
                self._shared[spec.name] = self._feeder.random(self._rng, spec)
        for key, row in itertools.islice(self._rows(), self._items):
            yield key, {**row, **self._shared}

    # ------------------------------------------------------------------ kinds

    def _random(self) -> Iterator[Named]:
        count = self.RANDOM_ITEMS if self._items is None else self._items
        for number in range(count):
            yield f"#{number}", {spec.name: self._feeder.random(self._rng, spec) for spec in self._single}

    def _named(self, folder: Path) -> bool:
        """Whether there is an array for each input."""
        return all((folder / f"{spec.name}.npy").is_file() for spec in self._single)

    def _arrays(self, folder: Path) -> Iterator[Named]:
        arrays = {}
        for spec in self._specs:
            path = folder / f"{spec.name}.npy"
            if not spec.shared or path.is_file():
                try:
                    arrays[spec.name] = np.load(path, mmap_mode="r", allow_pickle=False)
                except (OSError, ValueError) as error:
                    raise ConfigError(f"{path} cannot be read: {error}; write it with numpy.save") from error
        for spec in self._specs:
            if spec.shared and spec.name in arrays:
                self._shared[spec.name] = self._feeder.read(spec, arrays[spec.name], f"{folder / spec.name}.npy")
        counts = {spec.name: len(arrays[spec.name]) if arrays[spec.name].ndim else 0 for spec in self._single}
        if len(set(counts.values())) > 1:
            raise ConfigError(
                f"the arrays in {folder} have different numbers of rows "
                f"({', '.join(f'{name}: {count}' for name, count in counts.items())}); give as many of each"
            )
        for row in range(min(counts.values())):
            yield (
                f"#{row}",
                {
                    spec.name: self._feeder.read(
                        spec, np.asarray(arrays[spec.name][row]), f"{folder / spec.name}.npy#{row}"
                    )
                    for spec in self._single
                },
            )

    def _columns(self, inputs: Inputs) -> dict[str, str]:
        names = [spec.name for spec in self._single]
        columns = choose(inputs, (), names, any_type=False)
        if len(names) != 1 and not columns:
            raise ConfigError(
                f"the models have the inputs {', '.join(names)}: name with --data a folder with "
                f"{', '.join(f'{name}.npy' for name in names)}, or Parquet with these columns"
            )
        return columns

    def _read(self, inputs: Inputs, columns: dict[str, str]) -> Iterator[Named]:
        reader = Reader(inputs.kind, columns)
        for chunk in inputs.chunks(CHUNK):
            for item, value in reader.rows(chunk):
                values = self._value(item.key, value)
                yield (
                    item.key,
                    {
                        spec.name: self._feeder.read(
                            spec, values[spec.name] if isinstance(values, dict) else values, item.key
                        )
                        for spec in self._single
                    },
                )

    @staticmethod
    def _value(key: str, value: Callable[[], Any]) -> Any:
        try:
            return value()
        except (InvalidInput, OSError, ValueError) as error:
            raise ConfigError(f"{key} cannot be read: {reason(error)}; leave it out of --data") from error


def batches(rows: Iterator[Named], specs: Sequence[TensorSpec], most_bytes: int) -> Iterator[list[Named]]:
    """`rows`, some at a time: at most `CHUNK`, and no more than about `most_bytes`."""
    item_bytes = sum(spec.item_bytes for spec in specs)
    count = max(1, min(CHUNK, most_bytes // max(1, item_bytes)))
    while batch := list(itertools.islice(rows, count)):
        yield batch
