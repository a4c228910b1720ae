"""A contender in a process of its own, so that one that fails or hangs takes nothing else with it.

The parent's calls never raise for a contender's sake: one that failed is over, says why in `failure`, and answers None
from then on.  One that does not answer in time prints where its threads are, and is killed; its own children end with
it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from .crew import CONTEXT, end, end_with_parent
from .gpu_window import Performer, Window

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

GRACE_S: Final = 30.0
"""How long an answer may take beyond the window it is about; pageable copies of large images take seconds."""
DUMP_S: Final = 0.5


def _perform(make: Callable[[], Performer], control: Connection[Any, Any]) -> None:
    """The main function of a contender's process; ends when `control` does."""
    end_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    try:
        with contextlib.closing(make()) as performer:
            control.send(performer.facts)
            while True:
                window_s, options = control.recv()
                control.send(performer.window(window_s, **options))
    except EOFError:
        return
    except BaseException:  # noqa: BLE001  # whatever it is, the parent is to know
        with contextlib.suppress(OSError):
            control.send(traceback.format_exc())


class Stage:
    """Starts a contender; does not wait for it.

    Args:
        name: for messages.
        make: makes the contender there, so it must be picklable.

    Attributes:
        facts: see `Performer`; empty until `ready`.
        failure: why it is over; "" while it is not.
    """

    def __init__(self, name: str, make: Callable[[], Performer]) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        self.failure = ""
        self._asked = False
        self._control, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_perform, args=(make, theirs))
        self._process.start()
        theirs.close()

    def ready(self, timeout_s: float) -> bool:
        """Wait until it is up, and has its facts.  Again: nothing."""
        if not self.facts:
            answer = self._receive(timeout_s)
            if isinstance(answer, dict):
                self.facts = answer
        return not self.failure

    def window(self, window_s: float, **options: float) -> Window | None:
        """One window, from begin to end."""
        self.begin(window_s, **options)
        return self.finish(window_s)

    def begin(self, window_s: float, **options: float) -> None:
        """Start a window without waiting for its end."""
        if self.failure:
            return
        try:
            self._control.send((window_s, options))
            self._asked = True
        except OSError:
            self._receive(0.0)  # what it said before it ended
            self._fail(f"it ended with {self._process.exitcode}")

    def finish(self, window_s: float) -> Window | None:
        """What came of the window that was begun."""
        if not self._asked:
            return None
        self._asked = False
        answer = self._receive(window_s + GRACE_S)
        return answer if isinstance(answer, Window) else None

    def _receive(self, timeout_s: float) -> Any:
        if self.failure:
            return None
        try:
            if not self._control.poll(max(0.0, timeout_s)):
                self._dump()
                self._fail(f"no answer within {timeout_s:.0f} s")
                return None
            answer = self._control.recv()
        except (EOFError, OSError):
            self._process.join(1)
            self._fail(f"it ended with {self._process.exitcode}")
            return None
        if isinstance(answer, str):
            self._fail(answer)
        return answer

    def _dump(self) -> None:
        """Let it print where its threads are."""
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGUSR1)
                time.sleep(DUMP_S)

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why.strip()
        print(f"{self.name} is over: {self.failure}", file=sys.stderr, flush=True)
        end(self._process)

    def dismiss(self) -> None:
        """Let it end by itself; do not wait for that."""
        self._control.close()

    def close(self) -> None:
        """End it."""
        self.dismiss()
        end(self._process, grace_s=20.0)
