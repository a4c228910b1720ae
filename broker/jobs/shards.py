"""Tar shards, as WebDataset has them: what is in them, and what of it is the input.

A sample is the members whose names are the same up to the first dot of the base name, its key; what follows that dot
tells them apart.  The job reads the headers of each shard once, and nothing else of one that is not compressed.  The
places of the members travel with the chunks, so a producer reads a member with one `pread` (`members`).

A compressed shard has no places to jump to.  It is decompressed once to find what is in it, and once more by the
producer that gets its chunks, in order; only a producer that has nothing else to do decompresses up to a later chunk.

A shard that breaks off is read up to there.  `tarfile` takes what is no header for the end, so the mark of the end is
looked for; without it there is a row more, whose error says where the shard breaks off.
"""

from __future__ import annotations

import gzip
import re
import sys
import tarfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from trtpool.ipc.errors import ConfigError, InvalidInput

from .kinds import SHARD_SUFFIXES, kind_of
from .members import PIECE, ShardFile, advise_jumps, open_shard
from .tables import columns_by_input
from .wire import Member, Sample

ANY: Final = ""
"""In place of suffixes: the one member of a sample that can be an input."""

_BLOCK: Final = 512
_TOGETHER: Final = 8
"""Shards whose headers are read at once: on a network's disk that is waiting, and `zlib` leaves other threads alone."""

_DAMAGES: Final = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)
"""What reading a damaged shard raises."""

_META: Final = re.compile(r"__[^/]*__($|/)")
"""What WebDataset leaves out."""


class Listing(NamedTuple):
    """What is in a shard.

    Attributes:
        samples: those that are rows, with the members that were asked for.
        suffixes: of all its members, in lower case.
    """

    samples: tuple[Sample, ...]
    suffixes: frozenset[str]


class _Wanted:
    """Which members are kept: `suffixes`, in lower case; if there are none, those that can be an input."""

    def __init__(self, suffixes: Iterable[str], *, any_type: bool) -> None:
        self.suffixes = frozenset(suffixes)
        self._any_type = any_type

    def __call__(self, suffix: str) -> bool:
        if self.suffixes:
            return suffix in self.suffixes
        return self._any_type or is_kind(suffix, "image", "npy")


def is_kind(suffix: str, *kinds: str) -> bool:
    """Whether a member is of one of these kinds, see `kinds`."""
    return kind_of(f"member.{suffix}") in kinds


def split_name(name: str) -> tuple[str, str] | None:
    """A member's key and suffix, as WebDataset splits its name; None if it leaves the member out."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}", suffix) if stem and suffix and not _META.match(name) else None


def alternatives(column: str) -> tuple[str, ...]:
    """The suffixes that a ``--column`` names, in lower case: ``jpg;png`` is either; ``.jpg`` is ``jpg``."""
    return tuple(part.strip().removeprefix(".").lower() for part in column.split(";"))


# ---------------------------------------------------------------------------------- what is in them


def list_shards(paths: Sequence[str], columns: Iterable[str], *, any_type: bool) -> list[tuple[Sample, ...]]:
    """The samples of each shard.

    Args:
        paths: the shards.
        columns: from ``--column``; none: members that can be an input.
        any_type: a function of the user's decodes, so any member can be one.

    Raises:
        ConfigError: one cannot be opened or is no tar file, or none has what is asked for.
    """
    groups = [alternatives(column) for column in columns]
    wanted = _Wanted((suffix for group in groups for suffix in group), any_type=any_type)
    with ThreadPoolExecutor(_TOGETHER) as threads:
        listings = list(threads.map(lambda path: list_shard(path, wanted), paths))
    there = frozenset[str]().union(*(listing.suffixes for listing in listings))
    kinds = f"only {_some(there)}" if there else "nothing with a suffix"
    for group in groups:
        if there.isdisjoint(group):
            raise ConfigError(f"--column {';'.join(group)}: no sample of {_named(paths)} has such a member, {kinds}")
    if not any(listing.samples for listing in listings):
        raise ConfigError(
            f"--input {_named(paths)}: no member is an image or a .npy file, there is {kinds}; say with --column which "
            "is the input, and name a function that reads it with --decode"
        )
    return [listing.samples for listing in listings]


def _some(suffixes: Collection[str]) -> str:
    first = sorted(suffixes)[:8]
    return ", ".join(f".{suffix}" for suffix in first) + (", ..." if len(suffixes) > len(first) else "")


def _named(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"


def list_shard(path: str, wanted: _Wanted) -> Listing:
    """What is in one shard.

    Raises:
        ConfigError: it cannot be opened, or is no tar file.
    """
    found: dict[str, list[Member]] = {}
    broken: dict[str, str] = {}
    suffixes: set[str] = set()
    damage = ""
    try:
        file = open_shard(path)
    except OSError as error:
        raise ConfigError(f"--input {path} cannot be read: {error}") from error
    with file:
        advise_jumps(file)
        try:
            for info in _headers(path, file):
                parts = split_name(info.name) if info.isreg() else None
                if parts is None:
                    continue
                key, suffix = parts[0], sys.intern(_text(parts[1]))
                suffixes.add(suffix.lower())
                if wanted.suffixes:
                    found.setdefault(key, [])  # without what is wanted it is a row with an error
                if not wanted(suffix.lower()):
                    continue
                members = found.setdefault(key, [])
                if any(member.suffix.lower() == suffix.lower() for member in members):
                    broken[key] = f"the shard has {key}.{suffix} twice; write it anew"
                    continue
                if info.issparse():
                    broken[key] = f"{key}.{suffix} is stored as a sparse file; write the shard anew"
                members.append(Member(suffix, info.offset_data, info.size))
        except _DAMAGES as error:
            damage = f"the shard is damaged, so rows of it may be missing: {error}"
    samples = [Sample(_text(key), tuple(members), broken.get(key, "")) for key, members in found.items()]
    if damage:
        samples.append(Sample("", (), damage))
    return Listing(tuple(samples), frozenset(suffixes))


def _headers(path: str, file: ShardFile) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar file, to its end.

    Raises:
        ConfigError: it does not begin like one.
        tarfile.TarError: it ends before its end.
    """
    try:
        tar = tarfile.TarFile(fileobj=file, mode="r")
    except _DAMAGES as error:
        raise ConfigError(
            f"--input {path} is no tar file: {error}; compressed ones must be called {' or '.join(SHARD_SUFFIXES[1:])}"
        ) from error
    with tar:
        is_empty = tar.offset == 0  # the first header was read by now; Python 3.10's `next` fails where there is none
        while not is_empty and (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            yield info
        file.seek(tar.offset)
        end = file.read(_BLOCK)
        if not end:
            raise tarfile.ReadError(f"at byte {tar.offset:,} it ends without the mark of a tar file's end")
        if any(end):
            raise tarfile.ReadError(f"at byte {tar.offset:,} there is no header")
        if isinstance(file, gzip.GzipFile):
            while file.read(PIECE):  # checksums come last
                pass


def _text(name: str) -> str:
    """A name that results can hold."""
    return name if name.isprintable() else ascii(name)[1:-1]


# ---------------------------------------------------------------------------------- which member is the input


def choose_members(
    shards: Sequence[Sequence[Sample]],
    wanted: Iterable[tuple[str, str]],
    names: Sequence[str],
    *,
    any_type: bool,
) -> dict[str, str]:
    """Which member of a sample feeds which model input: what `member_of` takes.

    Args:
        shards: the samples of each.
        wanted, names, any_type: see `columns_by_input`.

    Raises:
        ConfigError: it is not clear.
    """
    columns = columns_by_input(wanted, names, any_type=any_type)
    if columns:
        return columns
    suffixes: dict[str, None] = {}
    several: Sample | None = None
    for sample in (sample for samples in shards for sample in samples):
        suffixes.update(dict.fromkeys(member.suffix.lower() for member in sample.members))
        if several is None and len(candidates(sample)) > 1:
            several = sample
    if several is None and len(names) == 1:
        return {names[0]: ANY}
    # As a column of a table is taken if it is called like the input: 000.x.npy for the input x.
    by_name = {name: [suffix for suffix in suffixes if suffix.partition(".")[0] == name.lower()] for name in names}
    if all(by_name.values()):
        return {name: ";".join(found) for name, found in by_name.items()}
    if several is not None and len(names) == 1:
        members = ", ".join(f".{member.suffix}" for member in several.members)
        raise ConfigError(
            f"sample {several.key} has several members that could be the input, {members}; say which is, as in "
            f"--column {several.members[0].suffix.lower()}"
        )
    raise ConfigError(
        f"the samples have the members {_some(suffixes)}; say with --column which one is for each input: "
        f"{', '.join(f'--column {name}=SUFFIX' for name in names)}"
    )


def candidates(sample: Sample) -> list[Member]:
    """The members that can be an input; if there are none, all."""
    return [member for member in sample.members if is_kind(member.suffix, "image", "npy")] or list(sample.members)


def member_of(sample: Sample, column: str) -> Member:
    """The member of a sample that `column` names: suffixes, or `ANY`.

    Raises:
        InvalidInput: there is none.
    """
    if column == ANY:
        found = candidates(sample)
    else:
        by_suffix = {member.suffix.lower(): member for member in sample.members}
        found = [by_suffix[suffix] for suffix in alternatives(column) if suffix in by_suffix]
    if not found:
        raise InvalidInput(f"the sample has no member .{' or .'.join(alternatives(column))}")
    return found[0]
