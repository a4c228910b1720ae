"""`trtpool start`, `status` and `stop` as their users meet them: exit codes, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import trtpool
from tests.models import FIXED_BATCH_ONE, OPEN_ITEM, save
from tests.system.conftest import GPUS
from tests.system.rig import CLI, Process, StartedPool, command_of, family, wait_until
from tests.workers import fake_bindings as fake

# 8 MiB an item.
LARGE = "large (float[N,1024,1024] x) => (float[N,1024,1024] y) { y = Neg(x) }"


def cli(*arguments: str | os.PathLike[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *arguments], check=False, capture_output=True, text=True, env={**os.environ, **env}, timeout=100
    )


def refused(code: int, *arguments: str | os.PathLike[str], **env: str) -> str:
    """Run a command that must fail with `code` and one line, and return that line."""
    result = cli(*arguments, **env)
    assert (result.returncode, result.stdout) == (code, ""), result
    (line,) = result.stderr.splitlines()
    assert line.startswith("trtpool: ")
    return line


# --- A good life ---------------------------------------------------------------------------------


def test_a_pool_starts_says_what_it_has_and_stops(negate, run_dir):
    at = f"--run-dir={run_dir}"
    with StartedPool(negate, run_dir=run_dir, slots=32) as pool:
        first, ready = pool.announced.splitlines()
        assert first == "model negate: x float32 (N, 4) -> y float32 (N, 4); 32 slots of 32 B, batches of up to 8"
        assert ready == f"ready: pool 'default' with 1 worker on the CPU, arena 8.0 KiB, in {run_dir}"
        assert {entry.name for entry in run_dir.iterdir()} == {"lifeline", "lock", "requests", "zmq-1"}
        assert not run_dir.stat().st_mode & 0o077

        assert cli("status", at).stdout.startswith("pool default: serving")
        report = json.loads(cli("status", at, "--json").stdout)
        assert (report["violations"], report["models"][0]["free"]) == (0, 32)
        assert [worker["pid"] for worker in report["workers"]] == [pool.worker]

        with trtpool.connect(run_dir=run_dir) as client:
            assert client.infer(x=np.ones(4, np.float32))["y"].tolist() == [-1, -1, -1, -1]
        line = refused(7, "start", negate, at)
        assert f"(pid {pool.pid})" in line
        assert "--name" in line

        stopped = cli("stop", at)
        assert (stopped.returncode, stopped.stdout) == (0, f"the pool in {run_dir} has ended\n")
        assert pool.succeed() == ""
    assert not run_dir.exists()
    assert "no pool runs in" in refused(11, "stop", at)
    assert "trtpool start" in refused(11, "status", at)


def test_a_pool_is_found_by_its_name(negate, tmp_path):
    home = tmp_path / "trtpool"  # in $XDG_RUNTIME_DIR, see conftest.py
    with StartedPool(f"det={negate}", run_dir=home / "ocr", name="ocr", slots=8, max_batch=2, workers=2) as pool:
        assert "pool 'ocr' with 2 workers" in pool.announced
        with trtpool.connect("ocr") as client:
            assert client.name == "ocr"
            assert [model.spec.name for model in client.models] == ["det"]
            assert len(client.status().workers) == 2
        assert "in ocr" not in refused(11, "status")
        # The variable counts before the name, and an option before both.
        assert json.loads(cli("status", "--json", TRTPOOL_RUN_DIR=str(home / "ocr")).stdout)["name"] == "ocr"
        assert cli("stop", "--name=ocr").stdout == "pool 'ocr' has ended\n"
        pool.succeed()
    assert not (home / "ocr").exists()


# --- What is refused -----------------------------------------------------------------------------


class Wrong(NamedTuple):
    """A start that cannot be: its exit code, what to give it in a directory, and what its line must say."""

    code: int
    make: Callable[[Path], list[str]]
    words: str


def _file(folder: Path, content: bytes, name: str = "some.onnx") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def _model(folder: Path, *options: str, text: str = FIXED_BATCH_ONE) -> list[str]:
    return [str(save(text, folder)), *options]


def _at(folder: Path, make: Callable[[Path], object]) -> list[str]:
    """A good model and a run directory that `make` has been at."""
    make(folder / "there")
    return _model(folder, f"--run-dir={folder / 'there'}")


WRONG = {
    "no such file": Wrong(4, lambda d: [str(d / "none.onnx")], "there is no file"),
    "not a model": Wrong(4, lambda d: [_file(d, b"hello")], "the file is damaged or no ONNX model"),
    "empty file": Wrong(4, lambda d: [_file(d, b"")], "is empty; export or copy the model again"),
    "directory": Wrong(4, lambda d: [str(d)], "name the .onnx file itself"),
    "open shape": Wrong(4, lambda d: _model(d, text=OPEN_ITEM), "--shape x=3x640x640"),
    "shape that does not fit": Wrong(4, lambda d: _model(d, "--shape=x=4x5x6", text=OPEN_ITEM), "does not fit it"),
    "shape of no input": Wrong(4, lambda d: _model(d, "--shape=z=4"), "the inputs of model.onnx are: x"),
    "shape of no model": Wrong(3, lambda d: _model(d, "--shape=z:x=4"), "no model is called 'z'; there are model"),
    "shape nonsense": Wrong(2, lambda d: _model(d, "--shape=x=3xa"), "is not NAME=3x640x640"),
    "shape of nothing": Wrong(2, lambda d: _model(d, "--shape=x=3x0"), "is not NAME=3x640x640"),
    "too large": Wrong(5, lambda d: _model(d, "--slots=16777216", text=LARGE), "lower --slots"),
    "open run directory": Wrong(6, lambda d: _at(d, lambda p: p.mkdir(mode=0o755)), "run: chmod 700"),
    "linked run directory": Wrong(6, lambda d: _at(d, lambda p: p.symlink_to(d)), "name the directory itself"),
    "run directory is a file": Wrong(6, lambda d: _at(d, lambda p: p.write_text("")), "choose another with --run-dir"),
    "nowhere to be": Wrong(6, lambda d: _model(d, f"--run-dir={d}/no/where"), "No such file or directory; choose"),
    "path too long": Wrong(6, lambda d: _model(d, f"--run-dir={d}/{'x' * 90}"), "choose a shorter one with --run-dir"),
    "bad name": Wrong(3, lambda d: _model(d, "--name=../up"), "name"),
    "batch below slot": Wrong(
        3, lambda d: _model(d, "--max-batch=2", "--items-per-slot=4"), "raise the first or lower"
    ),
    "batch above model": Wrong(3, lambda d: _model(d, "--max-batch=4"), "takes batches of at most 1"),
    "slot above model": Wrong(3, lambda d: _model(d, "--items-per-slot=2"), "takes batches of at most 1"),
    "plan without a GPU": Wrong(3, lambda d: [_file(d, b"ftrt", "det.plan")], "det.plan is a TensorRT plan, which"),
    "disguised plan": Wrong(3, lambda d: [_file(d, b"vtrt")], "some.onnx is a TensorRT plan, which needs a GPU"),
    "workers and GPUs": Wrong(3, lambda d: _model(d, "--gpus=0", "--workers=2"), "--workers-per-gpu"),
    "GPU without which": Wrong(3, lambda d: _model(d, "--device=gpu"), "name the GPUs to use, such as --gpus 0"),
    "GPU nonsense": Wrong(2, lambda d: _model(d, "--gpus=zero"), "is not a list of different GPUs, such as 0,1"),
    "one GPU twice": Wrong(2, lambda d: _model(d, "--gpus=1,1"), "is not a list of different GPUs"),
    "device": Wrong(8, lambda d: _model(d, "--device=tpu"), "there is no device 'tpu'; use --device cpu"),
    "two of one name": Wrong(3, lambda d: 2 * _model(d), "name them with NAME=FILE"),
    "no file in NAME=": Wrong(3, lambda d: ["det="], "write FILE or NAME=FILE"),
    "no model": Wrong(2, lambda d: [], "see `trtpool start --help`"),
    "no such option": Wrong(2, lambda d: _model(d, "--slot=4"), "see `trtpool start --help`"),
    "no slots": Wrong(2, lambda d: _model(d, "--slots=0"), "0 is not in the range"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_in_one_line_and_leaves_nothing(case, tmp_path, monkeypatch):
    # A pool that has no place of its own goes here.
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    arguments = case.make(tmp_path)
    before = sorted(tmp_path.iterdir())
    line = refused(case.code, "start", *arguments)
    assert case.words in line
    assert sorted(tmp_path.iterdir()) == before
    assert [*place.rglob("*")] in ([], [place / "trtpool"])


def test_without_onnxruntime_it_says_what_to_install(negate, run_dir, tmp_path):
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "onnxruntime.py").write_text("raise ImportError('not here')\n")
    path = os.pathsep.join([str(tmp_path / "without"), os.environ["PYTHONPATH"]])
    line = refused(9, "start", negate, f"--run-dir={run_dir}", PYTHONPATH=path)
    assert "pip install 'trtpool[cpu]'" in line
    assert not run_dir.exists()


def test_a_worker_that_cannot_load_fails_the_start(negate, run_dir, worker_does):
    env = worker_does("raise errors.ModelError('the disk is gone; mend it')")
    result = cli("start", negate, f"--run-dir={run_dir}", "--workers=2", **env)
    assert (result.returncode, result.stdout) == (4, "")  # that of the worker's own error
    *logged, last = result.stderr.splitlines()
    assert logged
    assert all(re.search(r" trtpool worker [12]\[\d+\] ERROR: the disk is gone; mend it$", line) for line in logged)
    assert re.fullmatch("trtpool: worker [12]: the disk is gone; mend it", last)
    assert not run_dir.exists()


def test_a_worker_that_is_killed_while_it_loads_fails_the_start(negate, run_dir, worker_does):
    env = worker_does("os.kill(os.getpid(), 9)")
    line = refused(15, "start", negate, f"--run-dir={run_dir}", **env)
    assert line.startswith("trtpool: worker 1 did not become ready: SIGKILL (killed from outside")
    assert not run_dir.exists()


# --- On GPUs -------------------------------------------------------------------------------------


def test_a_pool_on_gpus_has_workers_that_see_one_each(plan, run_dir, on_gpus):
    options: dict[str, Any] = {"gpus": "3,0", "workers_per_gpu": 2, "lanes": 1}
    with StartedPool(plan, run_dir=run_dir, env=on_gpus(), **options) as pool:
        assert pool.announced.splitlines() == [
            "model negate: x float32 (N, 4) -> y float32 (N, 4); 4096 slots of 32 B, batches of up to 8",
            f"GPU 0: NVIDIA L4 (GPU-{fake.uuid_of(3)}), 2 workers",
            f"GPU 1: NVIDIA H100 80GB HBM3 (GPU-{fake.uuid_of(0)}), 2 workers",
            f"ready: pool 'default' with 4 workers on 2 GPUs, arena 128.0 KiB, in {run_dir}",
        ]
        with pool.connect() as client:
            assert client.infer(x=np.ones(4, np.float32))["y"].tolist() == [-1, -1, -1, -1]

            def workers() -> dict[str, int]:
                return {worker.device: worker.pid for worker in client.status().workers}

            named = {
                "PCI_BUS_ID 3, worker 1 on GPU 0",
                "PCI_BUS_ID 3, worker 2 on GPU 0",
                "PCI_BUS_ID 0, worker 3 on GPU 1",
                "PCI_BUS_ID 0, worker 4 on GPU 1",
            }
            first = workers()
            assert first.keys() == named
            os.kill(first["PCI_BUS_ID 0, worker 3 on GPU 1"], signal.SIGKILL)
            assert "worker 3 on GPU 1 ended: SIGKILL" in pool.line(2)
            # Another comes in its place, on the same GPU.
            wait_until(lambda: workers().keys() == named and workers() != first, "another worker", client.status)
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0
    assert not run_dir.exists()


def test_a_list_of_gpus_from_outside_counts(plan, run_dir, on_gpus):
    env = {**on_gpus(), "CUDA_VISIBLE_DEVICES": "3,0"}
    with StartedPool(plan, run_dir=run_dir, env=env, gpus="0") as pool:
        assert f"\nGPU 0: NVIDIA L4 (GPU-{fake.uuid_of(3)}), 1 worker\n" in pool.announced
        with pool.connect() as client:
            assert [worker.device for worker in client.status().workers] == ["PCI_BUS_ID 3, worker 1 on GPU 0"]
        pool.stop()
    line = refused(8, "start", plan, f"--run-dir={run_dir}", "--gpus=0,2", **env)
    assert line.startswith("trtpool: --gpus 2: CUDA_VISIBLE_DEVICES=3,0 has 2 GPUs, counted from 0; choose among them")


def test_gpus_that_cannot_be_used_are_refused_in_one_line(plan, run_dir, on_gpus):
    at = f"--run-dir={run_dir}"
    env = on_gpus()
    assert "trtpool: --gpus 1: CUDA finds no GPU 1 here" in refused(8, "start", plan, at, "--gpus=0,1", **env)
    same = fake.machine({**GPUS, "GPU-3": GPUS["3"]})
    assert "--gpus 3,GPU-3: both are GPU-" in refused(3, "start", plan, at, "--gpus=3,GPU-3", **{**env, **same})
    bare = fake.machine({}, driver=0, error=35)
    assert "there is no NVIDIA driver here" in refused(8, "start", plan, at, "--gpus=0", **{**env, **bare})
    assert not run_dir.exists()


def test_a_worker_that_cannot_use_its_gpu_fails_the_start(plan, run_dir, on_gpus):
    env = on_gpus(
        load="from trtpool.ipc import errors; raise errors.DeviceUnavailable('its memory is full; free some')"
    )
    result = cli("start", plan, f"--run-dir={run_dir}", "--gpus=3", **env)
    assert (result.returncode, result.stdout) == (8, "")
    logged, last = result.stderr.splitlines()
    assert re.search(r" trtpool worker 1 on GPU 0\[\d+\] ERROR: its memory is full; free some$", logged)
    assert last == "trtpool: worker 1 on GPU 0: its memory is full; free some"
    assert not run_dir.exists()


# --- Races ---------------------------------------------------------------------------------------


def test_of_two_starts_at_once_one_wins(negate, run_dir):
    command = [*CLI, "start", negate, f"--run-dir={run_dir}"]
    with Process(*command) as one, Process(*command) as other:
        wait_until(lambda: one.popen.poll() is not None or other.popen.poll() is not None, "one refusal")
        loser, winner = (one, other) if one.popen.poll() is not None else (other, one)
        assert loser.wait() == 7
        assert f"(pid {winner.pid})" in loser.rest(2)
        winner.wait_for_line("ready:")
        winner.kill(signal.SIGTERM)
        winner.succeed()
    assert not run_dir.exists()


def _has_child(module: str) -> Callable[[int, Path], bool]:
    return lambda pid, _: any(command_of(process) == module for process in family(pid))


STAGES: dict[str, Callable[[int, Path], bool]] = {
    "claimed": lambda _, run_dir: (run_dir / "lock").exists(),
    "looking at the model": _has_child("trtpool.workers.inspect"),
    "listening": lambda _, run_dir: (run_dir / "lifeline").exists(),
    "starting the broker": _has_child("trtpool.broker"),
    "starting the worker": _has_child("trtpool.workers"),
}


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_a_signal_while_it_starts_leaves_nothing(stage, negate, run_dir):
    with Process(*CLI, "start", negate, f"--run-dir={run_dir}") as process:
        wait_until(lambda: stage(process.pid, run_dir), "that stage")
        process.kill(signal.SIGTERM)
        assert process.succeed() == ""
    assert not run_dir.exists()


def test_nobody_reads_what_it_announces(negate, run_dir):
    """As in ``trtpool start model.onnx | true``: it cannot say that it is ready, and leaves nothing."""
    with Process(*CLI, "start", negate, f"--run-dir={run_dir}") as process:
        process.popen.stdout.close()
        assert "Traceback" not in process.rest(2)
        assert process.wait() != 0
    assert not run_dir.exists()
