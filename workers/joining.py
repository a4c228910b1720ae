"""How a worker joins its pool: the description, the arena, and the pipe to the broker."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trtpool.ipc import messages as m
from trtpool.ipc.arena import Residence, map_segment
from trtpool.ipc.errors import ProtocolError
from trtpool.ipc.layout import ModelLayout, plane_array
from trtpool.ipc.lifeline import receive_description
from trtpool.ipc.pipe import Pipe
from trtpool.ipc.settings import WorkerConfig
from trtpool.ipc.signature import differences
from trtpool.ipc.tensors import ModelSpec

from .engine import Planes, Times

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
        """Input and output planes of a model, after checking that it fits what the arena was made for.

        Raises:
            ProtocolError: the file changed since the pool looked at it.
        """
        layout = self.models[model]
        if wrong := differences(layout, spec):
            raise ProtocolError(
                f"{spec.path} changed after the pool had looked at it: {'; '.join(wrong)}; put the file back as it "
                "was, or start the pool again"
            )
        inputs, outputs = (
            {plane.spec.name: plane_array(self.segment, layout, plane) for plane in planes}
            for planes in (layout.inputs, layout.outputs)
        )
        return inputs, outputs

    def leave(self) -> None:
        """Disconnect."""
        self.pipe.close()
        os.close(self.arena_fd)


class Inbox:
    """The batches that the broker sends to a worker.

    Args:
        joined: the worker's place in the pool.

    Attributes:
        over: nothing more comes, since the broker ended, said Bye, or is not understood.
    """

    def __init__(self, joined: Joined) -> None:
        self._pipe = joined.pipe
        self._bounds = [(model.segment, model.slots) for model in joined.models]
        self.over = False

    def receive(self, *, spins: bool = True) -> list[m.Run]:
        """Wait for the next frame; the batches in it.  For `spins` see `Pipe.receive`.

        Raises:
            ProtocolError: the broker refused what we sent, or names rows that do not lie in the planes.
        """
        return self._take(lambda: self._pipe.receive(spins=spins))

    def poll(self) -> list[m.Run]:
        """As `receive`, without waiting.

        Raises:
            ProtocolError: as from `receive`.
        """
        return self._take(self._pipe.poll)

    def _take(self, read: Callable[[], Sequence[m.FromBroker] | None]) -> list[m.Run]:
        runs: list[m.Run] = []
        try:
            messages = read()
            if messages is None:
                return runs
            self.over = not messages
            for message in messages:
                if type(message) is m.Run:
                    self._check(message)
                    if message.works:  # the broker names them where each is to be logged
                        _note(message, "received")
                    runs.append(message)
                elif isinstance(message, m.Error):
                    raise ProtocolError(f"the broker refused a message: {message.text}")
                elif isinstance(message, m.Bye):
                    log.debug("leaving: %s", message.text)
                    self.over = True
                    break
        except ProtocolError:
            self.over = True
            raise
        return runs

    def _check(self, run: m.Run) -> None:
        """Whether the rows of a batch lie in the planes; how many items they hold is for the engine to check."""
        if run.model >= len(self._bounds):
            raise ProtocolError(f"batch {run.batch} is for model {run.model} of {len(self._bounds)}")
        segment, slots = self._bounds[run.model]
        for rows in run.rows:
            if rows.segment != segment or rows.first + rows.count > slots:
                raise ProtocolError(f"batch {run.batch} names slots {rows.first}+{rows.count} of {slots}")


class Job:
    """What one Run asks for: a batch, or several.

    Args:
        run: as it came.
        layout: that of its model.

    Attributes:
        batches: the rows of each, at most `max_batch` items.
    """

    __slots__ = ("_error", "_left", "_spent", "batches", "run")

    def __init__(self, run: m.Run, layout: ModelLayout) -> None:
        self.run = run
        self.batches = cut(run.rows, layout.max_batch, layout.items_per_slot)
        self._left = len(self.batches)
        self._spent = Times(0, 0, 0)
        self._error = ""

    def fail(self, error: Exception) -> m.Failed | None:
        """One of its batches was refused; what to tell the broker if it was the last: till then others write."""
        self._error = self._error or str(error)[:MAX_TEXT]
        self._left -= 1
        return None if self._left else m.Failed(self.run.batch, self.run.attempt, self._error)

    def finish(self, times: Times) -> m.Finished | m.Failed | None:
        """One of its batches took so long; what to tell the broker if it was the last."""
        self._left -= 1
        run, batches = self.run, len(self.batches)
        if self._error:
            return None if self._left else m.Failed(run.batch, run.attempt, self._error)
        if batches > 1:
            spent = self._spent
            copy_in, compute, copy_out, gathered = map(sum, zip(spent[:4], times[:4], strict=True))
            filled = spent.filled_items + times.filled_items
            times = self._spent = Times(copy_in, compute, copy_out, gathered, times.shapes, filled)
            if self._left:
                return None
        copy_in_ns, compute_ns, copy_out_ns, gathered, shapes, filled = times
        if run.works:
            _note(run, f"ended after {(copy_in_ns + compute_ns + copy_out_ns) / 1e6:.3f} ms")
        ended_ns = time.monotonic_ns()
        return m.Finished(
            run.batch, run.attempt, copy_in_ns, compute_ns, copy_out_ns, gathered, batches, ended_ns, shapes, filled
        )


def cut(rows: Sequence[m.Rows], max_batch: int, items_per_slot: int) -> list[Sequence[m.Rows]]:
    """Rows in batches of at most `max_batch` items, in order; slots stay whole."""
    if sum(run.items for run in rows) <= max_batch:
        return [rows]
    batches: list[Sequence[m.Rows]] = []
    batch: list[m.Rows] = []
    room = max_batch
    for run in rows:
        segment, first, count, items = run.segment, run.first, run.count, run.items
        while items > room:
            slots = room // items_per_slot
            if slots:
                batch.append(m.Rows(segment, first, slots, slots * items_per_slot))
                first, count, items = first + slots, count - slots, items - slots * items_per_slot
            batches.append(batch)
            batch, room = [], max_batch
        batch.append(m.Rows(segment, first, count, items))
        room -= items
    batches.append(batch)
    return batches


def ids(run: m.Run) -> dict[str, Any]:
    """What a line about a Run has as its fields."""
    return {"batch": run.batch, "attempt": run.attempt, "works": run.works}


def _note(run: m.Run, what: str) -> None:
    log.debug("batch %d, attempt %d, %s: work %s", run.batch, run.attempt, what, ", ".join(run.works), extra=ids(run))


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
    return Joined(Pipe(lifeline, config.spin_us), segment, fd, description.layout.models)
