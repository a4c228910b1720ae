"""Real pools and real producers to test with.

Nothing here sleeps for a time that a test relies on.  What is waited for is a line, the end of a process (by pidfd),
or a figure of `status`.  A worker that is stopped by SIGSTOP holds work where it is: a batch or two are RUNNING,
and all others stay QUEUED.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import pytest

import trtpool
from trtpool.ipc.process import wait_ended
from trtpool.ipc.report import ModelReport

T = TypeVar("T")
ProcessT = TypeVar("ProcessT", bound="Process")

PATIENCE_S = float(os.environ.get("TRTPOOL_TEST_PATIENCE_S", "40"))
"""How long anything may take before a test gives up on it; no judgement about speed."""

LOOK_AGAIN_S = 0.002

CLI = (sys.executable, "-m", "trtpool.broker.cli")

# y = -x, the smallest useful model.
NEGATE = "negate (float[N,4] x) => (float[N,4] y) { y = Neg(x) }"

# Items of one float that come back as they were, after about a tenth of a second.
SLOW = (
    "slow (float[N,1] x) => (float[N,1] y) <int64[2] shape = {1400, 1400}, float zero = {0}> {"
    " w = ConstantOfShape(shape) m = ReduceMax<keepdims=0>(x) v = Add(w, m)"
    " p = MatMul(v, v) q = MatMul(p, v) s = ReduceMax<keepdims=0>(q) z = Mul(s, zero) y = Add(x, z) }"
)


def wait_until(happened: Callable[[], T], what: str = "it", seen: Callable[[], object] = str) -> T:
    """Look until `happened` returns something true, and return that; else `seen` is what is shown."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := happened()):
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE_S:.0f} s: {seen()}"
        select.select([], [], [], LOOK_AGAIN_S)
    return value


def command_of(process: psutil.Process) -> str:
    """The module that one of our processes runs, such as "trtpool.broker"; "" if it has ended."""
    with contextlib.suppress(psutil.Error, IndexError):  # a zombie has no command line
        return process.cmdline()[-1]
    return ""


def family(pid: int) -> list[psutil.Process]:
    """All living descendants of a process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


@contextlib.contextmanager
def watching(pids: Iterable[int]) -> Iterator[Callable[[], None]]:
    """Pidfds of processes that live now; what is yielded waits for the end of all."""
    with contextlib.ExitStack() as stack:
        pidfds = {}
        for pid in pids:
            pidfds[pid] = os.pidfd_open(pid)
            stack.callback(os.close, pidfds[pid])

        def wait() -> None:
            for pid, pidfd in pidfds.items():
                assert wait_ended(pidfd, PATIENCE_S), f"process {pid} lives on"

        yield wait


# --- What must not be left -----------------------------------------------------------------------


def descriptors(pid: int) -> list[str]:
    """What a process has open, such as "socket", "memfd" or a path; sorted."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.append(str(link.readlink()).partition(":[")[0])
    return sorted(found)


def memfds(pid: int) -> dict[int, Path]:
    """The memfds that a process has open, by inode: where to open or stat them."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(link.readlink()).startswith("/memfd:"):
                found[link.stat().st_ino] = link
    return found


def holders(inodes: Collection[int]) -> list[int]:
    """Processes that map one of these memfds, or have it open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            maps = (folder / "maps").read_text().splitlines()
            mapped = {int(line.split()[4]) for line in maps if " /memfd:" in line}
            if not mapped.union(memfds(int(folder.name))).isdisjoint(inodes):
                found.append(int(folder.name))
    return found


def lock_is_free(run_dir: Path) -> bool:
    """Whether a run directory belongs to nobody: its lock is there and is not held."""
    with (run_dir / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class Process:
    """A child whose output is read by line; ended, if need be, at the end of the ``with``."""

    def __init__(self, *command: str | os.PathLike[str], env: Mapping[str, str] | None = None, cwd: Path | None = None):
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            bufsize=0,
        )
        self.pid = self.popen.pid
        self._seen = {1: b"", 2: b""}
        self._read = {1: b"", 2: b""}

    def _take(self, number: int) -> bool:
        """Read what there is, or wait for it; False at the end."""
        pipe = self.popen.stdout if number == 1 else self.popen.stderr
        assert pipe is not None
        ready, _, _ = select.select([pipe], [], [], PATIENCE_S)
        assert ready, f"nothing was printed within {PATIENCE_S:.0f} s; so far: {self._seen}"
        data = os.read(pipe.fileno(), 65536)
        self._seen[number] += data
        self._read[number] += data
        return bool(data)

    def line(self, number: int = 1) -> str:
        """The next line of standard output, or of standard error (2)."""
        while b"\n" not in self._read[number]:
            assert self._take(number), f"it ended; it printed: {self._seen}, {self.rest(2)}"
        line, _, self._read[number] = self._read[number].partition(b"\n")
        return line.decode()

    def wait_for_line(self, part: str, number: int = 1) -> str:
        """Read lines until one has `part`."""
        while part not in (line := self.line(number)):
            pass
        return line

    def rest(self, number: int) -> str:
        """What is left to read, to the end of the stream."""
        while self._take(number):
            pass
        text, self._read[number] = self._read[number].decode(), b""
        return text

    def say(self, line: str = "") -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line.encode() + b"\n")

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.popen.send_signal(number)

    def wait(self) -> int:
        return self.popen.wait(PATIENCE_S)

    def succeed(self) -> str:
        """Wait for a good end without a word on standard error; returns the rest of standard output."""
        out, err = self.rest(1), self.rest(2)
        assert (self.wait(), err) == (0, ""), f"{self._seen}"
        return out

    def __enter__(self: ProcessT) -> ProcessT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class StartedPool(Process):
    """`trtpool start`, ready; nothing of it may be left after the ``with``, however it ended.

    Args:
        models, run_dir, options: as on the command line.
        env: added to the environment.
        through: a command that runs it.

    Attributes:
        run_dir: where it is.
        announced: what it printed.
        memfds: inodes of its arena and its table.
    """

    def __init__(
        self,
        *models: str | os.PathLike[str],
        run_dir: Path,
        env: Mapping[str, str] | None = None,
        through: Iterable[str] = (),
        **options: Any,
    ):
        self.run_dir = run_dir
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        super().__init__(*through, *CLI, "start", *models, f"--run-dir={run_dir}", *flags, env=env)
        self.announced = ""
        try:
            while "ready:" not in self.announced:
                self.announced += self.line() + "\n"
            self.memfds = set(memfds(self.pid))
            assert len(self.memfds) == 2, "the arena and the table"
            self._workers = len(self.pids("trtpool.workers"))
            self._at_rest = self._holdings()
        except BaseException:
            super().__exit__(None, None, None)
            raise

    def _holdings(self) -> dict[str, list[str]]:
        """Descriptors of supervisor and broker, which are the same whenever the same peers are there."""
        return {"supervisor": descriptors(self.pid), "broker": descriptors(self.broker)}

    def check_at_rest(self) -> None:
        """Assert that of all its clients, which have left, nothing is left: no slot, request, descriptor or mapping.

        It is waited for: the end of a process is noticed in the next turn, and another worker takes its time.
        """
        wait_until(lambda: not self._left(), "it is at rest", self._left)

    def _left(self) -> list[str]:
        """What would not be there if nobody had used it."""
        with self.connect() as client:
            now = client.status()
        left = [str(model) for model in now.models if model.free != model.slots or model.waiting]
        if (len(now.workers), now.producers) != (self._workers, 1):
            left.append(f"{len(now.workers)} workers, {now.producers} producers")
        if (holdings := self._holdings()) != self._at_rest:
            left.append(f"descriptors: {holdings}, at rest {self._at_rest}")
        own = {self.pid, *(process.pid for process in family(self.pid))}
        if held := own.symmetric_difference(set(holders(self.memfds)) - {os.getpid()}):
            left.append(f"they hold its memory, or are to hold it and do not: {held}")
        return left

    def check_nothing_left(self) -> None:
        """Assert that of the pool, which has ended, nothing is left but a run directory whose lock is free.

        This process may still map the arena: what a test keeps of it is looked for by the fixture `nothing_left`.
        """
        wait_until(
            lambda: not set(holders(self.memfds)) - {os.getpid()},
            "all memory is given back",
            lambda: [psutil.Process(pid) for pid in holders(self.memfds)],
        )
        wait_until(lambda: str(self.run_dir) not in Path("/proc/net/unix").read_text(), "no socket is left")
        assert not self.run_dir.exists() or lock_is_free(self.run_dir)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is None:
            self.check_nothing_left()

    def connect(self, transport: str = "lifeline") -> trtpool.Client:
        return trtpool.connect(run_dir=self.run_dir, transport=transport)

    def pids(self, module: str) -> list[int]:
        """The processes of this pool that run a module."""
        return [process.pid for process in family(self.pid) if command_of(process) == module]

    @property
    def broker(self) -> int:
        """Its broker, by pid; the next one, if one has just ended."""
        (pid,) = wait_until(lambda: self.pids("trtpool.broker"), "there is a broker")
        return pid

    @property
    def worker(self) -> int:
        (pid,) = self.pids("trtpool.workers")
        return pid

    @contextlib.contextmanager
    def stopped_worker(self) -> Iterator[int]:
        """Its only worker, by pid, standing still; goes on at the end, unless it was killed."""
        pid = self.worker
        os.kill(pid, signal.SIGSTOP)
        try:
            yield pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def stop(self) -> None:
        """Drain it, and see it end well."""
        self.kill(signal.SIGTERM)
        assert self.succeed() == ""


@contextlib.contextmanager
def pool_of_ones_own(model: Path, run_dir: Path, **options: Any) -> Iterator[StartedPool]:
    """A pool for one test: at rest in the end, which then ends well unless the test ended it."""
    with StartedPool(model, run_dir=run_dir, **options) as pool:
        yield pool
        if pool.popen.poll() is None:
            pool.check_at_rest()
            pool.kill(signal.SIGTERM)
            assert pool.wait() == 0
    assert not run_dir.exists()


def figures(client: trtpool.Client, model: int = 0) -> ModelReport:
    return client.status().models[model]


def wait_all_free(client: trtpool.Client) -> None:
    """Wait until every slot of every model is free; what the client is granted in advance it gives back."""

    def all_free() -> bool:
        models = client.status().models
        for number in range(len(models)):
            client.session.requests.return_spares(number)
        return all(model.free == model.slots for model in models)

    wait_until(all_free, "all slots free", client.status)


def producer(pool: StartedPool, code: str, *arguments: object, transport: str = "lifeline") -> Process:
    """A process that runs `code` with a connected `pool`, and `wait()`, which prints a word and waits for a line."""
    head = """
        import os, sys, warnings
        import numpy as np
        import trtpool

        # From 3.12 on Python says so of every fork beside a thread; some of this code is there to do just that.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

        def wait(word):
            os.write(1, (word + os.linesep).encode())  # in one piece, beside what a forked child writes
            sys.stdin.readline()

        run_dir = sys.argv[1]
        pool = trtpool.connect(run_dir=run_dir, transport=os.environ["TRANSPORT"])
    """
    text = textwrap.dedent(head) + textwrap.dedent(code)
    return Process(sys.executable, "-c", text, pool.run_dir, *map(str, arguments), env={"TRANSPORT": transport})


# --- Work for the model NEGATE ---


def ones(value: float = 1) -> npt.NDArray[Any]:
    return np.full(4, value, np.float32)


def submit(client: trtpool.Client, value: float, deadline_s: float | None = None) -> trtpool.Submitted:
    """Lease a slot, write `value` and submit it; it is released by whoever reads it."""
    lease = client.lease(model="negate", timeout_s=30)
    lease.inputs["x"][...] = value
    return lease.submit(deadline_s=deadline_s)


def answer(submitted: trtpool.Submitted) -> float:
    """The result of `submit`, whose slot is released."""
    with submitted.result(timeout_s=60) as result:
        return float(result.outputs["y"].max())


def hold(client: trtpool.Client, values: list[float]) -> list[trtpool.Submitted]:
    """Submit to a pool whose worker stands still: the first is RUNNING, the others are RUNNING or QUEUED."""
    work = []
    for count, value in enumerate(values, 1):
        work.append(submit(client, value))
        wait_until(lambda: _in_flight(client) == count, "it is in flight", client.status)  # noqa: B023
    assert figures(client).running >= 1
    return work


def only_the_third_ends_workers(client: trtpool.Client, how: str) -> None:
    """Four items of `NEGATE` in one batch, the third of them 13, which ends workers: it fails alone, as `how` says."""
    with client.lease_many(4) as leases:
        work = []
        for index, slot in enumerate(leases.slots()):
            slot.inputs["x"][...] = 13 if index == 2 else index
            work.append(slot.submit())
        with pytest.raises(trtpool.WorkerDied, match=how):
            work[2].result(timeout_s=60)
        assert [answer(work[index]) for index in (0, 1, 3)] == [0, -1, -3]
        work[2].release()
        wait_all_free(client)


def _in_flight(client: trtpool.Client) -> int:
    now = figures(client)
    return now.running + now.queued
