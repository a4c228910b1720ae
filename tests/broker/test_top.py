"""What `trtpool top` shows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.broker.core_rig import MS, Rig, sent
from trtpool.broker import events as e
from trtpool.broker.nvml import GpuFigures, Nvml
from trtpool.broker.reporting import report
from trtpool.broker.top import Look, Top
from trtpool.ipc import messages as m


def work(rig: Rig, gpu: int | None, items: int, compute_ns: int, peer: int = 1) -> None:
    """A batch that waits 1 ms and is with its worker for as long as it computes."""
    lease = rig.submit(peer, items, gpu=gpu)
    worker = 10 + (gpu or 0)
    (run,) = sent(rig.turn(MS), m.Run, worker)
    rig.now_ns += compute_ns
    rig.say(worker, m.Finished(run.batch, run.attempt, 0, compute_ns, 0, 0))
    rig.say(peer, m.Release(lease, 0, items))


def show(
    rig: Rig, act: Callable[[], object] = lambda: None, passed_s: float = 1.0, rows: int = 1000, **gpus: Any
) -> list[str]:
    """Lines on a terminal of 80 columns, of what happens while `act` acts."""
    before = Look(report(rig.core), 0.0)
    act()
    console = Console(width=80, color_system=None, force_terminal=True)
    with console.capture() as capture:
        console.print(Top(before, Look(report(rig.core), passed_s, gpus.get("gpus", {}))).show(rows))
    return capture.get().splitlines()


def row(lines: list[str], table: str, name: str) -> list[str]:
    """The cells of a row, but for its name."""
    start = next(index for index, line in enumerate(lines) if line.startswith(table + " "))
    return next(line for line in lines[start + 1 :] if line.startswith(name + " ")).removeprefix(name).split()


@pytest.fixture
def rig() -> Rig:
    rig = Rig((64, 1, 16), gpus=2)
    rig.join(1, 2)
    for gpu in range(2):
        rig.worker(10 + gpu, lanes=3, gpu=gpu)
    work(rig, 0, 16, 900 * MS)
    return rig


def test_rates_are_of_the_time_between_two_looks(rig):
    def act():
        for _ in range(4):
            work(rig, 0, 8, 100 * MS)
        work(rig, 1, 4, 50 * MS, peer=2)

    lines = show(rig, act, passed_s=2.0)
    items, batch, *percentiles, failed, retried = row(lines, "model", "m0")
    assert (items, batch, failed, retried) == ("18", "7.2", "0", "0")
    assert all(40 < float(one) < 145 for one in percentiles)
    assert row(lines, "device", "gpu 0")[:3] == ["1", "0/3", "20%"]
    assert row(lines, "device", "gpu 1")[:3] == ["1", "0/3", "2%"]
    assert row(lines, "client", "pid 101") == ["16", "48", "0", "0", "0"]
    assert row(lines, "client", "pid 102") == ["2", "4", "0", "0", "0"]
    _, queue, _, copy_in, compute, copy_out, total = row(lines, "mean, ms", "m0")
    assert (queue, copy_in, copy_out) == ("1.000", "-", "-")
    assert float(total) == pytest.approx(1 + (4 * 8 * 100 + 4 * 50) / 36, abs=0.1)
    assert float(compute) == pytest.approx(90)


def test_slots_by_state_and_who_waits(rig):
    def act():
        rig.lease(1, 40)
        rig.say(2, m.Lease(3, 0, 30, None))
        rig.turn()

    assert row(show(rig, act), "slots", "m0") == ["24", "40", "0", "0", "0", "64", "1"]


def test_restarts_are_shown(rig):
    lines = show(rig, lambda: rig.do(e.WorkerEnded(11, "SIGKILL")))
    assert lines[1] == "restarts: 0 broker, 1 workers; 0 protocol violations"
    assert "gpu 1" not in "\n".join(lines)


def test_nothing_is_wider_than_80_columns_or_cut_off():
    rig = Rig(*[(2**24, 1, 16)] * 3, gpus=2)
    rig.join(1)
    for gpu in range(2):
        rig.worker(10 + gpu, lanes=16, gpu=gpu)
    for model in rig.core.models:
        model.totals.failed_items = 12_345_678
        model.totals.retries = 123_456
    gpus = {1010: GpuFigures(100, 140 * 2**30, 141 * 2**30)}
    lines = show(rig, lambda: work(rig, 0, 16, 10**6 * MS), passed_s=0.00002, gpus=gpus)
    assert max(map(len, lines)) <= 80
    assert "…" not in "\n".join(lines)


def test_the_drivers_figures_are_shown_for_the_gpu_of_a_worker(rig):
    gpus = {1010: GpuFigures(87, 3 * 2**30, 80 * 2**30)}
    lines = show(rig, gpus=gpus)
    assert row(lines, "device", "gpu 0")[-3:] == ["87", "%", "3.0/80G"]
    assert row(lines, "device", "gpu 1")[-2:] == ["-", "-"]


def test_clients_that_have_no_room_are_counted():
    rig = Rig()
    rig.join(*range(1, 10))
    lines = show(rig, rows=10)
    assert sum(line.startswith("pid 10") for line in lines) == 3
    assert lines[-1].strip() == "and 6 more"


def test_copied_bytes_are_shown_for_gpus_only(rig):
    lines = show(rig, lambda: work(rig, 0, 16, MS), passed_s=16 * 8 / 1e6)
    assert row(lines, "device", "gpu 0")[3:7] == ["1.0", "MB", "0.5", "MB"]
    cpu = Rig()
    cpu.worker()
    assert row(show(cpu), "device", "cpu") == ["1", "0/1", "0%", "-", "-", "-", "-"]


# --- The driver ----------------------------------------------------------------------------------


def fake_nvml(**more: Any) -> SimpleNamespace:
    """A driver with two GPUs: process 7 on the first, 8 and 9 on the second."""
    pids = ((7,), (8, 9))
    calls = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [SimpleNamespace(pid=pid) for pid in pids[gpu]],
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=10 + gpu, total=100),
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=50 + gpu),
    }
    return SimpleNamespace(**{**calls, **more})


def test_gpus_are_found_by_the_processes_on_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    with Nvml() as nvml:
        assert nvml.figures([8, 9, 11]) == dict.fromkeys((8, 9), GpuFigures(51, 11, 100))
    assert nvml.figures([8]) == {}, "it was shut down"


def test_without_a_driver_nothing_is_known(monkeypatch):
    def fail():
        raise OSError("no driver")

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=fail))
    with Nvml() as nvml:
        assert nvml.figures([7]) == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Nvml() as nvml:
        assert nvml.figures([7]) == {}


def test_the_names_that_are_used_are_nvmls():
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is optional")
    assert [name for name in vars(fake_nvml()) if not hasattr(pynvml, name)] == []
