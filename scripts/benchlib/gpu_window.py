"""What is measured in a window, the same for every contender, and the two marks that it lies between.

Work goes on before the first mark and after the last, so that neither the filling of the pipeline nor its emptying
is measured.  A mark is set when a batch has just ended, or else one batch more or less would make 1 %::

    producers   |------------- lead ------------|------------ window ------------|-- tail --| in flight |
    marks                                       ^ items, CPU                     ^ items, CPU
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import psutil

LEAD_S: Final = 0.2
TAIL_S: Final = 0.15
EDGE_S: Final = 0.1
"""How long a mark waits for a batch to end; far longer than a batch takes."""
POLL_S: Final = 0.0003


@dataclass
class Window:
    """What one contender did between two marks.

    Attributes:
        items, batches: ended.
        began_s, ended_s: `time.monotonic()` at the marks.
        copies_in, copies_out: calls' worth of copies to and from the device.
        cpu_s: user and system seconds, by who: "producers", "broker", "worker", "supervisor".
        figures: what only this kind of contender can tell.
    """

    items: float
    batches: float
    began_s: float
    ended_s: float
    copies_in: float = 0.0
    copies_out: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def took_s(self) -> float:
        return self.ended_s - self.began_s

    @property
    def items_per_s(self) -> float:
        return self.items / self.took_s if self.took_s > 0 else 0.0


class Performer(Protocol):
    """A contender, living in a process of its own.

    Attributes:
        facts: what it found out when it was made, for the report; JSON.
    """

    facts: dict[str, object]

    @property
    def window(self) -> Callable[..., Window]:
        """Works for so many seconds between the marks; each kind has options of its own, all of them floats."""

    def close(self) -> None: ...


class Edge(NamedTuple):
    """The value of a counter, and when it had just changed."""

    at_s: float
    value: float


def edge(
    read: Callable[[], float],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    limit_s: float = EDGE_S,
) -> Edge:
    """Wait until `read()` gives something else than before, `limit_s` at most."""
    before = read()
    until_s = clock() + limit_s
    while True:
        sleep(POLL_S)
        value, at_s = read(), clock()
        if value != before or at_s >= until_s:
            return Edge(at_s, value)


def classify(cmdline: Sequence[str]) -> str:
    """Who a process of a contender is, by its command line; "" for those of no interest.

    Producers, and the processes that stand in for them, come from `multiprocessing`.
    """
    for word, who in (
        ("trtpool.broker.supervise", "supervisor"),
        ("trtpool.broker", "broker"),
        ("trtpool.workers", "worker"),
    ):
        if word in cmdline:
            return who
    return "producers" if any("spawn_main" in word for word in cmdline) else ""


def below() -> dict[str, list[int]]:
    """The processes that this one, or one of its own, has started: numbers by who."""
    found: dict[str, list[int]] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # ended meanwhile
            if who := classify(process.cmdline()):
                found.setdefault(who, []).append(process.pid)
    return found


class CpuTimes:
    """The CPU seconds of some processes, by who."""

    def __init__(self, pids: Mapping[str, Sequence[int]]) -> None:
        self._processes = {who: [psutil.Process(pid) for pid in numbers] for who, numbers in pids.items()}

    def read(self) -> dict[str, float]:
        """Seconds so far; "worker main thread" is a part of "worker".  One that has ended counts nothing."""
        seconds = {who: sum(map(_cpu_s, processes)) for who, processes in self._processes.items()}
        if "worker" in self._processes:
            seconds["worker main thread"] = sum(map(_main_thread_s, self._processes["worker"]))
        return seconds


def _cpu_s(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _main_thread_s(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        return float(sum(t.user_time + t.system_time for t in process.threads() if t.id == process.pid))
    return 0.0


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Seconds between two readings; what ended in between counts nothing."""
    return {who: max(0.0, after[who] - before.get(who, 0.0)) for who in after}
