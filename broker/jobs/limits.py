"""What a job waits for: of its parts, the one that is busiest.

==========  ============================================================================================
decoding    time in decoders (reading files too), over that of all producers
post        the same for functions that look at results, and for encoding what goes to the sink
writing     time in the sink, over the job's own
broker      processor time of the broker, over time
copies      time of copies to GPUs and back, over time and workers; 0 on the CPU
GPU, model  time of the engine, over time and workers, on GPUs or on the CPU
==========  ============================================================================================

None of these may be near 1: then producers wait for one another's processor time, or there is too little in flight.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Final

from trtpool.ipc.report import ModelReport, PoolReport

PARTS: Final = ("decoding", "post", "writing", "broker", "copies", "engine")


class Usage:
    """How busy each part was, between the start and now, and lately.

    Args:
        producers: how many.
        supervisor: the pool's, by pid.
        on_gpu: what the engine is called.
    """

    def __init__(self, producers: int, supervisor: int, *, on_gpu: bool) -> None:
        self._producers = producers
        self._broker = _Cpu(supervisor)
        self._engine = "GPU" if on_gpu else "model"
        self._sums = dict.fromkeys(PARTS, 0.0)
        self._base: dict[str, float] | None = None
        self._start = time.monotonic()
        self._last: tuple[float, dict[str, float]] = (self._start, dict(self._sums))
        self._workers = 1

    def begin(self, report: PoolReport, model: ModelReport) -> None:
        """Start the clock: producers have started."""
        self.look(report, model)
        self._start = time.monotonic()
        self._last = self._start, dict(self._sums)

    def add(self, part: str, seconds: float) -> None:
        """Note time of producers or of the sink."""
        self._sums[part] += seconds

    def look(self, report: PoolReport, model: ModelReport) -> None:
        """Note what the pool says of itself."""
        now = {
            "copies": (model.copy_in_ns + model.copy_out_ns) / 1e9,
            "engine": model.compute_ns / 1e9,
            "broker": self._broker.seconds(),
        }
        if self._base is None:
            self._base = now
        self._workers = max(1, len(report.workers))
        for part, value in now.items():
            self._sums[part] = value - self._base[part]

    def lately(self) -> tuple[str, float]:
        """The busiest part since this was last asked, and its share of the time."""
        at, before = self._last
        now, sums = time.monotonic(), dict(self._sums)
        self._last = now, sums
        return self._busiest({part: sums[part] - before[part] for part in PARTS}, now - at)

    def overall(self) -> dict[str, float]:
        """Each part's share of the time since the start."""
        return self._shares(self._sums, time.monotonic() - self._start)

    def _busiest(self, sums: dict[str, float], seconds: float) -> tuple[str, float]:
        shares = self._shares(sums, seconds)
        part = max(shares, key=lambda one: shares[one])
        return part, shares[part]

    def _shares(self, sums: dict[str, float], seconds: float) -> dict[str, float]:
        of = {"decoding": self._producers, "post": self._producers, "copies": self._workers, "engine": self._workers}
        shares = {part: min(1.0, value / max(seconds * of.get(part, 1), 1e-9)) for part, value in sums.items()}
        return {(self._engine if part == "engine" else part): share for part, share in shares.items()}


class _Cpu:
    """Processor time of the pool's broker, and of the one that takes over if it ends."""

    def __init__(self, supervisor: int) -> None:
        self._supervisor = supervisor
        self._before = 0.0
        self._pid, self._seconds = 0, 0.0

    def seconds(self) -> float:
        """Seconds so far."""
        seconds = _cpu_seconds(self._pid)
        if seconds is None:
            self._before += self._seconds
            self._pid = self._find()
            seconds = _cpu_seconds(self._pid) or 0.0
        self._seconds = seconds
        return self._before + seconds

    def _find(self) -> int:
        for task in Path(f"/proc/{self._supervisor}/task").glob("*"):
            with contextlib.suppress(OSError):  # it ended, or the kernel keeps no such list
                for pid in (task / "children").read_text().split():
                    if b"trtpool.broker\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return int(pid)
        return 0


def _cpu_seconds(pid: int) -> float | None:
    """User and system time of a process; None if it is not there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() if pid else None
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else None
