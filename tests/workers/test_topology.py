"""Binding to the CPUs near a GPU, on hosts made of files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trtpool.workers.topology import bind_to_gpu

Host = Callable[..., Path]


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, set[int]]]:
    """What was asked of the kernel, on a host where this process may run on CPUs 0 to 5."""
    calls: list[tuple[int, set[int]]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: calls.append((pid, set(cpus))))
    return calls


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Makes a sysfs with a GPU at 0000:3b:00.0."""

    def make(nodes: str = "0-1\n", node: str = "1\n", cpus: str = "4-7\n", gpu: str = "0000:3b:00.0") -> Path:
        device = tmp_path / "bus/pci/devices" / gpu
        device.mkdir(parents=True)
        (device / "numa_node").write_text(node)
        (device / "local_cpulist").write_text(cpus)
        (tmp_path / "devices/system/node").mkdir(parents=True)
        (tmp_path / "devices/system/node/online").write_text(nodes)
        return tmp_path

    return make


@pytest.mark.parametrize("name", ["0000:3b:00.0", "00000000:3B:00.0", "0000:3B:00.0"])
def test_it_stays_near_its_gpu_on_the_cpus_that_it_may_use(name, host, bound):
    assert bind_to_gpu(name, host()) == frozenset({4, 5})
    assert bound == [(0, {4, 5})]


@pytest.mark.parametrize(
    ("cpus", "near"), [("1\n", {1}), ("0-1,4,8-9\n", {0, 1, 4}), ("2,3", {2, 3}), ("3-3\n", {3}), ("5,100-200\n", {5})]
)
def test_lists_of_cpus(cpus, near, host, bound):
    assert bind_to_gpu("0000:3b:00.0", host(cpus=cpus)) == frozenset(near)


def test_a_pci_domain_beyond_the_usual_digits(host, bound):
    assert bind_to_gpu("00010000:3B:00.0", host(gpu="10000:3b:00.0")) == frozenset({4, 5})


@pytest.mark.parametrize(
    "changed",
    [
        {"nodes": "0\n"},
        {"nodes": ""},
        {"node": "-1\n"},
        {"cpus": "8-11\n"},  # none of ours
        {"cpus": "0-11\n"},  # all of ours
        {"cpus": "\n"},
        {"cpus": "some\n"},
        {"node": "\n"},
        {"gpu": "0000:3c:00.0"},
    ],
    ids=str,
)
def test_nothing_changes_where_nothing_can_be_gained_or_known(changed, host, bound):
    assert bind_to_gpu("0000:3b:00.0", host(**changed)) is None
    assert bound == []


@pytest.mark.parametrize("name", ["", "3b:00.0", "x:y:z"])
def test_an_address_that_is_none(name, host, bound):
    assert bind_to_gpu(name, host()) is None
    assert bound == []


def test_without_sysfs_nothing_changes(tmp_path, bound):
    assert bind_to_gpu("0000:3b:00.0", tmp_path / "none") is None


def test_a_sandbox_that_forbids_it(host, bound, monkeypatch):
    def forbid(pid: int, cpus: set[int]) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", forbid)
    assert bind_to_gpu("0000:3b:00.0", host()) is None
