"""One figure out of TensorRT's phases, and what a version tells of them."""

from __future__ import annotations

import pytest

from tests.workers.build_rig import Make, major
from trtpool.workers.build_progress import Phases


@pytest.fixture
def phases():
    seen: list[tuple[str, int]] = []
    made = Phases(lambda line: seen.append((line.progress.phase, line.progress.done)))
    return made, seen


def test_a_phase_inside_a_step_takes_half_of_what_is_left_of_it(phases):
    made, seen = phases
    made.start("all", None, 2)
    made.start("first", "all", 4)
    made.step("first", 1)
    made.finish("first")
    made.start("second", "all", 1)
    made.step("second", 0)
    made.finish("second")
    made.step("all", 0)
    made.step("all", 1)
    assert seen == [
        ("all", 0), ("first", 0), ("first", 125), ("all", 250), ("second", 250), ("second", 375), ("all", 500),
        ("all", 1000),
    ]  # fmt: skip


def test_odd_reports_do_no_harm(phases):
    made, seen = phases
    made.step("unknown", 3)
    made.finish("unknown")
    made.start("empty", None, 0)
    made.step("empty", 5)
    made.start("orphan", "unknown", 2)
    made.finish("orphan")
    assert [done for _, done in seen] == [0, 1000, 1000]


def test_progress_where_the_version_tells(trt, make_plan: Make):
    progress = make_plan().progress
    if major(trt) < 10:
        assert progress == []
        return
    done = [step.done for step in progress]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 1000)
    assert {step.phase for step in progress} >= {"Building engine", "Optimizing graph", "Computing profile costs"}
