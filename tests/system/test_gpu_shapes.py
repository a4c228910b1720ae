"""Pools on a fake GPU with plans whose items differ: from the client's array to the device and back.

The CPU's are in `test_models`; both engines by themselves in `tests/workers/test_engine_shapes.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import trtpool
from tests.system.rig import StartedPool, figures, wait_all_free
from tests.workers.fake_tensorrt import Tensor, batched, make_packages, write_plan
from trtpool.ipc.errors import EngineFailed, InvalidInput

PROFILED = ("neg", [Tensor("x", (-1, -1), [[(1, 1), (4, 4), (8, 8)], [(1, 16), (4, 16), (8, 32)]])], [
    Tensor("y", ("N", "x.1")),
])  # fmt: skip
UPTO = ("upto", [Tensor("x", (-1, -1), [[(2, 1), (4, 4), (8, 6)]])], [Tensor("y", ("N", "?")), Tensor("n", ("N", 1))])
SHARED = ("shared", [batched("x", (3,)), Tensor("k", ()), Tensor("b", (2, 3))], [Tensor("y", ("N", 3))])


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedPool]:
    """Models "profiled", "upto" and "shared" on a fake GPU."""
    folder = tmp_path_factory.mktemp("fake-gpu")
    plans = [
        write_plan(folder / f"{name}.plan", *model)
        for name, model in (("profiled", PROFILED), ("upto", UPTO), ("shared", SHARED))
    ]
    env = make_packages(folder / "packages")
    with StartedPool(*plans, run_dir=folder / "run", env=env, gpus=0, shape="upto:y=3") as started:
        yield started
        started.kill(15)
        assert started.wait() == 0


@pytest.fixture
def client(pool: StartedPool, request: pytest.FixtureRequest) -> Iterator[trtpool.Client]:
    worker = pool.worker
    with pool.connect() as connected:
        yield connected
    request.node.funcargs.pop("client", None)  # else pytest would hold it, and it the arena, when leaks are looked for
    assert pool.worker == worker, "another had to take over"


def test_items_of_any_shape_that_a_profile_takes(client):
    def write(item: np.ndarray[Any, Any], inputs: Any) -> None:
        inputs["x"] = item

    random = np.random.default_rng(1)
    items = [random.random(size, np.float32) for size in random.choice([1, 2, 8, 16, 31, 32], 200)]
    for item, result in client.map(write, items, model="profiled"):
        np.testing.assert_array_equal(result.outputs["y"], -item)
    wait_all_free(client)
    assert figures(client).items == 200


@pytest.mark.parametrize("size", [9, 15])
def test_shapes_between_the_profiles_are_refused_when_they_are_submitted(client, size):
    with pytest.raises(InvalidInput, match=rf"takes items of x \(1 to 8\) or x \(16 to 32\), got x \({size},"):
        client.infer(x=np.zeros((1, size), np.float32), model="profiled")
    with pytest.raises(InvalidInput, match=r"must have shape \(1,\) and then \(1 to 32\), got \(1, 33\)"):
        client.infer(x=np.zeros((1, 33), np.float32), model="profiled")
    wait_all_free(client)


def test_an_answer_as_long_as_the_data_says_and_one_that_is_too_long(client):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    x[:, 0] = 2
    with client.lease_many(4, model="upto") as run:
        run[0].inputs["x"] = x
        outputs = run[0].submit().result(timeout_s=60).outputs
        np.testing.assert_array_equal(outputs["y"], x[:, :2])
        np.testing.assert_array_equal(outputs["n"], x[:, :1])
    x[:, 0] = 4
    with pytest.raises(EngineFailed, match=r"rows hold items of \(0 to 3\); if it may be larger, start the pool with"):
        client.infer(x=x[:1], model="upto")
    x[:, 0] = 3
    np.testing.assert_array_equal(client.infer(x=x, model="upto")["y"], x[:, :3])


def test_inputs_that_a_batch_shares(client):
    x, b = np.arange(15, dtype=np.float32).reshape(5, 3), np.ones((2, 3), np.float32)
    for k in (2, 3):
        y = client.infer(x=x, k=np.float32(k), b=b, model="shared")["y"]
        np.testing.assert_array_equal(y, x * k + 1)


def test_the_bytes_that_crossed_the_bus_are_counted(client):
    def copied(model: str) -> tuple[int, int]:
        (one,) = [one for one in client.status().models if one.name == model]
        return sum(on.copied_in_bytes for on in one.devices), sum(on.copied_out_bytes for on in one.devices)

    def of(model: str, **arrays: Any) -> tuple[int, int]:
        """Of one batch."""
        into, out = copied(model)
        client.infer(model=model, **arrays)
        return copied(model)[0] - into, copied(model)[1] - out

    ones = np.ones((3, 16), np.float32)
    assert of("profiled", x=ones) == (3 * 16 * 4, 3 * 16 * 4)
    assert of("profiled", x=ones[:2, :5]) == (2 * 5 * 4, 2 * 5 * 4)
    assert of("shared", x=ones[:, :3], k=np.float32(2), b=ones[:2, :3]) == (3 * 3 * 4 + 4 + 2 * 3 * 4, 3 * 3 * 4)
    assert of("upto", x=ones[:, :4]) == (3 * 4 * 4, 3 * (1 + 1) * 4)
    assert of("upto", x=ones[:1, :4]) == (2 * 4 * 4, (1 + 1) * 4), "the only item fills a batch of two up"
