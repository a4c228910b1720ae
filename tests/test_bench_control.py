"""`scripts/bench_control.py`: what is counted of a whole pool's processes, and how perf and py-spy are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from array import array
from pathlib import Path

import pytest
from click.testing import CliRunner
from scripts.benchlib.control import CASES, EVENTS, WHO, Perf, shares, wake_ups
from scripts.benchlib.control_cli import main
from scripts.benchlib.sweep import PLANS
from scripts.benchlib.sweep_run import phases_us, timed_p50_us

from trtpool.ipc.timings import PHASES

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_control.py"


def test_wake_ups_are_those_of_all_threads_of_a_process():
    before = wake_ups({"here": [os.getpid()]})["here"]
    wake, woken = threading.Event(), threading.Event()

    def sleep() -> None:
        wake.wait()
        woken.set()

    thread = threading.Thread(target=sleep)
    thread.start()
    wake.set()
    woken.wait()
    for _ in range(20):  # a pipe that is empty is slept on
        reader, writer = os.pipe()
        other = threading.Timer(0.001, os.write, (writer, b"x"))
        other.start()
        os.read(reader, 1)
        other.join()
        os.close(reader)
        os.close(writer)
    thread.join()
    assert wake_ups({"here": [os.getpid()]})["here"] >= before + 20
    assert wake_ups({"gone": [2**22 + 1]}) == {"gone": 0}


def test_what_perf_counted_is_told_for_each_item():
    perf = Perf()
    perf.take(
        "broker",
        "640,,raw_syscalls:sys_enter,2000,100.00,,\n100,,syscalls:sys_enter_sendto,2000,100.00,,\n"
        "30,,syscalls:sys_enter_poll,2000,100.00,,\n20,,syscalls:sys_enter_epoll_wait,2000,100.00,,\n"
        "<not counted>,,syscalls:sys_enter_futex,0,0.00,,\n",
    )
    assert perf.counts("broker", 100) == {"system calls": 6.4, "sends": 1.0, "polls": 0.5}
    assert perf.counts("worker", 100) == {}
    assert perf.failure == ""


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Error:\nNo permission to enable raw_syscalls:sys_enter event.\n", "No permission to enable"),
        ("", "perf said nothing"),
    ],
)
def test_a_perf_that_may_not_count_says_why(said, reason):
    perf = Perf()
    perf.take("broker", said)
    assert reason in perf.failure
    assert perf.counts("broker", 1) == {}


def test_samples_count_for_the_innermost_function():
    stacks = (
        "main (app.py:3);turn (/x/loop.py:9);read (/x/loop.py:20) 6\n"
        "main (app.py:3);turn (/x/loop.py:9) 1\nmain (app.py:3);turn (/x/loop.py:11) 2\n<module> 1\n"
    )
    assert shares(stacks) == [("loop.py read", 0.6), ("loop.py turn", 0.3), ("<module>", 0.1)]
    assert shares("") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "runs16,runs17"], "no case runs17; there are single, runs1, runs16, runs16 x 16, runs64, items64"),
        (["--gpu", "0"], "--gpu and --engines go together"),
        (["--json", "/nowhere/x.json"], "/nowhere is not a directory"),
    ],
)
def test_bad_options_are_refused(arguments, words):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert words in result.output


def run(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """The script, where neither perf nor py-spy is on the path."""
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, env={**os.environ, "PATH": str(path)}, capture_output=True, text=True, check=False, timeout=100
    )


@pytest.mark.system
def test_each_kind_of_process_of_a_pool_is_counted(tmp_path):
    """Without perf, which few may use, system calls are left out, and the report says so."""
    path = tmp_path / "out.json"
    ended = run("--only", "single,runs16", "--window-s", "0.3", "--json", str(path), path=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "system calls were not counted: perf is not installed" in ended.stdout
    cases = json.loads(path.read_text())["cases"]
    assert set(cases) == {"single", "runs16"}
    for name, costs in cases.items():
        assert set(costs["cpu_us"]) == set(WHO)
        assert costs["items"] > 0
        assert costs["items_per_s"] > 0
        assert 0 < costs["p50_us"] <= costs["p99_us"]
        assert set(costs["phases_us"]) == set(PHASES)
        assert costs["phases_us"]["compute"] > 0
        assert (costs["items_per_batch"] == 1) == (name == "single")
        assert all(costs["counts"][who]["wake-ups"] > 0 for who in WHO)
        assert costs["counts"]["broker"]["wake-ups"] < 8, "of an item, at its worst"
    single = cases["single"]
    latency = sum(took for phase, took in single["phases_us"].items() if phase not in ("lease", "fill"))
    assert latency < 2 * single["timed_p50_us"], "medians of the same runs"
    assert latency < 10 * single["p50_us"], "medians, in another window"


@pytest.mark.system
def test_without_py_spy_the_command_says_how_to_get_it(tmp_path):
    ended = run("--only", "single", "--window-s", "0.3", "--py-spy", path=tmp_path)
    assert ended.returncode == 1
    assert "py-spy is not installed: pip install py-spy" in ended.stderr


def test_phases_are_medians_over_all_producers():
    reports = [array("q", [1000 * number] * len(PHASES)) for number in (1, 9)] + [array("q"), array("q", range(8))]
    assert phases_us(reports) == dict.fromkeys(PHASES, 1.0)


def test_the_latency_of_timed_runs_is_from_their_submission_and_the_median_over_all_producers():
    runs = [[900_000, 900_000, *[1000 * number] * (len(PHASES) - 2)] for number in (1, 2, 9)]
    reports = [array("q", runs[2] + runs[0]), array("q"), array("q", runs[1])]
    assert timed_p50_us(reports) == 2.0 * (len(PHASES) - 2)


def test_on_a_gpu_no_case_wants_larger_batches_than_the_plan_takes():
    for case in CASES.values():
        assert case.point.for_plan().max_batch == PLANS[1024][1] <= case.point.max_batch


def test_each_event_is_shown_and_each_case_described():
    assert {"system calls", "sends", "receives", "polls", "futex"} == set(EVENTS.values())
    assert all(case.title for case in CASES.values())
