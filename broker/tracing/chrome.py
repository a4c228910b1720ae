"""A story as Chrome's trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

::

    pool NAME (the broker's process)   counters "queue MODEL" and "free slots MODEL"; "queue MODEL": submissions
    worker ...                         a track for each lane
    producer ...                       tracks for waiting for slots, filling and reading them

Slices are complete events ("X"), the queue's are asynchronous ones ("b", "e"), as many may wait at once.  Times are
microseconds of CLOCK_MONOTONIC.  The format: "Trace Event Format", by Nat Duca and Dean Michael Berris, 2016.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from .records import Present
from .story import Slice, Story
from .tracks import lanes_of, rows_of

NAMELESS_PID: Final = 1 << 22
"""Above all process numbers: for peers whose own cannot be told, since they are in another pid namespace."""

CHUNK: Final = 10_000
"""Events that are written at a time."""

_KINDS: Final = ("lease", "fill", "read")
_POOL, _WORKER, _PRODUCER = range(3)

_Event = dict[str, Any]

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Trace:
    """A trace that was written.

    Attributes:
        path: the file.
        seconds: from its beginning to its end.
        events: in the file.
        dropped: events that had no room in the buffer; all that came after the first of them.
        ended: "", or why it ended before it was told to.
    """

    path: Path
    seconds: float
    events: int
    dropped: int
    ended: str


def write(story: Story, path: Path, dropped: int, ended: str) -> Trace:
    """Write a story to a file, which is replaced whole or not at all.

    Args:
        story: what happened.
        path: the file.
        dropped, ended: see `Trace`.

    Raises:
        OSError: it cannot be written.
    """
    other = {
        "pool": story.pool,
        "clock": "CLOCK_MONOTONIC",
        "start_ns": story.start_ns,
        "end_ns": story.end_ns,
        "dropped_events": dropped,
        "ended": ended or "as asked",
    }
    is_special = path.exists() and not path.is_file()  # a pipe, or /dev/stdout
    new = path if is_special else path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(b'{"displayTimeUnit":"ns","otherData":%b,"traceEvents":[' % _encode(other))
            events = _Drawing(story, file).draw()
            file.write(b"]}\n")
        if not is_special:
            new.replace(path)
    finally:
        if not is_special:
            new.unlink(missing_ok=True)
    return Trace(path, (story.end_ns - story.start_ns) / 1e9, events, dropped, ended)


@dataclass
class _Group:
    """A process, as the viewer shows it; `slices` of its clients, by kind."""

    name: str
    sort: int
    slices: dict[str, list[Slice]] = field(default_factory=lambda: defaultdict(list))


class _Drawing:
    """Events of a story, written to a file as they are made: there may be millions, in no order."""

    def __init__(self, story: Story, file: BinaryIO) -> None:
        self._story = story
        self._file = file
        self._events: list[_Event] = []  # that were not written yet
        self._written = 0
        self._groups: dict[int, _Group] = {story.pid: _Group(f"pool {story.pool}", _POOL)}
        self._pids = {peer: one.pid or NAMELESS_PID + peer for peer, one in story.peers.items()}
        for number, one in story.peers.items():
            group = self._groups.setdefault(self._pids[number], _Group("", _PRODUCER))
            if one.is_worker or not group.name:
                group.name, group.sort = _name(one), _WORKER if one.is_worker else _PRODUCER
        self._at: dict[int, tuple[int, int]] = {}  # id of a slice, or of an execution: track and time

    def draw(self) -> int:
        """Write all events; returns how many."""
        for pid, group in self._groups.items():
            self._name("process_name", pid, 0, name=group.name)
            self._name("process_sort_index", pid, 0, sort_index=group.sort)
        self._draw_lanes()
        self._draw_producers()
        self._draw_queues()
        self._draw_levels()
        self._draw_flows()
        for when_ns, peer, what in self._story.marks:
            if peer in self._pids:
                self._add("i", what, when_ns, self._pids[peer], 0, s="p", cat="peer")
        self._write()
        return self._written

    def _write(self) -> None:
        text = _encode(self._events)[1:-1]
        if text:
            self._file.write(b",\n" + text if self._written else text)
        self._written += len(self._events)
        self._events.clear()

    def _draw_lanes(self) -> None:
        by_worker = defaultdict(list)
        for execution in self._story.executions:
            by_worker[execution.worker].append(execution)
        for worker, one in self._story.peers.items():
            if not one.is_worker:
                continue
            pid = self._pids[worker]
            for lane in range(max(1, one.lanes)):
                self._track(pid, lane + 1, f"lane {lane}")
            for phase in lanes_of(by_worker[worker], one.lanes, self._story.start_ns):
                tid = phase.lane + 1
                execution = phase.execution
                args = execution.args if execution.device_ns is not None else {**execution.args, "ended": execution.how}
                name = phase.name if execution.device_ns is not None else phase.name.partition(":")[0]
                self._slice(phase.start_ns, phase.end_ns, pid, tid, name, "device", args)
                self._at.setdefault(id(execution), (tid, phase.start_ns))

    def _draw_producers(self) -> None:
        for one in self._story.slices:
            if one.peer in self._pids:
                self._groups[self._pids[one.peer]].slices[one.kind].append(one)
        for pid, group in self._groups.items():
            tid = 1
            for kind in _KINDS:
                rows = rows_of(group.slices[kind])
                count = 1 + max((row for row, _ in rows), default=-1)
                for row in range(count):
                    self._track(pid, tid + row, kind)
                for row, one in rows:
                    self._slice(one.start_ns, one.end_ns, pid, tid + row, one.name, kind, one.args)
                    self._at[id(one)] = (tid + row, one.start_ns)
                tid += count

    def _draw_queues(self) -> None:
        for number, one in enumerate(self._story.queued):
            name = f"queue {self._story.models[one.model][0]}"
            for kind, when_ns, args in (("b", one.start_ns, one.args), ("e", one.end_ns, {})):
                self._add(kind, name, when_ns, self._story.pid, 0, cat="queue", id=hex(number), args=args)

    def _draw_levels(self) -> None:
        last: dict[str, int] = {}
        for when_ns, model, free, queued in self._story.levels:
            name = self._story.models[model][0]
            for counter, unit, level in (
                (f"queued items {name}", "items", queued),
                (f"free slots {name}", "slots", free),
            ):
                if last.get(counter) != level:
                    last[counter] = level
                    self._add("C", counter, when_ns, self._story.pid, 0, args={unit: level})

    def _draw_flows(self) -> None:
        """An arrow begins within the fill, right at its end, and ends where the outputs are there to be read."""
        peers = self._story.peers
        for number, flow in enumerate(self._story.flows):
            fill, execution, read = flow.fill, flow.execution, flow.read
            if fill.peer not in peers or execution.worker not in peers:
                continue
            common = {"cat": "work", "id": hex(number)}
            fill_tid, fill_ns = self._at[id(fill)]
            from_ns = max(fill_ns, fill.end_ns - 1)
            self._add("s", flow.name, from_ns, self._pids[fill.peer], fill_tid, **common)
            if id(execution) in self._at:
                tid, when_ns = self._at[id(execution)]
                self._add("t", flow.name, max(when_ns, from_ns), self._pids[execution.worker], tid, bp="e", **common)
            read_tid, read_ns = self._at[id(read)]
            self._add("f", flow.name, read_ns, self._pids[read.peer], read_tid, bp="e", **common)

    # ------------------------------------------------------------------ events

    def _slice(
        self, start_ns: int, end_ns: int, pid: int, tid: int, name: str, cat: str, args: dict[str, object]
    ) -> None:
        self._add("X", name, start_ns, pid, tid, cat=cat, dur=(end_ns - start_ns) / 1000, args=args)

    def _add(self, kind: str, name: str, when_ns: int, pid: int, tid: int, **more: Any) -> None:
        self._events.append({"ph": kind, "name": name, "ts": when_ns / 1000, "pid": pid, "tid": tid, **more})
        if len(self._events) >= CHUNK:
            self._write()

    def _track(self, pid: int, tid: int, name: str) -> None:
        self._name("thread_name", pid, tid, name=name)
        self._name("thread_sort_index", pid, tid, sort_index=tid)

    def _name(self, what: str, pid: int, tid: int, **args: object) -> None:
        self._events.append({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args})


def _name(one: Present) -> str:
    if not one.is_worker:
        return f"producer {one.pid or f'of peer {one.peer}'}"
    place = "" if one.gpu is None else f" on GPU {one.gpu}"
    device = f": {one.device}" if one.device else ""
    return f"worker {one.pid}{place}{device}"
