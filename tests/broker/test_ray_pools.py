"""`trtpool.ray.TrtPool` on a pool in this process, without Ray; tests/system/test_etl_ray.py has a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ipc.fake_pool import BAD, FakePool
from trtpool.broker.ray_pools import TrtPool
from trtpool.ipc.errors import EngineFailed, InvalidInput, PoolNotFound


class Pools:
    """What an actor sees of `NodePools`."""

    def __init__(self, *run_dirs: Path) -> None:
        self.run_dirs = list(run_dirs)

    def attach(self) -> str:
        return str(self.run_dirs.pop(0) if len(self.run_dirs) > 1 else self.run_dirs[0])


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    made: list[TrtPool] = []

    def actor(pools: Pools, **options: Any) -> TrtPool:
        made.append(TrtPool(pools, **options))  # type: ignore[arg-type]
        return made[-1]

    yield actor
    for each in made:
        if each._client is not None:
            each._client.close()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[FakePool]:
    (tmp_path / "a").mkdir()
    with FakePool(tmp_path / "a") as running:
        yield running


def batch(count: int) -> dict[str, Any]:
    return {"id": np.arange(count), "x": np.arange(4 * count, dtype=np.float32).reshape(count, 4)}


def test_a_batch_of_arrays(pool, make):
    given = batch(20)
    out = make(Pools(pool.run_dir))(given)
    assert list(out) == ["id", "y", "total"]
    assert out["id"] is given["id"]
    np.testing.assert_array_equal(out["y"], -given["x"])


def test_other_columns(pool, make):
    given = batch(3)
    out = make(Pools(pool.run_dir), columns={"x": "pixels"}, keep=["pixels"])({"pixels": given["x"], "id": given["id"]})
    assert list(out) == ["pixels", "y", "total"]


@pytest.mark.parametrize(
    ("given", "options", "text"),
    [
        ({"id": np.arange(2)}, {}, "there is no column x; name the inputs' columns with columns=, out of id"),
        ({**batch(2), "y": 1}, {}, "column y would come twice"),
        (batch(2), {"on_error": "null"}, "on_error='null' is for batch_format='pyarrow'"),
        ([1, 2], {}, "takes batch_format 'numpy' or 'pyarrow', got list"),
    ],
)
def test_what_cannot_be(pool, make, given, options, text):
    with pytest.raises(InvalidInput, match=text):
        make(Pools(pool.run_dir), **options)(given)


def test_a_row_that_fails_says_which(pool, make):
    given = batch(9)
    given["x"][5, 0] = BAD
    with pytest.raises(EngineFailed, match=r"\(item 5\)"):
        make(Pools(pool.run_dir))(given)


def test_a_pool_that_ended_is_replaced_and_the_batch_run_again(pool, make, tmp_path):
    (tmp_path / "b").mkdir()
    with FakePool(tmp_path / "b") as second:
        actor = make(Pools(pool.run_dir, second.run_dir))
        actor(batch(2))
        assert actor.client.run_dir == pool.run_dir
        pool.stop()
        np.testing.assert_array_equal(actor(batch(2))["y"], -batch(2)["x"])
        assert actor.client.run_dir == second.run_dir
        actor.client.close()


def test_a_pool_that_never_comes(make, tmp_path):
    with pytest.raises(PoolNotFound):
        make(Pools(tmp_path / "none"))(batch(2))
