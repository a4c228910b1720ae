"""What of a job is safe on disk, in a folder beside the output, ``OUTPUT.job``.

::

    lock       held while a job runs, so that two cannot write one output
    job.json   what the job is; `--resume` goes on with these inputs and refuses other settings
    data...    the sink's file(s)
    journal    a line for each chunk that is whole in the sink's files
    moves      there once all is written: which file goes where; from then on there is nothing but moving left

A chunk's bytes are synced before its line is written, and the line is synced too, so what the journal names is there
after any crash.  What lies behind the last chunk that it names was being written, and is cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import msgspec

from trtpool.ipc.errors import ConfigError

from .images import ImageOptions
from .sources import Inputs

VERSION = 1


class JobSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What results depend on; another pool, other GPUs or more producers may go on with a job.

    Attributes:
        model: the file, absolute, with its size in bytes and its time.
        inputs: as they were given.
        columns: from ``--column``: model input and column, or suffix in tar shards.
        decode, post: users' functions, or "".
        image: as given.
        sink: "parquet", "arrow", "npy" or "jsonl".
        pool: options that change what the model computes: shapes, and how a plan is built.
    """

    model: tuple[str, int, int]
    inputs: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    decode: str
    post: str
    image: ImageOptions
    sink: str
    pool: str


class JobRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `job.json` holds: `chunk_rows` at most in a chunk, `folder` is the current directory."""

    version: int = VERSION
    settings: JobSettings
    inputs: Inputs
    chunk_rows: int
    folder: str


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of the journal: a chunk, where its bytes are, and its rows without a result."""

    chunk: int
    offset: int
    bytes: int
    errors: tuple[tuple[int, str, str], ...] = ()


class JobFolder:
    """The folder of one job, locked; a context manager that unlocks it.

    Raises:
        ConfigError: it cannot be made, or another job has it.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".job")
        self._journal_fd = self._lock_fd = -1
        self._names_synced = False
        try:
            self.path.mkdir(exist_ok=True)
            self._lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            raise ConfigError(f"another job is writing {output}; wait for it, or name another --output") from None
        except FileNotFoundError as error:
            raise ConfigError(f"--output {output}: there is no folder {output.parent}; make it first") from error
        except OSError as error:
            raise ConfigError(f"--output {output}: its folder cannot be used: {error}") from error

    @property
    def begun(self) -> bool:
        """Whether a job was interrupted here."""
        return (self.path / "job.json").exists()

    def load(self) -> JobRecord:
        """What that job is.

        Raises:
            ConfigError: another version of trtpool began it.
        """
        try:
            return msgspec.json.decode((self.path / "job.json").read_bytes(), type=JobRecord)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{self.path} is of another version of trtpool; use --overwrite: {error}") from error

    def begin(self, record: JobRecord) -> None:
        """Start anew: whatever is here goes."""
        for entry in self.path.iterdir():
            if entry.name != "lock":
                entry.unlink()
        self.write("job.json", msgspec.json.encode(record))
        self._sync_folder(self.output.parent)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, all or nothing."""
        draft = self.path / f"{name}.draft"
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path / name)
        self._sync_folder(self.path)

    def entries(self) -> dict[int, Entry]:
        """The chunks that are safe, by number; the journal is cut after the last whole line and goes on from there."""
        journal = self.path / "journal"
        found: dict[int, Entry] = {}
        good = 0
        if journal.exists():
            for line in journal.read_bytes().splitlines(keepends=True):
                try:
                    entry = msgspec.json.decode(line, type=Entry)
                except msgspec.MsgspecError:
                    break
                if not line.endswith(b"\n"):
                    break
                found[entry.chunk] = entry
                good += len(line)
        self._journal_fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._journal_fd, good)
        os.lseek(self._journal_fd, good, os.SEEK_SET)
        return found

    def note(self, entries: Iterable[Entry]) -> None:
        """Add chunks whose bytes are synced."""
        if not self._names_synced:  # the names of the files that they are in, which are there by now
            self._sync_folder(self.path)
            self._names_synced = True
        data = b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries)
        while data:
            data = data[os.write(self._journal_fd, data) :]
        os.fsync(self._journal_fd)

    def finish(self, moves: Iterable[tuple[str, str]] | None = None) -> tuple[Path, ...]:
        """Move the sink's files to where they belong and remove the folder; returns where they are.

        Args:
            moves: file in this folder and file beside it; None: as an interrupted `finish` wrote down.
        """
        if moves is not None:
            self.write("moves", msgspec.json.encode(list(moves)))
        final = msgspec.json.decode((self.path / "moves").read_bytes(), type=list[tuple[str, str]])
        for name, target in final:
            with contextlib.suppress(FileNotFoundError):  # moved before an interruption
                (self.path / name).replace(self.output.with_name(target))
        self._sync_folder(self.output.parent)
        shutil.rmtree(self.path)
        return tuple(self.output.with_name(target) for _, target in final)

    @property
    def all_written(self) -> bool:
        """Whether only `finish` was interrupted."""
        return (self.path / "moves").exists()

    def discard_if_new(self) -> None:
        """Leave nothing if no job began here."""
        if not self.begun:
            shutil.rmtree(self.path, ignore_errors=True)

    @staticmethod
    def _sync_folder(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def __enter__(self) -> JobFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (self._journal_fd, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._journal_fd = self._lock_fd = -1
