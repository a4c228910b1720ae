"""Builds against a small copy of TensorRT's builder, and what became of them; the fixtures are in conftest.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

import pytest

from tests.models import ADD, save
from tests.workers.fake_builder import make_tensorrt
from trtpool.ipc.building import BuildRequest, Line, PlanRecord
from trtpool.ipc.settings import BuildSettings, GpuInfo, ModelSource
from trtpool.workers.builder import build

VERSIONS: Final = ("8.6.0", "10.13.0.35", "11.4.0.106")
GPU: Final = GpuInfo(
    name="NVIDIA H100 80GB HBM3", uuid="GPU-1", pci_bus_id="0", compute_capability="9.0", memory_bytes=1, driver=(13, 0)
)


class Built:
    """What became of a build."""

    def __init__(self, record: PlanRecord, lines: list[Line], plan: dict[str, Any]) -> None:
        self.record = record
        self.said = [line.said for line in lines if line.said]
        self.progress = [line.progress for line in lines if line.progress and line.progress.of]
        self.plan = plan


Make: TypeAlias = Callable[..., Built]
"""`make_plan` with its folder."""


def install(version: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have that version of TensorRT be the one that is installed; returns the module."""
    module = make_tensorrt(version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def major(trt: Any) -> int:
    return int(trt.__version__.partition(".")[0])


def make_plan(folder: Path, model: Any = ADD, request: dict[str, Any] | None = None, **options: Any) -> Built:
    """Build a model in `folder` with options of `BuildSettings`, and others of the request."""
    path = save(model, folder)
    output = folder / "model.plan"
    asked = BuildRequest(
        source=ModelSource(str(path), "m"), build=BuildSettings(**options), output=str(output), **(request or {})
    )
    lines: list[Line] = []
    record = build(asked, lines.append)
    return Built(record, lines, json.loads(output.read_bytes()))
