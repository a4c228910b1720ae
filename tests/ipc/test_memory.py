"""What may be taken, on machines made of files, and on this one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trtpool.ipc.memory import Room, room

GIB = 1 << 30
UNLIMITED = 2**63 - 4096
"""What version 1 says where there is no limit."""

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")

Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Makes a /proc for a process in cgroups as /proc/self/cgroup says, with hierarchies mounted as mountinfo says.

    In `mountinfo`, "{sys}" stands for /sys/fs/cgroup; there is 8 GiB available without any limit.
    """

    def make(cgroup: str, *mountinfo: str) -> Path:
        proc = tmp_path / "proc"
        (proc / "self").mkdir(parents=True)
        (proc / "self/cgroup").write_text(cgroup + "\n")
        other = "22 1 0:21 / /proc rw,nosuid shared:5 - proc proc rw"
        lines = [other, *(line.format(sys=tmp_path / "sys") for line in mountinfo)]
        (proc / "self/mountinfo").write_text("\n".join(lines) + "\n")
        (proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemFree: 2 kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
        return proc

    return make


def limit(folder: Path, names: tuple[str, str, str], most: int | str, used: int, cache: int | None = None) -> Path:
    """A cgroup with a limit, and the file that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{used}\n")
    if cache is not None:
        (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {cache}\nfile 9\n")
    return folder / names[0]


ONE_V2 = "31 22 0:28 / {sys} rw,nosuid,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
ONE_V1 = "35 31 0:32 / {sys}/memory rw,relatime - cgroup cgroup rw,memory"


@pytest.mark.parametrize("smallest", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("cgroup", "mount", "names", "top"),
    [
        ("0::/user.slice/jobs/mine", ONE_V2, V2, "sys"),
        ("9:cpu:/\n4:hugetlb,memory:/user.slice/jobs/mine", ONE_V1, V1, "sys/memory"),
    ],
    ids=["v2", "v1"],
)
def test_the_least_limit_of_all_levels_counts(cgroup, mount, names, top, smallest, machine, tmp_path):
    proc = machine(cgroup, mount)
    folder, files = tmp_path / top, []
    for level, part in enumerate(("", "user.slice", "jobs", "mine")):
        folder /= part
        files.append(limit(folder, names, 5 * GIB if level == smallest else 7 * GIB, GIB))
    left = room(proc)
    assert left.size == 4 * GIB
    assert str(files[smallest]) in left.where
    assert "raise that limit" in left.remedy


@pytest.mark.parametrize(
    ("cgroup", "mount", "names"), [("0::/mine", ONE_V2, V2), ("4:memory:/mine", ONE_V1, V1)], ids=["v2", "v1"]
)
def test_what_others_in_a_cgroup_use_counts_too_and_the_cache_of_files_does_not(
    cgroup, mount, names, machine, tmp_path
):
    """A limit of the parent, with little of it left, is less than a smaller one of which nothing is used."""
    proc = machine(cgroup, mount)
    top = tmp_path / "sys" / ("memory" if names == V1 else "")
    parent = limit(top, names, 6 * GIB, 5 * GIB, cache=GIB)
    limit(top / "mine", names, 3 * GIB, 0, cache=0)
    left = room(proc)
    assert (left.size, str(parent) in left.where) == (2 * GIB, True)


@pytest.mark.parametrize(
    ("cgroup", "mount", "names", "most"),
    [("0::/mine", ONE_V2, V2, "max"), ("4:memory:/mine", ONE_V1, V1, UNLIMITED)],
    ids=["v2", "v1"],
)
def test_no_limit_is_none(cgroup, mount, names, most, machine, tmp_path):
    proc = machine(cgroup, mount)
    limit(tmp_path / "sys" / ("memory" if names == V1 else "") / "mine", names, most, GIB)
    assert room(proc) == Room(8 * GIB, "this machine", "end what else takes memory here")


def test_more_than_its_limit_is_used(machine, tmp_path):
    proc = machine("0::/mine", ONE_V2)
    limit(tmp_path / "sys/mine", V2, GIB, 2 * GIB)
    assert room(proc).size == 0


def test_a_limit_above_what_the_machine_has_left_is_no_matter(machine, tmp_path):
    proc = machine("0::/mine", ONE_V2)
    limit(tmp_path / "sys/mine", V2, 64 * GIB, GIB)
    assert room(proc).where == "this machine"


CONTAINERS = {
    "its own namespace": ("0::/", ONE_V2, ""),
    "the host's, with a folder of it mounted": (
        "0::/docker/ab12", "31 22 0:28 /docker/ab12 {sys} ro - cgroup2 cgroup2 rw", ""
    ),
    "the host's, in a folder of that": (
        "0::/docker/ab12/job", "31 22 0:28 /docker/ab12 {sys} ro - cgroup2 cgroup2 rw", "job"
    ),
    "moved out of what its namespace shows": ("0::/../other", ONE_V2, ""),
    "another that is mounted": ("0::/docker/cd34", "31 22 0:28 /docker/ab12 {sys} ro - cgroup2 cgroup2 rw", ""),
}  # fmt: skip


@pytest.mark.parametrize(("cgroup", "mount", "folder"), CONTAINERS.values(), ids=CONTAINERS)
def test_in_a_container(cgroup, mount, folder, machine, tmp_path):
    proc = machine(cgroup, mount)
    limit(tmp_path / "sys" / folder, V2, 3 * GIB, GIB)
    assert room(proc).size == 2 * GIB


def test_a_hybrid_host_has_memory_in_version_1(machine, tmp_path):
    proc = machine("4:memory:/mine\n0::/mine", "41 31 0:38 / {sys}/unified rw - cgroup2 cgroup2 rw", ONE_V1)
    (tmp_path / "sys/unified/mine").mkdir(parents=True)  # without memory's files
    limit(tmp_path / "sys/memory/mine", V1, 3 * GIB, GIB)
    assert room(proc).size == 2 * GIB


def test_a_mount_point_with_a_space(machine, tmp_path):
    proc = machine("0::/mine", r"31 22 0:28 / {sys}/a\040b rw - cgroup2 cgroup2 rw")
    limit(tmp_path / "sys/a b/mine", V2, 3 * GIB, GIB)
    assert room(proc).size == 2 * GIB


@pytest.mark.parametrize("cgroup", ["", "nonsense", "::", "4:memory"])
def test_what_cannot_be_read_limits_nothing(cgroup, machine):
    assert room(machine(cgroup, "nonsense - ")).size == 8 * GIB


def test_without_any_such_file(tmp_path):
    assert 0 < room(tmp_path).size <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_on_this_machine():
    assert 0 < room().size <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
