"""Traces of real pools: sound whatever ends meanwhile, and one at a time."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import trtpool
from tests.models import save
from tests.system.rig import (
    CLI,
    NEGATE,
    Process,
    StartedPool,
    answer,
    hold,
    producer,
    submit,
    wait_all_free,
    wait_until,
    watching,
)
from tests.trace_check import Checked, check
from trtpool.broker.tracing.asking import Recording

STREAM = """
    wait("connected")
    def write(item, inputs):
        inputs["x"][...] = item
    for item, result in pool.map(write, range(200), window=8, model="negate"):
        assert result.outputs["y"][0] == -item
    print("done", flush=True)
    wait("left")
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedPool]:
    """Two workers; tests may end what they like but the pool, which starts it again."""
    folder = tmp_path_factory.mktemp("traced")
    model = save(NEGATE, folder, "negate")
    with StartedPool(model, run_dir=folder / "run", workers=2, threads=1, slots=32, max_batch=4) as pool:
        yield pool
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


@pytest.fixture
def traced(shared: StartedPool) -> Iterator[StartedPool]:
    """The shared pool; nothing of a trace is left in it."""
    yield shared
    shared.check_at_rest()


def begun(pool: StartedPool, output: Path, *options: str) -> Process:
    """The command, when what happens is written down."""
    command = Process(*CLI, "trace", f"--run-dir={pool.run_dir}", f"--output={output}", "--seconds=1000", *options)
    command.wait_for_line("recording", 2)
    return command


def interrupted(command: Process, output: Path) -> Checked:
    """What is written at Ctrl-C."""
    with command:
        command.kill(signal.SIGINT)
        out, err = command.rest(1), command.rest(2)
        assert (command.wait(), err) == (0, "")
        assert f"{output}: " in out
    return check(output)


def test_producers_workers_and_queues_of_a_pool_at_work(traced: StartedPool, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    with producer(traced, STREAM) as one, producer(traced, STREAM, transport="zmq") as two:
        for process in (one, two):
            process.wait_for_line("connected")
        command = begun(traced, output)
        for process in (one, two):
            process.say()
        for process in (one, two):
            process.wait_for_line("left")
        checked = interrupted(command, output)
        for process in (one, two):
            process.say()
            process.succeed()
    names = checked.processes()
    assert {one.pid, two.pid, traced.broker, *traced.pids("trtpool.workers")} <= names.keys()
    for pid in (one.pid, two.pid):
        fills = [event for event in checked.slices("fill") if event["pid"] == pid and "work" in event["args"]]
        reads = [event for event in checked.slices("read") if event["pid"] == pid]
        assert sum(event["args"]["items"] for event in fills) == 200
        assert sum(event["args"]["slots"] for event in reads) == 200
        assert {"lease", "fill", "read"} == set(checked.tracks(pid))
        assert {event["args"]["work"] for event in fills} == {event["args"]["work"] for event in reads}
    batches = checked.slices("device")
    assert {event["name"] for event in batches} <= {"compute", "copy in", "copy out"}
    assert sum(event["args"]["items"] for event in batches if event["name"] == "compute") == 400
    assert sum(event["args"]["slots"] for event in checked.of("b")) == 400
    assert len(checked.of("s")) == len(checked.of("f")) == len(checked.slices("read"))
    assert {event["name"] for event in checked.of("s")} == {
        event["args"]["work"] for event in checked.slices("read")
    }, "arrows are named as logs name work"
    counters = {event["name"]: event["args"] for event in checked.of("C")}
    assert counters.keys() == {"queued items negate", "free slots negate"}
    assert counters["queued items negate"] == {"items": 0}
    assert checked.other["dropped_events"] == 0
    assert checked.other["ended"] == "as asked"


def test_workers_and_producers_that_die_meanwhile(traced: StartedPool, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    with producer(traced, 'slot = pool.lease()\nprint("holds", flush=True)\nwait("x")') as doomed:
        command = begun(traced, output)
        doomed.wait_for_line("holds")
        workers = traced.pids("trtpool.workers")
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        with traced.connect() as client:
            held = hold(client, [1, 2, 3, 4])
            with watching([*workers, doomed.pid]) as wait:
                for pid in (*workers, doomed.pid):
                    os.kill(pid, signal.SIGKILL)
                wait()
            assert [answer(work) for work in held] == [-1, -2, -3, -4]
            wait_all_free(client)
        checked = interrupted(command, output)
    assert {event["pid"] for event in checked.named("lost")} <= set(workers)
    assert checked.named("lost")
    assert [event["pid"] for event in checked.named("holds slots")] == [doomed.pid]
    left = {event["pid"] for event in checked.of("i") if event["name"].startswith("left")}
    assert {*workers, doomed.pid} <= left
    assert len(checked.of("f")) == 4
    assert {event["args"]["attempt"] for event in checked.of("b")} == {0, 1}


def test_a_second_trace_is_told_that_there_is_one(traced: StartedPool, tmp_path: Path) -> None:
    with Recording(traced.run_dir, tmp_path / "first.json") as first:
        with Process(*CLI, "trace", f"--run-dir={traced.run_dir}", "-o", tmp_path / "second.json") as command:
            assert command.wait() == trtpool.PoolBusy.exit_code
            said = command.rest(2)
        assert said == "trtpool: another trace of this pool is under way; wait until it has ended, or end it\n"
        with traced.connect() as client:
            assert answer(submit(client, 1)) == -1
    assert first.trace.ended == ""
    assert not (tmp_path / "second.json").exists()
    assert len(check(first.trace.path).of("f")) == 1
    with Recording(traced.run_dir, tmp_path / "third.json") as third:
        pass
    assert check(third.trace.path).slices("device") == []
    assert third.stop() is third.trace


def test_whoever_records_may_be_killed(traced: StartedPool, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    with begun(traced, output) as command:
        command.kill()
        command.wait()
    recording = wait_until(lambda: _try_record(traced, output), "the next trace begins")
    recording.stop()
    assert list(tmp_path.glob("*.json*")) == [output]


def _try_record(pool: StartedPool, output: Path) -> Recording | None:
    with contextlib.suppress(trtpool.PoolBusy):
        return Recording(pool.run_dir, output)
    return None


def test_a_broker_that_dies_ends_a_trace_and_leaves_what_it_wrote(traced: StartedPool, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    with begun(traced, output) as command:
        with traced.connect() as client:
            assert answer(submit(client, 1)) == -1
            broker = traced.broker
            os.kill(broker, signal.SIGKILL)
            out, err = command.rest(1), command.rest(2)
            assert command.wait() == 0
            assert "the trace ended early: the pool's broker ended and another took over" in err
            assert f"{output}: " in out
            assert answer(submit(client, 2)) == -2
        checked = check(output)
        assert len(checked.of("f")) == 1
        assert "took over" in checked.other["ended"]
        assert checked.processes()[broker].startswith("pool ")
        recording = wait_until(lambda: _try_record(traced, output), "the next broker records")
        assert recording.stop().ended == ""
        assert traced.broker in check(output).processes()


def test_a_pool_that_ends_ends_a_trace(negate: Path, run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    with StartedPool(negate, run_dir=run_dir, threads=1) as pool, begun(pool, output) as command:
        pool.stop()
        err = command.rest(2)
        assert command.wait() == 0
    assert "the trace ended early: the pool ended" in err
    assert check(output).other["ended"] == "the pool ended"


def test_a_full_buffer_says_how_much_was_dropped(traced: StartedPool, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    with (
        traced.connect() as client,
        traced.connect() as other,
        traced.connect() as third,
        begun(traced, output, "--buffer-mib=1") as command,
    ):
        with other.lease_many(24), third.lease_many(8):
            for _ in range(5000):  # each has an error's text in it
                with pytest.raises(trtpool.PoolBusy):
                    client.lease(timeout_s=0)
        command.kill(signal.SIGINT)
        err = command.rest(2)
        assert command.wait() == 0
    assert "events were dropped" in err
    assert check(output).other["dropped_events"] > 0


def test_errors_say_what_to_do(traced: StartedPool, tmp_path: Path) -> None:
    cases: list[tuple[tuple[str, ...], type[trtpool.TrtpoolError], str]] = [
        ((f"--run-dir={tmp_path}/none",), trtpool.PoolNotFound, "trtpool start"),
        ((f"--run-dir={traced.run_dir}", f"--output={tmp_path}"), trtpool.ConfigError, "is a directory"),
        ((f"--run-dir={traced.run_dir}", f"--output={tmp_path}/no/t.json"), trtpool.ConfigError, "can be written in"),
    ]
    for options, kind, words in cases:
        with Process(*CLI, "trace", *options) as command:
            assert command.wait() == kind.exit_code
            assert words in command.rest(2)


def test_an_embedded_pool_records_a_block(negate: Path, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    with trtpool.Pool(negate, threads=1) as pool:
        with pool.trace(output) as recording:
            assert pool.infer({"x": np.ones((3, 4), np.float32)})["y"].shape == (3, 4)
        assert recording.trace.path == output
        with pytest.raises(ZeroDivisionError), pool.trace(tmp_path / "other.json"):
            raise ZeroDivisionError
        assert check(tmp_path / "other.json").other["ended"] == "as asked"
    assert check(output).processes()[os.getpid()] == f"producer {os.getpid()}"
    with pytest.raises(trtpool.PoolClosed):
        pool.trace(output)
