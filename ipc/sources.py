"""Where `map` reads its items from when that is an async iterable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Iterator
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from .session import Session
from .waiting import Target

T = TypeVar("T")

_END: Final = object()


class AsyncSource(Iterator[T]):
    """Items of an async iterable, one at a time, for a thread that is not its loop's.

    One item is asked for at a time, and only when there is a slot for it: that is the back-pressure.
    """

    def __init__(self, session: Session, items: AsyncIterable[T], loop: asyncio.AbstractEventLoop) -> None:
        self._session = session
        self._iterator = aiter(items)
        self._loop = loop
        self._coming: Target | None = None
        self._future: Future[Any] | None = None

    def coming(self) -> Target:
        """Ask for the next item, if that was not done; what is over when it is there."""
        if self._coming is None:
            target = self._coming = Target()
            self._future = asyncio.run_coroutine_threadsafe(self._next(), self._loop)
            self._future.add_done_callback(lambda _: self._session.finish(target))
        return self._coming

    def __next__(self) -> T:
        self.coming()
        future, self._future, self._coming = self._future, None, None
        assert future is not None
        item = future.result()
        if item is _END:
            raise StopIteration
        return item  # type: ignore[no-any-return]

    def close(self) -> None:
        """Ask for no more."""
        if self._future is not None:
            self._future.cancel()

    async def _next(self) -> object:
        return await anext(self._iterator, _END)
