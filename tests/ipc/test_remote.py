"""Handles: pickled, shared, connected once in each process.  Other processes are in tests/system."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.ipc.fake_pool import NET_S, FakePool, until
from trtpool.ipc import remote
from trtpool.ipc.client import Client
from trtpool.ipc.errors import PoolNotFound
from trtpool.ipc.remote import PoolHandle


@pytest.fixture
def handle(client: Client) -> Iterator[PoolHandle]:
    yield client.handle()
    remote._close_all()  # as at the end of the process


def test_a_handle_is_used_like_a_client(client, handle):
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(handle.infer(x=x)["y"], -x)
    np.testing.assert_array_equal(handle.infer({"x": x}, timeout_s=NET_S)["total"], x.sum(1))
    with handle.lease(timeout_s=NET_S) as lease:
        lease.inputs["x"][...] = 2
        assert lease.submit().result(NET_S).outputs["total"] == 8
    with handle.lease_many(3) as leases:
        assert sum(one.count for one in leases) == 3

    def write(value: int, inputs: dict[str, npt.NDArray[Any]]) -> None:
        inputs["x"][...] = value

    assert [value for value, _ in handle.map(write, range(5), window=2)] == list(range(5))
    assert handle.status().name == "fake"
    assert repr(handle) == f"<PoolHandle of {client.run_dir}>"


def test_a_handle_connects_when_it_is_first_used_and_once(client, handle):
    assert client.status().producers == 1
    copies = [pickle.loads(pickle.dumps(handle)) for _ in range(3)]
    assert client.status().producers == 1
    assert len({id(copy.client) for copy in (handle, *copies)}) == 1
    assert client.status().producers == 2


def test_it_is_not_the_clients_own_connection(client, handle):
    assert handle.client is not client
    client.close()
    assert handle.status().producers >= 1


def test_threads_that_use_it_first_at_once_connect_once(client, handle):
    barrier = threading.Barrier(8)

    def first_use(_: int) -> int:
        barrier.wait(NET_S)
        return id(handle.client)

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(first_use, range(8)))) == 1
    assert client.status().producers == 2


def test_it_works_in_a_thread_pool(client, handle):
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda value: handle.infer(x=np.full(4, value, "f4"))["total"].item(), range(50)))
    assert answers == [4 * value for value in range(50)]


def test_it_connects_again_after_its_client_was_closed(client, handle):
    handle.client.close()
    assert handle.infer(x=np.zeros(4, "f4"))["total"] == 0


def test_a_client_of_ones_own(client, handle):
    with handle.connect() as own:
        assert own is not handle.client
        own.infer(x=np.zeros(4, "f4"))
    assert handle.status().producers >= 1


def test_the_end_of_the_process_closes_it(client, handle):
    handle.infer(x=np.zeros(4, "f4"))
    connected = handle.client
    remote._close_all()
    assert connected.session.closed
    until(client, lambda _: client.status().producers == 1)


def test_a_pool_that_is_gone(make_pool):
    pool: FakePool = make_pool()
    handle = pool.connect().handle()
    pool.stop()
    with pytest.raises(PoolNotFound, match="no pool answers"):
        handle.status()
