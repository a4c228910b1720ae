"""`trtpool build` and `trtpool start model.onnx --gpus` as users run them, as far as a machine without a GPU goes."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.models import ADD, BAD_MODELS, MODELS, OPEN_ITEM, save
from tests.system.rig import CLI, PATIENCE_S, Process, StartedPool
from tests.workers.fake_builder import make_package
from trtpool.ipc import errors
from trtpool.ipc.building import PlanRecord
from trtpool.ipc.settings import Profile

TARGET = "--compute-capability=8.9"

Env = Callable[..., dict[str, str]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def rtx():
    """TensorRT for RTX, which builds for a GPU that is not here."""
    return pytest.importorskip("tensorrt_rtx", exc_type=ImportError)


@pytest.fixture
def fakes(on_gpus: Env, tmp_path: Path) -> Env:
    """An environment with a GPU and a TensorRT in small; a plan of it is the ONNX file."""

    def make(**told: Any) -> dict[str, str]:
        env = on_gpus()
        tensorrt = make_package(tmp_path / "fake", tmp_path / "log", onnx=True, **told)
        return {**env, **tensorrt, "CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    return make


def build(*words: str | os.PathLike[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*CLI, "build", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False)


# --- Real plans ----------------------------------------------------------------------------------


def test_a_plan_and_its_record(rtx, tmp_path):
    model = save(MODELS["mlp"].model, tmp_path, "mlp")
    ended = build(model, "--fp16", "--io=x=uint8", "--io=y=fp16", "--shapes=x=1:8:16", TARGET)
    assert ended.returncode == 0, ended.stderr
    plan = tmp_path / "mlp.plan"
    assert plan.read_bytes()[:4] == b"vtrt"
    (line,) = ended.stdout.splitlines()
    assert line.startswith(f"{plan}: ")
    assert " KiB, built in " in line
    record = msgspec.json.decode((tmp_path / "mlp.plan.json").read_bytes(), type=PlanRecord)
    assert [(t.name, t.role, t.dtype) for t in record.tensors] == [("x", "input", "uint8"), ("y", "output", "float16")]
    assert record.tensors[0].profile == Profile((1, 256), (8, 256), (16, 256))
    assert (record.plan_bytes, record.compute_capability) == (plan.stat().st_size, "8.9")
    said = ended.stderr.splitlines()
    assert said[0] == f"TensorRT for RTX {rtx.__version__} for compute capability 8.9"
    assert said[1:6] == [
        "precision: float16", "x: uint8 for float32", "y: float16 for float32",
        "input x: uint8 (?, 256), from 1x256, best 8x256, to 16x256", "output y: float16 (?, 16)",
    ]  # fmt: skip
    assert said[-1].startswith("100% ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlp.onnx", "mlp.plan", "mlp.plan.json"]


def test_a_build_replaces_what_was_there_only_when_it_succeeds(rtx, tmp_path):
    plan = tmp_path / "out.plan"
    plan.write_bytes(b"old")
    assert build(save(BAD_MODELS["unknown operator"][0], tmp_path), "-o", plan, TARGET).returncode == 4
    assert plan.read_bytes() == b"old"
    assert build(save(ADD, tmp_path), "-o", plan, TARGET).returncode == 0
    assert plan.read_bytes()[:4] == b"vtrt"


@pytest.mark.parametrize(
    ("model", "words", "error", "text"),
    [
        (BAD_MODELS["unknown operator"][0], [TARGET], errors.ModelError, "operator NoSuchThing"),
        (OPEN_ITEM, [TARGET], errors.ModelError, "for example --shapes x=1x3x640x640:32x3x640x640:64x3x640x640"),
        (ADD, [TARGET, "--io=z=fp16"], errors.ModelError, "--io names 'z'"),
        (ADD, ["--compute-capability=9.0"], errors.ConfigError, "and not for 9.0"),
        (ADD, [TARGET, "-o", "nowhere/x.plan"], errors.ConfigError, "cannot write to "),
        (None, [TARGET], errors.ModelError, "No such file"),
    ],
    ids=["operator", "open", "io", "target", "folder", "file"],
)
def test_refusals_are_one_line_and_their_code(model, words, error, text, rtx, tmp_path):
    path = save(model, tmp_path) if model else tmp_path / "model.onnx"
    ended = build(path, "--flavour=rtx", *words)
    assert ended.returncode == error.exit_code, ended.stderr
    assert ended.stdout == ""
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("trtpool: ")]
    assert text in line
    assert [entry.name for entry in tmp_path.iterdir()] == ([path.name] if model else [])


def test_a_changed_onnx_file_is_served_on_the_cpu(run_dir, tmp_path):
    model = save("g (float[N,3,4,4] x) => (float[N,3,4,4] y) { y = Neg(x) }", tmp_path)
    changed = tmp_path / "pixels.onnx"
    ended = build(model, "-o", changed, "--normalize=mean=0.5,0.25,0.125,std=0.5", "--io=y=fp16")
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "pixels.onnx", "pixels.onnx.json"]
    with StartedPool(changed, run_dir=run_dir) as pool:
        pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 4, 4), np.uint8)
        with pool.connect() as client:
            answer = client.infer(x=pixels)["y"]
        pool.stop()
    wanted = -(pixels / 255 - np.reshape((0.5, 0.25, 0.125), (3, 1, 1))) / 0.5
    assert answer.dtype == np.float16
    np.testing.assert_allclose(answer, wanted, atol=1e-3)


# --- In small ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_build_that_is_stopped_leaves_nothing(number, fakes, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    model = save(ADD, tmp_path)
    env = fakes(first=f"open({str(gate)!r}).read()")  # which nobody ever writes to
    before = sorted(path.name for path in tmp_path.iterdir())
    with Process(*CLI, "build", model, env=env) as process:
        process.wait_for_line("output sum", 2)  # the last thing that is said before TensorRT builds
        process.kill(number)
        assert process.rest(2).splitlines()[-1] == "trtpool: the build was stopped, and nothing was written"
        assert process.wait() == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "log") == before


def test_a_build_ends_with_the_command_that_was_killed(fakes, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    env = fakes(first=f"open({str(gate)!r}).read()")
    with Process(*CLI, "build", save(ADD, tmp_path), env=env) as process:
        process.wait_for_line("output sum", 2)
        process.kill()
        process.wait()  # that its child is gone too is looked at after each test here
    assert not (tmp_path / "model.plan").exists()


def test_a_builder_that_crashes(fakes, tmp_path):
    ended = build(save(ADD, tmp_path), env=fakes(first="os.kill(os.getpid(), 11)"))
    assert ended.returncode == errors.ModelError.exit_code
    assert "building a plan ended with SIGSEGV" in ended.stderr


def test_a_terminal_has_a_progress_bar(fakes, tmp_path):
    ours, theirs = pty.openpty()
    env = {**os.environ, **fakes(), "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [*CLI, "build", save(ADD, tmp_path)], stderr=theirs, stdout=subprocess.PIPE, env=env
    ) as process:
        os.close(theirs)
        shown = b""
        while select.select([ours], [], [], PATIENCE_S)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # how a terminal ends
                break
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0, shown
    assert b"model.plan: " in out
    assert "TensorRT 10.13.0.35 for compute capability 9.0" in shown.decode()
    assert "━" in shown.decode()


def test_a_pool_builds_on_first_use(fakes, negate, run_dir, tmp_path):
    env = fakes()
    x = np.arange(4, dtype=np.float32)
    for found in (False, True):
        with StartedPool(negate, run_dir=run_dir, env=env, gpus=0) as pool:
            with pool.connect() as client:
                np.testing.assert_array_equal(client.infer({"x": x[None]})["y"], -x[None])
            pool.stop()
        assert ("model negate: built in " in pool.announced) == (not found)
        assert ("was found in the cache, " in pool.announced) == found
        (plan,) = (tmp_path / "cache" / "trtpool" / "plans").glob("*.plan")
        assert str(plan) in pool.announced
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_start_that_is_stopped_while_it_builds(fakes, negate, run_dir, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    env = fakes(first=f"open({str(gate)!r}).read()")
    with Process(*CLI, "start", negate, "--gpus=0", f"--run-dir={run_dir}", env=env) as process:
        process.wait_for_line("output y")
        process.kill(signal.SIGTERM)
        assert process.wait() == 0
    assert [path.suffix for path in (tmp_path / "cache" / "trtpool" / "plans").iterdir()] == [".lock"]
    assert not run_dir.exists()


def test_a_start_with_a_model_that_cannot_be_built(fakes, run_dir, tmp_path):
    model = save(BAD_MODELS["unknown operator"][0], tmp_path)
    with Process(*CLI, "start", model, "--gpus=0", f"--run-dir={run_dir}", env=fakes()) as process:
        assert "operator NoSuchThing (node 0): TensorRT does not have it" in process.rest(2)
        assert process.wait() == errors.ModelError.exit_code
