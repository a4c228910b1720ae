"""Producer processes, as their parent sees them."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from .plan import ProducerPlan
from .target import Target

SCRIPTS: Final = Path(__file__).resolve().parent.parent
STUCK_S: Final = 180.0
"""A producer that says nothing for so long has hung; it waits 90 s for a result by itself."""

NO_LINE: Final[dict[str, Any]] = {"final": False}


@dataclass
class Totals:
    """What became of the items of all producers.

    Attributes:
        gone: items that were in flight when their producer was killed; nobody is left to have them.
    """

    producers: int = 0
    submitted: int = 0
    ok: int = 0
    unread: int = 0
    gone: int = 0
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    refusals: collections.Counter[str] = field(default_factory=collections.Counter)
    roles: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: collections.Counter[str] = field(default_factory=collections.Counter)
    texts: list[str] = field(default_factory=list)

    def blame(self, what: str, count: int, text: str) -> None:
        self.wrong[what] += count
        self.texts.append(f"{what}: {text}")


class Member:
    """One producer process."""

    def __init__(self, plan: ProducerPlan, target: Target, log: IO[bytes]) -> None:
        self.plan = plan
        self.ended_by_us = self.stopped = False
        self.heard_at = time.monotonic()
        self.last = NO_LINE
        self._text = b""
        path = os.pathsep.join([str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "soaklib.producer", str(target.run_dir), *map(str, plan)],
            env={**target.environment, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def listen(self) -> None:
        """Take in what it has printed."""
        assert self.process.stdout is not None
        while data := self.process.stdout.read(65536):
            self._text += data
        *lines, self._text = self._text.split(b"\n")
        if lines:
            self.last, self.heard_at = json.loads(lines[-1]), time.monotonic()

    def signal(self, number: int) -> None:
        """Send it a signal that may end it."""
        self.ended_by_us = self.ended_by_us or number not in (signal.SIGSTOP, signal.SIGCONT)
        self.process.send_signal(number)

    def dismiss(self) -> None:
        """Let it end after its round."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def close(self, totals: Totals) -> None:
        """Enter a process that has ended into the totals."""
        self.listen()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.dismiss()
        last, code = self.last, self.process.returncode
        totals.roles[self.plan.role] += 1
        for name in ("submitted", "ok", "unread"):
            setattr(totals, name, getattr(totals, name) + last.get(name, 0))
        for name in ("errors", "refusals", "wrong"):
            getattr(totals, name).update(last.get(name, {}))
        totals.texts += [f"producer {self.plan.number}: {text}" for text in last.get("texts", [])]
        if self.ended_by_us and not last["final"]:
            totals.gone += last.get("open", 0)
            return
        if code and not self.ended_by_us:
            totals.blame("producer failed", 1, f"{self.plan} ended with {code}, see producers.log")
        if last.get("open", 0) or not last["final"]:
            totals.blame("lost", last.get("open", 0), f"{self.plan} ended with items open")


class Crew:
    """So many producers at once, one after another from the plans."""

    def __init__(self, target: Target, plans: Iterator[ProducerPlan], size: int) -> None:
        self.totals = Totals()
        self.members: list[Member] = []
        self._target = target
        self._plans = plans
        self._size = size
        self._log = (target.folder / "producers.log").open("wb")

    def tend(self, *, hire: bool = True) -> None:
        """Take in what all have printed, enter those that ended, start others."""
        for member in list(self.members):
            member.listen()
            if member.process.poll() is not None:
                self.members.remove(member)
                member.close(self.totals)
            elif time.monotonic() - member.heard_at > STUCK_S:
                self.totals.blame("producer hangs", 1, f"{member.plan} said nothing for {STUCK_S:.0f} s")
                member.signal(signal.SIGKILL)
        while hire and len(self.members) < self._size:
            self.members.append(Member(next(self._plans), self._target, self._log))
            self.totals.producers += 1

    def dismiss(self) -> None:
        """Let all end after their rounds, and wait for them."""
        for member in self.members:
            member.dismiss()
        while self.members:
            self.tend(hire=False)
            time.sleep(0.02)
        self._log.close()
