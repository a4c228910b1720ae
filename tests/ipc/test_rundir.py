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


# --- The way to it ---


def writable_by_all(base: Path) -> Path:
    (base / "open").mkdir()
    (base / "open").chmod(0o777)
    return base / "open" / "run"


def above_it(base: Path) -> Path:
    path = writable_by_all(base).parent / "mine" / "run"
    path.parent.mkdir(mode=0o700)
    return path


def a_link_there(base: Path) -> Path:
    """The link is in a good place and leads to a bad one."""
    (base / "link").symlink_to(writable_by_all(base).parent)
    return base / "link" / "run"


def a_link_to_above(base: Path) -> Path:
    target = above_it(base).parent
    (base / "link").symlink_to(f"../{base.name}/open/../open/{target.name}")
    return base / "link" / "run"


def a_good_link_in_a_bad_place(base: Path) -> Path:
    link = writable_by_all(base).with_name("link")
    link.symlink_to(base)
    return link / "run"


def writable_by_a_group(base: Path) -> Path:
    path = writable_by_all(base)
    os.chown(path.parent, -1, 12345)
    path.parent.chmod(0o775)
    return path


def anothers(base: Path) -> Path:
    (base / "theirs").mkdir()
    os.chown(base / "theirs", 12345, -1)
    return base / "theirs" / "run"


def anothers_sticky(base: Path) -> Path:
    path = anothers(base)
    path.parent.chmod(0o1777)
    return path


def anothers_link_in_a_sticky_place(base: Path) -> Path:
    base.chmod(0o1777)
    (base / "mine").mkdir(mode=0o700)
    (base / "link").symlink_to("mine")
    os.chown(base / "link", 12345, -1, follow_symlinks=False)
    return base / "link" / "run"


as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (writable_by_all, "open has mode 0777"),
        (above_it, "open has mode 0777"),
        (a_link_there, "open has mode 0777"),
        (a_link_to_above, "open has mode 0777"),
        (a_good_link_in_a_bad_place, "open has mode 0777"),
        pytest.param(writable_by_a_group, "open has mode 0775", marks=as_root),
        pytest.param(anothers, "theirs belongs to uid 12345", marks=as_root),
        pytest.param(anothers_sticky, "theirs belongs to uid 12345", marks=as_root),
        pytest.param(anothers_link_in_a_sticky_place, "link belongs to uid 12345", marks=as_root),
    ],
)
def test_a_way_that_somebody_else_could_change_is_refused(base, make, reason):
    path = make(base)
    before = sorted(base.rglob("*"))
    with pytest.raises(RunDirError, match=rf"could be exchanged by others, since /.*{reason}; choose another place"):
        RunDir.claim(path)
    assert sorted(base.rglob("*")) == before


def in_a_sticky_place(base: Path) -> Path:
    base.chmod(0o1777)
    return base / "run"


def through_links_of_ours(base: Path) -> Path:
    (base / "real").mkdir()
    (base / "one").symlink_to("real")
    (base / "two").symlink_to(base / "one")
    return base / "two" / "run"


def in_a_place_of_our_own_group(base: Path) -> Path:
    """As home directories are on many systems, where each user has a group."""
    base.chmod(0o775)
    os.chown(base, -1, os.getgid())
    return base / "run"


@pytest.mark.parametrize("make", [in_a_sticky_place, through_links_of_ours, in_a_place_of_our_own_group])
def test_a_way_that_only_we_and_root_can_change_is_taken(base, make):
    path = make(base)
    RunDir.claim(path).release()
    assert not path.exists()


def test_links_in_a_circle_end(base):
    (base / "a").symlink_to("b")
    (base / "b").symlink_to("a")
    with pytest.raises(RunDirError, match="too many links"):
        RunDir.claim(base / "a" / "run")


# --- Several users ---


def test_for_several_users_all_may_pass_and_nobody_may_look(base):
    base.chmod(0o755)
    claimed = RunDir.claim(base / "pool", shared=True)
    assert claimed.path.stat().st_mode & 0o777 == 0o711
    assert (claimed.path / LOCK).stat().st_mode & 0o777 == 0o600
    claimed.release()


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_killed_pool_with_other_users_left_is_taken_over(base, shared):
    base.chmod(0o755)
    left = RunDir.claim(base / "pool", shared=not shared)
    os.close(left._lock_fd)
    claimed = RunDir.claim(base / "pool", shared=shared)
    assert claimed.path.stat().st_mode & 0o777 == (0o711 if shared else 0o700)
    claimed.release()


@pytest.mark.parametrize(("shared", "mode", "wanted"), [(False, 0o711, "700"), (True, 0o700, "711")])
def test_the_mode_of_a_directory_with_other_files_is_not_ours_to_change(base, shared, mode, wanted):
    base.chmod(0o755)
    path = base / "pool"
    path.mkdir()
    (path / "notes").touch()
    path.chmod(mode)
    with pytest.raises(RunDirError, match=f"has mode {mode:04o} and holds other files .* run: chmod {wanted}"):
        RunDir.claim(path, shared=shared)
    assert [entry.name for entry in path.iterdir()] == ["notes"]
    assert path.stat().st_mode & 0o777 == mode


def test_for_several_users_it_must_be_where_they_can_get_to(base):
    base.chmod(0o700)
    with pytest.raises(RunDirError, match=rf"cannot get to .* since {base} has mode 0700; choose another"):
        RunDir.claim(base / "pool", shared=True)
    assert not (base / "pool").exists()


def test_a_runtime_directory_that_cannot_be_looked_at_is_none(monkeypatch):
    """As after su, which keeps the environment of another user."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/12345")

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert default_root() == Path(f"/tmp/trtpool-{os.getuid()}")


# --- Claimed, left over, released ---


def test_a_claim_is_private_and_says_who(base):
    before = descriptors()
    claimed = RunDir.claim(base / "pool")
    assert claimed.path == base / "pool"
    assert claimed.path.stat().st_mode & 0o777 == 0o700
    assert (claimed.path / LOCK).stat().st_mode & 0o777 == 0o600
    assert (claimed.path / LOCK).read_text().split()[0] == str(os.getpid())
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
        assert (base / "pool" / LOCK).read_text().split()[0] == str(child.pid)


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
    assert (path / LOCK).read_text().split()[0] == str(os.getpid())
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
    assert [text.split()[0] for text in seen] == [str(os.getpid())], "said before anything else is done"
    claimed.release()


def test_a_pool_of_another_container_is_not_taken_for_a_process_of_this_one(base, monkeypatch):
    """Its pid is a number of another pid namespace."""
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: pytest.fail("a signal to a stranger"))
    claimed = RunDir.claim(base / "pool")
    (claimed.path / LOCK).write_text(f"{os.getpid()} pid:[1]\n")
    before = descriptors()
    for call in (running_supervisor, lambda path: stop(path, 0)):
        with pytest.raises(RunDirError, match="runs in another container"):
            call(claimed.path)
    assert descriptors() == before
    claimed.release()
    with pytest.raises(PoolNotFound):
        running_supervisor(base / "pool")


@pytest.mark.parametrize("make", [a_link, a_file, open_to_others])
def test_a_directory_that_is_not_ours_is_not_looked_into(base, make):
    make(base / "pool")
    with pytest.raises(RunDirError):
        running_supervisor(base / "pool")
