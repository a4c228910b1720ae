"""Leases, submitted work and results: their states, their views, and what happens to those that are kept or dropped."""

from __future__ import annotations

import gc
import pickle
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.ipc.fake_pool import BAD, NET_S, FakePool, Threads, figures, in_turn, states, until
from trtpool.ipc import returns
from trtpool.ipc.client import Client
from trtpool.ipc.errors import EngineFailed, InvalidInput, SpentHandle
from trtpool.ipc.handles import Lease, Result
from trtpool.ipc.submitted import Submitted

ALL_FREE = (16, 0, 0, 0, 0)


def address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def write(lease: Lease, value: float) -> Submitted:
    lease.inputs["x"][...] = value
    return lease.submit()


# --- States --------------------------------------------------------------------------------------


def test_the_way_of_a_slot(client):
    lease = client.lease()
    assert states(client) == (15, 1, 0, 0, 0)
    lease.inputs["x"][...] = [1, 2, 3, 4]
    submitted = lease.submit()
    result = submitted.result(NET_S)
    np.testing.assert_array_equal(result.outputs["y"], [-1, -2, -3, -4])
    assert result.outputs["total"] == 10
    assert result.items == 1
    assert states(client) == (15, 0, 0, 0, 1)
    lease.release()
    assert states(client) == ALL_FREE


def spent(call: Callable[[], object], text: str) -> None:
    with pytest.raises(SpentHandle, match=text):
        call()


def test_using_a_submitted_lease(pool, client):
    with pool.held():
        lease = client.lease()
        inputs = lease.inputs
        lease.submit()
        for call in (lambda: lease.inputs, lambda: inputs["x"], lease.submit, lease.slots):
            spent(call, "was submitted; its inputs belong to the pool until the result is there")


def test_using_a_lease_whose_result_is_there(client):
    lease = client.lease()
    inputs = lease.inputs
    result = write(lease, 1).result(NET_S)
    for call in (lambda: lease.inputs, lambda: inputs["x"], lease.submit, lease.slots):
        spent(call, "has its result already; lease new slots for the next item")
    assert result.outputs["total"] == 4


def test_using_what_was_released(client):
    lease = client.lease()
    inputs = lease.inputs
    lease.release()
    for call in (lambda: lease.inputs, lambda: inputs["x"], lease.submit, lease.slots):
        spent(call, "was released; lease new slots")
    lease = client.lease()
    submitted = write(lease, 1)
    result = submitted.result(NET_S)
    outputs = result.outputs
    lease.release()
    for call in (lambda: result.outputs, lambda: outputs["y"], submitted.result):
        spent(call, "was released; lease new slots")


@pytest.mark.parametrize("wait", [False, True])
def test_releasing_twice_by_any_handle_is_releasing_once(client, wait):
    lease = client.lease()
    submitted = write(lease, 1)
    releases = [lease.release, submitted.release, lease.release]
    if wait:
        releases.append(submitted.result(NET_S).release)
    for release in releases:
        release()
    until(client, lambda now: now.free == 16)


def test_threads_that_release_at_once_release_once(client):
    """A second Release would be a breach of the protocol, and the end of the connection."""
    barrier = threading.Barrier(4)
    for _ in range(20):
        lease = client.lease()
        Threads(*4 * [in_turn(partial(barrier.wait, NET_S), lease.release)]).join()
    assert states(client) == ALL_FREE


class Oops(Exception):
    pass


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("state", ["leased", "submitted", "done"])
def test_a_with_block_releases_in_every_state(client, state, failing):
    try:
        with client.lease() as lease:
            if state != "leased":
                submitted = write(lease, 1)
                if state == "done":
                    submitted.result(NET_S)
            if failing:
                raise Oops
    except Oops:
        assert failing
    until(client, lambda now: now.free == 16)
    spent(lambda: lease.inputs, "was released")


def test_a_result_is_a_context_manager(client):
    with write(client.lease(), 1).result(NET_S) as result:
        assert result.outputs["total"] == 4
    assert states(client) == ALL_FREE


def test_leases_are_a_context_manager(client):
    with client.lease_many(5) as leases:
        assert sum(lease.count for lease in leases) == 5
        assert states(client) == (11, 5, 0, 0, 0)
    assert states(client) == ALL_FREE


def test_releasing_queued_work_cancels_it(pool, client):
    with pool.held():
        running = [write(client.lease(), 0) for _ in range(8)]
        until(client, lambda now: now.running > 0 and now.queued > 0)
        queued = [work for work in running if work.seq >= 5]
        for work in queued:
            work.release()
        assert all(isinstance(work.exception(NET_S), Exception) for work in queued)
    for work in running:
        work.release()
    until(client, lambda now: now.free == 16)


def test_release_of_running_work_takes_effect_at_its_end(pool, client):
    with pool.held():
        lease = client.lease()
        submitted = write(lease, 3)
        until(client, lambda now: now.running == 1)
        lease.release()
        assert states(client) == (15, 0, 0, 1, 0)
    assert submitted.exception(NET_S) is None
    spent(submitted.result, "was released")
    until(client, lambda now: now.free == 16)


# --- Dropped -------------------------------------------------------------------------------------


def test_a_dropped_lease_warns_and_comes_back(client):
    leases = [client.lease()]
    with pytest.warns(ResourceWarning, match="1 leased slots were dropped without submit"):
        leases.clear()
    assert states(client) == ALL_FREE


def test_a_dropped_lease_comes_back_though_warnings_are_errors(client, recwarn, monkeypatch):
    unraisable: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", unraisable.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lease = client.lease()
        del lease
        gc.collect()
    assert len(unraisable) == 1
    assert states(client) == ALL_FREE


def test_dropped_work_and_results_come_back_silently(pool, client):
    with pool.held():
        write(client.lease(), 1)
        gc.collect()
    write(client.lease(), 2).result(NET_S)
    gc.collect()
    until(client, lambda now: now.free == 16)


def test_handles_dropped_in_another_thread(client):
    leases = [write(client.lease(), i) for i in range(8)]
    for lease in leases:
        lease.result(NET_S)
    del lease
    thread = threading.Thread(target=leases.clear)
    thread.start()
    thread.join(NET_S)
    until(client, lambda now: now.free == 16)


# --- Kept arrays ---------------------------------------------------------------------------------

KEPT: dict[str, Callable[[npt.NDArray[Any]], object]] = {
    "the array": lambda y: y,
    "a slice": lambda y: y[1:3],
    "a slice of a slice": lambda y: y[1:][1:],
    "a reshape": lambda y: y.reshape(2, 2),
    "another dtype's view": lambda y: y.view(np.uint8),
    "a transpose": lambda y: y.reshape(2, 2).T,
    "a memoryview": lambda y: y.data,
    "a memoryview's slice": lambda y: y.data[1:],
    "a DLPack import": np.from_dlpack,
    "a DLPack capsule": lambda y: y.__dlpack__(),
    "a broadcast": lambda y: np.broadcast_to(y, (3, 4)),
    "an ndarray over it": lambda y: np.ndarray((2,), np.float32, y),
    "frombuffer": lambda y: np.frombuffer(y, np.float32),
    "an iterator": lambda y: y.flat,
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=list(KEPT))
def test_what_shows_a_slot_keeps_it(pool, client, keep):
    other = pool.connect()
    with client.lease() as lease:
        kept = keep(write(lease, 5).result(NET_S).outputs["y"])
    assert states(client) == (15, 0, 0, 0, 1)
    for value in range(40):
        other.infer(x=np.full(4, value, np.float32))
    assert states(other) == (15, 0, 0, 0, 1)
    if isinstance(kept, (np.ndarray, memoryview)):
        assert (np.asarray(kept).view(np.float32) == -5).all() if kept.itemsize == 4 else True
    del kept
    # Nothing else is asked of the client that kept it: its finalizer gives the slot back.
    until(other, lambda now: now.free == 16)


def test_a_kept_input_array_keeps_its_slot(pool, client):
    other = pool.connect()
    with client.lease() as lease:
        mine = lease.inputs["x"]
        write(lease, 5).result(NET_S)
    with other.lease_many(12) as leases:
        for lease in leases:
            lease.inputs["x"][...] = 7
        assert (mine == 5).all()
        mine[...] = 3
        for lease in leases:
            assert (lease.inputs["x"] == 7).all()
    del mine
    until(other, lambda now: now.free == 16)


def test_a_kept_array_is_never_anothers_though_the_pool_is_flooded(pool, client):
    kept = []
    for value in range(6):
        with client.lease() as lease:
            kept.append(write(lease, value).result(NET_S).outputs["y"])
    others = [pool.connect() for _ in range(2)]
    Threads(*(partial(other.infer, x=np.full((300, 4), 77, np.float32)) for other in others)).join()
    for value, array in enumerate(kept):
        np.testing.assert_array_equal(array, np.full(4, -value, np.float32))
    assert states(others[0]) == (10, 0, 0, 0, 6)
    del kept[:], array
    until(others[0], lambda now: now.free == 16)


def test_an_array_kept_of_a_run_keeps_the_slots_that_are_split_off_it(pool, client):
    other = pool.connect()
    (lease,) = client.lease_many(4)
    kept = lease.inputs["x"]
    kept[...] = 5
    for slot in lease.slots():
        slot.release()
    assert states(client) == (12, 4, 0, 0, 0)
    with other.lease_many(12) as leases:
        for run in leases:
            run.inputs["x"][...] = 7
    assert (kept == 5).all()
    del kept
    until(other, lambda now: now.free == 16)


def test_views_share_one_root_and_end_one_by_one(client):
    with client.lease() as lease:
        result = write(lease, 1).result(NET_S)
        y, total = result.outputs["y"], result.outputs["total"]
    del y
    assert states(client) == (15, 0, 0, 0, 1)
    assert total == 4
    del total
    assert states(client) == ALL_FREE


def test_arrays_outlive_the_client(pool):
    client = pool.connect()
    with client.lease() as lease:
        kept = write(lease, 9).result(NET_S).outputs["y"]
    client.close()
    del client, lease
    gc.collect()
    pool.connect().infer(x=np.ones((50, 4), np.float32))
    np.testing.assert_array_equal(kept, np.full(4, -9, np.float32))


def test_slots_kept_for_long_are_worth_a_warning(client, monkeypatch):
    with client.lease() as lease:
        kept = write(lease, 1).result(NET_S).outputs["y"]
    monkeypatch.setattr(returns, "HELD_WARNING_S", -1.0)
    with pytest.warns(ResourceWarning, match="1 slots were released -1 s ago and an array of them is still alive"):
        client.status()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        client.status()  # said once
    assert (kept == -1).all()


# --- Views ---------------------------------------------------------------------------------------


def test_a_view_is_the_arenas_own_memory(client):
    """P1: what is written there is what the worker reads; the address says so."""
    segment = np.frombuffer(client.session.segment, np.uint8)
    layout = client.models[0]
    with client.lease() as lease:
        view = lease.inputs["x"]
        plane = layout.inputs[0]
        offset = plane.offset + lease._claim.first * 16
        assert address(view) == address(segment) + offset
        assert view.flags.c_contiguous
        assert view.flags.writeable
        assert view.flags.aligned
        assert not view.flags.owndata
        assert address(lease.inputs["x"]) == address(view), "another view, the same memory"
        view[...] = 6
        assert (segment[offset : offset + 16].view(np.float32) == 6).all()
        y = lease.submit().result(NET_S).outputs["y"]
        assert address(y) == address(segment) + layout.outputs[0].offset + lease._claim.first * 16


@pytest.mark.parametrize("per_slot", [1, 3])
def test_shapes(make_pool, per_slot):
    client = make_pool(items_per_slot=per_slot, max_batch=4 * per_slot).connect()
    inner = () if per_slot == 1 else (per_slot,)
    with client.lease() as lease:
        assert lease.inputs["x"].shape == (*inner, 4)
        result = write(lease, 1).result(NET_S)
        assert result.items == per_slot
        assert result.outputs["y"].shape == (*inner, 4)
        assert result.outputs["total"].shape == inner
        assert result.outputs["total"].dtype == np.float64
    with client.lease_many(5) as leases:
        (run,) = leases
        x = run.inputs["x"]
        assert x.shape == (5, *inner, 4)
        assert x.flags.c_contiguous, "side by side: no gaps between the slots"
        x[...] = np.arange(x.size, dtype=np.float32).reshape(x.shape)
        result = run.submit().result(NET_S)
        assert result.items == 5 * per_slot
        np.testing.assert_array_equal(result.outputs["y"], -x)
        for row in range(5):
            one = result.at(row)
            assert one.items == per_slot
            assert one.outputs["y"].shape == (*inner, 4)
            np.testing.assert_array_equal(one.outputs["y"], -x[row])


def test_a_slot_that_is_not_there(client):
    with client.lease_many(3) as leases:
        (run,) = leases
        run.inputs["x"][...] = 1
        result = run.submit().result(NET_S)
        for row in (-1, 3):
            with pytest.raises(InvalidInput, match=f"slot {row} of 3"):
                result.at(row)


def test_names(client):
    with client.lease() as lease:
        assert list(lease.inputs) == ["x"]
        assert len(lease.inputs) == 1
        assert "x" in lease.inputs
        assert "y" not in lease.inputs
        assert repr(lease.inputs) == "<views of x>"
        with pytest.raises(InvalidInput, match=r"the model has no tensor 'y' here; it has 'x'"):
            lease.inputs["y"]
        outputs = write(lease, 1).result(NET_S).outputs
        assert dict(outputs).keys() == {"y", "total"}


def test_how_a_lease_presents_itself(client):
    lease = client.lease()
    assert repr(lease) == "<Lease of 1 slots of 'neg', leased>"
    submitted = write(lease, 1)
    assert repr(lease) == "<Lease of 1 slots of 'neg', submitted>"
    submitted.result(NET_S)
    assert repr(lease) == "<Lease of 1 slots of 'neg', done>"
    lease.release()
    assert repr(lease) == "<Lease of 1 slots of 'neg', released>"


# --- Runs ----------------------------------------------------------------------------------------


def test_a_run_taken_apart(client):
    with client.lease_many(4) as leases:
        slots = leases.slots()
        spent(lambda: leases[0].inputs, "was released")
        for value, slot in enumerate(slots):
            assert slot.inputs["x"].shape == (4,)
            slot.inputs["x"][...] = value
        work = [slot.submit() for slot in slots]
        for value, submitted in enumerate(work):
            assert (submitted.result(NET_S).outputs["y"] == -value).all()
    assert states(client) == (12, 0, 0, 0, 4), "its slots are each by themselves now"
    for slot in slots:
        slot.release()
    assert states(client) == ALL_FREE


def test_leases_submit_all_runs(client):
    with client.lease_many(6) as leases:
        for lease in leases:
            lease.inputs["x"][...] = 2
        for submitted in leases.submit():
            assert (submitted.result(NET_S).outputs["total"] == 8).all()


@pytest.mark.parametrize("items", [0, 3, 7, -1])
def test_all_slots_but_the_last_must_be_full(make_pool, items):
    client = make_pool(items_per_slot=3, max_batch=6).connect()
    with client.lease_many(2) as leases:
        (run,) = leases
        with pytest.raises(InvalidInput, match=f"{items} items in 2 slots of 3: all but the last must be full"):
            run.submit(items=items)
        run.inputs["x"][...] = 1
        result = run.submit(items=np.int64(4)).result(NET_S)  # nothing was lost by asking
        assert result.items == 4
        assert (result.at(0).items, result.at(1).items) == (3, 1)


def test_items_must_be_a_whole_number(client):
    with client.lease() as lease:
        with pytest.raises(TypeError):
            lease.submit(items=1.0)
        assert write(lease, 1).result(NET_S).items == 1


def test_some_slots_of_a_run_fail(client):
    with client.lease_many(4) as leases:
        (run,) = leases
        run.inputs["x"][...] = np.arange(4)[:, None]
        run.inputs["x"][2] = BAD
        submitted = run.submit()
        with pytest.raises(EngineFailed, match="a bad item") as caught:
            submitted.result(NET_S)
        assert caught.value.slots == range(2, 3)
        assert isinstance(submitted.exception(NET_S), EngineFailed)
        result = submitted.result(NET_S, partial=True)
        assert list(result.errors) == [2]
        np.testing.assert_array_equal(result.outputs["total"][[0, 1, 3]], [0, 4, 12])
        assert (result.at(3).outputs["y"] == -3).all()
        with pytest.raises(EngineFailed):
            result.at(2)


def test_a_run_of_which_all_failed_has_no_partial_result(client):
    with client.lease_many(2) as leases:
        (run,) = leases
        run.inputs["x"][...] = BAD
        submitted = run.submit()
        with pytest.raises(EngineFailed):
            submitted.result(NET_S, partial=True)


def test_handles_are_of_this_process(client):
    with client.lease() as lease:
        for thing in (lease, client):
            with pytest.raises((TypeError, pickle.PicklingError)):
                pickle.dumps(thing)


def test_results_hold_no_reference_cycle(pool, client):
    """Slots come back at once, and not when the garbage collector happens to run."""
    gc.disable()
    try:
        result: Result | None = write(client.lease(), 1).result(NET_S)
        assert result is not None
        del result
        client.session.requests.return_spares(0)
        assert client.status().models[0].free == 16
    finally:
        gc.enable()


def test_a_pool_ends_with_all_slots_free(make_pool: Callable[..., FakePool]) -> None:
    client: Client = make_pool().connect()
    client.infer(x=np.zeros((100, 4), np.float32))
    assert figures(client).free == 16
