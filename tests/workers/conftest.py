"""A GPU to build for, and TensorRT to build with; see `tests.workers.build_rig`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.workers import build_rig
from trtpool.workers import build_target


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a GPU."""
    monkeypatch.setattr(build_target, "look", lambda: build_rig.GPU)


@pytest.fixture(params=build_rig.VERSIONS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, gpu: None) -> Any:
    """Each version of TensorRT in turn, as the one that is installed."""
    return build_rig.install(request.param, monkeypatch)


@pytest.fixture
def make_plan(tmp_path: Path) -> build_rig.Make:
    """Builds a model with options of `BuildSettings`, and others of the request."""
    return functools.partial(build_rig.make_plan, tmp_path)
