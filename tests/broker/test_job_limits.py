"""What a job's shares of time are worked out from."""

from __future__ import annotations

import msgspec
import pytest

from trtpool.broker.jobs import limits
from trtpool.ipc.report import ModelReport, PoolReport, WorkerReport


def model(**figures: int) -> ModelReport:
    fields = {field.name: 0 for field in msgspec.structs.fields(ModelReport) if field.required}
    return msgspec.convert({**fields, "name": "m", "interactive": CLASS, "bulk": CLASS, **figures}, ModelReport)


CLASS = {"queued": 0, "waiting": 0, "items": 0, "queue_ns": 0}
POOL = PoolReport("p", 1, 1.0, 1, 1, 0, False, (WorkerReport(1, "cpu", 1, 0), WorkerReport(2, "cpu", 1, 0)), ())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, and what processor time the broker has."""
    now = [100.0, 7.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(limits, "_cpu_seconds", lambda pid: now[1] if pid else None)
    monkeypatch.setattr(limits._Cpu, "_find", lambda self: 5)
    return now


def test_shares_are_of_what_there_is_and_count_from_the_beginning(clock: list[float]) -> None:
    usage = limits.Usage(4, 1, on_gpu=True)
    clock[0] = 150.0
    usage.begin(POOL, model(compute_ns=10**12, copy_in_ns=10**12))
    clock[:] = [160.0, 10.0]
    usage.add("decoding", 20)
    usage.add("writing", 1)
    usage.look(POOL, model(compute_ns=10**12 + 15 * 10**9, copy_in_ns=10**12 + 10**9, copy_out_ns=10**9))
    wanted = {"decoding": 0.5, "post": 0.0, "writing": 0.1, "broker": 0.3, "copies": 0.1, "GPU": 0.75}
    assert usage.overall() == pytest.approx(wanted)
    part, share = usage.lately()
    assert (part, round(share, 9)) == ("GPU", 0.75)


def test_the_limit_is_that_of_late(clock: list[float]) -> None:
    usage = limits.Usage(1, 1, on_gpu=False)
    usage.begin(POOL, model())
    clock[0] += 10
    usage.look(POOL, model(compute_ns=20 * 10**9))
    assert usage.lately() == ("model", 1.0)
    clock[0] += 10
    usage.add("post", 9)
    usage.look(POOL, model(compute_ns=21 * 10**9))
    part, share = usage.lately()
    assert (part, round(share, 9)) == ("post", 0.9)


def test_processor_time_counts_on_when_another_broker_takes_over(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = limits.Usage(1, 1, on_gpu=False)
    usage.begin(POOL, model())
    clock[:] = [110.0, 9.0]
    usage.look(POOL, model())
    seconds = {5: None, 6: 1.0}
    monkeypatch.setattr(limits, "_cpu_seconds", seconds.get)
    monkeypatch.setattr(limits._Cpu, "_find", lambda self: 6)
    usage.look(POOL, model())
    assert usage.overall()["broker"] == pytest.approx(0.3)
