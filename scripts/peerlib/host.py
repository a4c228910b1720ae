"""A contestant in a process of its own, seen from the benchmark: time-outs, failures, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scripts.benchlib.crew import CONTEXT, end_with_parent

from . import processes
from .contestant import Contestant, Measured
from .job import Job

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

START_S: Final = 90.0
WINDOW_S: Final = 120.0
"""Beyond the window itself: producers connect, warm up, and wait for what is in flight."""
STOP_S: Final = 45.0
LINGER_S: Final = 10.0
"""How long a contestant's processes may take to end after `stop`."""


class ContestantFailed(Exception):
    """A contestant did not do what it should; the text says what, and the end of its log."""


class ProcessesLeft(ContestantFailed):
    """It stopped, and processes of it had to be killed; what it did before stands."""


@dataclass(frozen=True)
class _Failure:
    text: str


def _main(contestant: Contestant, job: Job, log: Path, control: Connection[Any, Any]) -> None:
    """The main function of the host; ends when told to stop, on any failure, and with its parent."""
    end_with_parent()
    processes.adopt_orphans()
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with contextlib.suppress(EOFError, OSError):
        try:
            contestant.start(job)
            control.send(None)
            _serve(contestant, control)
            control.send(None)
        except Exception:  # noqa: BLE001  # whatever it is, the benchmark is to know
            control.send(_Failure(traceback.format_exc()))


def _serve(contestant: Contestant, control: Connection[Any, Any]) -> None:
    try:
        while (asked := control.recv()) is not None:
            producers, window_s = asked
            measured = contestant.run(producers, window_s) if producers else contestant.latency(window_s)
            control.send(measured)
    finally:
        contestant.stop()


class Guest:
    """A contestant that is up; made by `guest`."""

    def __init__(self, contestant: Contestant, job: Job, known: set[int]) -> None:
        self._known = known
        self._log = job.folder / "log"
        self._control, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_main, args=(contestant, job, self._log, theirs))
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        """Wait until it is up."""
        self._answer(START_S, "start")

    def run(self, producers: int, window_s: float) -> Measured:
        self._control.send((producers, window_s))
        return self._window(window_s, f"finish a window with {producers} producers")

    def latency(self, window_s: float) -> Measured:
        self._control.send((0, window_s))
        return self._window(window_s, "finish a window of one item at a time")

    def stop(self) -> None:
        """Stop it, and see that every process of it has ended."""
        self._control.send(None)
        self._answer(STOP_S, "stop")
        self._process.join(LINGER_S)
        if remaining := processes.left(self._known, LINGER_S):
            names = ", ".join(f"{process.name} ({process.pid})" for process in remaining)
            raise ProcessesLeft(f"it left processes behind: {names}")

    def _window(self, window_s: float, what: str) -> Measured:
        measured = self._answer(window_s + WINDOW_S, what)
        assert isinstance(measured, Measured)
        return measured

    def _answer(self, timeout_s: float, what: str) -> Any:
        try:
            if not self._control.poll(timeout_s):
                raise ContestantFailed(f"it did not {what} within {timeout_s:.0f} s{self._last_words()}")
            answer = self._control.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(1)
            code = self._process.exitcode
            raise ContestantFailed(f"it ended with {code} when it was to {what}{self._last_words()}") from None
        if isinstance(answer, _Failure):
            raise ContestantFailed(f"it could not {what}: {answer.text.strip()}{self._last_words()}")
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "".join(f"\n    {line}" for line in lines[-12:])

    def close(self) -> None:
        """Kill whatever is left of it; nothing after a `stop` that went well."""
        self._control.close()
        processes.kill(self._known | {self._process.pid or 0})  # the host last: it adopts the others
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        processes.kill(self._known)


@contextlib.contextmanager
def guest(contestant: Contestant, job: Job) -> Iterator[Guest]:
    """Bring `contestant` up for `job`, and stop it when the block ends.

    Raises:
        ContestantFailed: it did not start, failed or hung in the block, or did not stop.
        ProcessesLeft: it left a process behind.
    """
    processes.adopt_orphans()
    resource_tracker.ensure_running()  # multiprocessing's own, which is to be among the known ones
    known = {process.pid for process in processes.below(os.getpid())}
    with contextlib.ExitStack() as stack:
        stack.callback(processes.adopt_orphans, adopt=False)
        one = Guest(contestant, job, known)
        stack.callback(one.close)
        one.wait()
        yield one
        one.stop()
