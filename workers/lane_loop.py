"""The GPU worker's loop: keep every lane busy, and say which batches have ended.

::

    a turn, by whichever thread is awake, with the lock held
      which flights have ended?                  ---> their lanes are free
      while a lane is free: launch what waits,   ---> flights
        or what a frame of the broker's brings
      tell the broker of all that ended, in one frame

    then                          there are flights               there are none
      the thread that had it       blocks on the oldest            blocks on the broker, or sleeps if the other does
      the other                    blocks on the broker; sleeps    sleeps
                                   if no lane is free, or for so
                                   short a batch

Two threads, since a process can block on the device or on its broker, and not on both.  Neither has a task of its own:
whoever wakes does all there is to do, and the other is called only for what it must listen to meanwhile.  So one batch
by itself is launched, waited for and told by one thread, and with every lane in use, or only short batches, one is ever
awake: two that take turns pay for the interpreter's lock with each call to CUDA, which gives it up.

Any flight may end first, so all are asked at each turn; but who blocks, blocks on the oldest.

With `busy_poll` there is one thread, which never blocks.

The broker sends one batch more than there are lanes, so a lane that comes free is used again at once.

A GPU that failed once cannot be trusted: whatever the failure, the worker says why, and ends.  Its batches go back to
the queue, and the supervisor starts another worker.  A batch that does not fit the engine, or whose answer does not fit
its rows, is no failure of the GPU: it alone is reported as failed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NoReturn, TypeAlias

from trtpool.ipc import messages as m
from trtpool.ipc.errors import EngineFailed, ProtocolError
from trtpool.ipc.settings import WorkerConfig
from trtpool.ipc.spinning import Spin

from .engine import BatchRefused, EngineError, LaneEngine
from .joining import MAX_TEXT, Inbox, Job, Joined, ids

log = logging.getLogger("trtpool.worker")

SWITCH_S: Final = 0.0005
"""How long one thread may keep the interpreter while another wants it; Python's own 5 ms is longer than a batch."""

SHORT_NS: Final = 50_000
"""While a batch that takes no longer than this runs, nobody listens: to wake a thread for it costs as much."""

_Batch: TypeAlias = tuple[Job, Sequence[m.Rows]]
"""One of a job's."""

_Flight: TypeAlias = tuple[Job, LaneEngine, int]
"""A batch on a lane."""


class LaneLoop:
    """Several batches at a time, on one device.

    Args:
        joined: the worker's place in the pool; the loop leaves it.
        config: which GPU of the pool this is, and whether to spin.
        engines: one for each model, bound.
        device: what to call the device in reports.
        end: ends the process after a fault, without clean-up.
    """

    def __init__(
        self,
        joined: Joined,
        config: WorkerConfig,
        engines: list[LaneEngine],
        device: str,
        end: Callable[[int], NoReturn] = os._exit,
    ) -> None:
        self._joined = joined
        self._inbox = Inbox(joined)
        self._engines = engines
        self._end = end
        self._spins = config.busy_poll
        self._spin = Spin(config.spin_us)
        self._free = list(range(min(engine.lanes for engine in engines)))
        self._waiting: deque[_Batch] = deque()
        self._flights: list[_Flight] = []  # in order of launch
        self._watched: _Flight | None = None  # the one that a thread blocks on
        self._ended: list[m.ToBroker] = []  # what the broker is still to be told
        self._error: ProtocolError | None = None
        # Whoever is awake has the lock.  A thread that sleeps hangs on the bell, which is locked until it is rung.
        self._lock, self._bell = threading.Lock(), threading.Lock()
        self._bell.acquire()
        self._took_ns = [SHORT_NS + 1] * len(engines)  # by model, its last batch
        self._listens = self._sleeps = False
        self._second = threading.Thread(target=self._serve, name="second", daemon=True)
        sys.setswitchinterval(SWITCH_S)
        joined.pipe.send([m.Ready(device, len(self._free), config.gpu)])

    def run(self) -> None:
        """Serve until the broker ends or says Bye, and what it sent before has ended.

        Raises:
            ProtocolError: the broker refused what we sent, or sent what it may not.
        """
        if self._spins:
            self._serve()
        else:
            self._second.start()
            try:
                self._serve()
            finally:
                self._second.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Free the engines and disconnect."""
        for engine in self._engines:
            engine.close()
        self._joined.leave()

    def _serve(self) -> None:
        """What each thread does."""
        with self._lock:
            try:
                while self._flights or self._waiting or not self._inbox.over:
                    if self._turn() or self._spins:
                        continue
                    while self._rest():  # called: by now somebody else has seen to all but what it is for
                        pass
            except EngineError as error:
                # A fault on the device ends all that is in flight, and does not tell which batch it came from.
                self._fail(f"the GPU failed: {error}")
            except Exception as error:  # noqa: BLE001  # without this thread nothing might ever end
                self._fail(f"the worker failed: {error!r}")
            finally:
                self._call()

    # ------------------------------------------------------------------ a turn; the lock is held

    def _turn(self) -> bool:
        """Do all that can be done now; whether something ended, so that more may have by now."""
        self._collect()
        while self._free:
            if not self._waiting and not self._listens and not self._inbox.over:
                self._waiting += self._hear(self._inbox.poll)
            if not self._waiting:
                break
            self._launch(*self._waiting.popleft())
        if not self._ended:
            return False
        self._tell(self._ended)
        return True

    def _collect(self) -> None:
        """Take what has ended off its lane."""
        for flight in self._flights[:]:
            job, engine, lane = flight
            times = engine.poll(lane)
            if times is not None:
                self._flights.remove(flight)
                finished = job.finish(times)
                if finished is not None:
                    self._ended.append(finished)
                self._took_ns[job.run.model] = times.copy_in_ns + times.compute_ns + times.copy_out_ns
                if flight is not self._watched:  # else who blocks on it is about to give its lane back
                    self._free.append(lane)

    def _hear(self, receive: Callable[[], list[m.Run]]) -> list[_Batch]:
        """The batches that the broker sent; needs no lock."""
        try:
            jobs = [Job(run, self._joined.models[run.model]) for run in receive()]
            return [(job, rows) for job in jobs for rows in job.batches]
        except ProtocolError as error:  # raised when what runs is finished
            self._error = error
            return []

    def _launch(self, job: Job, rows: Sequence[m.Rows]) -> None:
        lane = self._free.pop()
        engine = self._engines[job.run.model]
        try:
            engine.launch(lane, rows, job.run.shapes)
        except BatchRefused as error:
            self._free.append(lane)
            log.warning(
                "batch %d, attempt %d, was refused: %s", job.run.batch, job.run.attempt, error, extra=ids(job.run)
            )
            failed = job.fail(error)
            if failed is not None:
                self._ended.append(failed)
            return
        except EngineError as error:
            # This batch is to blame, as far as can be told.
            self._fail(f"batch {job.run.batch} could not be launched: {error}", job.run)
        self._flights.append((job, engine, lane))

    def _tell(self, messages: list[m.ToBroker]) -> None:
        with contextlib.suppress(ConnectionError):  # the broker ended, as whoever listens sees too
            self._joined.pipe.send(messages)
        messages.clear()

    # ------------------------------------------------------------------ between turns; the lock is given up to wait

    def _rest(self) -> bool:
        """Wait for what comes next: on the device, or on the broker; or sleep, if the other thread does what there is.

        Returns:
            Whether it slept, and was called.
        """
        over = self._inbox.over
        if self._flights and self._watched is None:
            flight = self._watched = self._flights[0]
            job, engine, lane = flight
            calls = self._free and not self._listens and not over and self._took_ns[job.run.model] > SHORT_NS
            self._lock.release()
            if calls:  # with the lock free, so that the other need not wait for it
                self._call()
            try:
                self._spin.wait(lambda: engine.ended(lane) or None, lambda: _block(engine, lane))
            finally:
                self._lock.acquire()
                self._watched = None
            if flight not in self._flights:
                # The other thread told of it.  It did not use the lane again, since a thread that comes late would
                # block on the next flight there, and older ones would be told late.
                self._free.append(lane)
        elif not over and not self._listens and (self._free or not self._flights):
            self._listens = True
            alone = not self._flights  # else the other thread needs the interpreter
            self._lock.release()
            try:
                runs = self._hear(lambda: self._inbox.receive(spins=alone))
            finally:
                self._lock.acquire()
                self._listens = False
            self._waiting += runs
        elif self._watched is not None or not over:  # else all is done
            self._sleeps = True
            self._lock.release()
            self._bell.acquire()
            self._lock.acquire()
            return True
        return False

    def _call(self) -> None:
        """Wake the other thread, if it sleeps."""
        if self._sleeps:
            self._sleeps = False
            self._bell.release()

    def _fail(self, text: str, run: m.Run | None = None) -> NoReturn:
        """Say why, and end this process; `run` is the batch that is to blame, if one is."""
        log.error("%s", text)
        said = [*self._ended, m.Bye(text[:MAX_TEXT])]
        if run is not None:
            said.insert(-1, m.Failed(run.batch, run.attempt, text[:MAX_TEXT]))
        with contextlib.suppress(OSError):
            self._joined.pipe.send(said)
        self._end(EngineFailed.exit_code)


def _block(engine: LaneEngine, lane: int) -> bool:
    engine.block(lane)
    return True
