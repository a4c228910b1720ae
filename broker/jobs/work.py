"""The middle of a job: producers work, and what they finish is made safe."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from trtpool.broker.pool import Pool
from trtpool.ipc.errors import ConfigError, StartFailed, TrtpoolError

from . import wire
from .appending import Sink
from .crew import Crew, Dealer
from .journal import Entry, JobFolder, JobRecord
from .limits import Usage
from .produce import ProducerConfig

LOOK_EVERY_S: Final = 1.0
TOGETHER: Final = 16
"""Most chunks that are made safe by one wait for the disk."""


class TooManyErrors(TrtpoolError):
    """More rows failed than ``--max-errors`` allows."""

    exit_code = 22


class Stopped(TrtpoolError):
    """A signal ended the job."""

    exit_code = 1


class Outcome(msgspec.Struct, frozen=True):
    """What a job did.

    Attributes:
        rows: of all inputs.
        kept: of these, how many were safe before it went on.
        errors: row, key and text of those without a result.
        seconds: from when the first producer was ready to the last row.
        shares: how busy each part was, see `limits`.
        replaced: producers that ended and were replaced.
        files: what was written.
    """

    rows: int
    kept: int
    errors: tuple[tuple[int, str, str], ...]
    seconds: float
    shares: dict[str, float]
    replaced: int
    files: tuple[Path, ...]


class Show(Protocol):
    """What shows a job's progress."""

    def say(self, line: str) -> None:
        """Say a line."""

    def begin(self, total: int, kept: int) -> None:
        """The rows of the job, and those that are done."""

    def advance(self, done: int, errors: int) -> None:
        """The rows that are done now, and those without a result."""

    def limit(self, part: str, share: float) -> None:
        """The busiest part, see `limits`."""


class JobOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to do a job; see `JobSettings` for what.

    Attributes:
        producers: processes.
        rows_per_group: rows in a chunk, 0: by their size.
        max_errors: rows that may fail; None: all.
        ordered: rows are in the output as in the inputs.
        resume, overwrite: what to do about an interrupted job, and about an output that is there.
        pool: options of `trtpool.Pool`.
    """

    producers: int
    rows_per_group: int
    max_errors: int | None
    ordered: bool
    resume: bool
    overwrite: bool
    pool: Mapping[str, Any]


class Work:
    """The chunks of a job that are not safe yet.

    Args:
        options, show: the job's.
        folder, record, safe: where it is kept, what it is, what is done.
        sink, pool, config: where chunks go, what runs them, what producers are told.
        stopping: whether to end early.
    """

    def __init__(
        self,
        options: JobOptions,
        show: Show,
        folder: JobFolder,
        record: JobRecord,
        safe: dict[int, Entry],
        sink: Sink,
        pool: Pool,
        config: ProducerConfig,
        *,
        stopping: Callable[[], bool],
    ) -> None:
        self._options, self._show, self._stopping = options, show, stopping
        self._folder, self._sink, self._pool = folder, sink, pool
        self._safe = safe
        self._chunks = record.inputs.chunks(record.chunk_rows)
        self._total = record.inputs.rows
        self._config = config
        self._folder_of_job = record.folder
        self._kept = self._rows_safe = sum(self._chunks[number].count for number in safe)
        self._rows_held = 0
        self._errors = [error for entry in safe.values() for error in entry.errors]
        self._begun = False
        self._start = self._looked = time.monotonic()
        self._seconds = 0.0
        self._replaced = 0
        self._usage = Usage(self._options.producers, pool.supervisor_pid, on_gpu=bool(self._options.pool.get("gpus")))

    def all_chunks(self) -> None:
        """Do what is not safe yet."""
        left = [chunk for chunk in self._chunks if chunk.number not in self._safe]
        self._check_errors()
        if left:
            dealer = Dealer(left)
            count = min(self._options.producers, len(left))
            with Crew(self._config, self._folder_of_job, count, dealer) as crew:
                while self._rows_safe + self._rows_held < self._total:
                    self._turn(crew)
                crew.leave()
                self._replaced = crew.replaced
        if not self._begun:
            self._begin()
        self._note(self._sink.held())
        self._show.advance(self._total, len(self._errors))
        self._usage.look(report := self._pool.status(), report.models[0])
        self._seconds = time.monotonic() - self._start

    def _begin(self) -> None:
        """Start the clock when there are producers: what they take to start says nothing about the rate."""
        self._begun = True
        self._start = self._looked = time.monotonic()
        self._usage.begin(report := self._pool.status(), report.models[0])
        self._show.begin(self._total, self._kept)

    def _turn(self, crew: Crew) -> None:
        """Handle what has come, and make it safe together."""
        entries: list[Entry] = []
        try:
            event = crew.events.get(timeout=0.2)
            while True:
                producer, header, payload = event
                if isinstance(header, wire.Ready) and not self._begun:
                    self._begin()
                chunk = crew.handle(producer, header)
                if isinstance(header, wire.Spent):
                    self._usage.add("decoding", header.decode_ns / 1e9)
                    self._usage.add("post", header.post_ns / 1e9)
                if chunk is not None:
                    assert isinstance(header, wire.Finished)
                    entries += self._write(chunk, header.errors, payload)
                if len(entries) >= TOGETHER:
                    break
                event = crew.events.get_nowait()
        except queue.Empty:
            pass
        finally:
            self._note(entries)
        if self._begun:
            self._show.advance(self._rows_safe + self._rows_held + crew.rows_in_work, len(self._errors))
        self._check_errors()
        if self._stopping():
            raise Stopped(f"the job was stopped; {self._safe_text()}")
        if self._begun and time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            report = self._pool.status()
            self._usage.look(report, report.models[0])
            self._show.limit(*self._usage.lately())

    def _write(self, chunk: wire.Chunk, errors: tuple[tuple[int, str, str], ...], payload: memoryview) -> list[Entry]:
        with self._writing():
            entries = self._sink.append(chunk, payload, errors)
        self._rows_held += chunk.count
        self._errors += errors
        return entries

    def _note(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        with self._writing():
            self._sink.sync()
            self._folder.note(entries)
        for entry in entries:
            self._safe[entry.chunk] = entry
            rows = self._chunks[entry.chunk].count
            self._rows_safe += rows
            self._rows_held -= rows

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{self._folder.path} cannot be written: {error}; when that is mended, {self._safe_text()}"
            ) from error
        finally:
            self._usage.add("writing", time.monotonic() - start)

    def _check_errors(self) -> None:
        most = self._options.max_errors
        if most is not None and len(self._errors) > most:
            _, key, text = self._errors[-1]
            raise TooManyErrors(
                f"{len(self._errors)} rows have errors, more than --max-errors {most}, the last {key}: {text}; "
                f"{self._safe_text()}"
            )

    def _safe_text(self) -> str:
        return f"{self._rows_safe} of {self._total} rows are safe, go on with --resume"

    def complete(self) -> tuple[Path, ...]:
        """Put the output where it belongs; returns the files."""
        with self._writing():
            return self._folder.finish(self._sink.finish(self._ordered_entries()))

    def _ordered_entries(self) -> list[Entry]:
        """All chunks, in the order that the output is to have."""
        if len(self._safe) != len(self._chunks):
            raise StartFailed("some chunks were never written, which is a defect of trtpool; please report it")
        if self._options.ordered:
            return [self._safe[number] for number in range(len(self._chunks))]
        return sorted(self._safe.values(), key=lambda entry: entry.offset)

    def outcome(self, files: tuple[Path, ...]) -> Outcome:
        """What was done."""
        errors = tuple(sorted(self._errors))
        return Outcome(self._total, self._kept, errors, self._seconds, self._usage.overall(), self._replaced, files)
