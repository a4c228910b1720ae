"""What a producer holds: `Lease` -> `Submitted` -> `Result`.

Each is a state, and using one after the next was reached raises `SpentHandle`::

    lease = pool.lease()            write lease.inputs["x"]
    submitted = lease.submit()      lease.inputs is spent; wait, await, callbacks
    result = submitted.result()     read result.outputs["y"]
    lease.release()                 all three are spent; `with pool.lease() as lease:` does it

All of them are about the same `Claim` on slots.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from .claims import DONE, LEASED, RELEASED, Claim, Tensors
from .errors import InvalidInput, WorkError
from .layout import ModelLayout
from .settings import Priority
from .timings import Timings

if TYPE_CHECKING:
    from .submitted import Submitted


class Lease:
    """The right to write adjacent slots.

    `pool.lease()` gives one slot, whose arrays have the shape of the slot; a run out of `pool.lease_many()` has
    an axis of slots in front.  Use it as a context manager: it releases the slots at the end.
    """

    __slots__ = ("_claim", "_row")

    def __init__(self, claim: Claim, *, single: bool) -> None:
        self._claim = claim
        self._row = 0 if single else None

    @property
    def count(self) -> int:
        """Slots."""
        return self._claim.count

    @property
    def model(self) -> ModelLayout:
        """The model that the slots are of."""
        return self._claim.model

    @property
    def inputs(self) -> Tensors:
        """The input arrays to write, by name: views of the arena, in whatever state the last user left them.

        Each has shape ``item_shape`` (``(items_per_slot, *item_shape)`` where slots hold several), with an axis of
        `count` slots in front unless this is one slot from `lease()`.  Where items differ in shape it is the largest,
        until `Tensors.shaped`, or ``inputs[name] = array``, gives another; a shared input has one value for each slot.

        Raises:
            SpentHandle: submitted or released.
        """
        self._claim.require(LEASED)
        claim = self._claim
        return Tensors(claim, claim.session.models[claim.model_index].inputs, LEASED, self._row)

    def submit(
        self,
        *,
        items: int | None = None,
        deadline_s: float | None = None,
        gpu: int | None = None,
        priority: Priority | None = None,
    ) -> Submitted:
        """Queue the slots; the inputs must be written.

        Args:
            items: items in all the slots together when the last is not full.
            deadline_s: seconds from now after which the work is dropped if it has not started.
            gpu: the one GPU that may run it, counted from 0 in the order of the pool's ``--gpus``; None: any, which
                keeps them all busy.
            priority: "interactive" goes before "bulk"; None: the class that the slots were leased with.

        Raises:
            SpentHandle: submitted or released before.
            InvalidInput: `items` does not fill all slots but the last, or the pool has no such GPU or class; or items
                of different shapes, or slots that differ in a shared input, were to go together.
            PoolClosed: the pool ended.
        """
        return self._claim.session.work.submit(self._claim, self._row, items, deadline_s, gpu, priority)

    def slots(self) -> list[Lease]:
        """One handle for each slot, to submit and release each by itself; this one is spent."""
        claim = self._claim
        claim.require(LEASED)
        claim.released = True
        return [Lease(claim.split(at, 1), single=True) for at in range(claim.count)]

    def release(self) -> None:
        """Give the slots back.  If they are queued the work is cancelled; if they run, when they have ended."""
        self._claim.release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        claim = self._claim
        state = ("leased", "submitted", "done", "released")[RELEASED if claim.released else claim.state]
        return f"<Lease of {claim.count} slots of {claim.model.spec.name!r}, {state}>"


class Leases(list[Lease]):
    """The runs of adjacent slots that `lease_many` was granted; usually one."""

    def slots(self) -> list[Lease]:
        """One handle for each slot; the runs are spent."""
        return [slot for lease in self for slot in lease.slots()]

    def submit(
        self, *, deadline_s: float | None = None, gpu: int | None = None, priority: Priority | None = None
    ) -> list[Submitted]:
        """Queue all runs, full; see `Lease.submit`."""
        return [lease.submit(deadline_s=deadline_s, gpu=gpu, priority=priority) for lease in self]

    def release(self) -> None:
        """Give all slots back."""
        for lease in self:
            lease.release()

    def __enter__(self) -> Leases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Result:
    """Outputs of finished work: views of the arena, valid until the slots are released.

    Attributes:
        items: items in all its slots together.
        errors: for a run of several slots read with ``partial=True``, the slots that failed, counted from the
            first, and why.
    """

    __slots__ = ("_claim", "_row", "errors", "items", "spent")

    def __init__(self, claim: Claim, row: int | None, items: int, errors: dict[int, WorkError]) -> None:
        self._claim = claim
        self._row = row
        self.items = items
        self.errors = errors
        self.spent = False

    @property
    def model(self) -> ModelLayout:
        """The model that made it."""
        return self._claim.model

    @property
    def outputs(self) -> Tensors:
        """The output arrays by name, shaped like the inputs of the lease, with the items' real shapes.

        Raises:
            SpentHandle: released.
            InvalidInput: on access, if the slots of a run have different shapes; see `at`.
        """
        claim = self._claim
        claim.require(DONE)
        return Tensors(claim, claim.session.models[claim.model_index].outputs, DONE, self._row, self)

    @property
    def timings(self) -> Timings:
        """Where the time went, in nanoseconds; stays readable when the slots are released.

        Slots that were submitted together share it; if they ended in parts, it is that of the last good one.
        """
        timings = self._claim.timings
        assert timings is not None, "a result is made when its end was heard"
        return timings

    def at(self, row: int) -> Result:
        """The result of one slot of a run, counted from its first.

        Raises:
            InvalidInput: there is no such slot.
            WorkError: that slot failed.
        """
        if not 0 <= row < self._claim.count:
            raise InvalidInput(f"slot {row} of {self._claim.count}")
        if row in self.errors:
            raise self.errors[row]
        per_slot = self._claim.model.items_per_slot
        return Result(self._claim, row, min(per_slot, self.items - row * per_slot), {})

    def release(self) -> None:
        """Give the slots back."""
        self._claim.release()

    def __enter__(self) -> Result:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
