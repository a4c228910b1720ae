"""`map`: a stream of items through the pool."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.ipc.fake_pool import BAD, NET_S, SUM, Threads, figures, until
from trtpool.ipc import mapping
from trtpool.ipc.errors import EngineFailed, InvalidInput, LeaseTooLarge, PoolBusy, PoolClosed, SpentHandle, WorkError

Arrays = Mapping[str, npt.NDArray[Any]]


def write(value: float, inputs: Arrays) -> None:
    inputs["x"][...] = value


class Oops(Exception):
    pass


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("window", [1, 2, 5, 12, 64])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 50])
def test_every_item_has_its_result(client, count, window, ordered):
    seen = []
    for value, result in client.map(write, range(count), window=window, ordered=ordered):
        assert result.outputs["y"].shape == (4,)
        assert (result.outputs["y"] == -value).all()
        assert result.outputs["total"] == 4 * value
        assert result.items == 1
        seen.append(value)
    if not ordered:
        seen.sort()
    assert seen == list(range(count))
    until(client, lambda now: now.free == 16)  # a run that was asked for and not needed comes, and goes back


def test_items_may_be_anything_that_can_be_iterated(client):
    endless = itertools.count()
    found = [value for value, _ in itertools.islice(client.map(write, endless), 40)]
    assert found == list(range(40))
    assert next(endless) <= 40 + 12, "read as slots come free"
    until(client, lambda now: now.free == 16)


def test_nothing_is_done_before_the_first_is_asked_for(client):
    source = iter(range(3))
    stream = client.map(write, source)
    assert figures(client).free == 16
    assert next(stream)[0] == 0
    stream.close()
    until(client, lambda now: now.free == 16)


def test_unordered_yields_what_ends_first(pool, client):
    """The first item is slow: it waits for a worker while those behind it are cancelled, and so end."""
    with pool.held():
        stream = client.map(write, range(12), window=12, ordered=False, return_exceptions=True)
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(next(stream)))
        thread.start()
        other = pool.connect()
        until(other, lambda now: now.running + now.queued == 12 and now.queued >= 3)
        last = max(client.session.work._pending.values(), key=lambda work: work.seq)
        last.cancel()
        thread.join(NET_S)
        value, error = got[0]
        assert value >= 1
        assert isinstance(error, WorkError)
    rest = [value for value, _ in stream]
    assert sorted([value, *rest]) == list(range(12))
    until(client, lambda now: now.free == 16)


def test_the_window_bounds_what_is_out(pool, client):
    with pool.held():
        thread = threading.Thread(target=lambda: list(client.map(write, range(100), window=6)))
        thread.start()
        other = pool.connect()
        until(other, lambda now: now.running + now.queued == 6)
        for _ in range(20):
            now = figures(other)
            assert now.leased + now.queued + now.running + now.done <= 6 + 1, "one may be asked for ahead"
    thread.join(NET_S)
    until(client, lambda now: now.free == 16)


def test_a_window_of_nothing(client):
    with pytest.raises(InvalidInput, match="map\\(\\) takes a window of at least 1, got 0"):
        client.map(write, range(3), window=0)


def test_small_items_go_in_runs_and_fill_batches(client):
    list(client.map(write, range(600)))
    now = figures(client)
    assert now.items == 600
    assert now.batches < 500, "not one by one"


def test_a_slow_writer_does_not_hold_back_what_is_written(pool, client, monkeypatch):
    """Each item of a run goes as soon as it is written, if writing takes long."""
    monkeypatch.setattr(mapping, "SLOW_WRITE_NS", -1)
    submitted: list[int] = []

    def slow(value: int, inputs: Arrays) -> None:
        now = figures(client)
        submitted.append(now.queued + now.running + now.done)
        write(value, inputs)

    found = [(value, result.outputs["total"].item()) for value, result in client.map(slow, range(6), window=8)]
    assert found == [(value, 4 * value) for value in range(6)]
    assert submitted[1] == 1, "the first was under way when the second was written"
    until(client, lambda now: now.free == 16)


# --- Several items in a slot ---------------------------------------------------------------------


def write_some(values: list[int], inputs: Arrays) -> int:
    for row, value in enumerate(values):
        inputs["x"][row] = value
    return len(values)


@pytest.mark.parametrize("whole", [int, np.int64])
def test_slots_that_are_partly_filled(make_pool, whole):
    client = make_pool(items_per_slot=3, max_batch=6).connect()
    source = [[1, 2, 3], [4], [5, 6], [7, 8, 9], [10, 11, 12], [13]]
    found = []
    for values, result in client.map(lambda v, i: whole(write_some(v, i)), source):
        assert result.items == len(values)
        assert result.outputs["y"].shape == (3, 4)
        found.append([int(-y[0]) for y in result.outputs["y"][: result.items]])
    assert found == source
    now = figures(client)
    assert (now.items, now.free) == (13, 16), "only what was written was computed"


def write_and_boast(value: float, inputs: Arrays) -> bool:
    write(value, inputs)
    return True


def test_a_writer_that_says_nothing_fills_the_slot(make_pool):
    client = make_pool(items_per_slot=2).connect()
    assert [result.items for _, result in client.map(write, range(5))] == 5 * [2]
    assert [result.items for _, result in client.map(write_and_boast, range(2))] == [2, 2]


@pytest.mark.parametrize("count", [0, 4, -1])
def test_a_writer_that_miscounts(make_pool, count):
    client = make_pool(items_per_slot=3, max_batch=6).connect()
    with pytest.raises(InvalidInput, match=rf"write\(\) returned {count} for a slot of 3 items"):
        list(client.map(lambda value, inputs: count, range(5)))
    assert figures(client).free == 16


def test_several_inputs(make_pool):
    client = make_pool(SUM).connect()

    def write_two(value: int, inputs: Arrays) -> None:
        inputs["a"][...] = value
        inputs["b"][...] = 100

    for value, result in client.map(write_two, range(20)):
        assert (result.outputs["sum"] == value + 100).all()


# --- What goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 2, 5, 29])
def test_a_writer_that_raises_does_so_after_what_came_before(client, at):
    def failing(value: int, inputs: Arrays) -> None:
        if value == at:
            raise Oops(value)
        write(value, inputs)

    seen: list[int] = []
    totals = ((value, result.outputs["total"].item()) for value, result in client.map(failing, range(30)))
    with pytest.raises(Oops, match=str(at)):
        seen.extend(value for value, total in totals if total == 4 * value)
    assert seen == list(range(at)), "nothing that was written is lost"
    until(client, lambda now: now.free == 16)


def test_a_source_that_raises(client):
    def source() -> Iterator[int]:
        yield from range(7)
        raise Oops

    seen: list[int] = []
    with pytest.raises(Oops):
        seen.extend(value for value, _ in client.map(write, source()))
    stream = client.map(write, source())
    assert [next(stream)[0] for _ in range(7)] == list(range(7))
    with pytest.raises(Oops):
        next(stream)
    until(client, lambda now: now.free == 16)


def test_an_interrupt_in_the_writer_is_raised_at_once(pool, client):
    def interrupted(value: int, inputs: Arrays) -> None:
        if value == 5:
            raise KeyboardInterrupt
        write(value, inputs)

    pool.hold()  # so that no result is there to be read first
    with pytest.raises(KeyboardInterrupt):
        next(client.map(interrupted, range(30)))
    pool.go()
    until(client, lambda now: now.free == 16)


def test_a_writer_that_keeps_its_arrays_keeps_its_slots(pool, client):
    kept: list[npt.NDArray[Any]] = []

    def keeping(value: int, inputs: Arrays) -> None:
        write(value, inputs)
        if value == 3:
            kept.append(inputs["x"])

    assert len(list(client.map(keeping, range(8)))) == 8
    pool.connect().infer(x=np.full((100, 4), 77, np.float32))
    assert (kept[0] == 3).all()
    kept.clear()
    pool.wait_all_free()


@pytest.mark.parametrize("ordered", [True, False])
def test_items_that_fail_with_return_exceptions(client, ordered):
    source = [BAD if value % 5 == 2 else value for value in range(40)]
    good, bad = [], 0
    for value, result in client.map(write, source, ordered=ordered, return_exceptions=True):
        if value == BAD:
            assert isinstance(result, EngineFailed)
            bad += 1
        else:
            assert result.outputs["total"] == 4 * value
            good.append(value)
    assert sorted(good) == [value for value in range(40) if value % 5 != 2]
    assert bad == 8
    until(client, lambda now: now.free == 16)


def test_all_items_of_a_run_fail(client):
    found = list(client.map(write, 12 * [BAD], return_exceptions=True))
    assert len(found) == 12
    assert all(isinstance(error, EngineFailed) for _, error in found)


def test_an_item_that_fails_ends_the_stream(client):
    seen: list[float] = []
    with pytest.raises(EngineFailed, match="a bad item"):
        seen.extend(value for value, _ in client.map(write, [0, 1, 2, 3, BAD, 5, 6, 7, 8, 9]))
    assert seen == [0, 1, 2, 3]
    until(client, lambda now: now.free == 16)


def test_time_passes(pool, client):
    for ordered in (True, False):
        with pool.held(), pytest.raises(TimeoutError, match=r"no result within 0\.01 s"):
            list(client.map(write, range(20), timeout_s=0.01, ordered=ordered))
        until(client, lambda now: now.free == 16)


def test_a_pool_that_stays_full(pool, client):
    held = [pool.connect().lease_many(8) for _ in range(2)]
    with pytest.raises(PoolBusy):
        list(client.map(write, range(5), timeout_s=0.01))
    for leases in held:
        leases.release()
    assert len(list(client.map(write, range(5), timeout_s=NET_S))) == 5


def test_a_thread_that_holds_all_that_it_may_hold(client, monkeypatch):
    count = threading.active_count
    monkeypatch.setattr(threading, "active_count", lambda: count() - 2)  # the pool's two
    with client.lease_many(12), pytest.raises(LeaseTooLarge, match="no other thread could release one"):
        next(client.map(write, range(3)))


def test_the_pool_ends_meanwhile(pool, client):
    stream = client.map(write, itertools.count())
    next(stream)
    pool.stop()
    # The former if it was waiting for slots just then.
    with pytest.raises(PoolClosed, match=r"is stopping and grants no more slots|was stopped"):
        for _ in stream:
            pass


def test_the_client_is_closed_meanwhile(client):
    stream = client.map(write, itertools.count())
    next(stream)
    client.close()
    with pytest.raises(PoolClosed, match="this client is closed"):
        for _ in stream:
            pass


# --- Results -------------------------------------------------------------------------------------


def test_a_result_is_spent_when_the_next_is_asked_for(client):
    stream = client.map(write, range(10))
    _, first = next(stream)
    outputs = first.outputs
    assert (outputs["y"] == 0).all()
    next(stream)
    for use in (lambda: outputs["y"], lambda: first.outputs["y"]):
        with pytest.raises(SpentHandle, match=r"passed by|was released"):
            use()
    stream.close()


def test_all_results_of_a_listed_stream_are_spent(client):
    for _, result in list(client.map(write, range(5))):
        with pytest.raises(SpentHandle):
            result.outputs["y"]


def test_arrays_that_are_kept_stay_as_they_are(pool, client):
    kept = [(value, result.outputs["y"]) for value, result in client.map(write, range(5), window=4)]
    pool.connect().infer(x=np.full((200, 4), 77, np.float32))
    for value, array in kept:
        assert (array == -value).all()
    assert figures(client).free == 11
    del kept, array
    pool.wait_all_free()


def test_a_stream_that_is_left_early(client):
    stream = client.map(write, range(1000))
    result = next(result for value, result in stream if value == 17)
    stream.close()
    assert (result.outputs["y"] == -17).all(), "nobody asked for a next one"
    del result
    until(client, lambda now: now.free == 16)


def test_a_stream_that_is_closed_before_it_began(client):
    client.map(write, range(10)).close()
    assert figures(client).free == 16


def test_two_streams_at_once_in_one_thread(client):
    first, second = (client.map(write, range(30), window=6) for _ in range(2))
    for (a, of_a), (b, of_b) in zip(first, second, strict=True):
        assert a == b
        assert of_a.outputs["total"] == of_b.outputs["total"] == 4 * a
    until(client, lambda now: now.free == 16)


def test_a_stream_inside_a_stream(client):
    for value, result in client.map(write, range(5), window=4):
        inner = [one.outputs["total"].item() for _, one in client.map(write, [value, value + 1], window=4)]
        assert inner == [4 * value, 4 * value + 4]
        assert result.outputs["total"] == 4 * value
    until(client, lambda now: now.free == 16)


def test_streams_in_threads(client):
    def work(offset: int) -> None:
        for value, result in client.map(write, range(offset, offset + 60), window=4):
            assert result.outputs["total"] == 4 * value

    Threads(*(partial(work, 1000 * n) for n in range(3))).join()
    until(client, lambda now: now.free == 16)
