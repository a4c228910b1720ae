"""The supervisor: the process behind `trtpool start`.

It owns what must outlive the others (run directory, listening socket, arena), starts the broker and the
workers, and starts a worker anew when it ends.  Children are tied to it by pidfd, both ways: their end is an
event here, and they end when it does.

::

    (look at GPUs, build plans) -> inspect models -> lay out, allocate -> listen
        -> broker ready -> workers ready -> serve -> drain -> end
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final, NamedTuple

import msgspec

from trtpool.ipc import lifeline
from trtpool.ipc.arena import create_segment
from trtpool.ipc.errors import PoolClosed, StartFailed, TrtpoolError, of_exit_code
from trtpool.ipc.layout import Layout
from trtpool.ipc.process import describe_exit
from trtpool.ipc.rundir import RunDir
from trtpool.ipc.settings import BrokerConfig, GpuInfo, PoolSettings, WorkerConfig

from . import control as c
from .journal import create_table, journal_bytes
from .planning import child_environment, inspect, is_plan, lay_out, probe, requests, worker_count

log = logging.getLogger("trtpool.supervisor")

BACK_OFF_S: Final = (0.1, 0.5, 2.0, 5.0, 15.0, 30.0)
"""Pauses before a worker is started again after ending that many times without having been ready."""

END_GRACE_S: Final = 10.0
"""How long children may take to end after the last message."""


BROKER_TRIES: Final = 3
"""How many brokers in a row may end before they are ready."""

BEQUEATH_PAUSE_S: Final = 0.002

RESERVE: Final = 16
"""Descriptors that are not spent on keeping clients for another broker: what starting a worker or a broker takes."""

HEAR_OUT_S: Final = 1.0
"""How long the broker may take to pass on what a worker said before it ended."""


class Started(NamedTuple):
    """What is running, when it is; `workers` counts the processes, the same number on each GPU."""

    name: str
    run_dir: Path
    layout: Layout
    workers: int
    gpus: tuple[GpuInfo, ...] = ()


class Stopped(Exception):
    """A signal ended the pool before it was ready."""


class _Worker:
    """One place for a worker, and the process that fills it now.

    Attributes:
        gpu: the pool's number for its GPU; None on the CPU.
        name: what users call it.
        number: what the broker calls its process; never reused.
        said: why its process had to end, in its own words.
        failures: how often in a row its process ended without having been ready.
        killed: whether we killed it, since it hung; `said` has more.
        ready_by: when its process must be ready.
    """

    def __init__(self, index: int, gpu: int | None) -> None:
        self.gpu = gpu
        self.name = f"worker {index + 1}" + ("" if gpu is None else f" on GPU {gpu}")
        self.number = 0
        self.said = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.failures = 0
        self.start_at = 0.0
        self.killed = False
        self.ready_by = float("inf")
        self.lifeline: socket.socket | None = None  # the broker's end, for the next broker
        self.pidfd = -1


class Supervisor:
    """Runs one pool, in the main thread of its process.

    Args:
        settings: which.
        announce: called when the pool serves.
        say: called with a line for the user about what takes long before that.
        owner_pid: the process that the pool is part of; 0: none.
    """

    def __init__(
        self,
        settings: PoolSettings,
        announce: Callable[[Started], None],
        say: Callable[[str], None],
        owner_pid: int = 0,
    ) -> None:
        self._requests = requests(settings)
        self._settings = settings
        self._announce = announce
        self._say = say
        self._owner_pid = owner_pid
        self._stack = contextlib.ExitStack()
        self._epoll = select.epoll()
        self._stack.callback(self._epoll.close)
        self._children: dict[int, tuple[subprocess.Popen[bytes], _Worker | None]] = {}
        self._workers = [
            _Worker(index, index // settings.workers_per_gpu if settings.gpus else None)
            for index in range(worker_count(settings))
        ]
        self._next_worker = 1
        self._clients: dict[int, tuple[int, list[int]]] = {}  # pid, lifeline and pidfd of each, for the next broker
        self._reserve: list[int] = []
        self._hears_broker = False
        self._epoch = self._broker_tries = 0
        self._draining = False
        self._broker_ready = self._drained = False
        self._serving = False
        self._stop_asked = 0
        self._interruptible = False
        self._wake_r, self._wake_w = socket.socketpair()

    def run(self) -> int:
        """Start, serve and stop; returns the exit code.

        Raises:
            TrtpoolError: the pool could not start, or its broker ended.
        """
        # Signals are ours until all is cleaned up: one more must not end us in the middle of that.
        with self._signals(), self._stack:
            try:
                self._start()
            except Stopped:
                return 0
            self._serve()
            return self._drain()

    # ------------------------------------------------------------------ signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(_number: int, _frame: FrameType | None) -> None:
            self._stop_asked += 1
            if self._interruptible:
                raise Stopped

        for sock in (self._wake_r, self._wake_w):
            sock.setblocking(False)
        self._epoll.register(self._wake_r.fileno(), select.EPOLLIN)
        wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, handle) for number in wanted}
        wake_before = signal.set_wakeup_fd(self._wake_w.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wake_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._wake_r.close()
            self._wake_w.close()

    @contextlib.contextmanager
    def _interrupts(self) -> Iterator[None]:
        """While waiting for a child that is looked after already: a signal raises `Stopped`.

        Elsewhere it could fall between the start of a child and our knowing of it.
        """
        self._interruptible = True
        try:
            if self._stop_asked:
                raise Stopped
            yield
        finally:
            self._interruptible = False

    # ------------------------------------------------------------------ starting

    def _start(self) -> None:
        shared = bool(self._settings.allow_users)
        run_dir = RunDir.claim(Path(self._settings.run_dir), shared=shared)
        self._stack.callback(run_dir.release)
        gpus = self._look_at_gpus()
        settings = self._settings
        layout = lay_out(settings, inspect(self._requests, self._interrupts, next(iter(settings.gpus), None)))
        arena_fd = create_segment(layout.segment_bytes, huge_pages=settings.huge_pages)
        self._stack.callback(os.close, arena_fd)
        table_fd = create_table(journal_bytes(layout))
        self._stack.callback(os.close, table_fd)
        listener = self._stack.enter_context(lifeline.listen(run_dir.path, shared=shared))
        self._stack.callback(self._close_kept)
        self._stack.callback(self._kill_children)  # before the control socket closes: no child shall see that
        self._broker_config = BrokerConfig(
            parent_pid=os.getpid(),
            name=settings.name,
            run_dir=settings.run_dir,
            epoch=0,
            layout=layout,
            max_slots_per_producer=settings.max_slots_per_producer,
            max_delay_us=settings.max_delay_us,
            gpus=len(settings.gpus),
            batch_timeout_s=settings.batch_timeout_s,
            recall_timeout_s=settings.recall_timeout_s,
            evict=settings.evict,
            owner_pid=self._owner_pid,
            listener_fd=listener.fileno(),
            control_fd=-1,
            arena_fd=arena_fd,
            allow_users=settings.allow_users,
            table_fd=table_fd,
        )
        self._stack.callback(lifeline.close_all, self._reserve)
        self._start_broker()
        self._wait_for(lambda: self._broker_ready)
        for worker in self._workers:
            self._start_worker(worker)
        self._wait_for(lambda: all(worker.ready for worker in self._workers))
        self._serving = True
        self._announce(Started(settings.name, run_dir.path, layout, len(self._workers), gpus))

    def _look_at_gpus(self) -> tuple[GpuInfo, ...]:
        """What the GPUs are; from here on all models are plans for them."""
        settings = self._settings
        if not settings.gpus:
            return ()
        gpus = tuple(probe(settings.gpus, self._interrupts))
        if not all(is_plan(model.path) for model in settings.models):
            from .building import ensure_plans

            self._settings = ensure_plans(settings, gpus, self._say, self._interrupts)
            self._requests = requests(self._settings)
        return gpus

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """Descriptors to start a child with, even if clients took all others."""
        lifeline.close_all(self._reserve)
        self._reserve.clear()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # those that there are none for now are got the next time
                while len(self._reserve) < RESERVE:
                    self._reserve.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def _spawn(self, module: str, config: msgspec.Struct, fds: list[int], worker: _Worker | None) -> int:
        """Start a child; returns a pidfd of it, which the epoll watches."""
        gpu = None if worker is None or worker.gpu is None else self._settings.gpus[worker.gpu]
        child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=2,
            pass_fds=fds,
            env=child_environment(gpu),
            cwd="/",  # Python 3.10 looks for modules there first, whatever PYTHONSAFEPATH says
            start_new_session=True,  # a Ctrl-C in the terminal is for us: we drain
        )
        pidfd = os.pidfd_open(child.pid)
        self._children[pidfd] = (child, worker)
        self._epoll.register(pidfd, select.EPOLLIN)
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:  # it ended at once, which its pidfd tells
            child.stdin.write(msgspec.json.encode(config))
        return pidfd

    def _start_broker(self) -> None:
        """Start the first broker, or one that takes over from it."""
        self._epoch += 1
        self._broker_ready, self._hears_broker = False, True
        with self._room(), contextlib.ExitStack() as stack:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(theirs)
            config = msgspec.structs.replace(
                self._broker_config, epoch=self._epoch, control_fd=theirs.fileno(), takes_over=self._epoch > 1
            )
            assert config.table_fd is not None
            fds = [config.listener_fd, config.control_fd, config.arena_fd, config.table_fd]
            self._spawn("trtpool.broker", config, fds, None)
        self._epoll.register(self._control.fileno(), select.EPOLLIN)

    def _broker_ended(self, returncode: int, how: str) -> None:
        """Start another, which goes on where this one ended.

        Raises:
            TrtpoolError: the pool does not serve yet, or brokers end before they are ready.
        """
        while self._hears_broker:  # what it said last
            self._read_control()
        if self._drained:
            return
        if not self._serving:
            raise of_exit_code(returncode)(f"the broker did not become ready: {how}; what it said is above")
        self._broker_tries = 1 if self._broker_ready else self._broker_tries + 1
        if self._broker_tries > BROKER_TRIES:
            raise PoolClosed(
                f"the broker ended: {how}, and so did {BROKER_TRIES} that were to take over; "
                "all that was in flight is lost, start the pool again"
            )
        log.error("the broker ended: %s; another takes over", how)
        self._control.close()
        self._start_broker()
        for worker in self._workers:  # first, so that there are descriptors for them
            if worker.process is not None and worker.lifeline is not None:
                fds = [worker.lifeline.fileno(), worker.pidfd]
                self._bequeath(c.WorkerStarted(worker.number, worker.process.pid), fds)
        for peer, (pid, fds) in self._clients.items():
            self._bequeath(c.PeerKept(peer, pid), fds)
        self._bequeath(c.TakeOver(), [])
        if self._draining:
            self._bequeath(c.DrainNow(), [])

    def _bequeath(self, message: c.Control, fds: list[int]) -> None:
        """Tell a broker that starts, and may not read yet; if it ends, its pidfd tells."""
        while True:
            try:
                lifeline.send_packet(self._control, message, fds)
            except ConnectionError:
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ETOOMANYREFS):
                    raise
                # Full, or more descriptors on their way than a user may have: until it takes some.
                poller = select.poll()
                poller.register(self._control, select.POLLOUT)
                poller.poll()
                time.sleep(BEQUEATH_PAUSE_S)
            else:
                return

    def _start_worker(self, worker: _Worker) -> None:
        worker.number, worker.ready, worker.said, worker.killed = self._next_worker, False, "", False
        worker.ready_by = time.monotonic() + (self._settings.start_timeout_s or float("inf"))
        self._next_worker += 1
        with self._room(), contextlib.ExitStack() as stack:
            brokers, workers = map(stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            cpus = max(1, len(os.sched_getaffinity(0)) // len(self._workers))
            config = WorkerConfig(
                parent_pid=os.getpid(),
                lifeline_fd=workers.fileno(),
                models=self._requests,
                cpus=cpus,
                name=worker.name,
                gpu=worker.gpu,
            )
            pidfd = self._spawn("trtpool.workers", config, [workers.fileno()], worker)
            child = worker.process = self._children[pidfd][0]
            worker.lifeline, worker.pidfd = brokers.dup(), pidfd
            self._tell(c.WorkerStarted(worker.number, child.pid), [brokers.fileno(), pidfd])

    def _wait_for(self, ready: Callable[[], bool]) -> None:
        while not ready():
            if self._stop_asked:
                raise Stopped
            self._step(self._end_late_workers())

    # ------------------------------------------------------------------ serving

    def _serve(self) -> None:
        while not self._stop_asked:
            self._step(_sooner(self._start_due_workers(), self._end_late_workers()))

    def _start_due_workers(self) -> float | None:
        """Start workers whose pause is over; returns the seconds until the next is."""
        due = None
        for worker in self._workers:
            if worker.process is not None:
                continue
            left = worker.start_at - time.monotonic()
            if left <= 0:
                self._start_worker(worker)
            else:
                due = _sooner(due, left)
        return due

    def _end_late_workers(self) -> float | None:
        """Kill workers that took too long to become ready; returns the seconds until the next has."""
        due = None
        for worker in self._workers:
            if worker.process is None or worker.ready or worker.killed or worker.ready_by == float("inf"):
                continue
            left = worker.ready_by - time.monotonic()
            if left > 0:
                due = _sooner(due, left)
                continue
            self._kill(
                worker,
                f"it was not ready after {self._settings.start_timeout_s:g} s, so the pool killed it; if loading may "
                "take that long, start the pool with a longer --start-timeout-s",
            )
        return due

    @staticmethod
    def _kill(worker: _Worker, why: str) -> None:
        if worker.process is not None and not worker.killed:
            worker.killed = True
            worker.said = worker.said or why
            worker.process.kill()  # its end comes by its pidfd, as any other

    def _step(self, timeout_s: float | None) -> None:
        """Sleep until something happens, and take note of it."""
        for fd, _ in self._epoll.poll(timeout_s):
            if fd == self._wake_r.fileno():
                with contextlib.suppress(BlockingIOError):
                    self._wake_r.recv(64)
            elif fd == self._control.fileno():
                self._read_control()
            elif fd in self._children:
                self._child_ended(fd)

    def _read_control(self) -> None:
        if not self._hears_broker:
            return
        try:
            data, fds = lifeline.receive_packet(self._control, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except lifeline.NoDescriptors as error:
            message = c.decode(error.data)
            assert isinstance(message, c.PeerAdmitted), message
            log.warning("a client could not be kept for the case that the broker ends, and is refused: %s", error)
            self._tell(c.PeerNotKept(message.peer))
            return
        except ConnectionError:
            data, fds = b"", []
        if not data:
            self._hears_broker = False
            self._epoll.unregister(self._control.fileno())  # the broker's end follows
            return
        self._broker_said(c.decode(data), fds)

    def _broker_said(self, message: c.Control, fds: list[int]) -> None:
        if isinstance(message, c.BrokerReady):
            self._broker_ready = True
        elif isinstance(message, c.PeerAdmitted):
            self._clients[message.peer] = (message.pid, fds)
            self._tell(c.PeerIsKept(message.peer))
        elif isinstance(message, c.PeerForgotten):
            lifeline.close_all(self._clients.pop(message.peer, (0, []))[1])
        elif isinstance(message, c.IsDrained):
            self._drained = True
        elif isinstance(message, (c.WorkerIsReady, c.WorkerSaid, c.WorkerHangs)):
            for worker in self._workers:
                if worker.number != message.worker:
                    continue
                if isinstance(message, c.WorkerSaid):
                    worker.said = message.text
                elif isinstance(message, c.WorkerHangs):
                    self._kill(worker, message.text)
                else:
                    worker.ready, worker.failures = True, 0

    def _tell(self, message: c.Control, fds: list[int] | None = None) -> None:
        with contextlib.suppress(ConnectionError):  # the broker ended, which its pidfd tells
            lifeline.send_packet(self._control, message, fds or [])

    def _child_ended(self, pidfd: int) -> None:
        child, worker = self._children.pop(pidfd)
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        returncode = child.wait()
        how = "SIGKILL from the pool" if worker is not None and worker.killed else describe_exit(returncode)
        if worker is None:
            self._broker_ended(returncode, how)
            return
        worker.process = None
        if worker.lifeline is not None:
            worker.lifeline.close()
        self._tell(c.WorkerGone(worker.number, how))
        if returncode > 0:  # neither well nor by a signal, so it may have said why
            self._hear_out(worker)
        if not self._serving:
            raise _start_error(worker, returncode)
        if not self._drained:
            pause = BACK_OFF_S[min(worker.failures, len(BACK_OFF_S) - 1)]
            worker.failures += not worker.ready
            worker.start_at = time.monotonic() + (pause if worker.failures else 0)
            why = f"{worker.said} ({how})" if worker.said else how
            log.error("%s ended: %s; another is started", worker.name, why)

    def _hear_out(self, worker: _Worker) -> None:
        """Wait for what a worker said before it ended: the broker reads that, at the latest when told of the end."""
        deadline = time.monotonic() + HEAR_OUT_S
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        while not worker.said and self._hears_broker and (left := deadline - time.monotonic()) > 0:
            if poller.poll(left * 1000):
                self._read_control()

    # ------------------------------------------------------------------ stopping

    def _drain(self) -> int:
        """Finish what is in flight, then end the children; a second signal, or the time-out, stops at once."""
        self._draining = True
        self._tell(c.DrainNow())
        deadline = time.monotonic() + self._settings.drain_timeout_s
        while not self._drained:
            due = _sooner(self._start_due_workers(), self._end_late_workers())
            left = deadline - time.monotonic()
            if self._stop_asked > 1 or left <= 0:
                log.error("stopped with work in flight, which is lost")
                return 1
            self._step(_sooner(left, due))
        deadline = time.monotonic() + END_GRACE_S
        while self._children and self._stop_asked <= 1 and (left := deadline - time.monotonic()) > 0:
            self._step(left)
        return 0

    def _close_kept(self) -> None:
        """Close what was kept for another broker."""
        for _, fds in self._clients.values():
            lifeline.close_all(fds)
        self._clients.clear()
        for worker in self._workers:
            if worker.lifeline is not None:
                worker.lifeline.close()
        if self._epoch:
            self._control.close()

    def _kill_children(self) -> None:
        for pidfd, (child, _) in self._children.items():
            child.kill()
            child.wait()
            os.close(pidfd)
        self._children.clear()


def _sooner(one: float | None, other: float | None) -> float | None:
    """The shorter of two times to sleep, of which None is for ever."""
    return other if one is None else one if other is None else min(one, other)


def _start_error(worker: _Worker, returncode: int) -> TrtpoolError:
    """Why a worker did not become ready."""
    if worker.said:
        return of_exit_code(returncode)(f"{worker.name}: {worker.said}")
    how = describe_exit(returncode)
    return StartFailed(f"{worker.name} did not become ready: {how}; what it said is above")


def run(
    settings: PoolSettings, announce: Callable[[Started], None], say: Callable[[str], None], owner_pid: int = 0
) -> int:
    """Run a pool in this process until it is stopped; see `Supervisor.run`."""
    return Supervisor(settings, announce, say, owner_pid).run()
