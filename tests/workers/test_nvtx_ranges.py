"""Ranges for profilers: one for each launch, around it, and none where nobody looks."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.workers.test_lane_loop import HeldEngine, Rig
from trtpool.ipc import messages as m
from trtpool.workers.lane_loop import LaneLoop
from trtpool.workers.nvtx_ranges import loop_type


class FakeNvtx(SimpleNamespace):
    """In place of the package: notes each range, and how many batches had been launched within it."""

    def __init__(self) -> None:
        super().__init__(ranges=[], engine=None)

    @contextlib.contextmanager
    def annotate(self, message: str, domain: str, payload: int) -> Iterator[None]:
        before = self._launched()
        try:
            yield
        finally:
            self.ranges.append((domain, message, payload, self._launched() - before))

    def _launched(self) -> int:
        engine: HeldEngine | None = self.engine
        return 0 if engine is None else len(engine.launched)


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> FakeNvtx:
    fake: Any = FakeNvtx()
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    return fake  # type: ignore[no-any-return]


@pytest.mark.parametrize("sign", ["NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID"])
def test_each_launch_is_a_range_that_names_its_batch(nvtx: FakeNvtx, sign: str) -> None:
    interval = sys.getswitchinterval()
    rig = Rig([1], spins=True, kind=loop_type(LaneLoop, {sign: "1"}))
    try:
        nvtx.engine = rig.engines[0]
        rig.send(m.Run(7, 2, 0, [m.Rows(0, 0, 3, 3), m.Rows(0, 5, 1, 1)]))
        rig.engines[0].wait_launched(1)
        rig.engines[0].finish(0)
        assert [(one.batch, one.attempt) for one in rig.hear(1) if isinstance(one, m.Finished)] == [(7, 2)]
        rig.run(8)
        rig.engines[0].wait_launched(2)
        rig.engines[0].finish(0)
        rig.hear(1)
    finally:
        rig.close()
        sys.setswitchinterval(interval)
    assert nvtx.ranges == [
        ("trtpool", "4 items of model-0, attempt 3", 7, 1), ("trtpool", "1 items of model-0", 8, 1)
    ]  # fmt: skip


def test_without_a_profiler_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)  # an import would fail
    assert loop_type(LaneLoop, {"NVTX_INJECTION64_PATH": ""}) is LaneLoop


def test_a_profiler_without_the_package_is_told_what_it_misses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with caplog.at_level(logging.WARNING):
        assert loop_type(LaneLoop, {"NVTX_INJECTION64_PATH": "/x.so"}) is LaneLoop
    assert "pip install 'trtpool[nvtx]'" in caplog.text
