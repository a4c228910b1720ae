"""The workers of a pool: places, and the processes that fill them.

::

    start --> loading --> ready --> its process ends --> start again, after a pause if it was not ready
                |           '-- hangs (the broker says so): killed --^
                '-- not ready in time: killed ----------------------'

The broker is told of each start, with the worker's lifeline and pidfd, and of each end.  What a worker must end for it
says to the broker, which passes it on.

A reload fills all places anew, with workers that load other files, and exchanges them at once::

    candidates, of the next generation: loading --> ready: stand by ---- switch ----> places
                                            '-- one ends: all are discarded ---.         |
    leaving, which nobody replaces: <------------------------------------------'<-- those that were there
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import time
from typing import Final

from trtpool.ipc.errors import StartFailed, TrtpoolError, of_exit_code
from trtpool.ipc.process import describe_exit
from trtpool.ipc.settings import InspectRequest, PoolSettings, WorkerConfig

from . import control as c
from .broker_link import BrokerLink
from .children import Children
from .planning import worker_count

log = logging.getLogger("trtpool.supervisor")

END_GRACE_S: Final = 10.0
"""How long a worker that was replaced may take to end after it was told so."""

BACK_OFF_S: Final = (0.1, 0.5, 2.0, 5.0, 15.0, 30.0)
"""Pauses before a worker is started again after ending that many times without having been ready."""


class Place:
    """One place for a worker, and the process that fills it now.

    Attributes:
        gpu: the pool's number for its GPU; None on the CPU.
        name: what users call it.
        number: what the broker calls its process; never reused.
        said: why its process had to end, in its own words.
        failures: how often in a row its process ended without having been ready.
        killed: whether we killed it, since it hung; `said` has more.
        ready_by: when its process must be ready.
        end_by: when its process, which was told to end, must have ended.
        models: what its process is to load.
        generation: of these; see `Crew.switch`.
        lifeline: the broker's end, for the next broker.
    """

    def __init__(
        self, index: int, gpu: int | None, models: tuple[InspectRequest, ...] = (), generation: int = 0
    ) -> None:
        self.index = index
        self.gpu = gpu
        self.models = models
        self.generation = generation
        self.name = f"worker {index + 1}" + ("" if gpu is None else f" on GPU {gpu}")
        self.number = 0
        self.said = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.failures = 0
        self.start_at = 0.0
        self.killed = False
        self.ready_by = self.end_by = float("inf")
        self.lifeline: socket.socket | None = None
        self.pidfd = -1

    def kill(self, why: str) -> None:
        """End its process; that comes by its pidfd, as any other end."""
        if self.process is not None and not self.killed:
            self.killed = True
            self.said = self.said or why
            self.process.kill()

    def start_error(self, returncode: int) -> TrtpoolError:
        """Why its process did not become ready."""
        if self.said:
            return of_exit_code(returncode)(f"{self.name}: {self.said}")
        how = describe_exit(returncode)
        return StartFailed(f"{self.name} did not become ready: {how}; what it said is above")


class Crew:
    """See the module.

    Args:
        settings: of the pool.
        models: what each worker is to load.
        children: how to start them.
        link: whom to tell.

    Attributes:
        places: as many as there shall be workers.
        candidates: those that shall take these places.
        leaving: processes that end, and that none is started for.
        generation: of what serves, or is to: the broker was told.
    """

    def __init__(
        self, settings: PoolSettings, models: tuple[InspectRequest, ...], children: Children, link: BrokerLink
    ) -> None:
        self._settings = settings
        self._children = children
        self._link = link
        self._next_number = 1
        self._tries = 0  # generations that were begun
        self.generation = 0
        self.places = [
            Place(index, index // settings.workers_per_gpu if settings.gpus else None, models)
            for index in range(worker_count(settings))
        ]
        self.candidates: list[Place] = []
        self.leaving: list[Place] = []

    @property
    def ready(self) -> bool:
        """Whether all are."""
        return all(place.ready for place in self.places)

    def at(self, pidfd: int) -> Place | None:
        """The place whose process has this pidfd."""
        return next((one for one in self._all() if one.process is not None and one.pidfd == pidfd), None)

    def _all(self) -> tuple[Place, ...]:
        return (*self.places, *self.candidates, *self.leaving)

    # ------------------------------------------------------------------ starting

    def start_all(self) -> None:
        """Start a worker for each place."""
        for place in self.places:
            self._start(place)

    def start_due(self) -> float | None:
        """Start workers whose pause is over; returns the seconds until the next is."""
        due = None
        for place in self.places:
            if place.process is not None:
                continue
            left = place.start_at - time.monotonic()
            if left <= 0:
                self._start(place)
            else:
                due = sooner(due, left)
        return due

    def _start(self, place: Place) -> None:
        place.number, place.ready, place.said, place.killed = self._next_number, False, "", False
        place.ready_by = time.monotonic() + (self._settings.start_timeout_s or float("inf"))
        self._next_number += 1
        with self._children.room(), contextlib.ExitStack() as stack:
            brokers, workers = map(stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            cpus = max(1, len(os.sched_getaffinity(0)) // len(self.places))
            config = WorkerConfig(
                parent_pid=os.getpid(),
                lifeline_fd=workers.fileno(),
                models=place.models,
                cpus=cpus,
                name=place.name,
                gpu=place.gpu,
                busy_poll=self._settings.busy_poll,
                spin_us=self._settings.spin_us or 0,
            )
            gpu = None if place.gpu is None else self._settings.gpus[place.gpu]
            child = self._children.spawn("trtpool.workers", config, [workers.fileno()], gpu)
            place.process, place.pidfd = child
            place.lifeline = brokers.dup()
            started = c.WorkerStarted(place.number, child.process.pid, place.generation)
            self._link.tell(started, [brokers.fileno(), child.pidfd])

    def bequeath(self) -> None:
        """Tell another broker of all that live."""
        for place in self._all():
            if place.process is not None and place.lifeline is not None:
                fds = [place.lifeline.fileno(), place.pidfd]
                self._link.bequeath(c.WorkerStarted(place.number, place.process.pid, place.generation), fds)

    # ------------------------------------------------------------------ other engines

    def stand_by(self, models: tuple[InspectRequest, ...]) -> None:
        """Start a worker for each place anew, which loads these and waits for `switch`."""
        self._tries += 1
        self.candidates = [Place(place.index, place.gpu, models, self._tries) for place in self.places]
        for place in self.candidates:
            self._start(place)

    def switch(self) -> None:
        """Put the candidates, all ready, in the places; the broker lets those that were there finish what they have."""
        self.generation = self.candidates[0].generation
        self.leaving += [place for place in self.places if place.process is not None]
        for place in self.leaving:
            if not place.ready:  # it has nothing to finish
                place.kill("other engines have taken its place")
        self.places, self.candidates = self.candidates, []
        self._link.tell(self.switched())

    def switched(self) -> c.SwitchWorkers:
        """Which generation serves; for another broker too."""
        return c.SwitchWorkers(self.generation, tuple(model.source.path for model in self.places[0].models))

    def discard(self, why: str) -> None:
        """Let nothing come of the candidates."""
        for place in self.candidates:
            place.kill(why)
        self.leaving += [place for place in self.candidates if place.process is not None]
        self.candidates = []

    # ------------------------------------------------------------------ what the broker says of them

    def hear(self, message: c.WorkerIsReady | c.WorkerSaid | c.WorkerHangs | c.WorkerLeaves) -> None:
        """Take note of what the broker says, if the process is still there."""
        for place in self._all():
            if place.number != message.worker:
                continue
            if isinstance(message, c.WorkerSaid):
                place.said = message.text
            elif isinstance(message, c.WorkerHangs):
                place.kill(message.text)
            elif isinstance(message, c.WorkerLeaves):
                place.end_by = time.monotonic() + END_GRACE_S
            else:
                place.ready, place.failures = True, 0
                log.info("%s is ready (worker %d)", place.name, place.number, extra={"worker": place.number})

    # ------------------------------------------------------------------ ends

    def end_late(self) -> float | None:
        """Kill workers that take too long to become ready, or to end; returns the seconds until the next does."""
        due = None
        for place in self._all():
            late_at = place.end_by if place.ready else place.ready_by
            if place.process is None or place.killed or late_at == float("inf"):
                continue
            left = late_at - time.monotonic()
            if left > 0:
                due = sooner(due, left)
                continue
            if place.ready:
                place.kill("it was told to end and did not")
                continue
            place.kill(
                f"it was not ready after {self._settings.start_timeout_s:g} s, so the pool killed it; if loading may "
                "take that long, start the pool with a longer --start-timeout-s"
            )
        return due

    def ended(self, place: Place, returncode: int) -> str:
        """A process was reaped: tell the broker; returns how it ended."""
        how = "SIGKILL from the pool" if place.killed else describe_exit(returncode)
        place.process = None
        if place.lifeline is not None:
            place.lifeline.close()
        self._link.tell(c.WorkerGone(place.number, how))
        if place in self.leaving:
            self.leaving.remove(place)
            log.info("%s (worker %d) was replaced, and ended: %s", place.name, place.number, how)
        return how

    def start_again(self, place: Place, how: str) -> None:
        """Have another fill the place of one that ended; `start_due` starts it when its pause is over."""
        pause = BACK_OFF_S[min(place.failures, len(BACK_OFF_S) - 1)]
        place.failures += not place.ready
        place.start_at = time.monotonic() + (pause if place.failures else 0)
        why = f"{place.said} ({how})" if place.said else how
        log.error("%s ended: %s; another is started", place.name, why, extra={"worker": place.number})

    def close(self) -> None:
        """Close what was kept for another broker."""
        for place in self._all():
            if place.lifeline is not None:
                place.lifeline.close()


def sooner(one: float | None, other: float | None) -> float | None:
    """The shorter of two times to sleep, of which None is for ever."""
    return other if one is None else one if other is None else min(one, other)
