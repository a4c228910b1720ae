"""`infer`: arrays of any length in, arrays out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.ipc.fake_pool import BAD, MODEL, NET_S, SUM, Threads, figures, until
from trtpool.ipc.client import Client
from trtpool.ipc.errors import EngineFailed, InvalidInput, LeaseTooLarge, PoolBusy, PoolClosed
from trtpool.ipc.handles import Lease


def items(count: int) -> npt.NDArray[Any]:
    return np.arange(count * 4, dtype=np.float32).reshape(count, 4)


def test_one_item_without_an_axis_of_items(client):
    x = np.array([1, 2, 3, 4], np.float32)
    answer = client.infer(x=x)
    assert {name: (array.shape, array.dtype.name) for name, array in answer.items()} == {
        "y": ((4,), "float32"),
        "total": ((), "float64"),
    }
    assert all(isinstance(array, np.ndarray) for array in answer.values())
    np.testing.assert_array_equal(answer["y"], -x)
    assert answer["total"] == 10
    assert figures(client).free == 16


@pytest.mark.parametrize("per_slot", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 11, 12, 13, 16, 17, 100])
def test_any_number_of_items(make_pool, count, per_slot):
    """None, a partly filled slot, a full batch, more than the client may hold, more than there is."""
    client = make_pool(items_per_slot=per_slot, max_batch=4 * per_slot).connect()
    x = items(count)
    answer = client.infer(x=x)
    assert (answer["y"].shape, answer["total"].shape) == ((count, 4), (count,))
    np.testing.assert_array_equal(answer["y"], -x)
    np.testing.assert_array_equal(answer["total"], x.sum(axis=1))
    now = figures(client)
    assert (now.free, now.items) == (16, count)


def test_the_answer_is_a_copy(client):
    first = client.infer(x=np.full((3, 4), 1, np.float32))["y"]
    client.infer(x=np.full((16, 4), 2, np.float32))
    assert (first == -1).all()
    first[...] = 0
    assert figures(client).free == 16


@pytest.mark.parametrize("per_slot", [1, 2])
def test_several_inputs(make_pool, per_slot):
    client = make_pool(SUM, items_per_slot=per_slot).connect()
    a = np.arange(7 * 6, dtype=np.int32).reshape(7, 2, 3)
    np.testing.assert_array_equal(client.infer(a=a, b=10 * a)["sum"], 11 * a)
    np.testing.assert_array_equal(client.infer({"b": a[0], "a": a[1]})["sum"], a[0] + a[1])
    np.testing.assert_array_equal(client.infer({"b": a}, a=a)["sum"], 2 * a)


def test_arrays_of_any_layout(client):
    x = np.asfortranarray(items(6))[::-1]
    np.testing.assert_array_equal(client.infer(x=x)["y"], -x)
    wide = np.arange(48, dtype=np.float32).reshape(6, 8)[:, ::2]
    np.testing.assert_array_equal(client.infer(x=wide)["y"], -wide)
    x.flags.writeable = False
    np.testing.assert_array_equal(client.infer(x=x)["y"], -x)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "model 'neg' has the inputs x, got none"),
        ({"y": items(1)}, "has the inputs x, got y"),
        ({"x": items(1), "z": items(1)}, "has the inputs x, got x, z"),
        ({"x": np.zeros((2, 5), np.float32)}, r"input 'x' must have shape \(2, 4\), got \(2, 5\)"),
        ({"x": np.zeros((2, 2, 4), np.float32)}, r"must have shape \(2, 4\), got \(2, 2, 4\)"),
        ({"x": np.float32(1)}, r"must have shape \(0, 4\), got \(\)"),
        ({"x": np.zeros((2, 4))}, r"input 'x' must be float32, got float64; convert it with .astype\('float32'\)"),
        ({"x": [[1, 2, 3, 4]]}, "must be float32, got int64"),
        ({"x": [[1, 2], [3]]}, "input 'x' cannot be made an array"),
        ({"x": "abcd"}, "input 'x' must have shape"),
    ],
)
def test_inputs_that_do_not_fit(client, given: dict[str, Any], text):
    with pytest.raises(InvalidInput, match=text):
        client.infer(**given)
    assert figures(client).free == 16


def test_inputs_of_different_lengths(make_pool):
    client = make_pool(SUM).connect()
    a = np.zeros((3, 2, 3), np.int32)
    with pytest.raises(InvalidInput, match=r"input 'b' must have shape \(3, 2, 3\), got \(2, 2, 3\)"):
        client.infer(a=a, b=a[:2])
    with pytest.raises(InvalidInput, match=r"input 'b' must have shape \(2, 3\), got \(3, 2, 3\)"):
        client.infer(a=a[0], b=a)


def test_models_by_name(make_pool):
    client = make_pool(MODEL, SUM).connect()
    assert client.infer(x=items(1), model="neg")["total"] == [6]
    with pytest.raises(InvalidInput, match="this pool has several models; name one with model=: neg, add"):
        client.infer(x=items(1))
    with pytest.raises(InvalidInput, match="this pool has no model 'none'; it has neg, add"):
        client.infer(x=items(1), model="none")


@pytest.mark.parametrize("count", [1, 30])
def test_an_item_that_fails_fails_the_call_and_keeps_nothing(client, count):
    x = items(count)
    x[count // 2] = BAD
    with pytest.raises(EngineFailed, match="a bad item"):
        client.infer(x=x)
    until(client, lambda now: now.free == 16)
    np.testing.assert_array_equal(client.infer(x=items(2))["y"], -items(2))


def test_a_result_that_does_not_come_in_time(pool, client):
    with pool.held(), pytest.raises(TimeoutError, match=r"no result within 0\.01 s"):
        client.infer(x=items(30), timeout_s=0.01)
    until(client, lambda now: now.free == 16)


@pytest.mark.parametrize("count", [1, 20])
def test_slots_that_do_not_come_free_in_time(pool, client, count):
    held = [pool.connect().lease_many(8) for _ in range(2)]
    with pytest.raises(PoolBusy):
        client.infer(x=items(count), timeout_s=0.01)
    for leases in held:
        leases.release()
    until(client, lambda now: now.free == 16 and not now.waiting)
    np.testing.assert_array_equal(client.infer(x=items(count), timeout_s=NET_S)["y"], -items(count))


def test_it_makes_do_with_what_others_leave(pool, client):
    with pool.connect().lease_many(12):
        np.testing.assert_array_equal(client.infer(x=items(100), timeout_s=NET_S)["y"], -items(100))


def test_it_makes_do_with_what_this_client_has_left(client):
    with client.lease_many(11):
        np.testing.assert_array_equal(client.infer(x=items(20), timeout_s=NET_S)["y"], -items(20))


def test_a_client_that_holds_all_that_it_may_hold(client, monkeypatch):
    count = threading.active_count
    monkeypatch.setattr(threading, "active_count", lambda: count() - 2)  # the pool's two
    with client.lease_many(12), pytest.raises(LeaseTooLarge, match="this client holds 12 of the 12 slots"):
        client.infer(x=items(2))


def test_several_batches_are_in_flight(pool, client):
    """The worker need not wait for the copies."""
    pool.hold()
    thread = threading.Thread(target=lambda: client.infer(x=items(100)))
    thread.start()
    other = pool.connect()
    now = until(other, lambda now: now.running + now.queued == 12)
    assert now.leased + now.done <= 4
    pool.go()
    thread.join(NET_S)
    until(client, lambda now: now.free == 16)


def test_threads_and_clients_at_once(pool):
    def work(client: Client, number: int) -> None:
        for count in (1, 40, 3, 17):
            x = np.full((count, 4), number, np.float32)
            np.testing.assert_array_equal(client.infer(x=x, timeout_s=NET_S)["y"], -x)

    clients = [pool.connect() for _ in range(3)]
    Threads(*(partial(work, client, n) for n, client in enumerate(clients * 3))).join()
    pool.wait_all_free()


def test_an_interrupt_gives_all_slots_back(client, monkeypatch):
    submit: Callable[..., Any] = Lease.submit
    calls = iter(range(3))

    def interrupted(lease: Lease, **options: Any) -> Any:
        for _ in calls:
            return submit(lease, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Lease, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.infer(x=items(100))
    until(client, lambda now: now.free == 16)


def test_after_close(client):
    client.close()
    with pytest.raises(PoolClosed, match="this client is closed"):
        client.infer(x=items(1))
