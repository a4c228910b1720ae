"""`scripts/bench_broker.py`: its fakes keep the real loop busy, and what it counts is what went to and fro."""

from __future__ import annotations

import io
import json
import pstats
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from scripts.benchlib import broker_cost
from scripts.benchlib.broker_cli import CASES, main, short
from scripts.benchlib.broker_cost import Timer, drive, measure
from scripts.benchlib.broker_rig import Case, Rig, core_of, turn

from trtpool.broker.invariants import validate

pytestmark = pytest.mark.system  # no process, but memfds and pidfds

SINGLE = Case("single", "one at a time", 1, 1, 1, lanes=1)
RUNS = Case("runs", "runs of 4", 3, 2, 4, max_batch=16)


def test_one_item_at_a_time_is_two_turns_and_a_frame_each_way_with_each_peer():
    """Client: Submit and Release, Done and Grant; worker: Run, Finished."""
    cost = measure(SINGLE, 100)
    assert (cost.traffic.items, cost.turns) == (100, 200)
    assert (cost.traffic.messages_in, cost.traffic.messages_out) == (300, 300)
    assert (cost.traffic.frames_in, cost.traffic.frames_out) == (200, 200)
    assert (cost.traffic.batches, cost.traffic.runs) == (100, 100)
    assert cost.cpu_ns > 0
    assert cost.system_calls >= 4, "each frame is received or sent by one"
    assert cost.calls["python"] > cost.system_calls


def test_a_run_costs_as_many_messages_as_a_slot():
    figures = measure(RUNS, 960).figures()
    assert figures["messages_in_per_item"] == pytest.approx(2 / 4 + 1 / 16, rel=0.3)
    assert figures["ns_per_slot"] == figures["ns_per_item"]
    assert figures["items_per_batch"] <= 16


def test_slots_of_many_items_are_counted_in_items():
    cost = measure(Case("many", "16 items a slot", 2, 2, 1, items_per_slot=16, max_batch=32), 640)
    assert cost.traffic.items >= 640
    assert cost.slots == cost.traffic.items / 16
    assert cost.figures()["ns_per_slot"] == pytest.approx(16 * cost.figures()["ns_per_item"])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_standard_case_goes_on_and_ends_well(case):
    with Rig(case) as rig:
        drive(rig, turn, 4 * case.producers * case.window * case.run * case.items_per_slot)
        core = core_of(rig.loop)
        validate(core)
        assert core.violations == 0
        assert rig.traffic.batches >= 4


def test_fakes_that_stand_still_are_told_of():
    with Rig(SINGLE) as rig:
        rig._clients[0].stopped = True
        with pytest.raises(RuntimeError, match="all stand still"):
            drive(rig, turn, 10)


def test_the_clock_costs_a_turn_nothing(monkeypatch: pytest.MonkeyPatch):
    """Its own cost is taken off; a turn that took no longer took nothing."""
    ticks = iter([0, 100, 1000, 1100, 2000, 2150])
    monkeypatch.setattr(broker_cost, "clock_ns", lambda: 100)
    timer = Timer()
    with Rig(SINGLE) as rig, monkeypatch.context() as patch:
        patch.setattr(broker_cost, "turn", lambda _: None)
        patch.setattr(time, "process_time_ns", lambda: next(ticks))
        for _ in range(3):
            timer(rig.loop)
    assert (timer.turns, timer.cpu_ns) == (3, 50)


# --- Command line ---------------------------------------------------------------------------------


def test_all_goes_to_the_table_the_profile_and_the_json(tmp_path: Path):
    profile, kept = tmp_path / "turns.prof", tmp_path / "kept.json"
    arguments = ["--only", "single,runs16", "--items", "200", "--profile", str(profile), "--json", str(kept)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "single: 1 producer" in result.output
    assert "_end_turn" in result.output, "the profile's top is printed"
    text = io.StringIO()
    pstats.Stats(str(profile), stream=text).print_stats("core.py")
    assert "handle" in text.getvalue() or "receive" in text.getvalue()
    content = json.loads(kept.read_text())
    assert [case["case"] for case in content["cases"]] == ["single", "runs16"]
    assert content["profiled"] is True
    assert content["cases"][0]["figures"]["turns_per_item"] == 2


def test_a_case_can_be_described_by_options():
    arguments = ["--producers", "2", "--run", "2", "--items", "64", "--max-batch", "8"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "given" in result.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "nonsense"], "there are single, runs1"),
        (["--only", "single", "--run", "2"], "--only names standard cases"),
        (["--items-per-slot", "512"], "at least --items-per-slot, 512"),
        (["--json", "/nowhere/at/all.json"], "/nowhere/at is not a directory"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(arguments: list[str], says: str):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize(("value", "text"), [(0.000123456, "0.000123"), (12.345, "12.3"), (123_456.7, "123,457")])
def test_numbers_are_short(value: float, text: str):
    assert short(value) == text
