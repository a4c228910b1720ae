"""`trtpool status` for people; what it says of a pool on the CPU is in test_cli."""

from __future__ import annotations

import pytest

from trtpool.broker.view import show_report
from trtpool.ipc.report import PoolReport, WorkerReport


def test_workers_on_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    workers = (WorkerReport(77, "NVIDIA H100 80GB HBM3", 3, 4, 0), WorkerReport(78, "NVIDIA H200", 3, 0, 1))
    show_report(PoolReport("ocr", 1, 61.4, 3 << 20, 2, 3, False, workers, ()))
    _, first, second = capsys.readouterr().out.splitlines()
    assert first == "worker 77 on gpu 0, NVIDIA H100 80GB HBM3: 4 batches in flight"
    assert second == "worker 78 on gpu 1, NVIDIA H200: 0 batches in flight"
