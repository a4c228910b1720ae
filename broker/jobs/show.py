"""What `trtpool run` shows: a bar on a terminal, else a line now and then; a table in the end."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from trtpool.ipc.arena import format_bytes

from .work import Outcome

PLAIN_EVERY: Final = 0.1
"""Without a terminal, progress is a line each time that this much more is done."""

ERRORS_SHOWN: Final = 5


class Display:
    """See `job.Show`; a context manager, and everything goes to standard error."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._total = self._kept = 0
        self._start = time.monotonic()
        self._told = 0.0
        self._limit = ""
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[limit]}"),
                TextColumn("{task.fields[errors]}"),
                console=self._console,
            )

    def say(self, line: str) -> None:
        """See `job.Show`."""
        (self._bar.console if self._bar else self._console).print(line)

    def begin(self, total: int, kept: int) -> None:
        """See `job.Show`."""
        self._total, self._kept, self._start = total, kept, time.monotonic()
        self._told = kept / total
        if kept:
            self.say(f"resuming: {kept:,} of {total:,} rows are safe")
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("rows", total=total, completed=kept, rate="", limit="", errors="")

    def advance(self, done: int, errors: int) -> None:
        """See `job.Show`."""
        rate = (done - self._kept) / max(time.monotonic() - self._start, 1e-9)
        failed = f"{errors:,} errors" if errors else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:,.1f}/s", errors=failed, limit=self._limit)
        elif done / self._total >= self._told + PLAIN_EVERY or (done == self._total and self._told < 1):
            self._told = done / self._total
            left = (self._total - done) / rate if rate else 0.0
            parts = [f"{done:,} of {self._total:,} rows", f"{rate:,.1f}/s", f"{left:,.0f} s left", self._limit, failed]
            self._console.print(", ".join(filter(None, parts)))

    def limit(self, part: str, share: float) -> None:
        """See `job.Show`."""
        self._limit = f"limit: {part} {share:.0%}"

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def show_outcome(outcome: Outcome, producers: int) -> None:
    """Print the table at the end of a job on standard output."""
    console = Console(highlight=False, markup=False)
    done = outcome.rows - outcome.kept
    rate = done / outcome.seconds if outcome.seconds else 0.0
    many = "producer" if producers == 1 else "producers"
    rows = [
        ("rows", f"{outcome.rows:,}"),
        ("with errors", f"{len(outcome.errors):,}"),
        ("safe before", f"{outcome.kept:,}"),
        ("time", f"{outcome.seconds:,.1f} s, {rate:,.1f} rows/s with {producers} {many}"),
        ("busy", ", ".join(f"{part} {share:.0%}" for part, share in outcome.shares.items())),
    ]
    if outcome.replaced:
        rows.append(("producers replaced", f"{outcome.replaced:,}"))
    rows += [("wrote", f"{path} ({format_bytes(path.stat().st_size)})") for path in outcome.files]
    wide = max(len(label) for label, _ in rows)
    for label, text in rows:
        console.print(f"{label:<{wide}}  {text}", soft_wrap=True)
    for _, key, text in outcome.errors[:ERRORS_SHOWN]:
        console.print(f"error: {key}: {text}", soft_wrap=True)
    if len(outcome.errors) > ERRORS_SHOWN:
        console.print(f"and {len(outcome.errors) - ERRORS_SHOWN:,} errors more, each in its row")
