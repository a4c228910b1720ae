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
from typing import Any, Final

import msgspec

from .records import Present
from .story import Slice, Story
from .tracks import lanes_of, rows_of

NAMELESS_PID: Final = 1 << 22
"""Above all process numbers: for peers whose own cannot be told, since they are in another pid namespace."""

_KINDS: Final = ("lease", "fill", "read")
_POOL, _WORKER, _PRODUCER = range(3)

_Event = dict[str, Any]


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
    events = events_of(story)
    other = {
        "pool": story.pool,
        "clock": "CLOCK_MONOTONIC",
        "start_ns": story.start_ns,
        "end_ns": story.end_ns,
        "dropped_events": dropped,
        "ended": ended or "as asked",
    }
    text = msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ns", "otherData": other})
    if path.exists() and not path.is_file():  # a pipe, or /dev/stdout
        path.write_bytes(text)
    else:
        _replace(path, text)
    return Trace(path, (story.end_ns - story.start_ns) / 1e9, len(events), dropped, ended)


def _replace(path: Path, text: bytes) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def events_of(story: Story) -> list[_Event]:
    """All events, those that name tracks first, and the others by time."""
    return _Drawing(story).events()


@dataclass
class _Group:
    """A process, as the viewer shows it; `slices` of its clients, by kind."""

    name: str
    sort: int
    slices: dict[str, list[Slice]] = field(default_factory=lambda: defaultdict(list))


class _Drawing:
    """Events of a story."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self._events: list[_Event] = []
        self._names: list[_Event] = []
        self._groups: dict[int, _Group] = {story.pid: _Group(f"pool {story.pool}", _POOL)}
        self._pids = {peer: one.pid or NAMELESS_PID + peer for peer, one in story.peers.items()}
        for number, one in story.peers.items():
            group = self._groups.setdefault(self._pids[number], _Group("", _PRODUCER))
            if one.is_worker or not group.name:
                group.name, group.sort = _name(one), _WORKER if one.is_worker else _PRODUCER
        self._at: dict[int, tuple[int, int]] = {}  # id of a slice, or of an execution: track and time

    def events(self) -> list[_Event]:
        """See `events_of`."""
        self._draw_lanes()
        self._draw_producers()
        self._draw_queues()
        self._draw_levels()
        self._draw_flows()
        for when_ns, peer, what in self._story.marks:
            if peer in self._pids:
                self._add("i", what, when_ns, self._pids[peer], 0, s="p", cat="peer")
        for pid, group in self._groups.items():
            self._name("process_name", pid, 0, name=group.name)
            self._name("process_sort_index", pid, 0, sort_index=group.sort)
        self._events.sort(key=lambda event: event["ts"])
        return self._names + self._events

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
                for row, one in rows:
                    self._slice(one.start_ns, one.end_ns, pid, tid + row, one.name, kind, one.args)
                    self._at[id(one)] = (tid + row, one.start_ns)
                count = 1 + max((row for row, _ in rows), default=-1)
                for row in range(count):
                    self._track(pid, tid + row, kind)
                tid += count

    def _draw_queues(self) -> None:
        for number, one in enumerate(self._story.queued):
            name = f"queue {self._story.models[one.model][0]}"
            for kind, when_ns, args in (("b", one.start_ns, one.args), ("e", one.end_ns, {})):
                self._add(kind, name, when_ns, self._story.pid, 0, cat="queue", id=hex(number), args=args)

    def _draw_levels(self) -> None:
        pid = self._story.pid
        for when_ns, model, free, queued in self._story.levels:
            name = self._story.models[model][0]
            self._add("C", f"queued items {name}", when_ns, pid, 0, args={"items": queued})
            self._add("C", f"free slots {name}", when_ns, pid, 0, args={"slots": free})

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

    def _track(self, pid: int, tid: int, name: str) -> None:
        self._name("thread_name", pid, tid, name=name)
        self._name("thread_sort_index", pid, tid, sort_index=tid)

    def _name(self, what: str, pid: int, tid: int, **args: object) -> None:
        self._names.append({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args})


def _name(one: Present) -> str:
    if not one.is_worker:
        return f"producer {one.pid or f'of peer {one.peer}'}"
    place = "" if one.gpu is None else f" on GPU {one.gpu}"
    device = f": {one.device}" if one.device else ""
    return f"worker {one.pid}{place}{device}"
