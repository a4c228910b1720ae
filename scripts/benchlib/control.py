"""What an item takes in a whole pool: time, CPU, wake-ups, system calls, and where the processes' Python spends it.

`broker_cost` counts the broker's loop by itself, with nobody else running.  Here all run, as they do for users, so what
is counted depends on who sleeps when, and differs by some percent from window to window.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from .gpu_window import CpuTimes, below, spent
from .sweep import BASE, Point
from .sweep_run import ALONE, LOAD, TIMED, Sweep, common, phases_us, quantiles_us, rate, timed_p50_us

WHO: Final = ("producers", "broker", "worker")

EVENTS: Final = {
    "raw_syscalls:sys_enter": "system calls",
    "syscalls:sys_enter_sendto": "sends",
    "syscalls:sys_enter_recvfrom": "receives",
    "syscalls:sys_enter_poll": "polls",
    "syscalls:sys_enter_epoll_wait": "polls",
    "syscalls:sys_enter_futex": "futex",
}
"""What `perf stat` counts, and as what it is shown.  A frame is one send and one receive; some receives find none."""

SAMPLES_PER_S: Final = 400


class Case(NamedTuple):
    """A load: one item at a time from one producer (`alone`), or as `scripts/bench.py --sweep` has it."""

    point: Point
    alone: bool
    title: str


CASES: Final = {
    "single": Case(Point(producers=1, run=1), True, "1 producer, one item at a time"),
    "runs1": Case(Point(run=1), False, "4 producers, 64 runs of 1 slot in flight each"),
    "runs16": Case(BASE, False, "4 producers, 4 runs of 16 slots"),
    "runs16 x 16": Case(Point(in_flight=256), False, "4 producers, 16 runs of 16 slots"),
    "runs64": Case(Point(run=64), False, "4 producers, 2 runs of 64 slots"),
    "items64": Case(Point(items_per_slot=64, max_batch=4096), False, "4 producers, 4 runs of 16 slots of 64 items"),
}


@dataclass
class Costs:
    """Of one case.

    Attributes:
        items_per_s: all producers together.
        p50_us, p99_us: from a run's submission until its producer has the result.
        phases_us: the median of each phase of a run, see `Result.timings`; they do not add up to that of the whole.
        timed_p50_us: the median `Timings.latency_ns` of those runs, which have a window of their own; what the
            producer's own calls take before and after is in `p50_us` alone.
        items: how many were counted.
        items_per_batch: of them.
        cpu_us: an item's, by who.
        counts: an item's "wake-ups", and what `EVENTS` says, by who; without those where perf cannot count.
        uncounted: why it could not.
        functions: the samples that were taken in each function itself, by who, the most first; (function, share).
    """

    items_per_s: float
    p50_us: float
    p99_us: float
    phases_us: dict[str, float]
    timed_p50_us: float
    items: int
    items_per_batch: float
    cpu_us: dict[str, float]
    counts: dict[str, dict[str, float]]
    uncounted: str = ""
    functions: dict[str, list[tuple[str, float]]] = field(default_factory=dict)


def measure(sweep: Sweep, case: Case, window_s: float, samples: Path | None = None) -> Costs:
    """Run a load for `window_s` to be counted, and for a quarter of that to have its phases.

    And once more to be sampled, if there is a folder for `samples`.

    Raises:
        FileNotFoundError: py-spy is to sample, and is not installed.
        ValueError: the window is too short for the load.
    """
    with sweep.producing(case.point) as (pool, crew, mode):
        mode.value = ALONE if case.alone else LOAD
        crew.run(window_s / 4)
        pids = {who: found for who, found in below().items() if who in WHO}
        cpu = CpuTimes(pids)
        with _perf(pids) as perf:
            before, cpu_before, wakes_before = pool.status().models[0], cpu.read(), wake_ups(pids)
            turns = crew.run(window_s)
            cpu_s, wakes, after = spent(cpu_before, cpu.read()), wake_ups(pids), pool.status().models[0]
        reports, inside = [turn.report for turn in turns], common(turns, window_s)
        mode.value += TIMED
        timed = [turn.report for turn in crew.run(window_s / 4)]
        mode.value -= TIMED
        items = after.items - before.items
        costs = Costs(
            rate(reports, *inside),
            *quantiles_us(reports, *inside),
            phases_us(timed),
            timed_p50_us(timed),
            items,
            items / max(1, after.batches - before.batches),
            {who: 1e6 * cpu_s[who] / items for who in pids},
            {who: {"wake-ups": (wakes[who] - wakes_before[who]) / items, **perf.counts(who, items)} for who in pids},
            perf.failure,
        )
        if samples is not None:
            with _py_spy(pids, samples, window_s) as files:
                crew.run(window_s + 1)
            costs.functions = {who: shares(path.read_text()) for who, path in files.items()}
    return costs


def wake_ups(pids: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """How often threads have slept, and so been woken, by who (``voluntary_ctxt_switches``, proc_pid_status(5))."""
    return {who: sum(map(_wake_ups, found)) for who, found in pids.items()}


def _wake_ups(pid: int) -> int:
    count = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):  # the thread ended
            count += next(
                int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("voluntary")
            )
    return count


# --- perf ----------------------------------------------------------------------------------------


class Perf:
    """What perf counted of processes, by who; `failure` says why it did not."""

    def __init__(self) -> None:
        self.failure = ""
        self._counted: dict[str, Counter[str]] = {}

    def take(self, who: str, output: str) -> None:
        """Read what `perf stat -x,` wrote."""
        counted: Counter[str] = Counter()
        for line in output.splitlines():
            fields = line.split(",")
            if len(fields) > 2 and fields[2] in EVENTS and fields[0].isdigit():
                counted[EVENTS[fields[2]]] += int(fields[0])
        if counted:
            self._counted[who] = counted
        elif not self.failure:
            self.failure = (output.strip() or "perf said nothing").splitlines()[-1]

    def counts(self, who: str, items: int) -> dict[str, float]:
        """For each item."""
        return {name: count / items for name, count in self._counted.get(who, {}).items()}


@contextlib.contextmanager
def _perf(pids: Mapping[str, Sequence[int]]) -> Iterator[Perf]:
    """Count while the block runs; results are there after it."""
    perf = Perf()
    command = shutil.which("perf")
    if command is None:
        perf.failure = "perf is not installed"
        yield perf
        return
    running = {
        who: subprocess.Popen(
            [command, "stat", "-x,", "-e", ",".join(EVENTS), "-p", ",".join(map(str, found))],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for who, found in pids.items()
    }
    try:
        yield perf
    finally:
        for who, process in running.items():
            process.send_signal(signal.SIGINT)
            perf.take(who, process.communicate()[1])


# --- py-spy --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _py_spy(pids: Mapping[str, Sequence[int]], folder: Path, seconds: float) -> Iterator[dict[str, Path]]:
    """Sample one process of each kind, which goes on meanwhile; files of stacks are there after the block."""
    command = shutil.which("py-spy")
    if command is None:
        raise FileNotFoundError("py-spy is not installed: pip install py-spy")
    files = {who: folder / f"{who}.stacks" for who in pids}
    running = [
        subprocess.Popen(
            [command, "record", "--nonblocking", "--gil", "-f", "raw", "-r", str(SAMPLES_PER_S), "-d", f"{seconds:.0f}",
             "-o", files[who], "-p", str(found[0])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for who, found in pids.items()
    ]  # fmt: skip
    try:
        yield files
    finally:
        for process in running:
            process.wait()


def shares(stacks: str) -> list[tuple[str, float]]:
    """Of stacks as py-spy writes them, ``outer;inner COUNT`` a line: how much is in each innermost function itself."""
    counted: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        counted[_function(stack.rpartition(";")[2])] += int(count)
    total = sum(counted.values())
    return [(name, count / total) for name, count in counted.most_common()]


def _function(frame: str) -> str:
    """``name (path/file.py:12)`` as ``file.py name``."""
    name, _, place = frame.partition(" (")
    return f"{Path(place.partition(':')[0].rstrip(')')).name} {name}" if place else name
