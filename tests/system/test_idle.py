"""A pool that has nothing to do: nothing wakes it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import pytest

import trtpool
from tests.system.rig import command_of, family, ones, wait_until

WATCHED_S: Final = 3.0
"""Longer than the period of any clock that a program might keep."""


def wake_ups(pids: list[int]) -> dict[str, int]:
    """How often each thread of these processes gave up its CPU to wait."""
    found = {}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
            found[f"{pid} {status['Name'].strip()} {task.name}"] = int(status["voluntary_ctxt_switches"])
    return found


@pytest.mark.parametrize(("transport", "spin_us"), [("lifeline", 0), ("zmq", 0), ("lifeline", 200)])
def test_an_idle_pool_and_its_clients_sleep(transport, spin_us, negate):
    with (
        trtpool.Pool(model=negate, transport=transport, spin_us=spin_us) as pool,
        trtpool.connect(run_dir=pool.run_dir, transport=transport) as client,
    ):
        for _ in range(5):  # so that slots are granted in advance
            assert client.infer(x=ones(5))["y"].tolist() == [-5] * 4
        held = client.lease()
        processes = family(pool.supervisor_pid)
        assert {command_of(one) for one in processes} >= {"trtpool.broker", "trtpool.workers"}
        pids = [pool.supervisor_pid, *(one.pid for one in processes)]

        def are_still() -> bool:
            before = wake_ups(pids)
            time.sleep(WATCHED_S)
            return wake_ups(pids) == before

        wait_until(are_still, f"that nothing is woken for {WATCHED_S:g} s", lambda: wake_ups(pids))
        held.release()
