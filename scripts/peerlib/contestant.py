"""What each contestant has in common: start, run, latency, stop."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from scripts.benchlib.crew import Crew, Driver, Exchanger
from scripts.benchlib.workload import Source, Workload

from . import processes
from .job import KINDS, Job, absent

WARM_UP_S = 0.3
"""Before each window, with the producers that it will have: first requests open connections and fill caches."""

Connects = Sequence[Callable[[], Driver]]
"""One for each producer; each makes its driver there."""


@dataclass(frozen=True)
class Measured:
    """One window.

    Attributes:
        items: what was sent in it and came back, checked.
        took_s: from the first producer's start to the last one's end.
        cpu_s: of all processes of the contestant, its producers and their checks included.
        took_ns: each exchange, where items went one at a time.
        least_share: of the items, those of the producer that had fewest, over an equal share; 1 where all had as many.
    """

    items: int
    took_s: float
    cpu_s: float
    took_ns: tuple[int, ...] = ()
    least_share: float = 1.0


class OneAtATime:
    """A runner that sends an item when it has the last one's answer; reports nanoseconds."""

    def __init__(self, connect: Callable[[], Exchanger], workload: Workload) -> None:
        self._source = Source(workload, 1)
        self._driver = connect()

    def run(self, until_s: float) -> list[int]:
        took_ns = []
        while time.monotonic() < until_s:
            items, expected = self._source.take(1)
            started_ns = time.perf_counter_ns()
            self._driver.exchange(items, expected)
            took_ns.append(time.perf_counter_ns() - started_ns)
        return took_ns

    def close(self) -> None:
        self._driver.close()


class Contestant(abc.ABC):
    """One way to feed a worker process; `start`, then any of `run` and `latency`, then `stop`.

    It lives in a process of its own, to which it is pickled before `start`.

    Attributes:
        name: for table and command line.
        modules: what must be importable.
        kinds: the kinds of work that it takes part in.
        copies: of each input byte of a large item, between the producer's write and the engine's read; those that the
            kernel makes count, the producer's write does not.  Counted in its source, not measured.
        why: what those copies are.
        note: what a reader must know beside its figures.
        least_window_s: a shorter window would say nothing.
        own: it is trtpool, and the others are compared with it.
        bar: it is one of those of which the best is the bar.
    """

    name: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[str, ...]] = tuple(KINDS)
    copies: ClassVar[int]
    why: ClassVar[str]
    note: ClassVar[str] = ""
    least_window_s: ClassVar[float] = 0.0
    own: ClassVar[bool] = False
    bar: ClassVar[bool] = True

    @classmethod
    def missing(cls) -> str:
        """Why this contestant cannot take part; empty if it can."""
        return absent(cls.modules)

    def start(self, job: Job) -> None:
        """Bring up all that producers share; when this returns, it is ready."""
        self._job = job
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.serve(job))
            self._up = stack.pop_all()

    def run(self, producers: int, window_s: float) -> Measured:
        """Let so many producers work for a window, each with as much in flight as suits this contestant."""
        with self.producers(self._job, producers) as connects:
            return self._measure(connects, max(window_s, self.least_window_s))

    def latency(self, window_s: float) -> Measured:
        """Send one item at a time for a window."""
        with self.producers(self._job, 1) as connects:
            return self._measure([partial(OneAtATime, connects[0], self._job.workload)], window_s)

    def stop(self) -> None:
        """End all that `start` began."""
        self._up.close()

    def _measure(self, connects: Sequence[Callable[[], Driver | OneAtATime]], window_s: float) -> Measured:
        with contextlib.closing(Crew(connects)) as crew:
            crew.run(WARM_UP_S)
            cpu_s = processes.cpu_s()
            turns = crew.run(window_s)
            cpu_s = processes.cpu_s() - cpu_s
        took_s = max(turn.ended_s for turn in turns) - min(turn.started_s for turn in turns)
        if self._job.one_at_a_time:
            took_ns = tuple(turns[0].report)
            return Measured(len(took_ns), took_s, cpu_s, took_ns)
        done = [turn.report for turn in turns]
        items = sum(done)
        return Measured(items, took_s, cpu_s, least_share=min(done) * len(done) / max(1, items))

    def serve(self, job: Job) -> AbstractContextManager[object]:  # noqa: ARG002  # for those that override it
        """What stays up over all windows; nothing, where producers and worker are set up together."""
        return contextlib.nullcontext()

    @abc.abstractmethod
    def producers(self, job: Job, count: int) -> AbstractContextManager[Connects]:
        """What `count` producers need; yields how each connects."""
