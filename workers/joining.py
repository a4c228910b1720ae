"""How a worker joins its pool: the description, the arena, and the pipe to the broker."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trtpool.ipc import messages as m
from trtpool.ipc.arena import Residence, map_segment
from trtpool.ipc.errors import ProtocolError
from trtpool.ipc.layout import ModelLayout, plane_array
from trtpool.ipc.lifeline import receive_description
from trtpool.ipc.pipe import Pipe
from trtpool.ipc.settings import WorkerConfig
from trtpool.ipc.tensors import ModelSpec

from .engine import Planes, Rows, Times

log = logging.getLogger("trtpool.worker")

MAX_TEXT: int = 4096


class Joined(NamedTuple):
    """A worker's place in a pool.

    Attributes:
        pipe: the way to the broker.
        segment: the arena, mapped.
        arena_fd: its descriptor, the worker's own.
        models: the models, in the order that messages number them.
    """

    pipe: Pipe
    segment: mmap.mmap
    arena_fd: int
    models: tuple[ModelLayout, ...]

    def planes(self, model: int, spec: ModelSpec) -> tuple[Planes, Planes]:
        """Input and output planes of a model, after checking that it is the one which the arena was made for.

        Raises:
            ProtocolError: the file changed since the pool looked at it.
        """
        layout = self.models[model]
        if spec != layout.spec:
            raise ProtocolError(f"{layout.spec.path} changed while the pool started; start it again")
        inputs, outputs = (
            {plane.spec.name: plane_array(self.segment, layout, plane) for plane in planes}
            for planes in (layout.inputs, layout.outputs)
        )
        return inputs, outputs

    def runs(self) -> Iterator[m.Run]:
        """The batches that the broker sends, until it ends or says Bye.

        Raises:
            ProtocolError: it refused what we sent.
        """
        while messages := self.pipe.receive():
            for message in messages:
                if isinstance(message, m.Run):
                    yield message
                elif isinstance(message, m.Error):
                    raise ProtocolError(f"the broker refused a message: {message.text}")
                elif isinstance(message, m.Bye):
                    log.debug("leaving: %s", message.text)
                    return

    def rows(self, run: m.Run) -> Sequence[Rows]:
        """The rows of a batch.

        Raises:
            ProtocolError: they do not lie in the planes.
        """
        model = self.models[run.model]
        for rows in run.rows:
            if rows.segment != model.segment or rows.first + rows.count > model.slots:
                raise ProtocolError(f"batch {run.batch} names slots {rows.first}+{rows.count} of {model.slots}")
        return [Rows(rows.first, rows.count, rows.items) for rows in run.rows]

    def leave(self) -> None:
        """Disconnect."""
        self.pipe.close()
        os.close(self.arena_fd)


def finished(run: m.Run, times: Times) -> m.Finished:
    """What to tell the broker of a batch whose outputs are written."""
    return m.Finished(
        run.batch, run.attempt, times.copy_in_ns, times.compute_ns, times.copy_out_ns, times.gathered_items
    )


def join(config: WorkerConfig) -> Joined:
    """Join the pool over the lifeline that the supervisor left us."""
    with contextlib.ExitStack() as stack:
        lifeline = stack.enter_context(socket.socket(fileno=config.lifeline_fd))
        description, fd = receive_description(lifeline)
        stack.callback(os.close, fd)
        segment = map_segment(fd, description.layout.segment_bytes)
        if config.gpu is None:  # pinning does it too
            Residence(segment).touch(0, len(segment))
        stack.pop_all()
    return Joined(Pipe(lifeline), segment, fd, description.layout.models)
