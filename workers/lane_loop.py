"""The GPU worker's loop: keep every lane busy, and say which batches have ended.

::

    a turn, by whichever thread is awake, with the lock held
      which flights have ended?  ---> their lanes are free
      a frame of the broker's?   ---> waiting
      launch what waits, while a lane is free  ---> flights
      tell the broker of all that ended, in one frame

    nothing moves any more         there are flights      there are none
      the thread that saw it         blocks on the oldest   blocks on the broker, if the other does not
      the other thread               blocks on the broker   sleeps
                                     if a lane is free

Two threads, since a process can block on the device or on its broker, and not on both.  Neither has a task of its own:
whoever wakes does all there is to do, and the other is called only for what it must listen to meanwhile.  So one batch
by itself is launched, waited for and told by one thread, without waking another on the way, and under load, with
every lane in use and the next batch here already, only one is ever awake: two that take turns pay for the
interpreter's lock with each call to CUDA, which gives it up.

Any flight may end first, so all are asked at each turn; but who blocks, blocks on the oldest.

With `busy_poll` there is one thread, which never blocks.

The broker sends one batch more than there are lanes, so a lane that comes free is used again at once.

A GPU that failed once cannot be trusted: whatever the failure, the worker says why, and ends.  Its batches go back to
the queue, and the supervisor starts another worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, NoReturn

from trtpool.ipc import messages as m
from trtpool.ipc.errors import EngineFailed, ProtocolError
from trtpool.ipc.settings import WorkerConfig

from .engine import EngineError, LaneEngine
from .joining import MAX_TEXT, Inbox, Joined, finished

log = logging.getLogger("trtpool.worker")

SWITCH_S: Final = 0.0005
"""How long one thread may keep the interpreter while another wants it; Python's own 5 ms is longer than a batch."""


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
        self._free = list(range(min(engine.lanes for engine in engines)))
        self._waiting: deque[m.Run] = deque()
        self._flights: list[tuple[m.Run, LaneEngine, int]] = []  # in order of launch, each with its lane
        self._ended: list[m.ToBroker] = []  # what the broker is still to be told
        self._error: ProtocolError | None = None
        # Whoever is awake has the lock.  A thread that sleeps hangs on the bell, which is locked until it is rung.
        self._lock, self._bell = threading.Lock(), threading.Lock()
        self._bell.acquire()
        self._watches = self._listens = self._sleeps = False
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
                    if not self._turn() and not self._spins:
                        self._rest()
            except EngineError as error:
                # A fault on the device ends all that is in flight, and does not tell which batch it came from.
                self._fail(f"the GPU failed: {error}")
            except Exception as error:  # noqa: BLE001  # without this thread nothing might ever end
                self._fail(f"the worker failed: {error!r}")
            finally:
                self._call()

    # ------------------------------------------------------------------ a turn; the lock is held

    def _turn(self) -> bool:
        """Do all that can be done now; whether there may be more."""
        moved = self._collect()
        if not self._waiting and self._free and not self._listens and not self._inbox.over:
            runs = self._hear(self._inbox.poll)
            self._waiting += runs
            moved = moved or bool(runs)
        while self._waiting and self._free:
            self._launch(self._waiting.popleft())
        if self._ended:
            self._tell(self._ended)
        return moved

    def _collect(self) -> bool:
        """Take what has ended off its lane; whether something has."""
        moved = False
        for flight in self._flights[:]:
            run, engine, lane = flight
            times = engine.poll(lane)
            if times is not None:
                self._flights.remove(flight)
                self._free.append(lane)
                self._ended.append(finished(run, times))
                moved = True
        return moved

    def _hear(self, receive: Callable[[], list[m.Run]]) -> list[m.Run]:
        """What the broker sent; needs no lock."""
        try:
            return receive()
        except ProtocolError as error:  # raised when what runs is finished
            self._error = error
            return []

    def _launch(self, run: m.Run) -> None:
        lane = self._free.pop()
        engine = self._engines[run.model]
        try:
            engine.launch(lane, run.rows)
        except EngineError as error:
            # This batch is to blame, as far as can be told.
            self._fail(f"batch {run.batch} could not be launched: {error}", run)
        self._flights.append((run, engine, lane))

    def _tell(self, messages: list[m.ToBroker]) -> None:
        with contextlib.suppress(ConnectionError):  # the broker ended, as whoever listens sees too
            self._joined.pipe.send(messages)
        messages.clear()

    # ------------------------------------------------------------------ between turns; the lock is given up to wait

    def _rest(self) -> None:
        """Wait for what comes next: on the device, on the broker, or for a call of the other thread, who does both."""
        over = self._inbox.over
        if self._flights and not self._watches:
            if self._free and not self._listens and not over:
                self._call()
            _, engine, lane = self._flights[0]
            self._watches = True
            self._lock.release()
            try:
                engine.block(lane)
            finally:
                self._lock.acquire()
                self._watches = False
        elif not over and not self._listens and (self._free or not self._flights):
            self._listens = True
            self._lock.release()
            try:
                runs = self._hear(self._inbox.receive)
            finally:
                self._lock.acquire()
                self._listens = False
            self._waiting += runs
        elif self._flights or not over:  # else all is done
            self._sleeps = True
            self._lock.release()
            self._bell.acquire()
            self._lock.acquire()

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
