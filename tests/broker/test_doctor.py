"""`trtpool doctor` as a user runs it, and what it finds of pools that were killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from trtpool.broker.doctor import cli, kernel, leftovers
from trtpool.broker.doctor.asking import Answer
from trtpool.broker.doctor.finding import Finding, Host
from trtpool.ipc import rundir
from trtpool.ipc.probing import PACKAGES, PackageFound


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where run directories are."""
    monkeypatch.delenv("TRTPOOL_RUN_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "trtpool").mkdir(mode=0o700)
    monkeypatch.setattr(leftovers, "usual_roots", lambda: [tmp_path / "trtpool"])  # and nobody else's
    return tmp_path / "trtpool"


@pytest.fixture(autouse=True)
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that finds what the CPU needs, without importing it."""
    packages = {name: PackageFound(name, "1.0" if name == "onnxruntime" else "") for name in PACKAGES}
    monkeypatch.setattr(cli, "ask", lambda: Answer(packages, [], []))


@contextlib.contextmanager
def pool_in(path: Path) -> Iterator[None]:
    """A pool runs in `path`, as far as its directory tells."""
    claimed = rundir.RunDir.claim(path)
    try:
        yield
    finally:
        claimed.release()


def kill_pool_in(path: Path, mode: int = 0o700) -> None:
    """Leave what a pool leaves that was killed."""
    path.mkdir()
    for name in (rundir.LIFELINE, f"{rundir.ZMQ_PREFIX}1"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.bind(os.fspath(path / name))
    (path / rundir.LOCK).write_text("1\n")
    path.chmod(mode)


def look(run_dirs: list[Path], tmp_path: Path, *, fix: bool = False) -> list[Finding]:
    return list(leftovers.look(Host(tmp_path / "nothing"), run_dirs, fix=fix))


# --- Leftovers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o700, 0o711])
def test_what_a_killed_pool_left_is_found_and_removed(mode, root, tmp_path):
    kill_pool_in(root / "ocr", mode)
    found = look(leftovers.places(root / "default"), tmp_path)
    assert [(one.status, one.remedy) for one in found] == [("warning", "trtpool doctor --fix removes it")]
    assert str(root / "ocr") in found[0].text
    assert (root / "ocr" / rundir.LIFELINE).exists()
    (found_now,) = look(leftovers.places(root / "default"), tmp_path, fix=True)
    assert (found_now.status, found_now.text) == (
        "ok",
        f"{root / 'ocr'}, left over from a pool that was killed, is removed",
    )
    assert not (root / "ocr").exists()
    (nothing,) = look(leftovers.places(root / "default"), tmp_path)
    assert nothing.text == "no pool runs here as this user, and nothing is left of any"


def test_a_pool_that_runs_is_left_alone(root, tmp_path):
    with pool_in(root / "ocr"):
        for fix in (False, True):
            (found,) = look(leftovers.places(root / "default"), tmp_path, fix=fix)
            assert (found.status, found.text) == ("ok", f"a pool runs in {root / 'ocr'} (pid {os.getpid()})")
        assert (root / "ocr" / rundir.LOCK).exists()


@pytest.mark.parametrize(
    ("said", "shown"), [("", "just starting"), ("12 pid:[1]\n", "pid 12 of another container"), ("12\n", "pid 12")]
)
def test_a_pool_is_told_as_far_as_it_says_who_it_is(said, shown, root, tmp_path):
    with pool_in(root / "ocr"):
        (root / "ocr" / rundir.LOCK).write_text(said)
        (found,) = look([root / "ocr"], tmp_path)
        assert (found.check, found.text) == ("pools", f"a pool runs in {root / 'ocr'} ({shown})")


def test_a_pool_that_starts_meanwhile_is_left_alone(root, tmp_path, monkeypatch):
    kill_pool_in(root / "ocr")
    monkeypatch.setattr(leftovers, "_holder", lambda _: "")  # as it was a moment ago
    with pool_in(root / "ocr"):
        (found,) = look([root / "ocr"], tmp_path, fix=True)
        assert found.text == f"a pool has just started in {root / 'ocr'}"
        assert (root / "ocr" / rundir.LOCK).exists()


def test_other_files_are_nobodys_to_remove(root, tmp_path):
    kill_pool_in(root / "ocr")
    (root / "ocr" / "mine").write_text("data")
    (found,) = look([root / "ocr"], tmp_path, fix=True)
    assert found.text.endswith("other files in it stay")
    assert [path.name for path in (root / "ocr").iterdir()] == ["mine"]


def test_directories_that_are_no_run_directories_are_not_mentioned(root, tmp_path):
    (root / "mine").mkdir()
    (root / "file").touch()
    (root / "link").symlink_to(tmp_path)
    assert [one.check for one in look(leftovers.places(tmp_path / "none"), tmp_path)] == ["leftovers"]
    assert look([root / "mine", root / "file", tmp_path / "none"], tmp_path)[0].status == "ok"


def test_one_that_was_killed_while_it_removed_its_directory_is_found(root, tmp_path):
    kill_pool_in(root / "ocr")
    (root / "ocr" / rundir.LOCK).unlink()
    (found,) = look([root / "ocr"], tmp_path)
    assert found.status == "warning"


# --- Processes -----------------------------------------------------------------------------------


@pytest.fixture
def processes(tmp_path: Path) -> Callable[..., Host]:
    """Makes a /proc of processes: pid, parent, command."""

    def make(*rows: tuple[int, int, str]) -> Host:
        for pid, parent, command in rows:
            folder = tmp_path / "proc" / str(pid)
            folder.mkdir(parents=True)
            (folder / "cmdline").write_text(command.replace(" ", "\0") + "\0")
            (folder / "stat").write_text(f"{pid} (py) thon) S {parent} {pid} 0")
        return Host(tmp_path)

    return make


def test_children_without_their_supervisor_are_found(processes):
    host = processes(
        (1, 0, "/sbin/init"),
        (10, 1, "/usr/bin/python /usr/bin/trtpool start a.onnx"),
        (11, 10, "python -m trtpool.broker"),
        (12, 10, "python -m trtpool.workers"),
        (20, 1, "python -m trtpool.workers"),
        (21, 99, "python -m trtpool.broker"),
        (30, 1, "vim trtpool.workers"),
        (31, 1, "python -m http.server"),
        (40, 1, "python -m trtpool.broker.supervise"),
        (41, 40, "python -m trtpool.workers"),
    )
    assert leftovers.strays(host) == [(20, "trtpool.workers"), (21, "trtpool.broker")]
    assert [one.status for one in leftovers.look(host, [])] == ["warning"] * 2


def test_a_stray_is_killed_only_if_asked_to(processes, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        host = processes((child.pid, 1, "python -m trtpool.workers"), (1, 0, "init"))
        (found,) = leftovers.look(host, [])
        assert found.text == f"process {child.pid} (trtpool.workers) outlived its pool"
        assert child.poll() is None
        (found,) = leftovers.look(host, [], fix=True)
        assert found.text.endswith("was killed")
        assert child.wait(60) == -9
    finally:
        child.kill()
        child.communicate()


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    """``trtpool doctor WORDS`` on this machine; of its processes none is looked at, or --fix could end one."""
    monkeypatch.setattr(leftovers, "strays", lambda _: [])
    return CliRunner().invoke(cli.doctor, words)


# --- The command ---------------------------------------------------------------------------------


def test_a_healthy_machine_ends_well(root, monkeypatch):
    ended = run(monkeypatch)
    assert ended.exit_code == 0
    assert "onnxruntime 1.0 runs models on the CPU" in ended.output
    assert ended.output.splitlines()[-1].startswith("no problems, ")


def test_a_problem_gives_an_exit_code_and_what_to_do(root, monkeypatch):
    def refused(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refused)
    ended = run(monkeypatch)
    assert ended.exit_code == 1
    after = ended.output.partition("problem memfd")[2].splitlines()
    assert [line.strip()[:2] for line in after[1:3]].count("->") == 1
    assert after[-1].startswith("1 problem, ")


def test_json_has_every_finding(root, monkeypatch):
    kill_pool_in(root / "ocr")
    ended = run(monkeypatch, "--json")
    assert ended.exit_code == 0
    report = msgspec.json.decode(ended.output)
    assert report["ok"] is True
    findings = msgspec.convert(report["findings"], list[Finding])
    assert {"python", "packages", "driver", "memfd", "memory", "files", "container", "run-directory"} <= {
        finding.check for finding in findings
    }
    assert [one.check for one in findings if "left over" in one.text] == ["leftovers"]


def test_fix_removes_what_is_left_over(root, monkeypatch):
    kill_pool_in(root / "ocr")
    ended = run(monkeypatch, "--fix")
    assert ended.exit_code == 0
    assert "left over from a pool that was killed" in " ".join(ended.output.split())
    assert list(root.iterdir()) == []


def test_a_check_that_fails_itself_is_a_warning_and_ends_no_other(root, monkeypatch):
    monkeypatch.setattr(kernel, "look", lambda _: 1 / 0)
    ended = run(monkeypatch)
    assert ended.exit_code == 0
    assert "this could not be looked at: ZeroDivisionError" in ended.output
    assert "run-directory" in ended.output


def test_long_lines_are_wrapped_under_their_column(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cli.show([Finding("a-check", "warning", "word " * 40, "do " * 40), Finding("a-check", "ok", "fine")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith(" " * 22 + "word")
    assert [line.strip()[:2] for line in lines].count("->") == 1
    assert "ok" + " " * 20 + "fine" in lines
    assert lines[-1] == "no problems, 1 warning"


def test_a_lock_that_is_held_shared_is_not_taken_for_a_pools(root, tmp_path):
    """Another doctor, at the same moment."""
    kill_pool_in(root / "ocr")
    with (root / "ocr" / rundir.LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        (found,) = look([root / "ocr"], tmp_path)
    assert found.status == "warning"
