"""`Client.map`: a stream of items through the pool.

Items are leased and submitted in runs, of a few MiB or a quarter of the window, so that a message carries many; where
items differ in shape, those of one shape that follow each other go together.
A run that fills slowly is submitted as far as it is filled, so that its first items start while the next are written.
Each Submit asks for as many slots again, which come with the result:
a steady stream needs one message each way for each run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput, WorkError
from .handles import LEASED, Claim, Result, Submitted, Tensors
from .session import Request, Session, check_priority
from .settings import Priority

T = TypeVar("T")

RUN_BYTES: Final = 4 * 1024 * 1024
"""Slots are leased in runs of about this many bytes: by then a message costs little beside the writing."""

SLOW_WRITE_NS: Final = 1_000_000
"""A run that takes longer than this to fill is submitted as far as it is filled."""


class _Part(Generic[T]):
    """Some slots of a run, submitted together, and the items in them."""

    def __init__(self, submitted: Submitted, items: list[T]) -> None:
        self.submitted = submitted
        self.items = items


class Mapper(Generic[T]):
    """One `map` call; iterate over `run()`."""

    def __init__(
        self,
        session: Session,
        model: int,
        write: Callable[[T, Mapping[str, npt.NDArray[Any]]], object],
        items: Iterable[T],
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
        self._items = iter(items)
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
        self._in_flight: deque[_Part[T]] = deque()
        self._slots_out = 0  # leased by us: being written, in flight, or being read
        self._request: Request | None = None
        self._claims: deque[Claim] = deque()
        self._exhausted = False
        self._failure: Exception | None = None  # raised by `items` or `write`; due when what came before is read

    def run(self) -> Iterator[tuple[T, Result]]:
        """Yield items with their results."""
        try:
            while True:
                self._fill()
                if not self._in_flight:
                    break
                part = self._next_part()
                if part is None:
                    continue
                try:
                    yield from self._deliver(part)
                except Exception:
                    part.submitted.release()
                    raise
                part.submitted.release()
                self._slots_out -= part.submitted.claim.count
        finally:
            self._clean_up()
        if self._failure is not None:
            raise self._failure

    # ------------------------------------------------------------------ writing

    def _fill(self) -> None:
        """Write and submit items until the window is full, the items end, or a result is ready to be read."""
        while not self._exhausted and (claim := self._next_claim()) is not None:
            self._fill_claim(claim)
            if self._in_flight and self._in_flight[0].submitted.done():
                return

    def _next_claim(self) -> Claim | None:
        """Slots to write; None when there is something better to do than to wait for them."""
        if self._claims:
            return self._claims.popleft()
        count = self._run_slots
        if self._slots_out + count > self._window:
            return None
        spare = self._session.take_spare(self._model, count, self._priority)
        if spare is not None:
            self._slots_out += count
            return spare
        busy = bool(self._in_flight)
        self._request = self._session.ask_amid(self._request, self._model, count, self._timeout_s, busy, self._priority)
        if self._in_flight and not self._request.over:
            return None
        request, self._request = self._request, None
        granted = self._session.answer(request)
        self._slots_out += sum(claim.count for claim in granted)
        self._claims.extend(granted)
        return self._claims.popleft()

    def _fill_claim(self, claim: Claim) -> None:
        """Write items into a run of slots, and submit it, at once or as it fills."""
        started = time.monotonic_ns()
        batch: list[T] = []
        try:
            while len(batch) < claim.count and (last := self._write_next(claim, batch)):
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
        """Write the next item behind those in `batch`; returns how many items its slot holds, 0 if there is none."""
        try:
            for item in self._items:
                items = self._items_of(self._write(item, Tensors(claim, self._planes, LEASED, len(batch))))
                batch.append(item)
                return items
        except Exception as error:  # noqa: BLE001  # theirs, and raised when what came before it is read
            self._failure = error
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
        again = 0 if self._exhausted else claim.count
        try:
            submitted = self._session.submit_again(claim, None, items, None, again, self._gpu)
        except BaseException:
            claim.release()
            raise
        self._in_flight.append(_Part(submitted, batch))

    def _give_up(self, claim: Claim) -> None:
        self._slots_out -= claim.count
        if claim.count:
            claim.release()

    # ------------------------------------------------------------------ reading

    def _next_part(self) -> _Part[T] | None:
        """The next part that has ended; None when slots to write came first."""
        parts = self._in_flight
        targets: list[Submitted | Request] = [part.submitted for part in ([parts[0]] if self._ordered else parts)]
        if self._request is not None and not self._exhausted and self._slots_out + self._run_slots <= self._window:
            targets.append(self._request)
        if not self._session.wait_any(targets, self._timeout_s):
            raise TimeoutError(f"no result within {self._timeout_s} s")
        for index, target in enumerate(targets):
            if target.over and target is not self._request:
                part = parts[index]
                del parts[index]
                return part
        return None

    def _deliver(self, part: _Part[T]) -> Iterator[tuple[T, Result]]:
        try:
            result = part.submitted.result(self._timeout_s, partial=True)
        except WorkError:  # all slots of the part failed
            if not self._return_exceptions:
                raise
            result = None
        errors = part.submitted.errors
        for row, item in enumerate(part.items):
            error_of_row = errors.get(row)
            if error_of_row is not None:
                if not self._return_exceptions:
                    raise error_of_row
                yield item, error_of_row  # type: ignore[misc]
                continue
            assert result is not None
            one = result.at(row)
            yield item, one
            one.spent = True

    # ------------------------------------------------------------------ leaving

    def _clean_up(self) -> None:
        """Give everything back, whether the stream ended, failed, or was left by its reader."""
        if self._request is not None:
            self._session.abandon(self._request)
        for claim in self._claims:
            claim.release()
        for part in self._in_flight:
            part.submitted.release()
        self._session.return_spares(self._model)
