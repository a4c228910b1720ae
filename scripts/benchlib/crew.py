"""Producer processes that start together, and the CPU time that processes take."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import psutil

from .workload import Array, Source

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess
    from multiprocessing.synchronize import Barrier

    import numpy as np
    import numpy.typing as npt

CONTEXT: Final = multiprocessing.get_context("spawn")
WARM_UP_S: Final = 0.1
START_S: Final = 10.0
"""How long producers may be apart at the start of a window; they all wait for it already."""
STUCK_S: Final = 60.0
"""A producer that says nothing for so long, over its window, has hung."""


class Runner(Protocol):
    """What a producer process drives."""

    def run(self, until_s: float) -> Any:
        """Work until `time.monotonic()` is `until_s`, wait for what is in flight, and report."""

    def close(self) -> None: ...


class Exchanger(Protocol):
    """What can be driven one message at a time."""

    def exchange(self, items: Array, expected: npt.NDArray[np.float64]) -> None:
        """Send `items`, wait for their results and check them."""

    def close(self) -> None: ...


class Driver(Runner, Exchanger, Protocol):
    """The producer's side of a contender, living in a producer process."""


class Counters(NamedTuple):
    """What a pool has done so far."""

    items: int
    batches: int
    runs: int


@dataclass(frozen=True)
class Started:
    """A contender that is up.

    Attributes:
        connects: one for each producer; each makes its driver there, so it must be picklable.
        counters: reads the pool's counters; None for what has none.
    """

    connects: Sequence[Callable[[], Driver]]
    counters: Callable[[], Counters] | None = None


class Transport(Protocol):
    """Sends items away and collects their results in the same order."""

    def send(self, items: Array) -> None:
        """Write `items`, ``(count, *shape)``, where the worker will read them, and tell it."""

    def collect(self, expected: npt.NDArray[np.float64]) -> None:
        """Wait for the oldest result and check it."""

    def close(self) -> None: ...


class Stream:
    """A driver that keeps `window` messages of `count` items each in flight; reports items done."""

    def __init__(self, transport: Transport, source: Source, window: int, count: int) -> None:
        self._transport, self._source, self._window, self._count = transport, source, window, count

    def run(self, until_s: float) -> int:
        transport, source, window, count = self._transport, self._source, self._window, self._count
        pending: deque[npt.NDArray[np.float64]] = deque()
        done = 0
        while True:
            while len(pending) < window and time.monotonic() < until_s:
                items, expected = source.take(count)
                transport.send(items)
                pending.append(expected)
            if not pending:
                return done
            transport.collect(pending.popleft())
            done += count

    def exchange(self, items: Array, expected: npt.NDArray[np.float64]) -> None:
        self._transport.send(items)
        self._transport.collect(expected)

    def close(self) -> None:
        self._transport.close()


@dataclass(frozen=True)
class Turn:
    """One producer's window: `time.monotonic()` at its start and end, and the driver's report."""

    started_s: float
    ended_s: float
    report: Any


def end_with_parent() -> None:
    """End this process when the one that spawned it has ended, however that came about.

    Blocked on a queue it would stay for ever: each process holds both ends of its pipes.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _produce(connect: Callable[[], Runner], barrier: Barrier, control: Connection[Any, Any]) -> None:
    """The main function of a producer process; ends when `control` does."""
    end_with_parent()
    try:
        with contextlib.closing(connect()) as driver:
            driver.run(time.monotonic() + WARM_UP_S)
            control.send(None)
            while True:
                window_s = control.recv()
                barrier.wait(START_S)
                started_s = time.monotonic()
                report = driver.run(started_s + window_s)
                control.send(Turn(started_s, time.monotonic(), report))
    except EOFError:
        return
    except Exception:  # noqa: BLE001  # whatever it is, the parent is to know
        with contextlib.suppress(OSError):
            control.send(traceback.format_exc())


class Crew:
    """The producer processes of one contender; ready when the constructor returns.

    Raises:
        RuntimeError: a producer failed or hung; the text has its traceback.
    """

    def __init__(self, connects: Sequence[Callable[[], Runner]]) -> None:
        barrier = CONTEXT.Barrier(len(connects))
        self._members: list[tuple[BaseProcess, Connection[Any, Any]]] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for connect in connects:
                ours, theirs = CONTEXT.Pipe()
                process = CONTEXT.Process(target=_produce, args=(connect, barrier, theirs))
                process.start()
                theirs.close()
                self._members.append((process, ours))
            self._gather(STUCK_S)
            undo.pop_all()

    def run(self, window_s: float) -> list[Turn]:
        """Let all producers work for `window_s` from a common start."""
        for _, control in self._members:
            control.send(window_s)
        return self._gather(window_s + STUCK_S)

    def _gather(self, timeout_s: float) -> list[Any]:
        until_s = time.monotonic() + timeout_s
        answers = []
        for process, control in self._members:
            if not control.poll(max(0.0, until_s - time.monotonic())):
                raise RuntimeError(f"producer {process.pid} has hung")
            try:
                answer = control.recv()
            except EOFError:
                process.join(1)
                raise RuntimeError(f"producer {process.pid} ended with {process.exitcode}") from None
            if isinstance(answer, str):
                raise RuntimeError(  # noqa: TRY004  # it is a traceback
                    f"producer {process.pid} failed:\n{answer}"
                )
            answers.append(answer)
        return answers

    def close(self) -> None:
        for _, control in self._members:
            control.close()
        for process, _ in self._members:
            end(process, grace_s=5.0)
        self._members.clear()


def end(process: BaseProcess, grace_s: float = 0.0) -> None:
    """Wait `grace_s` for `process` to end by itself, then kill it."""
    process.join(grace_s)
    if process.is_alive():
        process.kill()
        process.join()


class Cost:
    """The CPU time of this process and of those that `starting` saw appear below it."""

    def __init__(self) -> None:
        self._processes = {psutil.Process()}

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Count every process that is there after the block and was not before."""
        before = set(psutil.Process().children(recursive=True))
        yield
        self._processes |= set(psutil.Process().children(recursive=True)) - before

    def cpu_s(self) -> float:
        """User and system seconds so far; the kernel counts them in hundredths for each process."""
        return sum(times.user + times.system for times in (p.cpu_times() for p in self._processes))
