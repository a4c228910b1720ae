"""`gpu=`: work that one GPU of the pool alone may run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.ipc.fake_pool import NET_S, FakePool, states, until
from trtpool.ipc import remote
from trtpool.ipc.client import Client
from trtpool.ipc.errors import InvalidInput
from trtpool.ipc.remote import PoolHandle
from trtpool.ipc.submitted import Submitted

X = np.arange(24, dtype=np.float32).reshape(6, 4)


def write(value: int, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
    inputs["x"][...] = value


def lease_and_submit(client: Client, gpu: int | None) -> object:
    with client.lease() as lease:
        write(1, lease.inputs)
        return float(lease.submit(gpu=gpu).result(NET_S).outputs["total"])


def lease_many_and_submit(client: Client, gpu: int | None) -> object:
    with client.lease_many(6) as leases:
        for lease in leases:
            write(2, lease.inputs)
        return [float(total) for work in leases.submit(gpu=gpu) for total in work.result(NET_S).outputs["total"]]


def infer(client: Client | PoolHandle, gpu: int | None) -> object:
    return client.infer(x=X, gpu=gpu)["total"].tolist()


def stream(client: Client | PoolHandle, gpu: int | None) -> object:
    return [float(result.outputs["total"]) for _, result in client.map(write, range(40), gpu=gpu)]


WAYS = {
    lease_and_submit: 4.0,
    lease_many_and_submit: [8.0] * 6,
    infer: X.sum(1).tolist(),
    stream: [4.0 * value for value in range(40)],
}


@pytest.mark.parametrize("gpu", [0, 1, 2, np.int64(2)])
@pytest.mark.parametrize("way", WAYS)
def test_only_that_gpu_runs_it(make_pool, way, gpu):
    pool: FakePool = make_pool(gpus=3)
    assert way(pool.connect(), gpu) == WAYS[way]
    assert set(pool.ran) == {int(gpu)}


def test_a_handle_passes_it_on(make_pool: Callable[..., FakePool]) -> None:
    pool = make_pool(gpus=2)
    handle = pool.connect().handle()
    try:
        assert infer(handle, 1) == WAYS[infer]
        assert stream(handle, 1) == WAYS[stream]
        assert set(pool.ran) == {1}
    finally:
        remote._close_all()  # as at the end of the process


def test_without_it_all_gpus_share_the_work(make_pool: Callable[..., FakePool]) -> None:
    pool = make_pool(gpus=2)
    client = pool.connect()
    pool.hold()
    works: list[Submitted] = []
    with client.lease_many(2) as leases:
        for index, slot in enumerate(leases.slots()):
            write(index, slot.inputs)
            works.append(slot.submit())
            until(client, lambda now: now.running == len(works))
        pool.go()
        assert [work.result(NET_S).outputs["total"] for work in works] == [0, 4]
    assert pool.ran == {0: 1, 1: 1}


@pytest.mark.parametrize(
    ("gpus", "gpu", "text"),
    [
        (0, 0, "there is no GPU 0: the pool runs on the CPU, so gpu= must be left out"),
        (1, 1, "there is no GPU 1: the pool has GPU 0"),
        (2, 2, "there is no GPU 2: the pool has GPUs 0 to 1"),
        (2, -1, "there is no GPU -1: the pool has GPUs 0 to 1"),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_that_the_pool_does_not_have(make_pool, way, gpus, gpu, text):
    pool: FakePool = make_pool(gpus=gpus)
    client = pool.connect()
    with pytest.raises(InvalidInput) as caught:
        way(client, gpu)
    assert str(caught.value) == text
    assert states(client) == (16, 0, 0, 0, 0)
    assert not pool.ran
    assert way(client, None) == WAYS[way]


def test_a_refused_lease_is_still_to_be_submitted(make_pool: Callable[..., FakePool]) -> None:
    client = make_pool(gpus=2).connect()
    with client.lease() as lease:
        write(1, lease.inputs)
        with pytest.raises(InvalidInput):
            lease.submit(gpu=2)
        with pytest.raises(TypeError):
            lease.submit(gpu=1.0)  # type: ignore[arg-type]
        assert lease.submit(gpu=1).result(NET_S).outputs["total"] == 4


def test_a_stream_is_refused_before_it_is_read(make_pool: Callable[..., FakePool]) -> None:
    with pytest.raises(InvalidInput):
        make_pool().connect().map(write, range(4), gpu=0)
