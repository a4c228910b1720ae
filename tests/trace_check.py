"""Whether a file is a sound Chrome trace: what `trtpool trace` writes must be, whatever happened meanwhile."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

Event = dict[str, Any]

KINDS = set("XbesftCiM")
SLACK_NS = 1
"""Times are floats of microseconds."""


@dataclass
class Checked:
    """A trace that is sound."""

    events: list[Event]
    other: dict[str, Any]

    def named(self, part: str) -> list[Event]:
        """Slices whose names have a part."""
        return [event for event in self.events if event["ph"] == "X" and part in event["name"]]

    def slices(self, cat: str) -> list[Event]:
        return [event for event in self.events if event["ph"] == "X" and event["cat"] == cat]

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["ph"] == kind]

    def processes(self) -> dict[int, str]:
        return {event["pid"]: event["args"]["name"] for event in self.of("M") if event["name"] == "process_name"}

    def tracks(self, pid: int) -> list[str]:
        """Names of the tracks of a process, in the order of their numbers."""
        found = [event for event in self.of("M") if event["name"] == "thread_name" and event["pid"] == pid]
        return [event["args"]["name"] for event in sorted(found, key=lambda event: event["tid"])]


def _ns(event: Event) -> int:
    ns: int = round(event["ts"] * 1000)
    return ns


def _end_ns(event: Event) -> int:
    ns: int = round((event["ts"] + event["dur"]) * 1000)
    return ns


def check(path: Path) -> Checked:
    """Read a trace and assert that it is sound."""
    whole = json.loads(path.read_bytes())
    events: list[Event] = whole["traceEvents"]
    other: dict[str, Any] = whole["otherData"]
    assert {event["ph"] for event in events} <= KINDS
    timed = [event for event in events if event["ph"] != "M"]
    for event in timed:
        end_ns = _end_ns(event) if event["ph"] == "X" else _ns(event)
        assert other["start_ns"] - SLACK_NS <= _ns(event) <= end_ns <= other["end_ns"] + SLACK_NS, event
    tracks = _check_tracks(events)
    _check_pairs(events)
    _check_flows(events, tracks)
    return Checked(sorted(events, key=lambda event: event.get("ts", 0)), other)


def _check_tracks(events: list[Event]) -> dict[tuple[int, int], list[Event]]:
    """No slice overlaps another on its track, and each track and process has a name."""
    named = {(event["name"], event["pid"], event["tid"]) for event in events if event["ph"] == "M"}
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] != "M":
            assert ("process_name", event["pid"], 0) in named, event
        if event["ph"] == "X":
            assert ("thread_name", event["pid"], event["tid"]) in named, event
            tracks[event["pid"], event["tid"]].append(event)
    for track in tracks.values():
        track.sort(key=lambda event: (_ns(event), _end_ns(event)))
        for one, following in pairwise(track):
            assert _end_ns(one) <= _ns(following) + SLACK_NS, f"{one} overlaps {following}"
    return tracks


def _check_pairs(events: list[Event]) -> None:
    """Each begin has one end, which is not before it."""
    begun: dict[object, Event] = {}
    for event in (one for kind in "be" for one in events if one["ph"] == kind):
        key = (event["cat"], event["id"], event["pid"], event["name"])
        if event["ph"] == "b":
            assert key not in begun, event
            begun[key] = event
        else:
            assert _ns(begun.pop(key)) <= _ns(event), event
    assert not begun, "these have no end"


def _check_flows(events: list[Event], tracks: dict[tuple[int, int], list[Event]]) -> None:
    """Each arrow has two ends, in order, and each point of it is on a slice."""
    flows = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            flows[event["id"]].append(event)
            track = tracks[event["pid"], event["tid"]]
            at = bisect_right(track, _ns(event) + SLACK_NS, key=_ns) - 1
            assert at >= 0, event
            assert any(_end_ns(one) + SLACK_NS >= _ns(event) for one in track[max(0, at - 2) : at + 1]), event
    for flow in flows.values():
        kinds = "".join(event["ph"] for event in sorted(flow, key=lambda event: ("stf".index(event["ph"]), _ns(event))))
        assert kinds in ("sf", "stf"), flow
        times = [_ns(next(event for event in flow if event["ph"] == kind)) for kind in kinds]
        assert times == sorted(times), flow
        assert len({event["name"] for event in flow}) == 1, "all points of it name one work"
