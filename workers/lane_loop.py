"""The GPU worker's loop: keep every lane busy, and say which batches have ended.

::

    main thread                                   completion thread
      receive Run ---> waiting --.                  take the oldest flight
      a lane is free? ---------->+--> launch          block on its event (the GIL is released)
                                 |      `-> flights --> tell the broker; the lane is free:
                                 '<------------------- launch what waits

The broker sends one batch more than there are lanes, so a lane that comes free is used again at once, by the thread
that saw it come free.  Nothing spins, and neither thread waits for the other while it has work.

A GPU that failed once cannot be trusted: whatever the failure, the worker says why, and ends.  Its batches go back to
the queue, and the supervisor starts another worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, NoReturn

from trtpool.ipc import messages as m
from trtpool.ipc.errors import EngineFailed
from trtpool.ipc.settings import WorkerConfig

from .engine import EngineError, LaneEngine
from .joining import MAX_TEXT, Joined, finished

log = logging.getLogger("trtpool.worker")

SWITCH_S: Final = 0.0005
"""How long one thread may keep the interpreter while another wants it; Python's own 5 ms is longer than a batch."""


class _Flight(NamedTuple):
    """A batch on a lane."""

    run: m.Run
    engine: LaneEngine
    lane: int


class LaneLoop:
    """Several batches at a time, on one device.

    Args:
        joined: the worker's place in the pool; the loop leaves it.
        config: which GPU of the pool this is.
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
        self._engines = engines
        self._end = end
        self._free = list(range(min(engine.lanes for engine in engines)))
        self._waiting: deque[m.Run] = deque()
        self._lock = threading.Lock()
        self._flights: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self._completion = threading.Thread(target=self._complete, name="completion", daemon=True)
        sys.setswitchinterval(SWITCH_S)
        joined.pipe.send([m.Ready(device, len(self._free), config.gpu)])

    def run(self) -> None:
        """Serve until the broker ends or says Bye."""
        self._completion.start()
        try:
            for run in self._joined.runs():
                with self._lock:
                    self._waiting.append(run)
                    self._launch_waiting()
        finally:
            self._flights.put(None)
            self._completion.join()

    def close(self) -> None:
        """Free the engines and disconnect."""
        for engine in self._engines:
            engine.close()
        self._joined.leave()

    def _launch_waiting(self) -> None:
        """Launch what waits while a lane is free; the lock is held."""
        while self._waiting and self._free:
            run = self._waiting.popleft()
            lane = self._free.pop()
            engine = self._engines[run.model]
            try:
                engine.launch(lane, self._joined.rows(run))
            except EngineError as error:
                # This batch is to blame, as far as can be told.
                self._fail(f"batch {run.batch} could not be launched: {error}", run)
            self._flights.put(_Flight(run, engine, lane))

    def _complete(self) -> None:
        try:
            with contextlib.suppress(ConnectionError):  # the broker ended: the main thread sees it too
                while (flight := self._flights.get()) is not None:
                    self._finish(flight)
        except BaseException as error:  # noqa: BLE001  # without this thread nothing would ever end
            self._fail(f"the completion thread failed: {error!r}")

    def _finish(self, flight: _Flight) -> None:
        run = flight.run
        try:
            times = flight.engine.wait(flight.lane)
        except EngineError as error:
            # A fault on the device ends all that is in flight, and does not tell which batch it came from.
            self._fail(f"the GPU failed: {error}")
        self._joined.pipe.send([finished(run, times)])
        with self._lock:
            self._free.append(flight.lane)
            self._launch_waiting()

    def _fail(self, text: str, run: m.Run | None = None) -> NoReturn:
        """Say why, and end this process; `run` is the batch that is to blame, if one is."""
        log.error("%s", text)
        said: list[m.ToBroker] = [m.Bye(text[:MAX_TEXT])]
        if run is not None:
            said.insert(0, m.Failed(run.batch, run.attempt, text[:MAX_TEXT]))
        with contextlib.suppress(OSError):
            self._joined.pipe.send(said)
        self._end(EngineFailed.exit_code)
