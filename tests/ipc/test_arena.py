from __future__ import annotations

import errno
import fcntl
import gc
import logging
import mmap
import os
import resource
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from trtpool.ipc import arena
from trtpool.ipc.arena import (
    HUGE_PAGE_BYTES,
    SEALS,
    Residence,
    check_segment,
    create_segment,
    format_bytes,
    free_huge_pages,
    map_segment,
)
from trtpool.ipc.errors import ArenaTooLarge, ProtocolError
from trtpool.ipc.layout import PAGE_BYTES, ModelPlan, plan, plane_array
from trtpool.ipc.memory import Room
from trtpool.ipc.tensors import ModelSpec, TensorSpec

SIZE = 16 * 4096
F_SEAL_FUTURE_WRITE = 0x10  # not in the fcntl module yet


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def mappings() -> int:
    """How often a segment is mapped into this process."""
    return Path("/proc/self/maps").read_text().count("memfd:trtpool-arena")


@pytest.fixture
def segment() -> Iterator[int]:
    fd = create_segment(SIZE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("size", [0, 4096, SIZE - 1, SIZE + 1, 2 * SIZE])
def test_its_size_is_sealed(segment, size):
    with pytest.raises(PermissionError):
        os.ftruncate(segment, size)
    assert os.fstat(segment).st_size == SIZE


@pytest.mark.parametrize("seal", [F_SEAL_FUTURE_WRITE, fcntl.F_SEAL_WRITE])
def test_its_seals_are_sealed(segment, seal):
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment, fcntl.F_ADD_SEALS, seal)
    map_segment(segment, SIZE)[0] = 1


def test_its_pages_are_there_from_the_start(segment):
    """A sparse file would fail later, as SIGBUS."""
    assert os.fstat(segment).st_blocks * 512 >= SIZE


def test_it_has_no_name_and_takes_nothing_of_dev_shm(segment):
    before = list(Path("/dev/shm").iterdir())
    mapping = map_segment(segment, SIZE)
    mapping[:] = b"\xff" * SIZE
    assert list(Path("/dev/shm").iterdir()) == before
    assert os.fstat(segment).st_nlink == 0
    assert os.fstat(segment).st_dev != Path("/dev/shm").stat().st_dev
    (line,) = (line for line in Path("/proc/self/maps").read_text().splitlines() if "trtpool-arena" in line)
    assert line.endswith("/memfd:trtpool-arena (deleted)")


def test_it_does_not_pass_to_a_child_by_itself(segment):
    assert not os.get_inheritable(segment)


@pytest.mark.parametrize(("size", "limit"), [(SIZE, SIZE - 1), (2**50, None), (2**62, None)])
def test_more_than_may_be_taken(size, limit):
    before = descriptors()
    with pytest.raises(ArenaTooLarge, match="lower --slots"):
        create_segment(size, limit_bytes=limit)
    assert descriptors() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
@pytest.mark.parametrize("call", ["ftruncate", "posix_fallocate"])
def test_when_pages_run_out_nothing_is_left(monkeypatch, call, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    before = descriptors()
    with pytest.raises(ArenaTooLarge, match=r"could not allocate 64.0 KiB .*lower --slots"):
        create_segment(SIZE)
    assert descriptors() == before


@pytest.mark.parametrize("error", [OSError(errno.EPERM, "no"), KeyboardInterrupt()])
def test_other_failures_pass_through_and_leave_nothing(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(fcntl, "fcntl", fail)
    before = descriptors()
    with pytest.raises(type(error)):
        create_segment(SIZE)
    assert descriptors() == before


@pytest.mark.parametrize(("size", "left", "fits"), [(900, 1000, True), (901, 1000, False), (1, 0, False)])
def test_a_tenth_of_what_is_left_is_left_to_others(monkeypatch, size, left, fits):
    pages = size * 4096
    monkeypatch.setattr(arena, "room", lambda: Room(left * 4096, "the cgroup of /x/memory.max", "raise that limit"))
    if fits:
        os.close(create_segment(pages))
        return
    before = descriptors()
    with pytest.raises(ArenaTooLarge) as raised:
        create_segment(pages)
    text = str(raised.value)
    assert f"{format_bytes(left * 4096)} that are left in the cgroup of /x/memory.max; lower --slots" in text
    assert text.endswith("or raise that limit")
    assert descriptors() == before


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * 2**20, "1.5 GiB"), (2**52, "4096.0 TiB")],
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text


# --- Huge pages ---


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the kernel count its huge pages as a test says."""

    def count(nr: int, free: int, resv: int = 0) -> None:
        for name, number in (("nr", nr), ("free", free), ("resv", resv)):
            (tmp_path / f"{name}_hugepages").write_text(f"{number}\n")

    monkeypatch.setattr(arena, "HUGE_PAGES", tmp_path)
    return count


def is_huge(fd: int) -> bool:
    return os.fstat(fd).st_blksize == HUGE_PAGE_BYTES


def test_with_too_few_huge_pages_it_warns_and_takes_others(counted, caplog):
    counted(nr=10, free=4, resv=2)
    assert free_huge_pages() == 2
    fd = create_segment(5 * HUGE_PAGE_BYTES, huge_pages=True)
    try:
        assert not is_huge(fd)
        map_segment(fd, 5 * HUGE_PAGE_BYTES)[-1] = 1
    finally:
        os.close(fd)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "the arena needs 5 huge pages of 2 MiB and 2 are free: it is on normal pages; "
        "reserve them with `sysctl vm.nr_hugepages=13` and start again"
    )


def test_when_others_take_the_huge_pages_meanwhile_it_warns_and_takes_others(counted, caplog, monkeypatch):
    counted(nr=8, free=8)
    real = os.memfd_create

    def fail(name: str, flags: int) -> int:
        if flags & os.MFD_HUGETLB:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(name, flags)

    monkeypatch.setattr(os, "memfd_create", fail)
    before = descriptors()
    fd = create_segment(HUGE_PAGE_BYTES, huge_pages=True)
    assert not is_huge(fd)
    os.close(fd)
    assert descriptors() == before
    assert "needs 1 huge pages of 2 MiB and 8 are free (Cannot allocate memory): it is on" in caplog.text


def test_a_kernel_without_huge_pages(counted, caplog):
    assert free_huge_pages() == 0
    fd = create_segment(HUGE_PAGE_BYTES, huge_pages=True)
    assert not is_huge(fd)
    os.close(fd)
    assert "this kernel has no huge pages of 2 MiB" in caplog.text


def test_the_limit_holds_for_huge_pages_too(counted):
    counted(nr=8, free=8)
    with pytest.raises(ArenaTooLarge, match=r"needs 2.0 MiB and 1.0 MiB may be taken; lower --slots"):
        create_segment(HUGE_PAGE_BYTES, huge_pages=True, limit_bytes=1 << 20)


def test_what_is_too_large_for_either_kind_of_page(counted):
    counted(nr=8, free=8)
    with pytest.raises(ArenaTooLarge, match="lower --slots"):
        create_segment(2**50, huge_pages=True)


@pytest.mark.skipif(free_huge_pages() < 3, reason="fewer than 3 free huge pages; sysctl vm.nr_hugepages=3")
def test_on_huge_pages(caplog, monkeypatch):
    monkeypatch.setattr(arena, "available_bytes", lambda: 0)  # they are not part of it
    size, before = 3 * HUGE_PAGE_BYTES, free_huge_pages()
    fd = create_segment(size, huge_pages=True)
    assert caplog.records == []
    assert is_huge(fd)
    assert free_huge_pages() == before - 3, "all are there from the start"
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 2 * HUGE_PAGE_BYTES)
    check_segment(fd, size)
    one, other = map_segment(fd, size), map_segment(fd, size)
    one[:] = b"\x05" * size
    assert (other[0], other[size - 1]) == (5, 5)
    del one, other
    gc.collect()
    os.close(fd)
    assert free_huge_pages() == before


# --- Descriptors from elsewhere ---


def unsealed() -> int:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    return fd


def half_sealed() -> int:
    fd = unsealed()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def without_sealing() -> int:
    fd = os.memfd_create("x", 0)
    os.ftruncate(fd, SIZE)
    return fd


def file_of(directory: str | None) -> Callable[[], int]:
    def make() -> int:
        fd, path = tempfile.mkstemp(dir=directory)
        Path(path).unlink()
        os.ftruncate(fd, SIZE)
        return fd

    return make


@pytest.mark.parametrize(
    "make",
    [
        unsealed, half_sealed, without_sealing, file_of(None), file_of("/dev/shm"),
        lambda: os.open("/dev/null", os.O_RDWR), lambda: os.open("/", os.O_RDONLY), lambda: create_segment(2 * SIZE),
        lambda: create_segment(SIZE - 4096),
    ],
)  # fmt: skip
def test_what_is_no_segment_is_not_mapped(make):
    fd = make()
    before = mappings()
    try:
        with pytest.raises(ProtocolError, match=r"not a memfd|expected"):
            map_segment(fd, SIZE)
    finally:
        os.close(fd)
    assert mappings() == before


def test_a_segment_passes(segment):
    check_segment(segment, SIZE)
    assert fcntl.fcntl(segment, fcntl.F_GET_SEALS) & SEALS == SEALS


# --- Views that outlive their owner ---


def test_two_mappings_are_one_memory(segment):
    one, other = map_segment(segment, SIZE), map_segment(segment, SIZE)
    one[5000] = 77
    assert other[5000] == 77


def test_a_mapping_outlives_its_descriptor():
    fd = create_segment(SIZE)
    mapping = map_segment(fd, SIZE)
    os.close(fd)
    mapping[SIZE - 1] = 3
    assert mapping[SIZE - 1] == 3


VIEWS: dict[str, Callable[[Any], Any]] = {
    "the array": lambda array: array,
    "a slice": lambda array: array[1:3],
    "a row": lambda array: array[2],
    "a view of another type": lambda array: array.view(np.uint8),
    "a reshaped array": lambda array: array.reshape(-1),
    "a memoryview": memoryview,
    "a memoryview of a slice": lambda array: memoryview(array[1:3]),
    "DLPack": np.from_dlpack,
    "DLPack of a slice": lambda array: np.from_dlpack(array[1:3]),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_keeps_the_mapping_and_nothing_else_does(kind):
    """Drop the owner, collect, overwrite through another mapping, look."""
    spec = ModelSpec("m", "/m", (TensorSpec("x", "float32", (8,)),), (TensorSpec("y", "float32", ()),))
    layout = plan([ModelPlan(spec, 4, 2, 4)])
    gc.collect()
    before = mappings(), descriptors()
    fd = create_segment(layout.segment_bytes)
    root = plane_array(map_segment(fd, layout.segment_bytes), layout.models[0], layout.models[0].inputs[0])
    view = VIEWS[kind](root)
    collected = weakref.ref(root)
    del root
    gc.collect()
    assert collected() is not None, "the view keeps the root, or it would not keep the mapping"
    other = map_segment(fd, layout.segment_bytes)
    np.frombuffer(other, np.float32)[:] = 42
    assert np.all(np.asarray(view).view(np.float32) == 42)
    del other
    gc.collect()
    assert mappings() == before[0] + 1
    del view
    os.close(fd)
    gc.collect()
    assert (mappings(), descriptors()) == before


def test_a_mapping_with_views_cannot_be_closed(segment):
    """Why the client never closes it, and why that is safe to get wrong."""
    mapping = map_segment(segment, SIZE)
    array = np.frombuffer(mapping, np.uint8)
    with pytest.raises(BufferError):
        mapping.close()
    assert array[0] == 0
    assert isinstance(mapping, mmap.mmap)


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def test_pages_that_were_touched_cost_no_faults_when_they_are_written():
    size = 4 * Residence.STEP_BYTES
    fd = create_segment(size)
    mapping = map_segment(fd, size)
    os.close(fd)
    pages = 2 * Residence.STEP_BYTES // PAGE_BYTES
    Residence(mapping).touch(Residence.STEP_BYTES, 2 * Residence.STEP_BYTES)
    rows: npt.NDArray[np.uint8] = np.ndarray((2 * Residence.STEP_BYTES,), np.uint8, mapping, Residence.STEP_BYTES)
    before = faults()
    rows[:] = 7
    assert faults() - before < pages // 8
    before = faults()
    np.ndarray((Residence.STEP_BYTES,), np.uint8, mapping, 0)[:] = 7
    assert faults() - before >= pages // 2, "pages that were not touched cost as little, so the test shows nothing"


class RecordingMapping:
    """Notes what it is advised; `size` bytes."""

    def __init__(self, size: int, error: OSError | None = None) -> None:
        self.size, self.error = size, error
        self.advised: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.size

    def madvise(self, _option: int, start: int, length: int) -> None:
        self.advised.append((start, length))
        if self.error is not None:
            raise self.error


def test_each_step_of_a_mapping_is_asked_for_once():
    step = Residence.STEP_BYTES
    mapping = RecordingMapping(3 * step + PAGE_BYTES)
    residence = Residence(cast(mmap.mmap, mapping))
    residence.touch(step - 1, 2)
    assert mapping.advised == [(0, step), (step, step)]
    residence.touch(0, 2 * step)
    assert len(mapping.advised) == 2
    residence.touch(step, 2 * step + 1)
    assert mapping.advised[2:] == [(2 * step, step), (3 * step, PAGE_BYTES)]


def test_a_kernel_that_cannot_is_asked_once():
    mapping = RecordingMapping(8 * Residence.STEP_BYTES, OSError(errno.EINVAL, "no such advice"))
    residence = Residence(cast(mmap.mmap, mapping))
    residence.touch(0, mapping.size)
    residence.touch(0, mapping.size)
    assert len(mapping.advised) == 1
