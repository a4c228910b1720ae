"""The worker's loop: take batches from the broker, run them, say when their outputs are written."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
from collections.abc import Callable, Sequence

from trtpool.ipc import messages as m
from trtpool.ipc.arena import map_segment
from trtpool.ipc.errors import ProtocolError
from trtpool.ipc.layout import ModelLayout, plane_array
from trtpool.ipc.lifeline import receive_description
from trtpool.ipc.pipe import Pipe
from trtpool.ipc.settings import InspectRequest, WorkerConfig

from .engine import Engine, EngineError, Rows

log = logging.getLogger("trtpool.worker")

MAX_TEXT: int = 4096


def bind(engine: Engine, segment: mmap.mmap, model: ModelLayout) -> None:
    """Bind an engine to its planes, after checking that it is the model which the arena was made for.

    Raises:
        ProtocolError: the file changed since the pool looked at it.
    """
    if engine.spec != model.spec:
        raise ProtocolError(f"{model.spec.path} changed while the pool started; start it again")
    inputs = {plane.spec.name: plane_array(segment, model, plane) for plane in model.inputs}
    outputs = {plane.spec.name: plane_array(segment, model, plane) for plane in model.outputs}
    engine.bind(inputs, outputs, model.max_batch)


class WorkerLoop:
    """One device, its engines, and the connection to the broker.

    Args:
        config: what to load.
        load: makes an engine.
        device: what to call the device in reports.
    """

    def __init__(self, config: WorkerConfig, load: Callable[[InspectRequest, int], Engine], device: str) -> None:
        lifeline = socket.socket(fileno=config.lifeline_fd)
        description, fd = receive_description(lifeline)
        segment = map_segment(fd, description.layout.segment_bytes)
        os.close(fd)
        self._models = description.layout.models
        self._engines = [load(request, config.cpus) for request in config.models]
        for engine, model in zip(self._engines, self._models, strict=True):
            bind(engine, segment, model)
        self._pipe = Pipe(lifeline)
        self._pipe.send([m.Ready(device, lanes=1)])

    def run(self) -> None:
        """Serve until the broker ends or says Bye."""
        with contextlib.suppress(ConnectionError):  # it ended while we worked
            while messages := self._pipe.receive():
                for message in messages:
                    if isinstance(message, m.Run):
                        self._pipe.send([self._run(message)])
                    elif isinstance(message, m.Error):
                        raise ProtocolError(f"the broker refused a message: {message.text}")
                    elif isinstance(message, m.Bye):
                        log.debug("leaving: %s", message.text)
                        return

    def close(self) -> None:
        """Free the engines and disconnect."""
        for engine in self._engines:
            engine.close()
        self._pipe.close()

    def _run(self, run: m.Run) -> m.Finished | m.Failed:
        try:
            times = self._engines[run.model].run(self._check(run))
        except EngineError as error:
            log.warning("batch %d, attempt %d, failed: %s", run.batch, run.attempt, error)
            return m.Failed(run.batch, run.attempt, str(error)[:MAX_TEXT])
        return m.Finished(
            run.batch, run.attempt, times.copy_in_ns, times.compute_ns, times.copy_out_ns, times.gathered_items
        )

    def _check(self, run: m.Run) -> Sequence[Rows]:
        """The rows of a batch, which must lie in the planes."""
        model = self._models[run.model]
        for rows in run.rows:
            if rows.segment != model.segment or rows.first + rows.count > model.slots:
                raise ProtocolError(f"batch {run.batch} names slots {rows.first}+{rows.count} of {model.slots}")
        return [Rows(rows.first, rows.count, rows.items) for rows in run.rows]
