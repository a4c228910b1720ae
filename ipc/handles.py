"""What a producer holds: `Lease` -> `Submitted` -> `Result`.

Each is a state, and using one after the next was reached raises `SpentHandle`::

    lease = pool.lease()            write lease.inputs["x"]
    submitted = lease.submit()      lease.inputs is spent; wait, await, callbacks
    result = submitted.result()     read result.outputs["y"]
    lease.release()                 all three are spent; `with pool.lease() as lease:` does it

A NumPy view cannot be taken back.  So all views of a lease hang on one *root* array, and the slots go back
only after `release()` *and* the end of the last view: an array that somebody kept keeps its slots, and never
shows somebody else's data.  Slices, reshapes, memoryviews and DLPack capsules of a view keep the root alive
too, since NumPy makes them hold the root.
"""

from __future__ import annotations

import asyncio
import operator
import warnings
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import messages as m
from .errors import Cancelled, DeadlineExceeded, EngineFailed, InvalidInput, SpentHandle, WorkerDied, WorkError
from .layout import ModelLayout, Plane
from .logs import work_id
from .settings import BULK, Priority
from .tensors import check_array
from .timings import Timings, timings_of
from .variation import Variation

if TYPE_CHECKING:
    from .session import Session
    from .waiting import Sleeper

LEASED, SUBMITTED, DONE, RELEASED = range(4)
_STATE_TEXT = (
    "is not submitted yet; call submit()",
    "was submitted; its inputs belong to the pool until the result is there",
    "has its result already; lease new slots for the next item",
    "was released; lease new slots",
)

_WORK_ERRORS: dict[int, type[WorkError]] = {
    m.DEADLINE: DeadlineExceeded,
    m.CANCELLED: Cancelled,
    m.ENGINE_FAILED: EngineFailed,
    m.WORKER_DIED: WorkerDied,
}


class Claim:
    """Slots of one lease that are handled together; shared by the handles of its states.

    When the last handle is dropped without `release()`, the slots go back all the same.

    Attributes:
        lease_ns: how long they were waited for.
        leased_ns, submitted_ns, received_ns: when they were handed out, submitted, and the end of that was heard.
        done: what was heard; see `timings`, which is made of these when somebody asks.
    """

    __slots__ = (
        "at", "count", "done", "first", "lease_id", "lease_ns", "leased_ns", "model", "model_index", "priority",
        "received_ns", "released", "results", "root_ref", "session", "shapes", "state", "submitted_ns",
    )  # fmt: skip

    def __init__(self, session: Session, model_index: int, lease_id: int, first: int, at: int, count: int) -> None:
        self.session = session
        self.model_index = model_index
        self.model: ModelLayout = session.layout.models[model_index]
        self.lease_id = lease_id
        self.first = first
        self.at = at
        self.count = count
        self.lease_ns = self.leased_ns = self.submitted_ns = self.received_ns = 0
        self.done: m.Done | None = None
        self.priority = BULK
        self.state = LEASED
        self.released = False
        self.root_ref: weakref.ref[npt.NDArray[Any]] | None = None
        self.shapes: dict[int, dict[str, tuple[int, ...]]] = {}  # of inputs, by slot, where not the largest
        self.results: dict[int, m.Shapes] = {}  # of outputs that vary, by slot

    def root(self) -> npt.NDArray[Any]:
        """The array that all views of these slots hang on."""
        root = self.root_ref() if self.root_ref is not None else None
        if root is None:
            segment = self.session.segment
            # Made from the mapping, not from another array: NumPy lets a view of a view hold the first array of
            # its kind, which must be this one.
            root = np.ndarray((len(segment),), np.uint8, segment)
            self.root_ref = weakref.ref(root)
        return root

    def view(self, plane: Plane, row: int | None) -> npt.NDArray[Any]:
        """Rows of a plane: all of them, shape ``(count, *slot)``, or one, shape ``slot``.

        `slot` is ``(items_per_slot, *item_shape)``, or ``item_shape`` where slots hold one item, or one of the tensor.
        """
        model, spec = self.model, plane.spec
        if spec.least is not None:
            return self.variation.view(self, plane, row, done=self.state == DONE)
        shape = spec.shape
        if model.items_per_slot > 1 and not spec.shared:
            shape = (model.items_per_slot, *shape)
        if row is None:
            shape = (self.count, *shape)
        row_bytes = model.row_bytes(plane)
        offset = plane.offset + (self.first + (row or 0)) * row_bytes
        self.session.residence.touch(offset, row_bytes if row is not None else self.count * row_bytes)
        return np.ndarray(shape, spec.numpy_dtype, self.root(), offset)

    @property
    def variation(self) -> Variation:
        """In what the model's items differ."""
        return self.session.models[self.model_index].variation

    def split(self, at: int, count: int) -> Claim:
        """A claim on `count` of these slots from `at`; the caller gives up this one.

        Arrays that somebody keeps of this one keep the parts' slots too: nothing tells which of them they show.
        """
        claim = Claim(self.session, self.model_index, self.lease_id, self.first + at, self.at + at, count)
        claim.lease_ns, claim.leased_ns = self.lease_ns, self.leased_ns
        claim.priority = self.priority
        claim.root_ref = self.root_ref
        if self.shapes:
            claim.shapes = {row - at: shapes for row, shapes in self.shapes.items() if at <= row < at + count}
        return claim

    @property
    def timings(self) -> Timings | None:
        """Where the time went; None: the end was not heard."""
        if self.done is None:
            return None
        return timings_of(self.lease_ns, self.leased_ns, self.submitted_ns, self.done, self.received_ns)

    def require(self, state: int) -> None:
        """Raise `SpentHandle` unless the slots are in `state`."""
        self.session.check_process()
        if self.released or self.state != state:
            raise SpentHandle(f"this handle {_STATE_TEXT[RELEASED if self.released else self.state]}")

    def release(self) -> None:
        """Give the slots back, when the last view of them has ended.  Again: nothing."""
        if not self.released:
            self.session.release(self)

    def __del__(self) -> None:
        # `released` may be missing when __init__ failed; a finalizer never raises.
        if getattr(self, "released", True):
            return
        self.released = True
        self.session.release_dropped(self)  # first, for warnings may be errors
        if self.state == LEASED and not (self.session.closed or self.session.forked):
            warnings.warn(
                f"{self.count} leased slots were dropped without submit() or release(); "
                "use `with pool.lease() as slot:`",
                ResourceWarning,
                stacklevel=2,
            )


class Tensors(Mapping[str, npt.NDArray[Any]]):
    """Names to views of the arena; each access makes one, and a spent handle raises `SpentHandle`."""

    __slots__ = ("_claim", "_planes", "_row", "_state", "_valid")

    def __init__(
        self, claim: Claim, planes: dict[str, Plane], state: int, row: int | None, valid: Result | None = None
    ) -> None:
        self._claim = claim
        self._planes = planes
        self._state = state
        self._row = row
        self._valid = valid

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        self._claim.require(self._state)
        if self._valid is not None and self._valid.spent:
            raise SpentHandle("this result was passed by; copy what you keep before the next item, or list its arrays")
        return self._claim.view(self._plane(name), self._row)

    def __setitem__(self, name: str, array: npt.ArrayLike) -> None:
        """Write an input: ``inputs["x"] = array`` gives it the array's shape, and copies.

        The array has the shape of ``inputs["x"]``, where items may differ any within the model's range.

        Raises:
            InvalidInput: shape or dtype do not fit, or this is an output.
            SpentHandle: submitted or released.
        """
        claim, plane = self._claim, self._plane(name)
        self._require_inputs(name)
        leading = () if self._row is not None else (claim.count,)
        if claim.model.items_per_slot > 1 and not plane.spec.shared:
            leading = (*leading, claim.model.items_per_slot)
        given = check_array(plane.spec, array, leading)
        self.shaped(name, given.shape[len(leading) :])[...] = given

    def shaped(self, name: str, shape: Sequence[int]) -> npt.NDArray[Any]:
        """An input to write in place, for items of `shape`, which goes out with the submission.

        Args:
            name: the input.
            shape: of one item, within the range of `TensorSpec.least` and `TensorSpec.shape`.

        Returns:
            The array, dense, with the axes that ``inputs[name]`` has in front of an item's.  Each input has the largest
            shape until this is called, and the last shape that it is given counts.

        Raises:
            InvalidInput: the shape is not within the model's range, or this is an output.
            SpentHandle: submitted or released.
        """
        claim, plane = self._claim, self._plane(name)
        self._require_inputs(name)
        claim.variation.set_shape(claim, plane, self._row, tuple(map(operator.index, shape)))
        return self[name]

    def _require_inputs(self, name: str) -> None:
        if self._state != LEASED:
            raise InvalidInput(f"{name!r} is an output, which the model writes; copy it to change it")
        self._claim.require(LEASED)

    def _plane(self, name: str) -> Plane:
        plane = self._planes.get(name)
        if plane is None:
            raise InvalidInput(f"the model has no tensor {name!r} here; it has {', '.join(map(repr, self._planes))}")
        return plane

    def __contains__(self, name: object) -> bool:
        return name in self._planes

    def __iter__(self) -> Iterator[str]:
        return iter(self._planes)

    def __len__(self) -> int:
        return len(self._planes)

    def __repr__(self) -> str:
        return f"<views of {', '.join(self._planes)}>"


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
        return self._claim.session.submit(self._claim, self._row, items, deadline_s, gpu, priority)

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
            self.claim.session.cancel(self.claim)
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
