"""Faults as they are done: signals to workers, producers and the broker, and an end to those that do not last."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from .crew import Crew
from .plan import Fault
from .target import BATCH_TIMEOUT_S, Target

HANG_S: Final = 3 * BATCH_TIMEOUT_S
"""A worker that was stopped for good goes on after this if it had no work, and so was not killed."""

MAX_BROKER_STOP_S: Final = 0.5


class Saboteur:
    """Does the faults of a plan, each when it is due.

    Attributes:
        done: faults by kind.
        missed: faults that found nobody to hit.
    """

    def __init__(self, target: Target, crew: Crew, faults: Iterator[Fault]) -> None:
        self.done: collections.Counter[str] = collections.Counter()
        self.missed = 0
        self._target = target
        self._crew = crew
        self._faults = faults
        self._next = next(faults)
        self._due = time.monotonic() + self._next.after_s
        self._later: list[threading.Timer] = []
        self._hit: dict[str, Callable[[], list[int]]] = {
            "worker": self._workers, "producer": self._producers, "broker": self._brokers,
        }  # fmt: skip

    def step(self) -> None:
        """Do what is due."""
        if time.monotonic() >= self._due:
            self._do(self._next)
            self._next = next(self._faults)
            self._due = time.monotonic() + self._next.after_s

    def finish(self) -> None:
        """Wait until all that was stopped goes on."""
        for timer in self._later:
            timer.join()

    # ------------------------------------------------------------------ whom

    def _workers(self) -> list[int]:
        return sorted(worker.pid for worker in self._target.report().workers)

    def _producers(self) -> list[int]:
        return [member.process.pid for member in self._crew.members]

    def _brokers(self) -> list[int]:
        """One that is ready: several in a row that end before that are the end of the pool."""
        self._target.report()
        return self._target.pids("trtpool.broker")

    def _victims(self, whom: str, pick: int, count: int = 1) -> list[int]:
        there = self._hit[whom]()
        return [there[(pick + at) % len(there)] for at in range(min(count, len(there)))]

    # ------------------------------------------------------------------ what

    def _do(self, fault: Fault) -> None:
        verb, _, rest = fault.kind.partition(" ")
        if rest.startswith("two "):
            victims = [("worker", pid) for pid in self._victims("worker", fault.pick, 2)]
        else:
            victims = [(whom, pid) for whom in rest.split(" and ") for pid in self._victims(whom, fault.pick)]
        if not victims:
            self.missed += 1
            return
        self.done[fault.kind] += 1
        for whom, pid in victims:
            if verb == "kill":
                self._signal(whom, pid, signal.SIGKILL)
            elif verb == "end":
                self._signal(whom, pid, signal.SIGTERM)
            else:
                lasts_s = HANG_S if verb == "hang" else fault.lasts_s
                self._stop(whom, pid, min(lasts_s, MAX_BROKER_STOP_S) if whom == "broker" else lasts_s)

    def _stop(self, whom: str, pid: int, lasts_s: float) -> None:
        """Stop it, and let it go on later; its pidfd is kept until then, since its pid may have another by then.

        A thread sees to that: while the broker stands still, ours may wait for its answer.
        """
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            self._signal(whom, pid, signal.SIGSTOP)

            def go_on() -> None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                os.close(pidfd)

            timer = threading.Timer(lasts_s, go_on)
            self._later = [*(one for one in self._later if one.is_alive()), timer]
            timer.start()

    def _signal(self, whom: str, pid: int, number: int) -> None:
        if whom == "producer":
            for member in self._crew.members:
                if member.process.pid == pid:
                    member.signal(number)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
