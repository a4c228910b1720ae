"""Work on its way: the future between a `Lease` and its `Result`."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from . import messages as m
from .claims import DONE, Claim
from .errors import Cancelled, DeadlineExceeded, EngineFailed, WorkerDied, WorkError
from .handles import Result
from .logs import work_id
from .timings import Timings

if TYPE_CHECKING:
    from .waiting import Sleeper

_WORK_ERRORS: dict[int, type[WorkError]] = {
    m.DEADLINE: DeadlineExceeded,
    m.CANCELLED: Cancelled,
    m.ENGINE_FAILED: EngineFailed,
    m.WORKER_DIED: WorkerDied,
}

T = TypeVar("T")


class _WatchedList(list[T]):
    """`concurrent.futures.wait` and `as_completed` put a waiter in this list and sleep; somebody must then drive."""

    def __init__(self, submitted: Submitted) -> None:
        super().__init__()
        self._submitted = weakref.ref(submitted)

    def append(self, item: T) -> None:
        super().append(item)
        submitted = self._submitted()
        if submitted is not None:
            submitted.watch()


class Submitted(Future[Result]):
    """Work on its way: a `concurrent.futures.Future` of a `Result`, which can be awaited too.

    The thread that calls `result()` receives for all; a background thread does so only for callbacks, `await` and
    `concurrent.futures.wait`.
    """

    def __init__(self, claim: Claim, row: int | None, seq: int, items: int) -> None:
        super().__init__()
        self._waiters: list[Any] = _WatchedList(self)
        self.claim = claim
        self._row = row
        self._items = items
        self._left = claim.count
        self.errors: dict[int, WorkError] = {}
        self.seq = seq
        self.over = False
        self.watched = False
        self.failure: BaseException | None = None
        self.sleepers: list[Sleeper] = []

    @property
    def work_id(self) -> str:
        """What the logs of pool, worker and client call it, such as "12.3"; see docs/operations.md."""
        return work_id(self.claim.lease_id, self.seq)

    # ------------------------------------------------------------------ for the client, under its lock

    def take(self, done: m.Done, now_ns: int) -> bool:
        """Note the end of some of the slots; True when it was the last."""
        claim = self.claim
        at = done.first - claim.at
        if done.status == m.OK or claim.done is None:
            claim.done, claim.received_ns = done, now_ns
        if done.status == m.OK:
            if done.shapes:
                claim.variation.take_results(claim, at, done.count, done.shapes)
        else:
            kind = _WORK_ERRORS.get(done.status, WorkError)
            for slot in range(at, at + done.count):
                self.errors[slot] = kind(done.text, range(at, at + done.count), self.work_id)
        self._left -= done.count
        return self._left <= 0

    def announce(self) -> None:
        """Tell callbacks and waiters; never called under the client's lock, since callbacks may use the client."""
        error = self.failure or self._first_error()
        if error is None:
            self.set_result(self._make_result())
        else:
            self.set_exception(error)

    def add_sleeper(self, sleeper: Sleeper) -> None:
        """See `waiting.Target`."""
        self.sleepers.append(sleeper)

    def remove_sleeper(self, sleeper: Sleeper) -> None:
        """See `waiting.Target`."""
        self.sleepers.remove(sleeper)

    def watch(self) -> None:
        """Somebody waits who does not drive the socket: the background thread must."""
        self.claim.session.watch(self)

    # ------------------------------------------------------------------ for the producer

    def result(  # type: ignore[override]  # the first argument is the base's, under a name with its unit
        self, timeout_s: float | None = None, *, partial: bool = False, timeout: float | None = None
    ) -> Result:
        """Wait for the outputs.

        Args:
            timeout_s: seconds to wait; None waits until the pool answers or ends.
            partial: give a `Result` with `errors` when only some slots of a run failed, instead of raising.
            timeout: `timeout_s` by the name that `concurrent.futures` gives it.

        Raises:
            TimeoutError: not there yet; the work goes on.
            WorkError: a slot failed; the kind says why, `slots` which.
            PoolClosed: the pool ended first.
            SpentHandle: the slots were released.
        """
        self._wait(timeout_s if timeout_s is not None else timeout)
        if self.failure is not None:
            raise self.failure
        if self.errors and not (partial and len(self.errors) < self.claim.count):
            raise self.errors[min(self.errors)]
        self.claim.require(DONE)
        return self._make_result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, and return the error that `result()` would raise, if any."""
        self._wait(timeout)
        return self.failure or self._first_error()

    def done(self) -> bool:
        """Whether the work has ended; looks at the socket."""
        if not self.over:
            self.claim.session.poll()
        return self.over

    @property
    def timings(self) -> Timings | None:
        """Where the time went, also of work that failed; None while it goes on, or if the pool ended first."""
        return self.claim.timings if self.over else None

    def running(self) -> bool:
        """Whether it has not ended; queued and running work are not told apart."""
        return not self.done()

    def cancel(self) -> bool:
        """Ask for the work to be dropped if it is still queued; then it ends with `Cancelled`.

        Returns whether it has ended so already, which right after asking it has not.
        """
        if not self.over:
            self.claim.session.work.cancel(self.claim)
        return self.cancelled()

    def cancelled(self) -> bool:
        """Whether it ended by `cancel()`."""
        return self.over and isinstance(self._first_error(), Cancelled)

    def add_done_callback(self, fn: Any) -> None:
        """Call `fn(self)` when the work has ended, from whichever thread receives the end."""
        super().add_done_callback(fn)
        self.watch()

    def release(self) -> None:
        """Give the slots back when the work has ended; cancels it if it is still queued."""
        self.claim.release()

    def __await__(self) -> Generator[Any, None, Result]:
        return asyncio.wrap_future(self).__await__()

    def _wait(self, timeout_s: float | None) -> None:
        if not self.over and not self.claim.session.wait(self, timeout_s):
            raise TimeoutError(f"no result within {timeout_s} s; the work goes on, call result() again")

    def _first_error(self) -> WorkError | None:
        return self.errors[min(self.errors)] if self.errors else None

    def _make_result(self) -> Result:
        return Result(self.claim, self._row, self._items, dict(self.errors))
