"""The doctor's checks of kernel, memory, limits, containers and places, on hosts made of files and refused calls."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import socket
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from trtpool.broker.doctor import container, kernel, limits, memory, places
from trtpool.broker.doctor.finding import Finding, Host
from trtpool.ipc import process

MakeHost = Callable[..., Host]

UNLIMITED = resource.RLIM_INFINITY


@pytest.fixture
def host(tmp_path: Path) -> MakeHost:
    """Makes a host of the files that are given, by path with "/" as "__"; 8 GiB are free on it."""

    def make(files: dict[str, str] | None = None) -> Host:
        usual = {"proc/meminfo": f"MemAvailable: {8 << 20} kB\nCommitLimit: {4 << 20} kB\nCommitted_AS: {3 << 20} kB\n"}
        for path, text in {**usual, **(files or {})}.items():
            (tmp_path / "host" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "host" / path).write_text(text)
        return Host(tmp_path / "host")

    return make


@pytest.fixture
def rlimits(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """The limits of this process, as far as it can tell; without limit unless set."""
    values: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda which: values.get(which, (UNLIMITED, UNLIMITED)))
    return values


def only(findings: Iterable[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    return found


def refuse(monkeypatch: pytest.MonkeyPatch, module: object, name: str, number: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, name, refused)


# --- Kernel --------------------------------------------------------------------------------------


def test_this_machine_has_the_calls_that_pools_need():
    found = list(kernel.look(Host()))
    assert [finding.check for finding in found] == ["memfd", "pidfd", "peer-pidfd"]
    assert {finding.status for finding in found[:2]} == {"ok"}


def test_the_calls_leave_no_descriptor_open():
    before = len(list(Path("/proc/self/fd").iterdir()))
    list(kernel.look(Host()))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("files", "number", "remedy"),
    [
        ({"proc/self/status": "Seccomp:\t2\n"}, errno.EPERM, "a seccomp filter is active: allow memfd_create"),
        ({"proc/self/status": "Seccomp:\t0\n"}, errno.EPERM, "see what forbids memfd_create here"),
        ({}, errno.ENOSYS, "use Linux 3.17 or newer"),
        ({"proc/sys/vm/memfd_noexec": "2\n"}, errno.EACCES, "sysctl vm.memfd_noexec=1"),
    ],
)
def test_without_memfd_no_pool_runs(files, number, remedy, host, monkeypatch):
    refuse(monkeypatch, os, "memfd_create", number)
    found = only(kernel.look(host(files)), "memfd")
    assert found.status == "problem"
    assert os.strerror(number) in found.text
    assert remedy in found.remedy


def test_a_memfd_that_cannot_be_sealed_is_none(host, monkeypatch):
    refuse(monkeypatch, fcntl, "fcntl", errno.EPERM)
    assert only(kernel.look(host()), "memfd").status == "problem"


@pytest.mark.parametrize(("module", "name"), [(os, "pidfd_open"), (signal, "pidfd_send_signal")])
def test_without_pidfds_no_pool_runs(module, name, host, monkeypatch):
    refuse(monkeypatch, module, name, errno.EPERM)
    found = only(kernel.look(host({"proc/self/status": "Seccomp:\t2\n"})), "pidfd")
    assert found.status == "problem"
    assert "allow pidfd_open and pidfd_send_signal in the container's profile" in found.remedy


def test_without_peer_pidfds_other_pid_namespaces_are_shut_out(host, monkeypatch):
    monkeypatch.setattr(kernel, "SO_PEERPIDFD", 9999)  # which no kernel has
    found = only(kernel.look(host()), "peer-pidfd")
    assert found.status == "warning"
    assert "SO_PEERPIDFD: Linux has it since 6.5" in found.text
    assert "--pid=container:" in found.remedy
    assert process.SO_PEERPIDFD == 77  # asm-generic/socket.h


# --- Memory --------------------------------------------------------------------------------------


def test_memory_that_is_free(host, rlimits):
    found = list(memory.look(host()))
    assert {finding.status for finding in found} == {"ok"}
    assert only(found, "memory").text.startswith("8.0 GiB are free in this machine")
    assert only(found, "memlock").text == "memory may be locked without limit"


def test_a_small_cgroup_is_named_with_what_to_do(host, rlimits, tmp_path):
    mount = f"31 22 0:28 / {tmp_path}/cg rw - cgroup2 cgroup2 rw\n"
    machine = host({"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": mount})
    (tmp_path / "cg").mkdir()
    (tmp_path / "cg" / "memory.max").write_text(str(300 << 20))
    (tmp_path / "cg" / "memory.current").write_text(str(100 << 20))
    found = only(memory.look(machine), "memory")
    assert found.status == "warning"
    assert f"200.0 MiB are free in the cgroup of {tmp_path}/cg/memory.max" in found.text
    assert "docker: --memory" in found.remedy


@pytest.mark.parametrize(("mode", "words"), [("0", None), ("1", None), ("2", "no more memory than 1.0 GiB")])
def test_strict_overcommit_is_pointed_out(mode, words, host, rlimits):
    found = [one for one in memory.look(host({"proc/sys/vm/overcommit_memory": mode})) if one.check == "overcommit"]
    assert [one.status for one in found] == (["warning"] if words else [])
    assert all(words in one.text for one in found)


@pytest.mark.parametrize(
    ("total", "free", "reserved", "status", "words"),
    [
        (0, 0, 0, "ok", "none are reserved"),
        (8, 3, 1, "ok", "2 of 8 are free, 4.0 MiB"),
        (8, 0, 0, "warning", "all 8 of 2 MiB are in use"),
        (8, 2, 2, "warning", "all 8 of 2 MiB are in use"),
    ],
)
def test_huge_pages(total, free, reserved, status, words, host, rlimits):
    names = {"nr_hugepages": total, "free_hugepages": free, "resv_hugepages": reserved}
    found = only(memory.look(host({f"{memory.HUGE}/{name}": f"{n}\n" for name, n in names.items()})), "huge-pages")
    assert (found.status, words in found.text) == (status, True)


def test_wsl_is_said_to_pin_little(host, rlimits):
    found = only(memory.look(host({"proc/version": "Linux version 5.15.0-microsoft-standard-WSL2"})), "pinning")
    assert found.status == "warning"


# --- Limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("soft", "status", "words"),
    [
        (UNLIMITED, "ok", "not limited"),
        (20_064, "ok", "enough for about 10000 clients"),
        (1024, "ok", "enough for about 480 clients of a pool; for more"),
        (256, "warning", "enough for about 96 clients"),
        (32, "warning", "enough for about 0 clients"),
    ],
)
def test_open_files(soft, status, words, rlimits, host):
    rlimits[resource.RLIMIT_NOFILE] = soft, 4096
    found = only(limits.look(host()), "files")
    assert (found.status, words in found.text) == (status, True), found
    assert ("4096 at most" in found.remedy) == (status == "warning")


@pytest.mark.parametrize(
    ("cgroup", "used", "soft", "status"),
    [
        ("max", 5, UNLIMITED, "ok"),
        ("100", 50, UNLIMITED, "warning"),
        ("1000", 50, UNLIMITED, "ok"),
        ("max", 5, 10, "warning"),
    ],
)
def test_processes(cgroup, used, soft, status, rlimits, host):
    rlimits[resource.RLIMIT_NPROC] = soft, soft
    files = {"sys/fs/cgroup/pids.max": cgroup, "sys/fs/cgroup/pids.current": str(used)}
    assert only(limits.look(host(files)), "processes").status == status


@pytest.mark.parametrize(
    ("quota", "status", "words"),
    [
        ("max 100000", "ok", "4 CPUs"),
        ("250000 100000", "ok", "gives 2.5 CPUs of 4"),
        ("50000 100000", "warning", "gives 0.5 CPUs of 4"),
    ],
)
def test_cpus(quota, status, words, host, monkeypatch, rlimits):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    found = only(limits.look(host({"sys/fs/cgroup/cpu.max": quota})), "cpus")
    assert (found.status, words in found.text) == (status, True)


# --- Containers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({}, ""),
        ({".dockerenv": ""}, "docker"),
        ({"run/.containerenv": ""}, "podman"),
        ({"proc/1/environ": "A=b\0container=lxc\0"}, "lxc"),
        ({".dockerenv": "", "var/run/secrets/kubernetes.io/serviceaccount/token": ""}, "kubernetes"),
    ],
)
def test_a_container_is_told_that_its_dev_shm_is_not_used(files, kind, host):
    machine = host(files)
    assert machine.in_container == kind
    found = only(container.look(machine), "container")
    assert found.status == "ok"
    assert ("/dev/shm is not used" in found.text) == bool(kind)


@pytest.mark.parametrize(
    ("uid_map", "known"),
    [
        ("         0          0 4294967295\n", None),
        ("         0     100000      65536\n", "65536"),
        ("         0       1000          1\n         1     100000      65536\n", "65537"),
        ("nonsense\n", None),
    ],
)
def test_a_user_namespace_is_pointed_out(uid_map, known, host):
    files = {"proc/self/uid_map": uid_map, "proc/sys/kernel/overflowuid": "65534\n"}
    found = [one for one in container.look(host(files)) if one.check == "users"]
    assert len(found) == bool(known)
    assert all(f"knows {known} users" in one.text and "look like user 65534" in one.text for one in found)


# --- Places --------------------------------------------------------------------------------------


def test_a_place_with_sockets_and_locks_is_left_as_it_was(tmp_path):
    (found,) = places.look(tmp_path / "pools" / "a")
    assert (found.check, found.status) == ("run-directory", "ok")
    assert list(tmp_path.iterdir()) == []


def test_the_run_directory_itself_is_tried_if_it_is_there(tmp_path):
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "run" / "mine").touch()
    assert [one.status for one in places.look(tmp_path / "run")] == ["ok"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EOPNOTSUPP, "has no Unix sockets or no locks"),
        (errno.EROFS, "nothing can be made in"),
        (errno.ENOSPC, "is full"),
    ],
)
def test_a_file_system_that_will_not_do(number, words, tmp_path, monkeypatch):
    class NoSocket(socket.socket):
        def bind(self, address: object) -> None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "socket", NoSocket)
    (found,) = places.look(tmp_path)
    assert found.status == "problem"
    assert words in found.text
    assert "--run-dir" in found.remedy


def test_a_place_that_start_would_refuse_is_a_problem_here_too(tmp_path):
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        Path(folder).chmod(0o777)
        (found,) = places.look(Path(folder) / "run")
    assert found.status == "problem"
    assert "could be exchanged by others" in found.remedy
    (found,) = places.look(Path("/tmp") / ("x" * 120))
    assert "bytes too long for a Unix socket" in found.remedy
