"""Where rows come from: image or other files, Parquet columns, `.npy` arrays.

The parent finds the inputs and deals their rows out as chunks; each producer reads the rows of its chunks.  What is
read is mapped, not copied, where the format allows it: rows of a `.npy` file, values of a Parquet column.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from trtpool.ipc.errors import ConfigError, InvalidInput, MissingExtra

from .wire import Chunk

IMAGE_SUFFIXES: Final = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "png", "webp", "bmp", "dib", "gif", "tif", "tiff", "jp2", "j2k"),
        *("ppm", "pgm", "pbm", "pnm", "tga", "ico", "avif"),
    )
)
PARQUET_SUFFIXES: Final = frozenset((".parquet", ".pq"))
NPY_SUFFIXES: Final = frozenset((".npy",))


class Item(NamedTuple):
    """One row, as functions given with ``--decode`` and ``--post`` get it.

    Attributes:
        row: its number, counted from 0 over all inputs.
        key: the file, or ``FILE#ROW`` for a row of a Parquet or `.npy` file.
        value: a `pathlib.Path`; a row of a `.npy` file as a read-only array; from Parquet an array, a `pyarrow.Buffer`
            (binary columns), a string, or with several ``--column`` a dict of these by input name.
    """

    row: int
    key: str
    value: Any


class Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of rows, as it was when the job was planned; `groups` are the rows of each row group, or of it all."""

    path: str
    bytes: int
    mtime_ns: int
    groups: tuple[int, ...]


class Inputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All rows of a job: `kind` is "files", with `paths`, or "parquet" or "npy", with `stored`."""

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
                    yield Chunk(number, first, count, file.path, group_at + start, group, group_at)
                    number, first = number + 1, first + count
                group_at += rows


# ---------------------------------------------------------------------------------- finding


def find(wanted: Sequence[str], read_list: Callable[[], bytes], *, any_file: bool) -> Inputs:
    """The rows that ``--input`` means.

    Args:
        wanted: files, globs, folders, ``-`` for a list of files.
        read_list: gives that list, one a line, or separated by NUL.
        any_file: take every file of a folder; else those of one kind that is known: images, Parquet, `.npy`.

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
    return _of_kind(paths)


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
    for suffixes in (IMAGE_SUFFIXES, PARQUET_SUFFIXES, NPY_SUFFIXES):
        if some := [path for path in found if _suffix(path) in suffixes]:
            return some
    raise ConfigError(f"--input {folder}: no images, Parquet or .npy files are there; other files need --decode")


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


def _of_kind(paths: Sequence[str]) -> Inputs:
    kinds = {
        "parquet" if _suffix(p) in PARQUET_SUFFIXES else "npy" if _suffix(p) in NPY_SUFFIXES else "files" for p in paths
    }
    if len(kinds) > 1:
        raise ConfigError("--input names files of several kinds; run a job for each: images, Parquet, .npy")
    kind = kinds.pop()
    if kind == "files":
        return Inputs(kind, paths=tuple(paths))
    rows_of = _parquet_groups if kind == "parquet" else _npy_groups
    return Inputs(kind, stored=tuple(_stored(path, rows_of) for path in paths))


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


def pyarrow_parquet(why: str) -> Any:
    """`pyarrow.parquet`.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra(f"{why} with pyarrow; install it with: pip install 'trtpool[etl]'") from error
    return pyarrow.parquet


# ---------------------------------------------------------------------------------- reading


class Reader:
    """Reads the rows of chunks, in a producer.

    Args:
        kind: as in `Inputs`.
        columns: Parquet columns by model input.
    """

    def __init__(self, kind: str, columns: dict[str, str]) -> None:
        self._columns = columns
        self._open: tuple[tuple[str, int], Any] | None = None  # what was read last: a file, or a row group of one
        self._rows = {"files": self._files, "npy": self._npy, "parquet": self._parquet}[kind]

    def rows(self, chunk: Chunk) -> Iterator[tuple[Item, Callable[[], Any]]]:
        """Each row without its value, and what gives the value.

        A value that cannot be read is the row's error, so it is read where errors are caught.
        """
        return self._rows(chunk)

    def _files(self, chunk: Chunk) -> Iterator[tuple[Item, Callable[[], Any]]]:
        for offset, path in enumerate(chunk.paths):
            yield Item(chunk.first + offset, path, None), lambda path=path: Path(path)  # type: ignore[misc]

    def _stored(self, chunk: Chunk, value: Callable[[int], Any]) -> Iterator[tuple[Item, Callable[[], Any]]]:
        for offset in range(chunk.count):
            row = chunk.at + offset
            yield Item(chunk.first + offset, f"{chunk.path}#{row}", None), lambda row=row: value(row)  # type: ignore[misc]

    def _npy(self, chunk: Chunk) -> Iterator[tuple[Item, Callable[[], Any]]]:
        array = self._kept((chunk.path, 0), lambda: np.load(chunk.path, mmap_mode="r", allow_pickle=False))
        return self._stored(chunk, lambda row: np.asarray(array[row]))

    def _parquet(self, chunk: Chunk) -> Iterator[tuple[Item, Callable[[], Any]]]:
        def read() -> Any:
            file = pyarrow_parquet("a Parquet file is read").ParquetFile(chunk.path, memory_map=True)
            return file.read_row_group(chunk.group, columns=sorted(set(self._columns.values())))

        # The table is read within the first row's value, so that a broken row group is its rows' error.
        def value(row: int) -> Any:
            table = self._kept((chunk.path, chunk.group), read)
            values = {
                name: column_value(table.column(column)[row - chunk.group_at]) for name, column in self._columns.items()
            }
            return values if len(values) > 1 else next(iter(values.values()))

        return self._stored(chunk, value)

    def _kept(self, key: tuple[str, int], read: Callable[[], Any]) -> Any:
        if self._open is None or self._open[0] != key:
            self._open = None  # before the next is read, so that there are never two
            self._open = key, read()
        return self._open[1]


def column_value(scalar: Any) -> Any:
    """A value of a Parquet column: lists and tensors as arrays, binary values as buffers, without copies.

    Args:
        scalar: a `pyarrow.Scalar`; a struct with the field ``bytes`` (as Hugging Face stores images) counts as that.

    Raises:
        InvalidInput: it is null.
    """
    import pyarrow as pa

    if not scalar.is_valid:
        raise InvalidInput("the value is null")
    kind = scalar.type
    if isinstance(kind, pa.BaseExtensionType):
        return column_value(scalar.value)
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return column_value(scalar["bytes"])
    if isinstance(scalar, pa.BinaryScalar) and not isinstance(scalar, pa.StringScalar):
        return scalar.as_buffer()
    if isinstance(scalar, pa.ListScalar):
        return _list_value(scalar.values)
    value = scalar.as_py()
    return np.asarray(value) if isinstance(value, (bool, int, float)) else value


def _list_value(values: Any) -> Any:
    import pyarrow as pa

    shape = [len(values)]
    while isinstance(values, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        values = values.flatten()
        shape.append(len(values) // math.prod(shape) if all(shape) else 0)
    if values.null_count:
        raise InvalidInput("the list has nulls")
    if math.prod(shape) != len(values):
        raise InvalidInput("the list holds lists of different lengths")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def choose_columns(
    inputs: Inputs, wanted: Iterable[tuple[str, str]], names: Sequence[str], *, any_type: bool
) -> dict[str, str]:
    """Which Parquet column feeds which model input.

    Args:
        inputs: the job's.
        wanted: from ``--column``: input and column; an empty input is the model's only one.
        names: the model's inputs.
        any_type: a function of the user's decodes, so a column of any type will do.

    Raises:
        ConfigError: an input has none, or a column is not there.
    """
    schema = pyarrow_parquet("a Parquet file is read").read_schema(inputs.stored[0].path)
    given = list(wanted)
    if any(not name for name, _ in given) and len(given) > 1 and not any_type:
        raise ConfigError("--column: with several, say which input each is for, such as --column x=pixels")
    columns = {name or (names[0] if len(given) == 1 else column): column for name, column in given}
    if not columns:
        columns = {name: name for name in names if name in schema.names}
    if not columns:
        usable = [field.name for field in schema if any_type or _feeds(field.type)]
        if len(usable) != 1 or len(names) != 1:
            raise ConfigError(
                f"{inputs.stored[0].path} has the columns {', '.join(schema.names)}; say with --column which one is "
                f"for each input: {', '.join(f'--column {name}=COLUMN' for name in names)}"
            )
        columns[names[0]] = usable[0]
    if absent := [column for column in columns.values() if column not in schema.names]:
        raise ConfigError(f"--column {absent[0]}: {inputs.stored[0].path} has only {', '.join(schema.names)}")
    if not any_type and set(columns) != set(names):
        raise ConfigError(f"the model's inputs are {', '.join(names)}, but --column names {', '.join(columns)}")
    return columns


def _feeds(kind: Any) -> bool:
    """Whether values of a column's type can be a model's input or an encoded image."""
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return struct or any(test(kind) for test in (*lists, *binary))
