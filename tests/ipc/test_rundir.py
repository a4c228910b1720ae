from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtpool.ipc import rundir
from trtpool.ipc.errors import NameInUse, PoolNotFound, RunDirError
from trtpool.ipc.process import wait_ended
from trtpool.ipc.rundir import (
    LIFELINE,
    LOCK,
    SUN_PATH_BYTES,
    ZMQ_PREFIX,
    RunDir,
    check_path_length,
    check_private,
    default_root,
    run_dir_of,
    running_supervisor,
    stop,
)

NET_S = 60.0

SUPERVISOR = """
import signal, sys
from pathlib import Path
from trtpool.ipc.rundir import RunDir
mine = RunDir.claim(Path(sys.argv[1]))
signal.signal(signal.SIGTERM, lambda *_: (mine.release(), sys.exit(0)))
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("claimed", flush=True)
signal.pause()
"""


@pytest.fixture
def base() -> Iterator[Path]:
    """A short directory: pytest's own may be too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="trt", dir="/tmp") as found:
        yield Path(found)


@contextlib.contextmanager
def supervisor(path: Path, kind: str = "polite") -> Iterator[subprocess.Popen[bytes]]:
    """Another process that claims `path` and lives until SIGTERM."""
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(path), kind], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"claimed\n"
            yield child
        finally:
            child.kill()


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(path))


def descriptors() -> set[str]:
    gc.collect()  # what tests before this one dropped must not go while it runs
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


# --- Which directory ---


def test_a_run_dir_that_is_named_goes_first_then_the_environments_then_the_default(base, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    monkeypatch.delenv("TRTPOOL_RUN_DIR", raising=False)
    assert run_dir_of() == base / "trtpool" / "default"
    assert run_dir_of("other") == base / "trtpool" / "other"
    monkeypatch.setenv("TRTPOOL_RUN_DIR", str(base / "env"))
    assert run_dir_of("other") == base / "env"
    assert run_dir_of("other", base / "named") == base / "named"
    monkeypatch.chdir(base)
    assert run_dir_of(run_dir="here/../there") == base / "there"


@pytest.mark.parametrize("runtime", [None, "", "/no/such/directory"])
def test_without_a_runtime_directory_it_is_in_tmp(monkeypatch, runtime):
    monkeypatch.delenv("TRTPOOL_RUN_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if runtime is not None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    assert default_root() == Path(f"/tmp/trtpool-{os.getuid()}")


def test_the_longest_path_that_is_taken_is_one_that_sockets_take(base):
    longest = len(str(base / f"{ZMQ_PREFIX}{2**16}"))
    fits = base / ("x" * (SUN_PATH_BYTES - longest - 1))
    check_path_length(fits)
    fits.mkdir()
    put_socket(fits / f"{ZMQ_PREFIX}{2**16}")
    with pytest.raises(RunDirError, match=r"1 bytes too long .* choose a shorter one with --run-dir"):
        check_path_length(Path(f"{fits}x"))
    with pytest.raises(RunDirError, match="too long"):
        RunDir.claim(base / ("ü" * 60))
    assert not (base / ("ü" * 60)).exists()


# --- Whose it may be ---


def a_link(path: Path) -> None:
    path.with_name("target").mkdir(mode=0o700)
    path.symlink_to("target")


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def a_file(path: Path) -> None:
    path.write_text("mine")


def open_to_others(path: Path) -> None:
    path.mkdir()
    path.chmod(0o750)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (a_link, "is a symbolic link, which is refused"),
        (a_dangling_link, "is not a directory"),
        (a_file, "is not a directory"),
        (open_to_others, "has mode 0750, so others could get in; run: chmod 700"),
    ],
)
def test_a_directory_that_is_refused(base, make, reason):
    path = base / "pool"
    make(path)
    before, open_before = sorted(base.rglob("*")), descriptors()
    with pytest.raises(RunDirError, match=reason):
        RunDir.claim(path)
    assert sorted(base.rglob("*")) == before, "nothing was made or removed"
    assert descriptors() == open_before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_anothers_directory_is_refused(base):
    path = base / "pool"
    path.mkdir(mode=0o700)
    os.chown(path, 12345, -1)
    with pytest.raises(RunDirError, match="belongs to uid 12345, not to you; choose another with --run-dir"):
        RunDir.claim(path)
    with pytest.raises(RunDirError, match="belongs to uid 12345"):
        running_supervisor(path)
    assert list(path.iterdir()) == []


def test_a_directory_seen_as_anothers_is_refused(base, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(RunDirError, match="belongs to uid"):
        check_private(base)


def test_what_cannot_be_made_is_said(base):
    with pytest.raises(RunDirError, match="cannot be made: No such file or directory; choose another"):
        RunDir.claim(base / "no" / "pool")
    a_file(base / "file")
    with pytest.raises(RunDirError, match="cannot be made: Not a directory"):
        RunDir.claim(base / "file" / "pool")
    with pytest.raises(RunDirError, match="cannot be used: No such file"):
        check_private(base / "no")


def test_the_default_roots_directory_is_made_and_checked_before_anything_is_made_in_it(base, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    with contextlib.closing(contextlib.ExitStack()) as stack:
        claimed = RunDir.claim(base / "trtpool" / "pool")
        stack.callback(claimed.release)
        assert (base / "trtpool").stat().st_mode & 0o777 == 0o700
    (base / "trtpool").rmdir()
    elsewhere = base / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (base / "trtpool").symlink_to(elsewhere)
    with pytest.raises(RunDirError, match=r"directory of run directories .* symbolic link"):
        RunDir.claim(base / "trtpool" / "pool")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_a_lock_that_is_no_file_is_refused(base, kind):
    path = base / "pool"
    path.mkdir(mode=0o700)
    victim = base / "victim"
    victim.write_text("precious")
    if kind == "link":
        (path / LOCK).symlink_to(victim)
    else:
        (path / LOCK).mkdir()
    for call in (RunDir.claim, running_supervisor):
        with pytest.raises(RunDirError, match=r"the lock .* cannot be opened"):
            call(path)
    assert victim.read_text() == "precious"


# --- Claimed, left over, released ---


def test_a_claim_is_private_and_says_who(base):
    before = descriptors()
    claimed = RunDir.claim(base / "pool")
    assert claimed.path == base / "pool"
    assert claimed.path.stat().st_mode & 0o777 == 0o700
    assert (claimed.path / LOCK).stat().st_mode & 0o777 == 0o600
    assert (claimed.path / LOCK).read_text() == f"{os.getpid()}\n"
    put_socket(claimed.path / LIFELINE)
    claimed.release()
    assert not claimed.path.exists()
    claimed.release()
    assert descriptors() == before


def test_a_claim_under_any_umask_is_private(base):
    for mask in (0o000, 0o077):
        old = os.umask(mask)
        try:
            claimed = RunDir.claim(base / "pool")
        finally:
            os.umask(old)
        assert claimed.path.stat().st_mode & 0o777 == 0o700
        claimed.release()


def test_two_pools_cannot_have_one_directory(base):
    with supervisor(base / "pool") as child:
        before = descriptors()
        with pytest.raises(NameInUse, match=rf"\(pid {child.pid}\); stop it with `trtpool stop`"):
            RunDir.claim(base / "pool")
        assert descriptors() == before
        assert (base / "pool" / LOCK).read_text() == f"{child.pid}\n"


def test_what_a_killed_pool_left_is_removed_and_what_others_put_there_is_kept(base):
    path = base / "pool"
    with supervisor(path) as child:
        put_socket(path / LIFELINE)
        put_socket(path / f"{ZMQ_PREFIX}1")
        put_socket(path / "theirs.sock")
        (path / f"{ZMQ_PREFIX}notes").write_text("a file, and no socket")
        (path / "notes").write_text("theirs")
        child.kill()
        child.wait()
    assert (path / LIFELINE).exists()
    claimed = RunDir.claim(path)
    kept = {"theirs.sock", f"{ZMQ_PREFIX}notes", "notes"}
    assert {entry.name for entry in path.iterdir()} == {LOCK, *kept}
    assert (path / LOCK).read_text() == f"{os.getpid()}\n"
    claimed.release()
    assert {entry.name for entry in path.iterdir()} == kept


def test_one_who_waits_while_the_last_holder_removes_the_lock_starts_anew(base, monkeypatch):
    """Else it would hold a lock that nobody can see, and the next claim would succeed beside it."""
    path = base / "pool"
    real = fcntl.flock
    removed: list[Path] = []

    def flock(fd: int, how: int) -> None:
        if not removed:  # between our open and our lock, the holder releases
            removed.append(path / LOCK)
            (path / LOCK).unlink()
            path.rmdir()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    before = descriptors()
    claimed = RunDir.claim(path)
    assert removed
    with pytest.raises(NameInUse):
        RunDir.claim(path)
    claimed.release()
    assert descriptors() == before


def test_a_claim_that_fails_after_the_lock_unlocks(base, monkeypatch):
    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(rundir, "_remove_leftovers", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            RunDir.claim(base / "pool")
    assert descriptors() == before
    RunDir.claim(base / "pool").release()


# --- Who runs there ---


def test_a_running_supervisor_is_found_and_stopped(base):
    with supervisor(base / "pool") as child:
        pidfd = running_supervisor(base / "pool")
        try:
            assert not wait_ended(pidfd, 0)
            assert stop(base / "pool", NET_S)
            assert wait_ended(pidfd, 0)
        finally:
            os.close(pidfd)
        assert child.wait() == 0
    assert not (base / "pool").exists()


def test_one_that_does_not_end_in_time(base):
    with supervisor(base / "pool", "deaf") as child:
        before = descriptors()
        assert stop(base / "pool", 0) is False
        assert descriptors() == before
        assert child.poll() is None


def no_directory(path: Path) -> None:
    pass


def no_lock(path: Path) -> None:
    path.mkdir(mode=0o700)


def an_empty_lock(path: Path) -> None:
    no_lock(path)
    (path / LOCK).touch()


def garbage_in_the_lock(path: Path) -> None:
    no_lock(path)
    (path / LOCK).write_bytes(b"\xff\x00garbage")


def a_killed_pools_lock(path: Path) -> None:
    with supervisor(path) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()


def a_reused_pid(path: Path) -> None:
    """The lock is free, and the pid in it is that of a process that lives: this one."""
    no_lock(path)
    (path / LOCK).write_text(f"{os.getpid()}\n")


@pytest.mark.parametrize(
    "make", [no_directory, no_lock, an_empty_lock, garbage_in_the_lock, a_killed_pools_lock, a_reused_pid]
)
def test_where_no_pool_runs_nobody_is_signalled(base, make, monkeypatch):
    make(base / "pool")
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: pytest.fail("a signal to a stranger"))
    before = descriptors()
    for call in (running_supervisor, lambda path: stop(path, 0)):
        with pytest.raises(PoolNotFound, match=r"no pool runs in .*; start one with `trtpool start`"):
            call(base / "pool")
    assert descriptors() == before


def test_a_lock_that_is_held_by_one_who_has_not_said_who_it_is_yet(base, monkeypatch):
    """Its pid is not there yet, and a dead pool's must not be taken for it."""
    path = base / "pool"
    a_reused_pid(path)
    seen = []

    def look(where: Path) -> None:
        seen.append((where / LOCK).read_text())

    monkeypatch.setattr(rundir, "_remove_leftovers", look)
    claimed = RunDir.claim(path)
    assert seen == [f"{os.getpid()}\n"], "said before anything else is done"
    claimed.release()


@pytest.mark.parametrize("make", [a_link, a_file, open_to_others])
def test_a_directory_that_is_not_ours_is_not_looked_into(base, make):
    make(base / "pool")
    with pytest.raises(RunDirError):
        running_supervisor(base / "pool")
