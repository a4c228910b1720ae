"""`Stream`: what `Client.map` gives, to be read by ``for`` or by ``async for``.

In an ``async for`` one thread of the stream's own writes items, and waits for slots and results, while the loop goes
on; it is entered once for each run of slots, not for each item, and the results are given out in the loop.
"""

from __future__ import annotations

import asyncio
import operator
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

from .errors import InvalidInput
from .handles import Result
from .mapping import Mapper
from .session import Session
from .sources import AsyncSource

T = TypeVar("T")


class Stream(Generic[T]):
    """Items with their results: an iterator, and what ``async for`` takes; one or the other, once.

    A context manager of both kinds: leaving it gives everything back at once, however far it was read.  Without one,
    that is done when the stream has ended or is dropped.
    """

    def __init__(
        self,
        session: Session,
        items: Iterable[T] | AsyncIterable[T],
        make: Callable[[Iterator[T] | AsyncSource[T]], Mapper[T]],
    ) -> None:
        self._session = session
        self._items = items
        self._make = make
        self._left = operator.length_hint(items, 0)
        self._reading: Generator[tuple[T, Result], None, None] | None = None
        self._reading_async: AsyncGenerator[tuple[T, Result], None] | None = None

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> tuple[T, Result]:
        if self._reading is None:
            self._begin()
            self._reading = self._read()
        pair = next(self._reading)
        self._left -= 1
        return pair

    def __aiter__(self) -> AsyncGenerator[tuple[T, Result], None]:
        self._begin()
        self._reading_async = self._read_async()
        return self._reading_async

    def __length_hint__(self) -> int:
        """How many are still to come, as far as that is known: for progress bars."""
        return max(0, self._left)

    def _begin(self) -> None:
        if self._reading is not None or self._reading_async is not None:
            raise InvalidInput("this stream is being read already; call map() again for another")

    def _read(self) -> Generator[tuple[T, Result], None, None]:
        if not isinstance(self._items, Iterable):
            raise InvalidInput("these items are an async iterable; read the stream with `async for`")
        yield from self._make(iter(self._items)).run()

    async def _read_async(self) -> AsyncGenerator[tuple[T, Result], None]:
        loop = asyncio.get_running_loop()
        items = self._items
        source = iter(items) if isinstance(items, Iterable) else AsyncSource(self._session, items, loop)
        mapper = self._make(source)
        thread = ThreadPoolExecutor(1, "trtpool-map")
        try:
            while (part := await loop.run_in_executor(thread, mapper.next_part)) is not None:
                for pair in mapper.deliver(part):
                    yield pair
        finally:
            mapper.stop()
            if isinstance(source, AsyncSource):
                source.close()
            cleaned = thread.submit(mapper.clean_up)
            thread.shutdown(wait=False)
            await asyncio.shield(asyncio.wrap_future(cleaned))
        if mapper.failure is not None:
            raise mapper.failure

    def close(self) -> None:
        """Give everything back.  Again: nothing."""
        if self._reading is None and self._reading_async is None:
            self._reading = self._read()
        if self._reading is not None:
            self._reading.close()

    async def aclose(self) -> None:
        """The same for a stream that is read by ``async for``."""
        if self._reading_async is not None:
            await self._reading_async.aclose()
        else:
            self.close()

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Stream[T]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
