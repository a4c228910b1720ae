"""How long to look before sleeping, on a clock of the test's."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest

from trtpool.ipc.spinning import DEFAULT_SPIN_US, MANY_CPUS, START_NS, Spin, default_spin_us

LOOK_NS = 1000
MOST_US = 200


@dataclasses.dataclass
class Clock:
    """A message comes at `comes_ns`; each look takes a microsecond, and to be woken `wakes_ns`."""

    now_ns: int = 1_000_000
    comes_ns: int = 0
    wakes_ns: int = 0
    looks: int = 0
    sleeps: int = 0

    def look(self) -> str | None:
        self.looks += 1
        self.now_ns += LOOK_NS
        return "found" if self.now_ns >= self.comes_ns else None

    def sleep(self) -> str:
        self.sleeps += 1
        self.now_ns = max(self.now_ns, self.comes_ns) + self.wakes_ns
        return "woken"

    def after(self, spin: Spin, gap_ns: int, limit_ns: int | None = None) -> str:
        """How a message is had that comes `gap_ns` after one begins to wait."""
        self.comes_ns = self.now_ns + gap_ns
        return spin.wait(self.look, self.sleep, limit_ns)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic_ns", lambda: clock.now_ns)
    return clock


def test_the_first_wait_sleeps(clock):
    assert clock.after(Spin(MOST_US), 50_000) == "woken"
    assert clock.looks == 0


def test_the_window_doubles_until_messages_are_found(clock):
    spin = Spin(MOST_US)
    windows = []
    while clock.after(spin, 100_000) == "woken":
        windows.append(spin.window_ns)
    assert windows == [START_NS, 2 * START_NS, 4 * START_NS, 8 * START_NS, 16 * START_NS]
    assert clock.after(spin, 100_000) == "found"
    assert spin.window_ns == windows[-1]


def test_the_window_is_never_larger_than_the_most(clock):
    spin = Spin(MOST_US)
    for _ in range(20):
        clock.after(spin, 1000 * MOST_US - 5_000)
    assert spin.window_ns == 1000 * MOST_US


def test_a_long_wait_closes_the_window(clock):
    spin = Spin(MOST_US)
    while clock.after(spin, 50_000) == "woken":
        pass
    assert clock.after(spin, 10_000_000) == "woken"
    assert spin.window_ns == 0
    clock.looks = 0
    assert clock.after(spin, 10_000_000) == "woken"
    assert clock.looks == 0, "who is seldom called does not look"


def test_the_time_to_be_woken_counts_as_waiting(clock):
    """For that is what is saved."""
    clock.wakes_ns = 300_000
    spin = Spin(MOST_US)
    assert clock.after(spin, 10_000) == "woken"
    assert spin.window_ns == 0


def test_without_a_window_nobody_looks(clock):
    spin = Spin(0)
    for _ in range(5):
        assert clock.after(spin, 10_000) == "woken"
    assert clock.looks == spin.window_ns == 0


def test_nobody_looks_for_longer_than_the_limit(clock):
    spin = Spin(MOST_US)
    while clock.after(spin, 150_000) == "woken":
        pass
    clock.looks = clock.sleeps = 0
    assert clock.after(spin, 150_000, limit_ns=20_000) == "woken"
    assert (clock.looks, clock.sleeps) == (20, 1)


@pytest.mark.parametrize(
    ("cpus", "spin_us"), [(1, 0), (2, 0), (MANY_CPUS - 1, 0), (MANY_CPUS, DEFAULT_SPIN_US), (64, DEFAULT_SPIN_US)]
)
def test_few_cpus_are_for_work(monkeypatch, cpus, spin_us):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    assert default_spin_us() == spin_us
