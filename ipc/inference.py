"""`Client.infer`: an array of items through the pool, a batch at a time.

Slots are asked for by the batch, and while none are granted the oldest results are read and their slots released.
So it never waits for more than a batch, keeps as many batches in flight as it is given, and two that share a pool
cannot block each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput
from .handles import Claim, Lease, Leases, Submitted
from .session import Request, Session, check_priority
from .settings import Priority


class _Span(NamedTuple):
    """Items `start` to `end`, on their way."""

    submitted: Submitted
    start: int
    end: int


class Inference:
    """One `infer` call.

    Args:
        session: the connection.
        model: its number.
        inputs: arrays by name, whose first axis counts items, but for shared inputs.
        total: items.
        timeout_s, gpu, priority: see `Client.infer`.
    """

    def __init__(
        self,
        session: Session,
        model: int,
        inputs: Mapping[str, npt.NDArray[Any]],
        total: int,
        timeout_s: float | None,
        gpu: int | None,
        priority: Priority,
    ) -> None:
        self._session = session
        self._model = model
        self._inputs = inputs
        self._total = total
        self._timeout_s = timeout_s
        self._gpu = session.check_gpu(gpu)
        self._priority = check_priority(priority)
        layout = session.layout.models[model]
        outputs = layout.spec.outputs
        self._outputs = {
            spec.name: np.empty((total, *spec.shape), spec.numpy_dtype) for spec in outputs if spec.least is None
        }
        self._varying = {spec.name: spec for spec in outputs if spec.least is not None}
        self._seen: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in self._varying}
        self._order = [spec.name for spec in outputs]
        self._specs = {spec.name: spec for spec in layout.spec.inputs}
        self._per_slot = layout.items_per_slot
        self._most = max(1, min(layout.max_batch // layout.items_per_slot, session.room(model)))
        self._start = 0  # items submitted
        self._in_flight: deque[_Span] = deque()
        self._request: Request | None = None

    def run(self) -> dict[str, npt.NDArray[Any]]:
        """The outputs, with an axis of items in front."""
        try:
            while self._start < self._total or self._in_flight:
                claims = self._claims() if self._start < self._total else None
                if claims is not None:
                    self._submit(claims)
                else:
                    self._read(self._in_flight.popleft())
        finally:
            if self._request is not None:
                self._session.abandon(self._request)
            for span in self._in_flight:
                span.submitted.release()
        return {name: self._join(name) if name in self._seen else self._outputs[name] for name in self._order}

    def _claims(self) -> list[Claim] | None:
        """Slots for the next items; None when the oldest result came first."""
        count = min(self._most, -(-(self._total - self._start) // self._per_slot))
        if self._request is None:
            spare = self._session.take_spare(self._model, count, self._priority)
            if spare is not None:
                return [spare]
        busy = bool(self._in_flight)
        self._request = self._session.ask_amid(self._request, self._model, count, self._timeout_s, busy, self._priority)
        if self._in_flight:
            oldest = self._in_flight[0].submitted
            if not self._session.wait_any([self._request, oldest], self._timeout_s):
                raise TimeoutError(f"no result within {self._timeout_s} s")
            if not self._request.over:
                return None
        request, self._request = self._request, None
        return self._session.answer(request)

    def _submit(self, claims: list[Claim]) -> None:
        leases = Leases(Lease(claim, single=False) for claim in claims)
        try:
            for lease in leases:
                end = min(self._total, self._start + lease.count * self._per_slot)
                for name, array in self._inputs.items():
                    self._write(lease, name, array, end)
                self._in_flight.append(_Span(lease.submit(items=end - self._start, gpu=self._gpu), self._start, end))
                self._start = end
        except BaseException:
            leases.release()
            raise

    def _read(self, span: _Span) -> None:
        try:
            result = span.submitted.result(self._timeout_s)
            for name, array in self._outputs.items():
                array[span.start : span.end] = self._items_of(result.outputs[name])[: span.end - span.start]
            for name, seen in self._seen.items():
                for row in range(span.submitted.claim.count):
                    one = result.at(row)
                    outputs = one.outputs[name]
                    seen.append((outputs[: one.items] if self._per_slot > 1 else outputs[None]).copy())
        finally:
            span.submitted.release()

    def _write(self, lease: Lease, name: str, array: npt.NDArray[Any], end: int) -> None:
        """Write the items from `_start` to `end` of an input into the slots."""
        spec, items = self._specs[name], end - self._start
        if spec.shared:
            lease.inputs.shaped(name, array.shape)[...] = array
        elif spec.least is None:
            self._items_of(lease.inputs[name])[:items] = array[self._start : end]
        else:  # rows lie apart
            view = lease.inputs.shaped(name, array.shape[1:])
            if self._per_slot == 1:
                view[...] = array[self._start : end]
                return
            for row in range(lease.count):
                start = self._start + row * self._per_slot
                part = array[start : min(end, start + self._per_slot)]
                view[row, : len(part)] = part

    def _join(self, name: str) -> npt.NDArray[Any]:
        """All items of an output that varies."""
        seen, spec = self._seen[name], self._varying[name]
        if not seen:  # no items
            return np.empty((0, *spec.shape), spec.numpy_dtype)
        if len({array.shape[1:] for array in seen}) > 1:
            raise InvalidInput(
                f"output {name!r} has another shape for each item, which is no one array; infer the items one by one, "
                "or use map()"
            )
        return np.concatenate(seen)

    def _items_of(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """An array of slots as an array of items."""
        return array.reshape(-1, *array.shape[2:]) if self._per_slot > 1 else array
