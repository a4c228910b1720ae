"""Pools inside the test's process; see `tests.ipc.fake_pool`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.ipc.fake_pool import FakePool
from trtpool.ipc.client import Client
from trtpool.ipc.settings import DEFAULT_TRANSPORT


@pytest.fixture
def transport() -> str:
    """What clients talk over; modules to which it may matter have one of their own, with all there are."""
    return DEFAULT_TRANSPORT


@pytest.fixture
def make_pool(tmp_path: Path, transport: str) -> Iterator[Callable[..., FakePool]]:
    """Makes pools, which end with the test; takes what `FakePool` does."""
    with ExitStack() as stack:
        made = 0

        def make(*models: Any, **options: Any) -> FakePool:
            nonlocal made
            made += 1
            run_dir = tmp_path / str(made)
            run_dir.mkdir()
            return stack.enter_context(FakePool(run_dir, *models, transport=transport, **options))

        yield make


@pytest.fixture
def pool(make_pool: Callable[..., FakePool]) -> FakePool:
    """16 slots of one item, batches of 4; a client may hold 12."""
    return make_pool()


@pytest.fixture
def client(pool: FakePool) -> Client:
    """A client of `pool`."""
    return pool.connect()
