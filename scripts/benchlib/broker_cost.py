"""What turns of the broker's loop cost: CPU time in one pass, and calls into the kernel in another.

Counting calls would slow down what is timed, so it has a pass of its own.
"""

from __future__ import annotations

import cProfile
import gc
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, Final

from trtpool.broker.loop import Loop

from .broker_rig import Case, Rig, Traffic, turn

CHUNK: Final = 200
"""Turns whose mean is one sample: what a cache that another process has emptied costs shows in few of them."""
QUIET: Final = 0.05
"""The quantile of these that stands for a quiet machine."""
CLOCK_READS: Final = 2_000

SYSTEM_CALLS: Final = frozenset(
    {"accept", "poll", "recv", "recv_into", "recvmsg", "select", "send", "sendall", "sendmsg", "sendto"}
)
"""Methods of sockets, epoll and `select`, each one system call.  ZeroMQ's are not seen: no client uses it here."""


@dataclass
class Cost:
    """What one case cost.

    Attributes:
        case: its name.
        traffic: of the timed pass.
        turns: of the timed pass.
        slots: that were done.
        cpu_ns: in these turns.
        quiet_turn_ns: of a turn, see `QUIET`.
        calls: system calls for each item by name, and Python's own calls as "python", from the pass that counts.
    """

    case: str
    traffic: Traffic
    turns: int
    slots: float
    cpu_ns: int
    quiet_turn_ns: float
    calls: dict[str, float] = field(default_factory=dict)

    @property
    def messages(self) -> int:
        return self.traffic.messages_in + self.traffic.messages_out

    @property
    def system_calls(self) -> float:
        """For each item."""
        return sum(count for name, count in self.calls.items() if name != "python")

    def figures(self) -> dict[str, float]:
        """All of it, by name, for the table and for JSON."""
        items, traffic = self.traffic.items, self.traffic
        return {
            "items_per_cpu_s": 1e9 * items / self.cpu_ns,
            "quiet_items_per_cpu_s": 1e9 * items / (self.quiet_turn_ns * self.turns),
            "ns_per_item": self.cpu_ns / items,
            "ns_per_slot": self.cpu_ns / self.slots,
            "us_per_message": self.cpu_ns / self.messages / 1e3,
            "us_per_turn": self.cpu_ns / self.turns / 1e3,
            "quiet_us_per_turn": self.quiet_turn_ns / 1e3,
            "turns_per_item": self.turns / items,
            "frames_in_per_item": traffic.frames_in / items,
            "frames_out_per_item": traffic.frames_out / items,
            "messages_in_per_item": traffic.messages_in / items,
            "messages_out_per_item": traffic.messages_out / items,
            "system_calls_per_item": self.system_calls,
            "python_calls_per_item": self.calls.get("python", 0.0),
            "items_per_batch": items / max(1, traffic.batches),
            "runs_per_batch": traffic.runs / max(1, traffic.batches),
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.case, "turns": self.turns, "cpu_ns": self.cpu_ns, "traffic": asdict(self.traffic),
            "calls_per_item": self.calls, "figures": self.figures(),
        }  # fmt: skip


class Timer:
    """Runs turns, and adds up the CPU time that they take."""

    def __init__(self, profile: cProfile.Profile | None = None) -> None:
        self.turns = self.cpu_ns = 0
        self.chunks: list[float] = []
        self._profile = profile
        self._clock_ns = clock_ns()
        self._chunk_ns = 0

    def __call__(self, loop: Loop) -> None:
        profile = self._profile
        before_ns = time.process_time_ns()
        if profile is not None:
            profile.enable()
        turn(loop)
        if profile is not None:
            profile.disable()
        took_ns = max(0, time.process_time_ns() - before_ns - self._clock_ns)
        self.turns += 1
        self.cpu_ns += took_ns
        self._chunk_ns += took_ns
        if self.turns % CHUNK == 0:
            self.chunks.append(self._chunk_ns / CHUNK)
            self._chunk_ns = 0

    @property
    def quiet_turn_ns(self) -> float:
        """See `QUIET`; the mean of all turns if there are too few for a chunk."""
        if not self.chunks:
            return self.cpu_ns / max(1, self.turns)
        return sorted(self.chunks)[int(len(self.chunks) * QUIET)]


class CallCounter:
    """Runs turns, and counts what they call."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __call__(self, loop: Loop) -> None:
        before = sys.getprofile()
        sys.setprofile(self._seen)
        try:
            turn(loop)
        finally:
            sys.setprofile(before)

    def _seen(self, _: FrameType, kind: str, what: Any) -> None:
        if kind == "call":
            self.calls["python"] += 1
        elif kind == "c_call" and what.__name__ in SYSTEM_CALLS:
            self.calls[what.__name__] += 1


def clock_ns() -> int:
    """What asking for the CPU time costs, which is a system call, by its own account."""
    took = []
    for _ in range(CLOCK_READS):
        before_ns = time.process_time_ns()
        took.append(time.process_time_ns() - before_ns)
    return int(statistics.median(took))


def drive(rig: Rig, run_turn: Callable[[Loop], None], items: int) -> None:
    """Go on until so many items more are done.

    Raises:
        RuntimeError: nobody has anything to say, and they are not.
    """
    until = rig.traffic.items + items
    while rig.traffic.items < until:
        if not rig.step(run_turn):
            raise RuntimeError(f"all stand still after {rig.traffic.items} items; the fake peers miss something new")


def measure(case: Case, items: int, profile: cProfile.Profile | None = None) -> Cost:
    """Warm up with a tenth of `items`, time them, and count calls over another tenth."""
    with Rig(case) as rig:
        drive(rig, turn, max(1, items // 10))
        gc.collect()
        gc.freeze()  # what the fakes and this script keep is not the broker's to look through
        try:
            rig.restart_count()
            timer = Timer(profile)
            drive(rig, timer, items)
            timed = rig.restart_count()
            counter = CallCounter()
            drive(rig, counter, max(1, items // 10))
            counted = rig.restart_count()
        finally:
            gc.unfreeze()
    calls = {name: count / counted.items for name, count in sorted(counter.calls.items())}
    slots = timed.items / case.items_per_slot
    return Cost(case.name, timed, timer.turns, slots, timer.cpu_ns, timer.quiet_turn_ns, calls)
