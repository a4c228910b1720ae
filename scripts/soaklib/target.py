"""The pool under test: its processes, its figures, and what may be left of it."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

import psutil

import trtpool
from trtpool.ipc.report import PoolReport

from .models import write_hook, write_models
from .plan import PoolPlan

MARK: Final = "TRTPOOL_SOAK_MARK"
"""All processes of a soak inherit this, by which survivors are found wherever they were re-parented to."""

BATCH_TIMEOUT_S: Final = 3.0
START_TIMEOUT_S: Final = 60.0
PATIENCE_S: Final = 120.0
LOOK_AGAIN_S: Final = 0.05


def wait_for(happened: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
    """Look until it has happened; False if it did not in time."""
    deadline = time.monotonic() + patience_s
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_AGAIN_S)
    return True


def module_of(process: psutil.Process) -> str:
    """The module that one of the pool's processes runs, such as "trtpool.broker"; "" if it has ended."""
    with contextlib.suppress(psutil.Error, IndexError):
        return str(process.cmdline()[-1])
    return ""


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208  # names alone are counted


def own_holdings() -> tuple[int, int]:
    """This process's descriptors, and its mappings of memfds."""
    return descriptors(os.getpid()), Path("/proc/self/maps").read_text().count(" /memfd:")


class Target:
    """`trtpool start` in a folder, and a client to look at it with."""

    def __init__(self, folder: Path, plan: PoolPlan, workers: int, models: list[str]) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.workers = workers
        self.mark = uuid.uuid4().hex
        self.environment = {**os.environ, MARK: self.mark}
        self.log: IO[bytes] = (folder / "pool.log").open("wb")
        path = os.pathsep.join([str(write_hook(folder)), *filter(None, [os.environ.get("PYTHONPATH")])])
        options = {
            "workers": workers, "threads": 1, "items-per-slot": plan.items_per_slot, "max-batch": plan.max_batch,
            "slots": plan.slots, "max-delay-us": plan.max_delay_us, "batch-timeout-s": BATCH_TIMEOUT_S,
            "start-timeout-s": START_TIMEOUT_S,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "trtpool.broker.cli", "start", *write_models(folder, models),
                f"--run-dir={self.run_dir}", *(f"--{name}={value}" for name, value in options.items()),
            ],
            env={**self.environment, "PYTHONPATH": path}, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            ready = wait_for(lambda: self.process.poll() is not None or b"ready:" in self.said())
            if not ready or self.process.returncode is not None:
                raise SystemExit(f"the pool did not start; it said:\n{self.said().decode()}")
            self.client = trtpool.connect(run_dir=self.run_dir)
        except BaseException:
            self.process.kill()
            self.process.wait()
            self.log.close()
            raise
        self.at_rest = self.holdings()

    def said(self) -> bytes:
        """The pool's log."""
        return (self.folder / "pool.log").read_bytes()

    def pids(self, module: str) -> list[int]:
        """The pool's processes of one kind, oldest first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            return sorted(child.pid for child in children if module_of(child) == module)
        return []

    def report(self) -> PoolReport:
        return self.client.status()

    def holdings(self) -> dict[str, int]:
        """Descriptors of supervisor and broker, which are the same whenever the same peers are there."""
        (broker,) = self.pids("trtpool.broker")
        return {"supervisor": descriptors(self.process.pid), "broker": descriptors(broker)}

    def is_at_rest(self) -> bool:
        """Whether all slots are free, all workers there, and nobody else is connected."""
        now = self.report()
        return (
            all(model.free == model.slots and not model.waiting for model in now.models)
            and len(now.workers) == self.workers
            and now.producers == 1
        )

    def leaks_at_rest(self) -> list[str]:
        """What is left in the pool when all others have gone."""
        if not wait_for(self.is_at_rest):
            return [f"the pool did not come to rest: {self.report()}"]
        # A peer's descriptors are closed in the turn after its slots are free.
        if not wait_for(lambda: self.holdings() == self.at_rest, 10):
            return [f"descriptors: {self.holdings()}, and {self.at_rest} at the start"]
        return []

    def leaks_at_the_end(self) -> list[str]:
        """Stop the pool; what is left of it afterwards."""
        leaks = []
        (broker,) = self.pids("trtpool.broker")
        arena = memfds(broker)
        self.client.close()
        del self.client  # the mapping goes with it
        gc.collect()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        if code:
            leaks.append(f"the pool ended with exit code {code}")
        self.log.close()
        psutil.wait_procs(self.survivors(), timeout=10)
        for process in self.survivors():
            leaks.append(f"process {process.pid}: {module_of(process)}")
            process.kill()
        if not arena:
            leaks.append("the broker held no arena, so its end was not checked")
        leaks += [f"process {pid} still holds the arena" for pid in holders(arena)]
        if self.run_dir.exists():
            leaks.append(f"the run directory: {[path.name for path in self.run_dir.iterdir()]}")
        if str(self.run_dir) in Path("/proc/net/unix").read_text():
            leaks.append("a socket in the run directory")
        return leaks

    def survivors(self) -> list[psutil.Process]:
        """Living processes of this soak but this one."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def memfds(pid: int) -> set[int]:
    """Inodes of the memfds that a process has open."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile, as the listing's own is
            if os.readlink(link).startswith("/memfd:"):  # noqa: PTH115
                found.add(os.stat(link).st_ino)  # noqa: PTH116
    return found


def holders(inodes: set[int]) -> list[int]:
    """Processes that map one of these memfds, or have it open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            maps = (folder / "maps").read_text().splitlines()
            mapped = {int(line.split()[4]) for line in maps if " /memfd:" in line}
            if inodes & (mapped | memfds(int(folder.name))):
                found.append(int(folder.name))
    return found
