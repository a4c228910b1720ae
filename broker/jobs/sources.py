"""Where rows come from: image or other files, columns of Parquet and Arrow, `.npy` arrays, samples of tar shards.

The parent finds the inputs and deals their rows out as chunks, which producers read (`reading`).
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from trtpool.ipc.errors import ConfigError, InvalidInput

from .batches import BatchFile
from .kinds import kind_of
from .shards import choose_members, is_kind, list_shards, member_of
from .tables import choose_columns, pyarrow_parquet
from .wire import Chunk, Sample


class Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of rows, as it was when the job was planned.

    Attributes:
        path, bytes, mtime_ns: the file.
        groups: the rows of each row group or record batch, or of it all.
        samples: the rows of a tar shard.
    """

    path: str
    bytes: int
    mtime_ns: int
    groups: tuple[int, ...]
    samples: tuple[Sample, ...] = ()


class Inputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All rows of a job: `kind` is "files", with `paths`, or "parquet", "arrow", "npy" or "tar", with `stored`."""

    kind: str
    paths: tuple[str, ...] = ()
    stored: tuple[Stored, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.paths) + sum(sum(file.groups) for file in self.stored)

    def chunks(self, most: int) -> tuple[Chunk, ...]:
        """All rows, in order, in chunks of at most `most`, none across row groups."""
        return tuple(self._deal(most))

    def _deal(self, most: int) -> Iterator[Chunk]:
        number = first = 0
        for start in range(0, len(self.paths), most):
            paths = self.paths[start : start + most]
            yield Chunk(start // most, start, len(paths), paths=paths)
        for file in self.stored:
            group_at = 0
            for group, rows in enumerate(file.groups):
                for start in range(0, rows, most):
                    count = min(most, rows - start)
                    samples = file.samples[start : start + count]
                    yield Chunk(number, first, count, file.path, group_at + start, group, group_at, samples=samples)
                    number, first = number + 1, first + count
                group_at += rows


# ---------------------------------------------------------------------------------- finding


def find(
    wanted: Sequence[str], read_list: Callable[[], bytes], *, any_file: bool, columns: Iterable[str] = ()
) -> Inputs:
    """The rows that ``--input`` means.

    Args:
        wanted: files, globs, folders, ``-`` for a list of files.
        read_list: gives that list, one a line, or separated by NUL.
        any_file: take every file of a folder, and every member of a shard; else those of one kind that is known:
            images, Parquet, `.npy`, Arrow, tar shards.
        columns: from ``--column``.

    Raises:
        ConfigError: there is nothing, or not of one kind.
        MissingExtra: pyarrow is needed to read them.
    """
    paths: list[str] = []
    for text in wanted:
        if text == "-":
            paths += _listed(read_list())
        elif Path(text).is_dir():
            paths += _inside(text, any_file=any_file)
        elif Path(text).exists() or not glob.has_magic(text):
            if not Path(text).exists():
                raise ConfigError(
                    f"--input {text}: there is no such file; name files, folders or globs, or - for a list"
                )
            paths.append(text)
        else:
            paths += sorted(path for path in glob.glob(text, recursive=True) if Path(path).is_file())  # noqa: PTH207
    if not paths and list(wanted) == ["-"]:
        raise ConfigError("--input -: standard input names no files; write one a line, or separated by NUL")
    if not paths:
        raise ConfigError(f"--input {' '.join(wanted)}: nothing is there; look at the path, and quote globs")
    for path in paths:
        if not path.isprintable():
            raise ConfigError(f"the file name {path!r} is no text that results can name; rename the file")
    return _of_kind(paths, columns, any_file=any_file)


def _listed(data: bytes) -> list[str]:
    separator = b"\0" if b"\0" in data else b"\n"
    return [os.fsdecode(line.rstrip(b"\r")) for line in data.split(separator) if line.strip()]


def _inside(folder: str, *, any_file: bool) -> list[str]:
    """Files of a folder and its folders, hidden ones left out, of the first kind that is there."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(place, name) for name in sorted(names) if not name.startswith(".")]  # noqa: PTH118
    if any_file:
        return found
    for kind in ("image", "parquet", "npy", "arrow", "tar"):
        if some := [path for path in found if kind_of(path) == kind]:
            return some
    raise ConfigError(
        f"--input {folder}: no images, Parquet, .npy or Arrow files or tar shards are there; other files need --decode"
    )


def _of_kind(paths: Sequence[str], columns: Iterable[str], *, any_file: bool) -> Inputs:
    kinds = {"files" if (kind := kind_of(path)) in ("image", "other") else kind for path in paths}
    if len(kinds) > 1:
        raise ConfigError(
            "--input names files of several kinds; run a job for each: images, Parquet, .npy, Arrow, tar shards"
        )
    kind = kinds.pop()
    if kind == "files":
        return Inputs(kind, paths=tuple(paths))
    if kind == "tar":
        shards = list_shards(paths, columns, any_type=any_file)
        groups = {path: (len(samples),) for path, samples in zip(paths, shards, strict=True)}
        stored = (_stored(path, groups.__getitem__) for path in paths)
        pairs = zip(stored, shards, strict=True)
        return Inputs(kind, stored=tuple(msgspec.structs.replace(file, samples=samples) for file, samples in pairs))
    rows_of = {"parquet": _parquet_groups, "npy": _npy_groups, "arrow": lambda path: BatchFile(path).counts()}
    return Inputs(kind, stored=tuple(_stored(path, rows_of[kind]) for path in paths))


def _stored(path: str, groups: Callable[[str], tuple[int, ...]]) -> Stored:
    try:
        stat = Path(path).stat()
        return Stored(path, stat.st_size, stat.st_mtime_ns, groups(path))
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ConfigError(f"--input {path} cannot be read: {error}") from error


def _parquet_groups(path: str) -> tuple[int, ...]:
    metadata = pyarrow_parquet("a Parquet file is read").read_metadata(path)
    return tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))


def _npy_groups(path: str) -> tuple[int, ...]:
    shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    if not shape:
        raise ConfigError(f"--input {path} holds a single number; its first axis must count rows")
    return (shape[0],)


def check_unchanged(inputs: Inputs) -> None:
    """Raise `ConfigError` if a file of rows is no longer what the job was planned for."""
    for file in inputs.stored:
        try:
            stat = Path(file.path).stat()
        except OSError as error:
            raise ConfigError(f"{file.path}, which the job reads, is gone: {error}; put it back") from error
        if (stat.st_size, stat.st_mtime_ns) != (file.bytes, file.mtime_ns):
            raise ConfigError(f"{file.path} changed since the job began; start anew with --overwrite")


def choose(
    inputs: Inputs, wanted: Iterable[tuple[str, str]], names: Sequence[str], *, any_type: bool
) -> dict[str, str]:
    """Which column, or member of a tar shard, feeds which model input; empty if rows of the inputs have but one value.

    Args:
        inputs: the job's.
        wanted, names, any_type: see `tables.columns_by_input`.

    Raises:
        ConfigError: an input has none, or a column is not there.
    """
    if inputs.kind in ("parquet", "arrow"):
        path = inputs.stored[0].path
        read = BatchFile(path).schema if inputs.kind == "arrow" else None
        schema = pyarrow_parquet("a Parquet file is read").read_schema(path) if read is None else read
        return choose_columns(path, schema, wanted, names, any_type=any_type)
    if inputs.kind == "tar":
        shards = [file.samples for file in inputs.stored]
        return choose_members(shards, wanted, names, any_type=any_type)
    if tuple(wanted):
        raise ConfigError("--column is for Parquet, Arrow and tar shards; leave it out")
    return {}


def holds_images(inputs: Inputs, columns: Mapping[str, str]) -> bool:
    """Whether rows are encoded images, as far as names say."""
    if inputs.kind != "tar" or len(columns) > 1:
        return inputs.kind == "files"
    (column,) = columns.values()
    for sample in (sample for file in inputs.stored for sample in file.samples):
        with contextlib.suppress(InvalidInput):
            return is_kind(member_of(sample, column).suffix, "image")
    return False
