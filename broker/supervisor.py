"""The supervisor: the process behind `trtpool start`.

It owns what must outlive the others (run directory, listening socket, arena, table), starts the broker and the
workers, and starts each anew when it ends.  Children are tied to it by pidfd, both ways: their end is an
event here, and they end when it does.

::

    (look at GPUs, build plans) -> inspect models -> lay out, allocate -> listen
        -> broker ready -> workers ready -> serve -> drain -> end

Meanwhile, when a command asks for it, other engines take the place of those that serve: see `reload`.

This is the phases; the brokers are in `succession`, the workers in `crew`, all processes in `children`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from trtpool.ipc import lifeline
from trtpool.ipc.arena import create_segment
from trtpool.ipc.layout import Layout
from trtpool.ipc.rundir import RunDir
from trtpool.ipc.settings import BrokerConfig, GpuInfo, PoolSettings
from trtpool.ipc.spinning import default_spin_us

from . import control as c
from .broker_link import BrokerLink
from .children import Children
from .crew import Crew, sooner
from .desk import Asked, Desk
from .exporter import Exporter, listen
from .journal import create_table, journal_bytes
from .planning import inspect, is_plan, lay_out, probe, requests
from .reload.reloads import Reloads
from .reload.requests import ReloadRequest
from .signals import Signals, Stopped
from .succession import Succession
from .tracing.requests import TraceEnd, TraceRequest
from .tracing.traces import Traces

log = logging.getLogger("trtpool.supervisor")

END_GRACE_S: Final = 10.0
"""How long children may take to end after the last message."""


class Started(NamedTuple):
    """What is running, when it is; `workers` counts the processes, the same number on each GPU.  `metrics` is a URL."""

    name: str
    run_dir: Path
    layout: Layout
    workers: int
    gpus: tuple[GpuInfo, ...] = ()
    metrics: str = ""


class Supervisor:
    """Runs one pool, in the main thread of its process.

    Args:
        settings: which.
        announce: called when the pool serves.
        say: called with a line for the user about what takes long before that.
        owner_pid: the process that the pool is part of; 0: none.
    """

    _crew: Crew  # from `_start` on, like the next
    _succession: Succession
    _desk: Desk
    _reloads: Reloads
    _traces: Traces

    def __init__(
        self,
        settings: PoolSettings,
        announce: Callable[[Started], None],
        say: Callable[[str], None],
        owner_pid: int = 0,
    ) -> None:
        self._requests = requests(settings)
        if settings.spin_us is None:
            settings = msgspec.structs.replace(settings, spin_us=default_spin_us())
        self._settings = settings
        self._announce = announce
        self._say = say
        self._owner_pid = owner_pid
        self._stack = contextlib.ExitStack()
        self._epoll = select.epoll()
        self._stack.callback(self._epoll.close)
        self._signals = Signals(self._epoll)
        self._children = Children(self._epoll)
        self._link = BrokerLink(self._epoll)
        self._exporter: Exporter | None = None
        self._serving = self._draining = False

    def run(self) -> int:
        """Start, serve and stop; returns the exit code.

        Raises:
            TrtpoolError: the pool could not start, or its broker ended.
        """
        # Signals are ours until all is cleaned up: one more must not end us in the middle of that.
        with self._signals.caught(), self._stack:
            try:
                self._start()
            except Stopped:
                return 0
            self._serve()
            return self._drain()

    # ------------------------------------------------------------------ starting

    def _start(self) -> None:
        if self._settings.metrics:
            listener = self._stack.enter_context(listen(self._settings.metrics))
            self._exporter = Exporter(self._settings, self._children, listener)
        shared = bool(self._settings.allow_users)
        run_dir = RunDir.claim(Path(self._settings.run_dir), shared=shared)
        self._stack.callback(run_dir.release)
        gpus = self._look_at_gpus()
        settings = self._settings
        models = inspect(self._requests, self._signals.interrupts, next(iter(settings.gpus), None))
        config = self._own(lay_out(settings, models), run_dir)
        self._crew = Crew(settings, self._requests, self._children, self._link)
        self._succession = Succession(config, self._children, self._link, self._crew)
        for close in (self._link.close, self._crew.close, self._succession.close):
            self._stack.callback(close)
        self._stack.callback(self._children.close)  # before the link: no child shall see the end of that
        self._succession.start()
        self._wait_for(lambda: self._succession.ready)
        if self._exporter is not None:
            self._exporter.start()
        self._crew.start_all()
        self._wait_for(lambda: self._crew.ready)
        self._desk = Desk(run_dir.path, self._epoll, self._children)
        self._stack.callback(self._desk.close)
        self._reloads = Reloads(
            self._settings, gpus, config.layout, self._children, self._crew, self._succession, self._desk
        )
        self._traces = self._succession.traces = Traces(self._link, self._desk)
        self._serving = True
        self._warn_of_spinning()
        log.info("pool %r is ready in %s", settings.name, run_dir.path)
        url = self._exporter.url if self._exporter is not None else ""
        self._announce(Started(settings.name, run_dir.path, config.layout, len(self._crew.places), gpus, url))

    def _warn_of_spinning(self) -> None:
        """Processes that spin and have to share a CPU make each other wait."""
        spinning, cpus = 1 + len(self._crew.places), len(os.sched_getaffinity(0))
        if self._settings.busy_poll and spinning >= cpus:
            log.warning(
                "with --busy-poll the broker and the workers keep %d CPUs busy, and each client that waits one more; "
                "there are %d, so it is slower than without",
                spinning, cpus,
            )  # fmt: skip

    def _look_at_gpus(self) -> tuple[GpuInfo, ...]:
        """What the GPUs are; from here on all models are plans for them."""
        settings = self._settings
        if not settings.gpus:
            return ()
        gpus = tuple(probe(settings.gpus, self._signals.interrupts))
        if not all(is_plan(model.path) for model in settings.models):
            from .building import ensure_plans

            self._settings = ensure_plans(settings, gpus, self._say, self._signals.interrupts)
            self._requests = requests(self._settings)
        return gpus

    def _own(self, layout: Layout, run_dir: RunDir) -> BrokerConfig:
        """Make what outlives the others; returns what each broker is told of it."""
        settings = self._settings
        arena_fd = create_segment(layout.segment_bytes, huge_pages=settings.huge_pages)
        self._stack.callback(os.close, arena_fd)
        table_fd = create_table(journal_bytes(layout))
        self._stack.callback(os.close, table_fd)
        listener = self._stack.enter_context(lifeline.listen(run_dir.path, shared=bool(settings.allow_users)))
        return BrokerConfig(
            parent_pid=os.getpid(),
            name=settings.name,
            run_dir=settings.run_dir,
            epoch=0,
            layout=layout,
            max_slots_per_producer=settings.max_slots_per_producer,
            max_delay_us=settings.max_delay_us,
            terms=tuple(settings.terms_of(model.spec.name) for model in layout.models),
            gpus=len(settings.gpus),
            batch_timeout_s=settings.batch_timeout_s,
            recall_timeout_s=settings.recall_timeout_s,
            evict=settings.evict,
            slow_ms=settings.slow_ms,
            owner_pid=self._owner_pid,
            busy_poll=settings.busy_poll,
            spin_us=settings.spin_us or 0,
            listener_fd=listener.fileno(),
            control_fd=-1,
            arena_fd=arena_fd,
            allow_users=settings.allow_users,
            table_fd=table_fd,
        )

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        while not ready():
            if self._signals.asked:
                raise Stopped
            self._step(self._crew.end_late())

    # ------------------------------------------------------------------ serving

    def _serve(self) -> None:
        while not self._signals.asked:
            self._step(self._look_after_workers())
            self._reloads.advance()

    def _look_after_workers(self) -> float | None:
        """Start and kill workers whose time has come; returns the seconds until the next has."""
        due = sooner(self._crew.start_due(), self._crew.end_late())
        return due if self._exporter is None else sooner(due, self._exporter.start_due())

    def _step(self, timeout_s: float | None) -> None:
        """Sleep until something happens, and take note of it."""
        for fd, _ in self._epoll.poll(timeout_s):
            if fd == self._signals.fd:
                self._signals.clear()
            elif self._link.is_fd(fd):
                self._succession.hear()
            elif fd in self._children:
                self._child_ended(fd)
            elif self._serving and self._desk.is_fd(fd) and (asked := self._desk.look_at(fd)) is not None:
                self._hear(asked)

    def _hear(self, asked: Asked) -> None:
        if not isinstance(asked.request, ReloadRequest):
            self._traces.hear(asked, ready=self._succession.ready and self._link.hears)
        if not isinstance(asked.request, (TraceRequest, TraceEnd)):  # who asks nothing more may be either's
            self._reloads.hear(asked)

    def _child_ended(self, pidfd: int) -> None:
        place = self._crew.at(pidfd)
        returncode = self._children.reap(pidfd)
        if self._exporter is not None and self._exporter.is_child(pidfd):
            self._exporter.ended(returncode)
            return
        if self._serving and self._reloads.is_child(pidfd):
            self._reloads.examined(returncode)
            return
        if place is None:
            self._succession.ended(returncode, serving=self._serving, draining=self._draining)
            return
        is_candidate, is_leaving = place in self._crew.candidates, place in self._crew.leaving
        how = self._crew.ended(place, returncode)
        if returncode > 0:  # neither well nor by a signal, so it may have said why
            self._succession.hear_out(lambda: bool(place.said))
        if not self._serving:
            raise place.start_error(returncode)
        if is_candidate and place in self._crew.candidates:
            self._reloads.candidate_ended(place, returncode)
        elif not is_leaving and not self._succession.drained:
            self._crew.start_again(place, how)

    # ------------------------------------------------------------------ stopping

    def _drain(self) -> int:
        """Finish what is in flight, then end the children; a second signal, or the time-out, stops at once."""
        self._draining = True
        log.info("the pool drains")
        self._reloads.close()
        self._link.tell(c.DrainNow())
        deadline = time.monotonic() + self._settings.drain_timeout_s
        while not self._succession.drained:
            due = self._look_after_workers()
            left = deadline - time.monotonic()
            if self._signals.asked > 1 or left <= 0:
                log.error("stopped with work in flight, which is lost")
                return 1
            self._step(sooner(left, due))
            self._reloads.advance()
        if self._exporter is not None:
            self._exporter.stop()
        deadline = time.monotonic() + END_GRACE_S
        while self._children and self._signals.asked <= 1 and (left := deadline - time.monotonic()) > 0:
            self._step(left)
        return 0


def run(
    settings: PoolSettings, announce: Callable[[Started], None], say: Callable[[str], None], owner_pid: int = 0
) -> int:
    """Run a pool in this process until it is stopped; see `Supervisor.run`."""
    return Supervisor(settings, announce, say, owner_pid).run()
