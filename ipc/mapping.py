"""`Client.map`: a stream of items through the pool.

Items are leased and submitted in runs, of a few MiB or a quarter of the window, so that a message carries many; where
items differ in shape, those of one shape that follow each other go together.
A run that fills slowly is submitted as far as it is filled, so that its first items start while the next are written.
The slots of a run that was read are used again, or, of a small one, each Submit asks for as many, which come with the
result: a steady stream needs one message each way for each run.

`Mapper` is driven by one thread at a time: the reader's own in a ``for``, one of the stream's in an ``async for``, see
`trtpool.ipc.streams`.  An item that cannot be written is a part of its own, without slots, so that it keeps its place.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from .claims import LEASED, Claim, Tensors
from .errors import InvalidInput, WorkError, describe_item
from .handles import Result
from .inflight import check_priority
from .requests import Request
from .session import Session
from .settings import Priority
from .sources import AsyncSource
from .submitted import Submitted
from .waiting import Stopped, Target

T = TypeVar("T")

RUN_BYTES: Final = 4 * 1024 * 1024
"""Slots are leased in runs of about this many bytes: by then a message costs little beside the writing."""

SLOW_WRITE_NS: Final = 1_000_000
"""A run that takes longer than this to fill is submitted as far as it is filled."""

SOON_S: Final = SLOW_WRITE_NS / 1e9
"""What was written waits for so long for the next item of an async source, which is a hop between threads away."""


class Part(Generic[T]):
    """Some slots of a run, submitted together, and the items in them, of which the first has a number.

    With `error` it is one item that could not be written, which has no slot.
    """

    def __init__(self, submitted: Submitted | None, first: int, items: list[T], error: Exception | None = None) -> None:
        self.submitted = submitted
        self.first = first
        self.items = items
        self.error = error


class Mapper(Generic[T]):
    """One `map` call: iterate over `run()`, or call `next_part` and `deliver` until there is none, then `clean_up`."""

    def __init__(
        self,
        session: Session,
        model: int,
        write: Callable[[T, Mapping[str, npt.NDArray[Any]]], object],
        items: Iterator[T] | AsyncSource[T],
        window: int,
        *,
        ordered: bool,
        timeout_s: float | None,
        return_exceptions: bool,
        gpu: int | None,
        priority: Priority,
    ) -> None:
        self._session = session
        self._model = model
        self._write = write
        self._items: Iterator[T] = items
        self._source = items if isinstance(items, AsyncSource) else None
        self._ordered = ordered
        self._timeout_s = timeout_s
        self._return_exceptions = return_exceptions
        self._gpu = session.check_gpu(gpu)
        self._priority = check_priority(priority)
        layout = session.layout.models[model]
        self._per_slot = layout.items_per_slot
        self._planes = session.models[model].inputs
        self._variation = session.models[model].variation if session.models[model].varies else None
        most = min(window, session.models[model].cap)
        self._run_slots = max(1, min(RUN_BYTES // max(1, layout.slot_bytes), most // 4))
        self._window = most - most % self._run_slots
        self._in_flight: deque[Part[T]] = deque()
        self._taken = 0  # items that are in a part
        self._failed: tuple[T, Exception] | None = None  # the item that `write` raised for, on its way into one
        self._stop = Target()
        self._slots_out = 0  # leased by us: being written, in flight, or being read
        self._request: Request | None = None
        self._claims: deque[Claim] = deque()
        self._exhausted = False
        self.failure: Exception | None = None  # raised by `items` or `write`; due when what came before is read

    def run(self) -> Iterator[tuple[T, Result]]:
        """Yield items with their results."""
        try:
            while (part := self.next_part()) is not None:
                yield from self.deliver(part)
        finally:
            self.clean_up()
        if self.failure is not None:
            raise self.failure

    def next_part(self) -> Part[T] | None:
        """Write and submit what there is room for, and wait for the next part that has ended; None at the end.

        Raises:
            Stopped: `stop` was called.
        """
        while True:
            self._fill()
            if not self._in_flight:
                return None
            if (part := self._wait_for_part()) is not None:
                return part

    def deliver(self, part: Part[T]) -> Iterator[tuple[T, Result]]:
        """Yield the items of a part with their results; its slots go back when the last was read."""
        if part.submitted is None:
            assert part.error is not None
            yield part.items[0], part.error  # type: ignore[misc]
            return
        try:
            yield from self._rows(part, part.submitted)
        except Exception:
            part.submitted.release()
            raise
        part.submitted.release()
        self._slots_out -= part.submitted.claim.count

    def stop(self) -> None:
        """Have the thread that is in `next_part` leave it; from another."""
        self._session.finish(self._stop)

    def _wait(self, targets: list[Target | Submitted], timeout_s: float | None) -> bool:
        arrived = self._session.wait_any([*targets, self._stop], timeout_s)
        if self._stop.over:
            raise Stopped
        return arrived

    # ------------------------------------------------------------------ writing

    def _fill(self) -> None:
        """Write and submit items until the window is full, the items end, or a result is ready to be read."""
        while not self._exhausted and self._may_read() and (claim := self._next_claim()) is not None:
            self._fill_claim(claim)
            if self._in_flight and _has_ended(self._in_flight[0]):
                return

    def _may_read(self, written: int = 0) -> bool:
        """Whether the next item is there, or comes soon, or there is nothing better to do than to wait for it."""
        if self._source is None or (coming := self._source.coming()).over:
            return True
        if not (written or self._in_flight):
            return self._wait([coming], None)
        oldest = self._in_flight[0].submitted if self._in_flight else None
        self._wait([coming] if oldest is None else [coming, oldest], SOON_S)
        return coming.over

    def _next_claim(self) -> Claim | None:
        """Slots to write; None when there is something better to do than to wait for them."""
        if self._claims:
            return self._claims.popleft()
        count = self._run_slots
        if self._slots_out + count > self._window:
            return None
        spare = self._session.requests.take_spare(self._model, count, self._priority)
        if spare is not None:
            self._slots_out += count
            return spare
        busy = bool(self._in_flight)
        self._request = self._session.requests.ask_amid(
            self._request, self._model, count, self._timeout_s, busy, self._priority, self._stop
        )
        if self._in_flight and not self._request.over:
            return None
        request, self._request = self._request, None
        granted = self._session.requests.answer(request, self._stop)
        self._slots_out += sum(claim.count for claim in granted)
        self._claims.extend(granted)
        return self._claims.popleft()

    def _fill_claim(self, claim: Claim) -> None:
        """Write items into a run of slots, and submit it, at once or as it fills."""
        started = time.monotonic_ns()
        batch: list[T] = []
        try:
            while len(batch) < claim.count and self._may_read(len(batch)) and (last := self._write_next(claim, batch)):
                if last < 0:  # it could not be written
                    claim = self._submit_head(claim, batch, self._per_slot) if batch else claim
                    self._take_failed()
                    batch, started = [], time.monotonic_ns()
                    continue
                if self._differs(claim, len(batch) - 1):
                    item = batch.pop()
                    claim = self._submit_head(claim, batch, self._per_slot)
                    batch, started = [item], time.monotonic_ns()
                if last != self._per_slot or (
                    len(batch) < claim.count and time.monotonic_ns() - started > SLOW_WRITE_NS
                ):
                    claim = self._submit_head(claim, batch, last)
                    batch, started = [], time.monotonic_ns()
        except BaseException:
            self._give_up(claim)
            raise
        if batch and len(batch) == claim.count:
            self._submit(claim, batch, claim.count * self._per_slot)
        elif claim.count:
            if batch:
                claim = self._submit_head(claim, batch, self._per_slot)
            self._give_up(claim)

    def _write_next(self, claim: Claim, batch: list[T]) -> int:
        """Write the next item behind those in `batch`.

        Returns how many items its slot holds, 0 if there is none, -1 if it could not be written and `_failed` has it.
        """
        try:
            for item in self._items:
                try:
                    items = self._items_of(self._write(item, Tensors(claim, self._planes, LEASED, len(batch))))
                except Exception as error:
                    _note(error, f"while item {self._taken + len(batch)} of map() was written: {describe_item(item)}")
                    if not self._return_exceptions:
                        raise
                    claim.shapes.pop(len(batch), None)
                    self._failed = item, error
                    return -1
                batch.append(item)
                return items
        except Exception as error:  # noqa: BLE001  # theirs, and raised when what came before it is read
            self.failure = error
        self._exhausted = True
        return 0

    def _differs(self, claim: Claim, row: int) -> bool:
        """Whether a slot cannot be submitted with the one before it."""
        variation = self._variation
        return (
            variation is not None
            and row > 0
            and variation.row_variant(claim, row) != variation.row_variant(claim, row - 1)
        )

    def _take_failed(self) -> None:
        """Make a part of the item that could not be written."""
        assert self._failed is not None
        (item, error), self._failed = self._failed, None
        self._in_flight.append(Part(None, self._taken, [item], error))
        self._taken += 1

    def _items_of(self, written: object) -> int:
        """How many items a slot holds, by what `write` returned."""
        if self._per_slot == 1 or not isinstance(written, (int, np.integer)) or isinstance(written, bool):
            return self._per_slot
        if not 1 <= written <= self._per_slot:
            raise InvalidInput(f"write() returned {written} for a slot of {self._per_slot} items")
        return int(written)

    def _submit_head(self, claim: Claim, batch: list[T], last_items: int) -> Claim:
        """Submit the slots that are filled; returns a claim on the rest, which may be none."""
        filled = len(batch)
        head, rest = claim.split(0, filled), claim.split(filled, claim.count - filled)
        claim.released = True
        if not rest.count:
            rest.released = True
        try:
            self._submit(head, batch, (filled - 1) * self._per_slot + last_items)
        except BaseException:
            rest.release()
            raise
        rest.lease_ns, rest.leased_ns = 0, head.submitted_ns  # it waited for slots, and for these writes, once
        return rest

    def _submit(self, claim: Claim, batch: list[T], items: int) -> None:
        again = 0 if self._exhausted or self._session.models[self._model].uses_again(claim.count) else claim.count
        try:
            submitted = self._session.work.submit_again(claim, None, items, None, again, self._gpu)
        except BaseException:
            claim.release()
            raise
        self._in_flight.append(Part(submitted, self._taken, batch))
        self._taken += len(batch)

    def _give_up(self, claim: Claim) -> None:
        self._slots_out -= claim.count
        if claim.count:
            claim.release()

    # ------------------------------------------------------------------ reading

    def _wait_for_part(self) -> Part[T] | None:
        """The next part that has ended; None when slots to write, or an item to write into them, came first."""
        parts = self._in_flight
        looked_at = [parts[0]] if self._ordered else list(parts)
        for index, part in enumerate(looked_at):
            if part.submitted is None:
                del parts[index]
                return part
        targets: list[Target | Submitted] = [part.submitted for part in looked_at if part.submitted is not None]
        if not self._exhausted and self._slots_out + self._run_slots <= self._window:
            if self._source is not None and not self._source.coming().over:
                targets.append(self._source.coming())
            elif self._request is not None:
                targets.append(self._request)
        if not self._wait(targets, self._timeout_s):
            raise TimeoutError(f"no result within {self._timeout_s} s")
        for index, part in enumerate(looked_at):
            if part.submitted is not None and part.submitted.over:
                del parts[index]
                return part
        return None

    def _rows(self, part: Part[T], submitted: Submitted) -> Iterator[tuple[T, Result]]:
        try:
            result = submitted.result(self._timeout_s, partial=True)
        except WorkError as error:  # all slots of the part failed
            if not self._return_exceptions:
                error.name_item(part.first, part.items[0])
                raise
            result = None
        for row, item in enumerate(part.items):
            error_of_row = submitted.errors.get(row)
            if error_of_row is not None:
                error_of_row.name_item(part.first + row, item)
                if not self._return_exceptions:
                    raise error_of_row
                yield item, error_of_row  # type: ignore[misc]
                continue
            assert result is not None
            one = result.at(row)
            yield item, one
            one.spent = True

    # ------------------------------------------------------------------ leaving

    def clean_up(self) -> None:
        """Give everything back, whether the stream ended, failed, or was left by its reader."""
        if self._request is not None:
            self._session.requests.abandon(self._request)
        for claim in self._claims:
            claim.release()
        for part in self._in_flight:
            if part.submitted is not None:
                part.submitted.release()
        self._session.requests.return_spares(self._model)


def _has_ended(part: Part[Any]) -> bool:
    return part.submitted is None or part.submitted.done()


def _note(error: Exception, text: str) -> None:
    """Have tracebacks show `text` below `error`, from Python 3.11 on."""
    if sys.version_info >= (3, 11):
        error.add_note(text)
