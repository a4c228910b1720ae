"""What became of each item: a producer's book, in which nothing may stay open."""

from __future__ import annotations

import collections
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import trtpool

MAX_TEXTS = 5
"""Wrongs that a producer describes; all are counted."""


@dataclass(frozen=True)
class Sent:
    """Items that were submitted together and end together: those of one slot, or of one `infer`.

    Attributes:
        items: how many.
        deadline: whether they had one.
        poison: "" or what it does: "refused", "deadly", "hangs".
    """

    items: int
    deadline: bool = False
    poison: str = ""


def excuse(sent: Sent, cancelled: bool, error: BaseException) -> str | None:
    """Why this error is allowed to be the end of these items; None if it is not."""
    kind, poison = type(error), sent.poison
    if kind is trtpool.DeadlineExceeded and sent.deadline:
        return "it had a deadline"
    if kind is trtpool.Cancelled and cancelled:
        return "its producer cancelled it"
    if kind is trtpool.EngineFailed and poison == "refused":
        return "the model refuses its input"
    if kind is trtpool.WorkerDied and poison in ("deadly", "hangs"):
        return "its input ends or hangs workers"
    if kind is trtpool.WorkerDied and "tried alone 3 times" in str(error):
        return "the soak killed three workers that ran it alone"
    return None


class Ledger:
    """One producer's; threads share it.

    Attributes:
        submitted: items.
        ok: items whose result was right.
        unread: items that were released before their end was looked at, on purpose.
        errors: items by kind of error and why it was allowed.
        refusals: leases that were refused, and why that was allowed.
        wrong: what is not allowed: errors without an excuse, wrong answers, results that never came.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.submitted = self.ok = self.unread = 0
        self.errors: collections.Counter[str] = collections.Counter()
        self.refusals: collections.Counter[str] = collections.Counter()
        self.wrong: collections.Counter[str] = collections.Counter()
        self.texts: list[str] = []

    def send(self, sent: Iterable[Sent]) -> None:
        """Note what is about to be submitted."""
        with self._lock:
            self.submitted += sum(one.items for one in sent)

    def take_back(self, sent: Iterable[Sent]) -> None:
        """It was not submitted after all."""
        with self._lock:
            self.submitted -= sum(one.items for one in sent)

    def end_well(self, items: int) -> None:
        """Results came and were right."""
        with self._lock:
            self.ok += items

    def leave(self, items: int) -> None:
        """Nobody will look at the end of these."""
        with self._lock:
            self.unread += items

    def end_badly(self, sent: Sent, error: BaseException, *, cancelled: bool = False) -> None:
        """They ended with an error; a time-out is a result that never came."""
        reason = excuse(sent, cancelled, error)
        kind = type(error).__name__
        with self._lock:
            if reason is not None:
                self.errors[f"{kind}: {reason}"] += sent.items
                return
        self.blame("lost" if isinstance(error, TimeoutError) else "error", sent.items, f"{kind}: {error} ({sent})")

    def refuse(self, error: BaseException, reason: str) -> None:
        """A lease was refused, as it may be."""
        with self._lock:
            self.refusals[f"{type(error).__name__}: {reason}"] += 1

    def blame(self, what: str, items: int, text: str) -> None:
        """Note what must not happen."""
        with self._lock:
            self.wrong[what] += items
            if len(self.texts) < MAX_TEXTS:
                self.texts.append(f"{what}: {text}"[:2000])

    @property
    def open(self) -> int:
        """Items that have not ended yet."""
        return self.submitted - self.ok - self.unread - sum(self.errors.values()) - sum(self.wrong.values())

    def line(self, *, final: bool = False) -> str:
        """All of it as one line of JSON."""
        with self._lock:
            return json.dumps(
                {
                    "submitted": self.submitted, "ok": self.ok, "unread": self.unread, "errors": self.errors,
                    "refusals": self.refusals, "wrong": self.wrong, "texts": self.texts, "open": self.open,
                    "final": final,
                }
            )  # fmt: skip
