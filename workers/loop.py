"""The CPU worker's loop: take a batch from the broker, run it, say when its outputs are written."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from trtpool.ipc import messages as m
from trtpool.ipc.settings import InspectRequest, WorkerConfig

from .engine import Engine, EngineError
from .joining import MAX_TEXT, Inbox, Job, Joined, ids
from .warming import warm_up

log = logging.getLogger("trtpool.worker")


class WorkerLoop:
    """One batch at a time.

    Args:
        joined: the worker's place in the pool; the loop leaves it.
        config: what to load.
        load: makes an engine.
    """

    def __init__(self, joined: Joined, config: WorkerConfig, load: Callable[[InspectRequest, int], Engine]) -> None:
        self._joined = joined
        inbox = self._inbox = Inbox(joined)
        self._receive = inbox.poll if config.busy_poll else inbox.receive
        self._engines = [load(request, config.cpus) for request in config.models]
        for number, (engine, layout) in enumerate(zip(self._engines, joined.models, strict=True)):
            inputs, outputs = joined.planes(number, engine.spec)
            engine.bind(inputs, outputs, layout.max_batch)
        warm_up([(engine, layout.max_batch) for engine, layout in zip(self._engines, joined.models, strict=True)])
        joined.pipe.send([m.Ready("cpu", lanes=1)])

    def run(self) -> None:
        """Serve until the broker ends or says Bye."""
        with contextlib.suppress(ConnectionError):  # it ended while we worked
            while not self._inbox.over:
                for run in self._receive():
                    self._joined.pipe.send([self._run(run)])

    def close(self) -> None:
        """Free the engines and disconnect."""
        for engine in self._engines:
            engine.close()
        self._joined.leave()

    def _run(self, run: m.Run) -> m.Finished | m.Failed:
        job = Job(run, self._joined.models[run.model])
        answer = None
        try:
            for rows in job.batches:
                answer = job.finish(self._engines[run.model].run(rows, run.shapes))
        except EngineError as error:
            log.warning("batch %d, attempt %d, failed: %s", run.batch, run.attempt, error, extra=ids(run))
            return m.Failed(run.batch, run.attempt, str(error)[:MAX_TEXT])
        assert answer is not None
        return answer
