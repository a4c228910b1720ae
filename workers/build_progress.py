"""What a build says while it goes on, and one figure out of TensorRT's nested phases."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from trtpool.ipc.building import Line, Progress

Say: TypeAlias = Callable[[Line], None]
"""Who is told; it may be called from any thread."""

PROGRESS_STEPS: Final = 1000
"""The figure is of so many."""


class Phases:
    """One figure out of TensorRT's nested phases.

    A phase has a known number of steps, and a step any number of phases inside, which nobody announces: each takes
    half of what is left of the step.  So the figure always moves, never falls, and is exact where a step ends.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._open: dict[str, _Phase] = {}
        self._told = 0
        self._lock = threading.Lock()  # TensorRT may call from any of its threads

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._open[name] = _Phase(parent, max(1, steps))
            self._tell(name, force=True)

    def step(self, name: str, step: int) -> None:
        with self._lock:
            if phase := self._open.get(name):
                phase.done, phase.inside = min(step + 1, phase.steps), 0.0
                self._tell(name)

    def finish(self, name: str) -> None:
        with self._lock:
            phase = self._open.pop(name, None)
            if phase is None:
                return
            if parent := self._open.get(phase.parent or ""):
                parent.inside += (1 - parent.inside) / 2
            self._tell(phase.parent or name)

    def _tell(self, name: str, *, force: bool = False) -> None:
        roots = [key for key, phase in self._open.items() if phase.parent not in self._open]
        done = int(PROGRESS_STEPS * max(map(self._fraction, roots), default=1.0))
        if done > self._told or force:
            self._told = max(done, self._told)
            self._say(Line(progress=Progress(name, self._told, PROGRESS_STEPS)))

    def _fraction(self, name: str) -> float:
        phase = self._open[name]
        current = max((self._fraction(key) for key, inner in self._open.items() if inner.parent == name), default=0.0)
        return min(1.0, (phase.done + phase.inside + (1 - phase.inside) / 2 * current) / phase.steps)


class _Phase:
    """`done` of `steps`, and how much of the next one; `parent` is the phase around it."""

    def __init__(self, parent: str | None, steps: int) -> None:
        self.parent = parent
        self.steps = steps
        self.done = 0
        self.inside = 0.0


def make_monitor(trt: Any, say: Say) -> Any:
    """A ``trt.IProgressMonitor`` that tells `say`."""
    phases = Phases(say)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # of a module that is chosen at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        # An exception that went back into TensorRT would end the process.
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with contextlib.suppress(Exception):
                phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with contextlib.suppress(Exception):
                phases.step(phase_name, step)
            return True

        def phase_finish(self, phase_name: str) -> None:
            with contextlib.suppress(Exception):
                phases.finish(phase_name)

    return Monitor()
