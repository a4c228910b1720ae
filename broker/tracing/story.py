"""What happened in a trace: slices of time, arrows between them, and levels; `telling` makes it of what a broker wrote.

All times are the broker's, in nanoseconds of its clock: of what a peer says, when that was read, and of what it is
told, when the turn ended in which that was decided.  What began before the trace begins with it, and what goes on at
its end ends there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .records import Present


@dataclass(eq=False, slots=True)
class Slice:
    """Something that a peer did from `start_ns` to `end_ns`; `kind` is "lease", "fill" or "read"."""

    peer: int
    kind: str
    start_ns: int
    end_ns: int
    name: str
    args: dict[str, object]


@dataclass(eq=False, slots=True)
class Execution:
    """A batch on a worker.

    Attributes:
        sent_ns: when it was sent there.
        end_ns: when its outputs were written, as the worker told, or else when that was heard; when it failed.
        device_ns: copy-in, compute and copy-out, of all that it was cut into; None: it did not end with a result.
        how: "", or how it ended or "running".
    """

    worker: int
    sent_ns: int
    end_ns: int
    device_ns: tuple[int, int, int] | None
    how: str
    args: dict[str, object]


@dataclass(eq=False, slots=True)
class Flow:
    """Slots of one submission from their fill to the batch and to their delivery."""

    name: str
    fill: Slice
    execution: Execution
    read: Slice


@dataclass(eq=False, slots=True)
class QueueSlice:
    """Slots of one submission in the queue of a model."""

    model: int
    start_ns: int
    end_ns: int
    args: dict[str, object]


@dataclass(eq=False, slots=True)
class Story:
    """All of it.

    Attributes:
        pool, pid: the pool's name, and its broker's process.
        start_ns, end_ns: of the trace.
        models: name and slots of each.
        peers: all that were there at any time.
        slices, executions, queued, flows: what happened.
        levels: when, model, free slots, queued items.
        marks: when, peer, and what happened to it at that moment.
    """

    pool: str
    pid: int
    start_ns: int
    end_ns: int
    models: list[tuple[str, int]]
    peers: dict[int, Present]
    slices: list[Slice] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    queued: list[QueueSlice] = field(default_factory=list)
    flows: list[Flow] = field(default_factory=list)
    levels: list[tuple[int, int, int, int]] = field(default_factory=list)
    marks: list[tuple[int, int, str]] = field(default_factory=list)
