"""What holds for every test: no time limits inside, none outlives its net, nothing is left behind.

The net (`timeout` in pyproject.toml) is far above what any test needs.  It raises in the test, so that
fixtures still end their children; it is no assertion about speed.

GPU tests carry `@pytest.mark.gpu`, and `@pytest.mark.gpu2` too if they need two.  Without them they are skipped; where
so many were promised (``TRTPOOL_REQUIRE_GPU=1``, or 2) every skip of theirs is a failure.

Tests with real processes carry `@pytest.mark.system`, as all in tests/system do by themselves.  What they
start inherits a mark in its environment, by which survivors are found wherever they were re-parented to,
ended, and reported.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
MARK = "TRTPOOL_TEST_MARK"
GRACE_S = 10.0
"""How long a process may take to end after its test, in seconds; one that lives on is a leak."""

# Children must find this tree's trtpool from any directory, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / ".src"), *filter(None, [os.environ.get("PYTHONPATH")])])

# A loaded machine is no bug, so hypothesis may not judge speed.  CI repeats the same examples, a desk looks
# for new ones.
hypothesis.settings.register_profile(
    "trtpool",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("trtpool")

# A shell has its background commands ignore interrupts, and so would all that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "system"):
            item.add_marker("system")


# --- GPU -----------------------------------------------------------------------------------------


def gpus_promised() -> int:
    return int(os.environ.get("TRTPOOL_REQUIRE_GPU") or 0)


def gpus_needed(item: pytest.Item) -> int:
    return 2 if item.get_closest_marker("gpu2") else 1 if item.get_closest_marker("gpu") else 0


@functools.cache
def gpu_count() -> int:
    """Number of CUDA devices, asked by a child: a driver started here would stay in this process."""
    ask = (
        "import ctypes\n"
        "n = ctypes.c_int(0)\n"
        "cuda = ctypes.CDLL('libcuda.so.1')\n"
        "print(n.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(n)) == 0 else 0)\n"
    )
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    return int(answer.stdout) if answer.returncode == 0 else 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = gpus_needed(item)
    if needed and gpu_count() < needed:
        pytest.skip(f"{gpu_count()} CUDA devices, {needed} needed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and 0 < gpus_needed(item) <= gpus_promised() and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"TRTPOOL_REQUIRE_GPU is set, and yet: {report.longrepr}"
    return report


# --- Leaks ---------------------------------------------------------------------------------------


def marked_processes(mark: str) -> list[psutil.Process]:
    """Living processes, other than this one, that were started with `mark` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:  # ended meanwhile, or another user's
            continue
    return found


def end_survivors(mark: str) -> list[str]:
    """Wait for the processes of `mark`, end those that stay, and return their command lines."""
    psutil.wait_procs(marked_processes(mark), timeout=GRACE_S)
    ended = []
    while survivors := marked_processes(mark):  # again, for one may have started another meanwhile
        for process in survivors:
            try:
                ended.append(f"{process.pid}: {' '.join(process.cmdline())}")
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(survivors, timeout=GRACE_S)
    return ended


def memory_held() -> dict[str, int]:
    """Count what this process holds of others' memory and lives: memfds, their mappings, pidfds."""
    counts = {"memfd": 0, "memfd mapping": 0, "pidfd": 0}
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:  # the directory's own descriptor
            continue
        counts["memfd"] += target.startswith("/memfd:")
        counts["pidfd"] += target == "anon_inode:[pidfd]"
    counts["memfd mapping"] = Path("/proc/self/maps").read_text().count(" /memfd:")
    return counts


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a `system` test after which a process that it started, a memfd or a pidfd is left."""
    if not request.node.get_closest_marker("system"):
        yield
        return
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    gc.collect()
    before = memory_held()
    yield
    ended = end_survivors(mark)  # before anything is asserted, so that none outlives a failure
    gc.collect()
    after = memory_held()
    assert not ended, "processes outlived the test and were ended:\n" + "\n".join(ended)
    assert after == before, f"left in this process: {after}, before the test: {before}"
