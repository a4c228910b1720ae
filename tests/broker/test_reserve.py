"""Descriptors that are held back."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtpool.broker.reserve import Reserve


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def reserve() -> Iterator[Reserve]:
    one = Reserve(3)
    yield one
    one.close()


def test_within_spent_there_is_room_for_as_many_as_are_held(reserve):
    before = open_fds()
    reserve.refill()
    assert open_fds() == before + 3
    with reserve.spent():
        assert open_fds() == before
    assert open_fds() == before + 3
    reserve.close()
    assert open_fds() == before


def test_it_is_held_again_after_an_error(reserve):
    before = open_fds()
    with pytest.raises(ZeroDivisionError), reserve.spent():
        raise ZeroDivisionError
    assert open_fds() == before + 3


def test_what_there_are_no_descriptors_for_is_got_the_next_time(reserve, monkeypatch):
    before, left = open_fds(), [1]
    real = os.open

    def scarce(path: str, flags: int) -> int:
        if not left:
            raise OSError(errno.EMFILE, "too many open files")
        left.pop()
        return real(path, flags)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", scarce)
        reserve.refill()
    assert open_fds() == before + 1
    with reserve.spent():
        pass
    assert open_fds() == before + 3
