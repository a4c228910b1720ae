"""Arrays of items through the pool, a batch at a time: `Client.infer`, and `trtpool.arrow` with many of them.

Slots are asked for by the batch, and while none are granted the oldest results are read and their slots released.
So it never waits for more than a batch, keeps as many batches in flight as it is given, and two that share a pool
cannot block each other.  The next array is begun while the last one is computed: the slots are the back-pressure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from .claims import Claim
from .errors import InvalidInput, WorkError
from .handles import Lease, Leases, Result
from .inflight import check_priority
from .layout import ModelLayout
from .requests import Request
from .session import Session
from .settings import Priority
from .submitted import Submitted

T = TypeVar("T")

AHEAD: Final = 8
"""Arrays that are begun before the first of them is done, however small they are."""


class Job(Generic[T]):
    """An array of items for each input, and room for the outputs.

    Args:
        inputs: arrays by name, of shape ``(total, *item_shape)``, but for shared inputs.
        layout: the model.
        total: items.
        tag: anything of the caller's.

    Attributes:
        outputs: arrays by name, of shape ``(total, *item_shape)``; those that vary are there when it is done.
        errors: the items that failed, and why.
        left: items whose result was not read.
    """

    def __init__(self, inputs: Mapping[str, npt.NDArray[Any]], layout: ModelLayout, total: int, tag: T) -> None:
        self.inputs = inputs
        outputs = layout.spec.outputs
        self.outputs = {
            spec.name: np.empty((total if spec.least is None else 0, *spec.shape), spec.numpy_dtype) for spec in outputs
        }
        self._seen: dict[str, list[npt.NDArray[Any]]] = {spec.name: [] for spec in outputs if spec.least is not None}
        self.errors: dict[int, WorkError] = {}
        self.total = total
        self.tag = tag
        self.start = 0  # items submitted
        self.left = total

    def take(self, result: Result, rows: int, start: int, end: int, per_slot: int) -> None:
        """Copy the outputs of items `start` to `end`, which are in so many slots."""
        for name, array in self.outputs.items():
            seen = self._seen.get(name)
            if seen is None:
                array[start:end] = _items_of(result.outputs[name], per_slot)[: end - start]
                continue
            for row in range(rows):
                one = result.at(row)
                outputs = one.outputs[name]
                seen.append((outputs[: one.items] if per_slot > 1 else outputs[None]).copy())

    def join(self) -> None:
        """All items are there: make arrays of outputs that vary.

        Raises:
            InvalidInput: they are not of one shape.
        """
        for name, seen in self._seen.items():
            if len({array.shape[1:] for array in seen}) > 1:
                raise InvalidInput(
                    f"output {name!r} has another shape for each item, which is no one array; infer the items one by "
                    "one, or use map()"
                )
            if seen:
                self.outputs[name] = np.concatenate(seen)


class _Span(NamedTuple):
    """Items `start` to `end` of a job, on their way."""

    submitted: Submitted
    job: Job[Any]
    start: int
    end: int


class Inference(Generic[T]):
    """One `infer` call, or a stream of them.

    Args:
        session: the connection.
        model: its number.
        jobs: read as slots come free.
        partial: note the errors of items that fail in their job, instead of raising the first.
        timeout_s, gpu, priority: see `Client.infer`.
    """

    def __init__(
        self,
        session: Session,
        model: int,
        jobs: Iterable[Job[T]],
        timeout_s: float | None,
        gpu: int | None,
        priority: Priority,
        *,
        partial: bool = False,
    ) -> None:
        self._session = session
        self._model = model
        self._jobs = iter(jobs)
        self._partial = partial
        self._timeout_s = timeout_s
        self._gpu = session.check_gpu(gpu)
        self._priority = check_priority(priority)
        layout = session.layout.models[model]
        self._specs = {spec.name: spec for spec in layout.spec.inputs}
        self._per_slot = layout.items_per_slot
        self._most = max(1, min(layout.max_batch // layout.items_per_slot, session.requests.room(model)))
        self._begun: deque[Job[T]] = deque()
        self._exhausted = False
        self._in_flight: deque[_Span] = deque()
        self._request: Request | None = None

    def run(self) -> Iterator[Job[T]]:
        """Fill the outputs; yields each job when it is done, in order."""
        try:
            while True:
                job = self._unsubmitted()
                if self._begun and not self._begun[0].left:
                    self._begun[0].join()
                    yield self._begun.popleft()
                elif job is not None and (claims := self._claims(job)) is not None:
                    self._submit(job, claims)
                elif self._in_flight:
                    self._read(self._in_flight.popleft())
                else:
                    return
        finally:
            if self._request is not None:
                self._session.requests.abandon(self._request)
            for span in self._in_flight:
                span.submitted.release()

    def _unsubmitted(self) -> Job[T] | None:
        """The job that has items to submit; None when the oldest must be done first."""
        if self._begun and self._begun[-1].start < self._begun[-1].total:
            return self._begun[-1]
        if not self._exhausted and len(self._begun) < AHEAD:
            for job in self._jobs:
                self._begun.append(job)
                return job if job.total else None
            self._exhausted = True
        return None

    def _claims(self, job: Job[T]) -> list[Claim] | None:
        """Slots for the next items; None when the oldest result came first."""
        if self._in_flight and self._in_flight[0].submitted.over:
            return None
        if self._request is None:
            count = min(self._most, -(-(job.total - job.start) // self._per_slot))
            spare = self._session.requests.take_spare(self._model, count, self._priority)
            if spare is not None:
                return [spare]
        else:
            count = self._request.count
        busy = bool(self._in_flight)
        self._request = self._session.requests.ask_amid(
            self._request, self._model, count, self._timeout_s, busy, self._priority
        )
        if self._in_flight:
            oldest = self._in_flight[0].submitted
            if not self._session.wait_any([self._request, oldest], self._timeout_s):
                raise TimeoutError(f"no result within {self._timeout_s} s")
            if not self._request.over:
                return None
        request, self._request = self._request, None
        return self._session.requests.answer(request)

    def _submit(self, job: Job[T], claims: list[Claim]) -> None:
        leases = Leases(Lease(claim, single=False) for claim in claims)
        try:
            for lease in leases:
                start, end = job.start, min(job.total, job.start + lease.count * self._per_slot)
                for name, array in job.inputs.items():
                    self._write(lease, name, array, start, end)
                self._in_flight.append(_Span(lease.submit(items=end - start, gpu=self._gpu), job, start, end))
                job.start = end
        except BaseException:
            leases.release()
            raise

    def _read(self, span: _Span) -> None:
        job, submitted = span.job, span.submitted
        try:
            try:
                result = submitted.result(self._timeout_s, partial=self._partial)
            except WorkError as error:
                if not self._partial:
                    error.name_item(span.start + error.slots.start * self._per_slot)
                    raise
            else:
                job.take(result, submitted.claim.count, span.start, span.end, self._per_slot)
            for slot, failure in submitted.errors.items():
                first = span.start + slot * self._per_slot
                failure.name_item(first)
                for index in range(first, min(first + self._per_slot, span.end)):
                    job.errors[index] = failure
        finally:
            submitted.release()
        job.left -= span.end - span.start

    def _write(self, lease: Lease, name: str, array: npt.NDArray[Any], start: int, end: int) -> None:
        """Write the items from `start` to `end` of an input into the slots."""
        spec = self._specs[name]
        if spec.shared:
            lease.inputs.shaped(name, array.shape)[...] = array
        elif spec.least is None:
            _items_of(lease.inputs[name], self._per_slot)[: end - start] = array[start:end]
        else:  # rows lie apart
            view = lease.inputs.shaped(name, array.shape[1:])
            if self._per_slot == 1:
                view[...] = array[start:end]
                return
            for row in range(lease.count):
                at = start + row * self._per_slot
                part = array[at : min(end, at + self._per_slot)]
                view[row, : len(part)] = part


def _items_of(array: npt.NDArray[Any], per_slot: int) -> npt.NDArray[Any]:
    """An array of slots as an array of items."""
    return array.reshape(-1, *array.shape[2:]) if per_slot > 1 else array
