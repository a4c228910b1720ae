"""`map` read by ``async for``, as a context manager, and what its errors say of the item."""

from __future__ import annotations

import asyncio
import operator
import pickle
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.ipc.fake_pool import BAD, NET_S, figures, until
from trtpool.ipc.errors import EngineFailed, InvalidInput, SpentHandle

Arrays = Mapping[str, npt.NDArray[Any]]


class Corrupt(Exception):
    pass


def write(value: float, inputs: Arrays) -> None:
    inputs["x"][...] = value


def picky(value: float, inputs: Arrays) -> None:
    write(value, inputs)
    if value % 7 == 3:
        raise Corrupt(f"no picture in {value}")


async def numbers(count: int) -> AsyncIterator[int]:
    for value in range(count):
        await asyncio.sleep(0)
        yield value


async def collect(stream: Any) -> list[tuple[float, float]]:
    return [(value, result.outputs["total"].item()) async for value, result in stream]


def total(count: int) -> list[tuple[float, float]]:
    return [(value, 4 * value) for value in range(count)]


# --- async for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("window", [1, 5, 64])
@pytest.mark.parametrize("count", [0, 1, 3, 50])
@pytest.mark.parametrize("source", [range, numbers])
def test_every_item_has_its_result(client, source, count, window, ordered):
    found = asyncio.run(collect(client.map(write, source(count), window=window, ordered=ordered)))
    assert sorted(found) == total(count)
    assert not ordered or found == total(count)
    until(client, lambda now: now.free == 16)


def test_a_result_comes_while_the_source_is_quiet(client):
    """The source gives the next item only when it has the answer to the last one."""

    async def converse() -> list[float]:
        answers: asyncio.Queue[float] = asyncio.Queue()

        async def questions() -> AsyncIterator[float]:
            value = 1.0
            while value < 1e6:
                yield value
                value = 2 * await answers.get()

        heard = []
        async for _, result in client.map(write, questions()):
            heard.append(result.outputs["total"].item())
            answers.put_nowait(heard[-1])
        return heard

    assert asyncio.run(converse()) == [4.0 * 8**n for n in range(7)]
    until(client, lambda now: now.free == 16)


def test_a_fast_async_source_fills_batches(client):
    asyncio.run(collect(client.map(write, numbers(600))))
    assert figures(client).batches < 500, "not one by one"


def test_the_loop_goes_on_while_items_are_written(client):
    async def main() -> list[tuple[float, float]]:
        loop = asyncio.get_running_loop()

        def ask_the_loop(value: int, inputs: Arrays) -> None:
            assert threading.current_thread() is not threading.main_thread()
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(NET_S)
            write(value, inputs)

        return await collect(client.map(ask_the_loop, range(9)))

    assert asyncio.run(main()) == total(9)


def test_a_slow_reader_holds_back_an_async_source(client):
    async def main() -> int:
        read = 0

        async def endless() -> AsyncIterator[int]:
            nonlocal read
            while True:
                read += 1
                yield read

        async with client.map(write, endless(), window=6) as stream:
            seen = 0
            async for _ in stream:
                seen += 1
                assert read <= seen + 6 + 1
                if seen == 40:
                    break
        return seen

    assert asyncio.run(main()) == 40
    until(client, lambda now: now.free == 16)


@pytest.mark.parametrize("source", [range, numbers])
def test_a_task_that_is_cancelled_gives_all_back(pool, client, source):
    async def main() -> None:
        pool.hold()
        task = asyncio.ensure_future(collect(client.map(write, source(100))))
        other = pool.connect()
        await asyncio.to_thread(until, other, lambda now: now.running + now.queued >= 9)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), NET_S)
        pool.go()

    asyncio.run(main())
    until(client, lambda now: now.free == 16)


def test_a_task_that_is_cancelled_while_it_waits_for_slots(pool, client):
    async def main() -> None:
        held = [pool.connect().lease_many(8) for _ in range(2)]
        task = asyncio.ensure_future(collect(client.map(write, range(5))))
        other = pool.connect()
        await asyncio.to_thread(until, other, lambda now: now.waiting == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), NET_S)
        for leases in held:
            leases.release()

    asyncio.run(main())
    until(client, lambda now: now.free == 16)


def test_a_task_that_is_cancelled_while_its_source_is_quiet(client):
    async def main() -> None:
        begun = asyncio.Event()

        async def never() -> AsyncIterator[int]:
            begun.set()
            await asyncio.Event().wait()
            yield 1

        task = asyncio.ensure_future(collect(client.map(write, never())))
        await begun.wait()
        assert figures(client).free == 16, "it holds nothing meanwhile"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), NET_S)

    asyncio.run(main())
    until(client, lambda now: now.free == 16)


def test_a_loop_that_is_left_by_break_gives_all_back(client):
    async def main() -> None:
        async for value, _ in client.map(write, range(1000)):
            if value == 17:
                break

    asyncio.run(main())
    until(client, lambda now: now.free == 16)


def test_an_async_source_that_raises(client):
    seen = []

    async def source() -> AsyncIterator[int]:
        for value in range(7):
            yield value
        raise Corrupt("the disk")

    async def main() -> None:
        async for value, _ in client.map(write, source()):
            seen.append(value)

    with pytest.raises(Corrupt, match="the disk"):
        asyncio.run(main())
    assert seen == list(range(7))
    until(client, lambda now: now.free == 16)


def test_results_are_spent_as_in_a_for(client):
    async def main() -> list[Any]:
        return [result async for _, result in client.map(write, range(5))]

    for result in asyncio.run(main()):
        with pytest.raises(SpentHandle):
            result.outputs["y"]


def test_an_async_source_needs_an_async_for(client):
    with pytest.raises(InvalidInput, match="read the stream with `async for`"):
        next(client.map(write, numbers(3)))


def test_a_stream_is_read_once(client):
    stream = client.map(write, range(3))
    next(stream)
    with pytest.raises(InvalidInput, match="call map\\(\\) again for another"):
        aiter(stream)
    stream.close()
    assert list(stream) == []


# --- As a context manager, and for progress bars -------------------------------------------------


def test_leaving_a_stream_gives_all_back(client):
    with client.map(write, range(1000)) as stream:
        next(stream)
    until(client, lambda now: now.free == 16)


def test_how_many_are_left(client):
    stream = client.map(write, range(30))
    assert operator.length_hint(stream) == 30
    next(stream)
    assert operator.length_hint(stream) == 29
    list(stream)
    assert operator.length_hint(stream) == 0
    assert operator.length_hint(client.map(write, iter([])), 7) == 0


# --- What errors say of the item -----------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("window", [1, 8, 64])
def test_items_that_cannot_be_written_keep_their_place(client, window, ordered):
    source = [BAD if value % 10 == 5 else value for value in range(60)]
    found = list(client.map(picky, source, window=window, ordered=ordered, return_exceptions=True))
    assert sorted(value for value, _ in found) == sorted(source)
    if ordered:
        assert [value for value, _ in found] == source
    for value, result in found:
        wanted = EngineFailed if value == BAD else Corrupt if value % 7 == 3 else None
        assert isinstance(result, wanted) if wanted else not isinstance(result, Exception)
    until(client, lambda now: now.free == 16)


def test_all_items_cannot_be_written(client):
    def never(value: int, inputs: Arrays) -> None:
        raise Corrupt(value)

    found = list(client.map(never, range(40), return_exceptions=True))
    assert [(value, error.args) for value, error in found] == [(value, (value,)) for value in range(40)]
    until(client, lambda now: now.free == 16)


def test_which_item_failed(client):
    source = [*range(9), BAD, *range(9)]
    with pytest.raises(EngineFailed, match=r"a bad item.* \(item 9: -999\.0\)") as caught:
        list(client.map(write, source))
    assert (caught.value.index, caught.value.item) == (9, BAD)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.index, again.slots) == (str(caught.value), 9, caught.value.slots)


def test_numbers_count_items_that_could_not_be_written(client):
    source = [0, 3, BAD, 10, 4, BAD]
    found = list(client.map(picky, source, return_exceptions=True))
    assert [error.index for _, error in found if isinstance(error, EngineFailed)] == [2, 5]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have notes from Python 3.11 on")
def test_which_item_could_not_be_written(client):
    with pytest.raises(Corrupt) as caught:
        list(client.map(picky, range(30)))
    assert caught.value.__notes__ == ["while item 3 of map() was written: 3"]


def test_an_item_that_prints_badly_hides_no_error(client):
    class Rude:
        def __repr__(self) -> str:
            raise Corrupt

    def bad(item: object, inputs: Arrays) -> None:
        inputs["x"][...] = BAD

    with pytest.raises(EngineFailed, match=r"\(item 0: <Rude instance at"):
        list(client.map(bad, [Rude()]))
    with pytest.raises(EngineFailed) as caught:
        list(client.map(bad, [np.zeros((100, 100))]))
    assert len(str(caught.value)) < 300
