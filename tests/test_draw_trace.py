"""Pictures of traces, and the two pipelines that docs/tracing.md shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from scripts import draw_trace

from tests.trace_check import check

SCRIPTS = Path(draw_trace.__file__).resolve().parent


def named(kind: str, pid: int, tid: int, **args: object) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def done(pid: int, tid: int, begin_ms: float, ms: float, name: str, cat: str) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "pid": pid, "tid": tid, "ts": 1000 * begin_ms, "dur": 1000 * ms}


TRACE: dict[str, Any] = {
    "otherData": {"start_ns": 10_000_000, "end_ns": 110_000_000},
    "traceEvents": [
        *(named("process_name", pid, 0, name=name) for pid, name in ((3, "producer 3"), (7, "worker 7: cpu"))),
        *(named("process_sort_index", pid, 0, sort_index=index) for pid, index in ((3, 2), (7, 1))),
        named("thread_name", 7, 1, name="lane 0"),
        *(named("thread_name", 3, tid, name="fill") for tid in (1, 2, 3)),
        named("thread_name", 3, 4, name="read"),
        {"ph": "C", "name": "queued items m", "ts": 10_000, "pid": 1, "args": {"items": 2}},
        done(7, 1, 20, 10, "compute", "device"),
        done(7, 1, 30, 60, "copy out", "device"),
        *(done(3, tid, 15, 4, "fill 1.1", "fill") for tid in (1, 2, 3)),
    ],
}


def test_a_picture_has_a_part_of_the_time_and_of_the_tracks() -> None:
    picture = draw_trace.picture_of(TRACE, from_ms=15, ms=20, title="t", most=2)
    assert [(row.name, row.slices) for row in picture.rows] == [
        ("worker 7  lane 0", [(0, 5, "compute"), (5, 15, "copy out")]),
    ]
    assert picture.levels == {"m": ([-15], [2])}
    names = [row.name for row in draw_trace.picture_of(TRACE, most=2).rows]
    assert names == ["worker 7  lane 0", "producer 3  fill", "producer 3  fill"]
    assert draw_trace.picture_of(TRACE).ms == 100


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_it_is_drawn(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    trace, picture = tmp_path / "trace.json", tmp_path / f"picture.{suffix}"
    trace.write_text(json.dumps(TRACE))
    result = CliRunner().invoke(draw_trace.main, [str(trace), str(picture), "--title", "what is drawn"])
    assert (result.exit_code, result.output) == (0, "")
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [("{}", [], "no trace"), ("text", [], "no trace"), (json.dumps(TRACE), ["--from-ms=100"], "ends before 100 ms")],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, text: str, options: list[str], words: str) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "picture.svg"
    trace.write_text(text)
    result = CliRunner().invoke(draw_trace.main, [str(trace), str(picture), *options])
    assert result.exit_code == 1
    assert words in result.output
    assert not picture.exists()


def test_the_pipelines_of_the_docs(tmp_path: Path) -> None:
    for needed in ("matplotlib", "onnx", "onnxruntime"):
        pytest.importorskip(needed)
    command = [sys.executable, str(SCRIPTS / "trace_pipelines.py"), str(tmp_path), "--seconds=0.4"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout
    assert [line.partition(":")[0] for line in out.splitlines()] == ["bad", "good"]
    producers = {}
    for name in ("bad", "good"):
        assert (tmp_path / f"trace-{name}.png").exists()
        checked = check(tmp_path / f"{name}.json")
        producers[name] = len({event["pid"] for event in checked.slices("fill")})
        assert checked.of("f")
        if name == "bad":
            assert {event["args"]["items"] for event in checked.slices("device")} == {1}
    assert producers == {"bad": 1, "good": 4}
