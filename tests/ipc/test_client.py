"""The client as a whole: connecting, its models, status, closing, and the end of the pool."""

from __future__ import annotations

import gc
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.ipc.fake_pool import MODEL, NET_S, SUM, FakePool, figures, in_turn, until
from trtpool.ipc.client import Client
from trtpool.ipc.errors import InvalidInput, PoolClosed, PoolError, PoolNotFound
from trtpool.ipc.link import TRANSPORTS, ZmqLink
from trtpool.ipc.remote import connect
from trtpool.ipc.submitted import Submitted

Event = Callable[[FakePool], None]
ENDS: dict[str, tuple[Event, str]] = {
    "stopped": (FakePool.stop, "pool 'fake' was stopped"),
    "killed": (FakePool.kill, "the pool ended unexpectedly; see its log, and start it again with `trtpool start`"),
}
both_ends = pytest.mark.parametrize(("end", "text"), ENDS.values(), ids=list(ENDS))


@pytest.fixture(params=list(TRANSPORTS))
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed broker sent is here already."""
    monkeypatch.setattr(ZmqLink, "late_s", 0.05)


def submit(client: Client, value: float = 1.0) -> Submitted:
    lease = client.lease(timeout_s=NET_S)
    lease.inputs["x"][...] = value
    return lease.submit()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# --- Connecting ----------------------------------------------------------------------------------


def test_what_a_client_knows_of_its_pool(make_pool):
    pool = make_pool(MODEL, SUM, slots=10, items_per_slot=3, max_batch=9)
    with connect(run_dir=pool.run_dir) as client:
        assert client.name == "fake"
        assert client.run_dir == pool.run_dir
        assert [model.spec for model in client.models] == [MODEL, SUM]
        assert [(one.slots, one.items_per_slot, one.max_batch) for one in client.models] == 2 * [(10, 3, 9)]
        assert client.model_index("add") == 1
        assert repr(client) == "<Client of pool 'fake', connected>"
    assert repr(client) == "<Client of pool 'fake', closed>"


def test_nobody_there(tmp_path):
    with pytest.raises(PoolNotFound, match=r"no pool answers in .*; start one with `trtpool start`"):
        connect(run_dir=tmp_path)
    gc.collect()  # and its finalizer says nothing


def test_by_the_environment(pool, monkeypatch):
    monkeypatch.setenv("TRTPOOL_RUN_DIR", str(pool.run_dir))
    with connect() as client:
        assert client.name == "fake"


def test_by_name(pool, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("TRTPOOL_RUN_DIR", raising=False)
    (tmp_path / "trtpool").mkdir()
    (tmp_path / "trtpool" / "mine").symlink_to(pool.run_dir)
    with connect("mine") as client:
        assert client.name == "fake"


def come_and_go(pool: FakePool) -> None:
    """A closed client still has the arena mapped, for arrays that outlive it; at the return this one is gone."""
    with connect(run_dir=pool.run_dir, transport=pool.transport) as client:
        client.infer(x=np.zeros((3, 4), np.float32))


def test_connecting_and_closing_leaves_no_descriptor(pool, client):
    client.infer(x=np.zeros((3, 4), np.float32))
    for _ in range(3):
        pool.connect().close()
    until(client, lambda now: now.free == 16)
    before = descriptors()
    for _ in range(20):
        come_and_go(pool)
    gc.collect()
    deadline = time.monotonic() + NET_S
    while descriptors() > before:  # the broker, in this process too, closes its ends of them
        assert time.monotonic() < deadline, f"{descriptors() - before} descriptors are left"
        client.status()


def test_a_client_is_not_pickled(client):
    with pytest.raises(TypeError, match=r"cannot be pickled; give the other process pool.handle\(\)"):
        pickle.dumps(client)


def test_a_client_that_is_dropped_warns_and_closes(pool, client):
    other = Client(pool.run_dir)
    with pytest.warns(ResourceWarning, match="was dropped without close"):
        del other
    while client.status().producers > 1:
        pass


# --- Asking --------------------------------------------------------------------------------------


def test_status(pool, client):
    other = pool.connect()
    with client.lease_many(3), other.lease():
        report = client.status()
    assert (report.name, report.producers, report.violations, report.draining) == ("fake", 2, 0, False)
    assert (report.models[0].leased, report.models[0].free, report.models[0].slots) == (4, 12, 16)
    assert [worker.device for worker in report.workers] == ["fake"]


@pytest.mark.parametrize("count", [0, -1])
def test_leasing_nothing(client, count):
    with pytest.raises(InvalidInput, match=f"takes a count of at least 1, got {count}"):
        client.lease_many(count)


def test_a_count_is_a_whole_number(client):
    with pytest.raises(TypeError):
        client.lease_many(2.0)
    with client.lease_many(np.int64(2)) as leases:
        assert sum(lease.count for lease in leases) == 2
    assert figures(client).free == 16


def test_models_that_are_not_there(make_pool):
    client = make_pool(MODEL, SUM).connect()
    with pytest.raises(InvalidInput, match="this pool has no model 'x'; it has neg, add"):
        client.lease(model="x")
    with pytest.raises(InvalidInput, match="name one with model=: neg, add"):
        client.lease()


# --- Closing -------------------------------------------------------------------------------------


def test_closing_twice(client):
    client.close()
    client.close()
    for call in (client.lease, client.status, lambda: client.lease_many(2), lambda: client.infer(x=np.zeros(4, "f4"))):
        with pytest.raises(PoolClosed, match="this client is closed"):
            call()


def test_closing_in_many_threads_at_once(client):
    submit(client)
    threads = [threading.Thread(target=client.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(NET_S)
        assert not thread.is_alive()


def test_handles_outlive_the_client_quietly(client):
    lease, submitted = client.lease(), submit(client)
    result = submitted.result(NET_S)
    client.close()
    assert (result.outputs["y"] == -1).all(), "the memory is still there"
    for handle in (lease, submitted, result):
        handle.release()
        handle.release()
    del lease, submitted, result
    gc.collect()


def test_an_error_in_a_with_block_is_not_hidden(pool):
    def fail(client: Client) -> None:
        submit(client)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), connect(run_dir=pool.run_dir) as client:
        fail(client)


# --- The pool's end ------------------------------------------------------------------------------


@both_ends
def test_the_end_reaches_all_who_wait(pool, client, end, text):
    held = client.lease_many(8)
    outcomes: list[PoolError | None] = []

    def wait(call: Callable[[], object]) -> None:
        try:
            call()
            outcomes.append(None)
        except PoolError as error:
            outcomes.append(error)

    pool.hold()
    work = [submit(client) for _ in range(4)]
    calls = [*(lambda one=one: one.result(NET_S) for one in work), lambda: client.lease(timeout_s=NET_S)]
    threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    until(pool.connect(), lambda now: now.waiting == 1)
    end(pool)
    for thread in threads:
        thread.join(NET_S)
        assert not thread.is_alive()
    # A pool that is stopped finishes what runs; one that is killed, nothing.
    results = outcomes.count(None)
    assert results == (4 if end is FakePool.stop else 0)
    closed = [outcome for outcome in outcomes if outcome is not None]
    assert all(isinstance(error, PoolClosed) for error in closed)
    assert all(text in str(error) or "is stopping" in str(error) for error in closed)
    held.release()


@both_ends
def test_results_that_came_before_are_there_after(pool, client, end, text):
    read, unread = submit(client, 3), submit(client, 4)
    result = read.result(NET_S)
    while not unread.done():
        pass
    end(pool)
    with pytest.raises(PoolClosed):
        client.status()
    assert (result.outputs["y"] == -3).all()
    assert unread.result(NET_S).outputs["total"] == 16
    read.release()
    unread.release()
    for call in (client.lease, client.status, lambda: client.lease_many(2)):
        with pytest.raises(PoolClosed, match=text):
            call()


def test_what_the_broker_sent_before_its_end_is_taken_in(pool, client):
    """The lifeline may be seen to end before the last frames are."""
    work = [submit(client, value) for value in range(4)]
    other = pool.connect()
    until(other, lambda now: now.done == 4)
    pool.stop()
    for value, one in enumerate(work):
        assert one.result(NET_S).outputs["total"] == 4 * value


@both_ends
def test_submitting_and_releasing_after_the_end(pool, client, end, text):
    leases = client.lease_many(3).slots()
    for lease in leases:
        lease.inputs["x"][...] = 1
    end(pool)
    with pytest.raises(PoolClosed):
        leases[0].submit().result(NET_S)
    with pytest.raises(PoolClosed, match=text):
        leases[1].submit()
    assert (leases[2].inputs["x"] == 1).all()
    for lease in leases:
        lease.release()


@both_ends
def test_callbacks_hear_of_the_end(pool, client, end, text):
    heard: list[object] = []
    called = threading.Event()
    pool.hold()
    # More than a worker is sent: the last is queued when the broker is killed.
    work = [submit(client) for _ in range(10)]
    work[-1].add_done_callback(in_turn(lambda future: heard.append(future.exception()), lambda _: called.set()))
    until(pool.connect(), lambda now: now.queued + now.running == len(work))
    end(pool)
    assert called.wait(NET_S)
    if end is FakePool.stop:
        assert heard == [None], "a stopping pool finishes what it has"
    else:
        assert isinstance(heard[0], PoolClosed)


@both_ends
def test_closing_after_the_end(pool, client, end, text):
    submit(client)
    end(pool)
    client.close()


def test_an_ended_pool_is_not_named_by_spares(pool, client):
    """A slot granted in advance is no right to a pool that has ended."""
    for _ in range(5):
        submit(client).result(NET_S).release()
    assert client.session.models[0].spares
    pool.kill()
    with pytest.raises(PoolClosed):
        client.status()
    with pytest.raises(PoolClosed):
        client.lease()
