"""Where our children find trtpool, and which GPU they see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trtpool
from trtpool.broker.modules import child_environment
from trtpool.ipc import errors


def test_children_import_this_trtpool_and_nothing_of_the_directory_they_start_in(tmp_path, monkeypatch):
    (tmp_path / "trtpool.py").write_text("raise RuntimeError('the wrong one')\n")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert child_environment()["PYTHONPATH"].split(os.pathsep)[1:] == ["/elsewhere"]
    monkeypatch.delenv("PYTHONPATH")
    command = [sys.executable, "-c", "import trtpool; print(trtpool.__file__)"]
    seen = subprocess.run(command, env=child_environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    if sys.version_info >= (3, 11):  # before, nothing keeps that directory out but its place
        assert Path(seen.stdout.strip()).samefile(trtpool.__file__), seen.stderr


def test_a_child_for_a_gpu_sees_it_alone(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert child_environment()["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert child_environment("1")["CUDA_VISIBLE_DEVICES"] == "6"
    assert child_environment("1")["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    with pytest.raises(errors.DeviceUnavailable, match="--gpus 2: CUDA_VISIBLE_DEVICES=4,6 has 2 GPUs"):
        child_environment("2")
