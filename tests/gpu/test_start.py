"""What cannot start on a GPU says why in one sentence, with the exit code for it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.system.rig import CLI, Process
from trtpool.ipc.errors import DeviceUnavailable, MissingExtra, ModelError

pytestmark = [pytest.mark.gpu, pytest.mark.system]

HEADER_BYTES = 28
"""A plan's magic, sizes, and the version of TensorRT in the last four."""


class Refused(NamedTuple):
    """A start that must fail.

    Attributes:
        model: the file to start with.
        code: the exit code.
        says: what the sentence has in it.
        gpus: those to use.
        no_tensorrt: no TensorRT is installed, as far as the pool can tell.
    """

    model: Path
    code: int
    says: tuple[str, ...]
    gpus: str = "0"
    no_tensorrt: bool = False


@pytest.fixture
def refused(zoo, rng, tmp_path: Path) -> dict[str, Refused]:
    plan, raw = zoo.plan("mlp"), zoo.plan("mlp").read_bytes()
    header = raw[:HEADER_BYTES]
    files = {
        "garbage": header + rng.integers(0, 256, 100_000, np.uint8).tobytes(),
        "truncated": raw[: len(raw) // 2],
        "header": header,
        "empty": b"",
    }
    for name, data in files.items():
        (tmp_path / f"{name}.plan").write_bytes(data)
    model_error = {name: Refused(tmp_path / f"{name}.plan", ModelError.exit_code, (f"{name}.plan",)) for name in files}
    (tmp_path / "rtx.plan").write_bytes(b"vtrt" + raw[4:])
    return {
        **model_error,
        "another flavour": Refused(tmp_path / "rtx.plan", MissingExtra.exit_code, ("pip install 'trtpool[rtx]'",)),
        "no TensorRT for a plan": Refused(plan, MissingExtra.exit_code, ("pip install 'trtpool[",), no_tensorrt=True),
        "no builder for ONNX": Refused(
            zoo.onnx("mlp"), MissingExtra.exit_code, ("pip install 'trtpool[",), no_tensorrt=True
        ),
        "no such GPU": Refused(plan, DeviceUnavailable.exit_code, ("--gpus 99", "nvidia-smi"), gpus="99"),
    }


@pytest.fixture
def without_tensorrt(tmp_path: Path) -> dict[str, str]:
    """An environment in which no TensorRT is installed."""
    folder = tmp_path / "without"
    folder.mkdir()
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_lean"):
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here', name='{name}')")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}


def test_what_cannot_start_says_why(refused, without_tensorrt, tmp_path):
    """All at once, since each starts CUDA."""
    ended = {}
    with contextlib.ExitStack() as stack:
        started = {}
        for number, (name, case) in enumerate(refused.items()):
            command = [*CLI, "start", case.model, f"--gpus={case.gpus}", f"--run-dir={tmp_path / f'run{number}'}"]
            env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), **(without_tensorrt if case.no_tensorrt else {})}
            started[name] = stack.enter_context(Process(*command, env=env))
        for name, process in started.items():
            ended[name] = process.rest(1), process.rest(2), process.wait()
    wrong = {}
    for name, (_, err, code) in ended.items():
        said = [line for line in err.splitlines() if line.startswith("trtpool: ")]
        if code != refused[name].code or len(said) != 1 or not all(part in said[0] for part in refused[name].says):
            wrong[name] = ended[name]
    assert not wrong
    assert not [*tmp_path.glob("run*")]
