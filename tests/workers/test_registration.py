"""Pinning is all or nothing, in turns with other processes; copies are cut where two registrations meet."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.fake_cuda import FakeRuntime
from tests.workers.fake_device import cudaError_t
from trtpool.ipc.arena import create_segment, map_segment
from trtpool.ipc.errors import DeviceUnavailable
from trtpool.workers.cuda import Cuda
from trtpool.workers.registration import CHUNK_BYTES, Registration, pieces

PAGE = 4096
PAGES = 10


@pytest.fixture
def runtime():
    return FakeRuntime()


@pytest.fixture
def arena():
    """A descriptor of a segment of 10 pages, and the address where it is mapped."""
    fd = create_segment(PAGES * PAGE)
    array = np.frombuffer(map_segment(fd, PAGES * PAGE), np.uint8)
    yield fd, array.ctypes.data
    os.close(fd)


def register(runtime: FakeRuntime, arena: tuple[int, int], pages: int) -> Registration:
    fd, address = arena
    return Registration(Cuda(runtime), address, PAGES * PAGE, fd, pages * PAGE)


def chunks(address: int, pages: int) -> dict[int, int]:
    return {address + first * PAGE: min(pages, PAGES - first) * PAGE for first in range(0, PAGES, pages)}


@pytest.mark.parametrize("pages", [1, 3, 5, 9, 10, 11])
def test_all_of_it_is_pinned_in_chunks(pages, arena, runtime):
    expected = chunks(arena[1], pages)
    registration = register(runtime, arena, pages)
    assert runtime.registrations == expected
    assert registration.bounds == sorted(expected)[1:]
    registration.close()
    registration.close()
    starts = sorted(expected)
    assert runtime.registered == [("register", at) for at in starts] + [("unregister", at) for at in reversed(starts)]
    assert not registration.bounds
    runtime.check()


def test_an_arena_of_usual_size_is_one_chunk(arena, runtime):
    assert CHUNK_BYTES % (1 << 30) == 0  # a multiple of every page size
    fd, address = arena
    assert not Registration(Cuda(runtime), address, PAGES * PAGE, fd).bounds


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "another program may be registering it; start the pool again, with fewer --slots"),
        (2, "not so much memory to lock; lower --slots, --items-per-slot or --max-batch"),
        (35, r"the driver is too old for cuda-python; install a newer driver, or pip install 'trtpool\[cu12\]'"),
        (712, "another program may be registering it"),
        (801, "confidential computing"),
        (401, r"cudaHostRegister: text of cudaErrorIllegalState \(cudaErrorIllegalState, 401\)"),
    ],
)
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_failure_undoes_what_was_pinned_and_says_what_to_do(nth, code, words, arena, runtime):
    runtime.fail("cudaHostRegister", code, nth)
    with pytest.raises(DeviceUnavailable, match=f"40.0 KiB of shared memory cannot be pinned for the GPU: .*{words}"):
        register(runtime, arena, 3)
    starts = sorted(chunks(arena[1], 3))[: nth - 1]
    assert runtime.registered == [("register", at) for at in starts] + [("unregister", at) for at in reversed(starts)]
    assert not runtime.last_error, "the next unrelated call would report it"
    runtime.check()
    register(runtime, arena, 3).close()  # and it can be tried again


def test_memory_that_is_pinned_already_is_refused(arena, runtime):
    first = register(runtime, arena, 10)
    with pytest.raises(DeviceUnavailable, match="712"):
        register(runtime, arena, 4)
    first.close()
    runtime.check()


def test_an_interrupt_undoes_what_was_pinned(arena, runtime, monkeypatch):
    cuda = Cuda(runtime)
    pin = cuda.host_register

    def interrupted(address: int, size: int) -> None:
        if runtime.registrations:
            raise KeyboardInterrupt
        pin(address, size)

    monkeypatch.setattr(cuda, "host_register", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Registration(cuda, arena[1], PAGES * PAGE, arena[0], PAGE)
    runtime.check()


def test_what_cannot_be_unpinned_is_told_and_the_rest_is(arena, runtime, caplog):
    registration = register(runtime, arena, 4)
    runtime.fail("cudaHostUnregister", cudaError_t.cudaErrorInvalidValue, nth=2)
    registration.close()
    assert [*runtime.registrations] == [arena[1] + 4 * PAGE]
    assert not runtime.last_error
    assert "the arena stays pinned until this process ends: cudaHostUnregister" in caplog.text


# --- Turns ---------------------------------------------------------------------------------------

TRY = """
import fcntl, sys
fd = int(sys.argv[1])
for line in sys.stdin:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("busy", flush=True)
    else:
        fcntl.lockf(fd, fcntl.LOCK_UN)
        print("free", flush=True)
"""


@pytest.mark.system
@pytest.mark.parametrize("fails", [False, True])
def test_another_process_waits_for_its_turn(fails, arena, runtime, monkeypatch):
    fd, address = arena
    cuda = Cuda(runtime)
    pin = cuda.host_register
    said = []
    with subprocess.Popen(
        [sys.executable, "-c", TRY, str(fd)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[fd]
    ) as other:

        def ask() -> str:
            other.stdin.write("try\n")
            other.stdin.flush()
            return other.stdout.readline().strip()

        def register_and_ask(start: int, size: int) -> None:
            pin(start, size)
            said.append(ask())

        try:
            assert ask() == "free"
            monkeypatch.setattr(cuda, "host_register", register_and_ask)
            if fails:
                runtime.fail("cudaHostRegister", cudaError_t.cudaErrorMemoryAllocation, nth=3)
                with pytest.raises(DeviceUnavailable):
                    Registration(cuda, address, PAGES * PAGE, fd, 4 * PAGE)
                assert said == ["busy", "busy"]
            else:
                Registration(cuda, address, PAGES * PAGE, fd, 4 * PAGE)
                assert said == ["busy", "busy", "busy"]
            assert ask() == "free"
        finally:
            other.stdin.close()


# --- Pieces --------------------------------------------------------------------------------------


@given(
    address=st.integers(0, 60),
    size=st.integers(1, 60),
    bounds=st.lists(st.integers(0, 130), unique=True).map(sorted),
)
def test_pieces_are_the_copy_cut_at_each_bound_within_it(address, size, bounds):
    parts = [*pieces(address, size, bounds)]
    cuts = [address, *(bound for bound in bounds if address < bound < address + size), address + size]
    assert parts == [(start, end - start) for start, end in itertools.pairwise(cuts)]


def test_a_copy_with_no_bounds_is_one_piece():
    assert [*pieces(7, 5, [])] == [(7, 5)]
