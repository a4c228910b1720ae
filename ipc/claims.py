"""What a client knows of slots that it holds, and the views of them.

A NumPy view cannot be taken back.  So all views of a lease hang on one *root* array, and the slots go back
only after `release()` *and* the end of the last view: an array that somebody kept keeps its slots, and never
shows somebody else's data.  Slices, reshapes, memoryviews and DLPack capsules of a view keep the root alive
too, since NumPy makes them hold the root.
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import messages as m
from .errors import InvalidInput, SpentHandle
from .keeping import REUSED_BYTES, Kept
from .layout import ModelLayout, Plane
from .settings import BULK
from .tensors import check_array
from .timings import Timings, timings_of
from .variation import Variation

if TYPE_CHECKING:
    from .handles import Result
    from .session import Session

LEASED, SUBMITTED, DONE, RELEASED = range(4)
_STATE_TEXT = (
    "is not submitted yet; call submit()",
    "was submitted; its inputs belong to the pool until the result is there",
    "has its result already; lease new slots for the next item",
    "was released; lease new slots",
)


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

    def view(self, plane: ViewedPlane, row: int | None) -> npt.NDArray[Any]:
        """Rows of a plane: all of them, shape ``(count, *slot)``, or one, shape ``slot``; see `ViewedPlane.slot`."""
        if plane.spec.least is not None:
            return self.variation.view(self, plane.plane, row, done=self.state == DONE)
        row_bytes = plane.row_bytes
        if row is None:
            shape, size = (self.count, *plane.slot), self.count * row_bytes
            offset = plane.offset + self.first * row_bytes
        else:
            shape, size = plane.slot, row_bytes
            offset = plane.offset + (self.first + row) * row_bytes
        self.session.residence.touch(offset, size)
        return np.ndarray(shape, plane.dtype, self.root(), offset)

    @property
    def variation(self) -> Variation:
        """In what the model's items differ."""
        return self.session.models[self.model_index].variation

    @property
    def run(self) -> Kept:
        """Where its slots are."""
        return Kept(self.lease_id, self.first, self.at, self.count)

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
            self.session.returns.release(self)

    def __del__(self) -> None:
        # `released` may be missing when __init__ failed; a finalizer never raises.
        if getattr(self, "released", True):
            return
        self.released = True
        self.session.returns.drop(self)  # first, for warnings may be errors
        if self.state == LEASED and not (self.session.closed or self.session.forked):
            warnings.warn(
                f"{self.count} leased slots were dropped without submit() or release(); "
                "use `with pool.lease() as slot:`",
                ResourceWarning,
                stacklevel=2,
            )


class ViewedPlane:
    """A plane, and what every view of its rows needs, worked out once.

    Attributes:
        plane: the plane.
        spec, offset: its.
        slot: the shape of a slot's array: ``(items_per_slot, *item_shape)``, or ``item_shape`` where slots hold one
            item, or one of the tensor.
        row_bytes: of a slot.
    """

    __slots__ = ("_dtype", "offset", "plane", "row_bytes", "slot", "spec")

    def __init__(self, layout: ModelLayout, plane: Plane) -> None:
        self.plane = plane
        self.spec = plane.spec
        self.offset = plane.offset
        several = layout.items_per_slot > 1 and not plane.spec.shared
        self.slot = (layout.items_per_slot, *plane.spec.shape) if several else plane.spec.shape
        self.row_bytes = layout.row_bytes(plane)
        self._dtype: np.dtype[Any] | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """That of views; see `TensorSpec.numpy_dtype`, which may raise."""
        if self._dtype is None:
            self._dtype = self.spec.numpy_dtype
        return self._dtype


class ModelState:
    """What the client keeps of one model.

    Attributes:
        inputs, outputs: planes by tensor name.
        cap: slots this client may hold.
        held: slots it holds.
        variation: in what its items differ.
        kept: slots that their caller released, the oldest first; see `keeping`.
        unused: how many of these were there all the time since `take_unused` was called.
        keeps: whether there may be any: not while this client, or others, wait for slots.
        spares: claims granted in advance, by a Submit's `again`.
        step, steps: how many slots were released last, and how often in a row it was as many: a caller in a rhythm
            will lease as many again.
        unspent: submissions since a lease took the last spare, or found none.
        slot_bytes: of a slot, in all planes.
    """

    __slots__ = (
        "cap", "held", "inputs", "keeps", "kept", "outputs", "slot_bytes", "spares", "step", "steps", "unspent",
        "unused", "variation", "varies",
    )  # fmt: skip

    def __init__(self, layout: ModelLayout, cap: int) -> None:
        self.inputs = {plane.spec.name: ViewedPlane(layout, plane) for plane in layout.inputs}
        self.outputs = {plane.spec.name: ViewedPlane(layout, plane) for plane in layout.outputs}
        self.variation = Variation(layout)
        self.varies = bool(self.variation)
        self.slot_bytes = layout.slot_bytes
        self.cap = cap
        self.held = 0
        self.step = self.steps = self.unspent = self.unused = 0
        self.keeps = True
        self.spares: deque[Claim] = deque()
        self.kept: deque[Kept] = deque()

    def keep(self, run: Kept) -> bool:
        """Keep what its caller has released, if the caller is in a rhythm and it is worth it; whether it is kept."""
        self.steps = self.steps + 1 if self.step == run.count else 1
        self.step = run.count
        kept = self.keeps and self.steps > 1 and self.uses_again(run.count)
        if kept:
            self.kept.append(run)
        return kept

    def uses_again(self, count: int) -> bool:
        """Whether a run of so many slots is used again, and not given back for another."""
        return count * self.slot_bytes >= REUSED_BYTES

    def take(self, count: int) -> Kept | None:
        """Of the runs of so many slots that are kept the youngest, whose rows a cache may still hold."""
        kept = self.kept
        for place in range(len(kept) - 1, -1, -1):
            run = kept[place]
            if run.count == count:
                del kept[place]
                self.unused = min(self.unused, len(kept))
                return run
        return None

    def take_unused(self) -> list[Kept]:
        """Those that there were too many of since this was last called."""
        unused = [self.kept.popleft() for _ in range(self.unused)]
        self.unused = len(self.kept)
        return unused

    def take_all(self) -> list[Kept]:
        """All that is kept."""
        runs = list(self.kept)
        self.kept.clear()
        self.unused = 0
        return runs

    def wants_spare(self, count: int, in_flight: int) -> bool:
        """Whether a submission of `count` slots, beside so many others, should ask for as many in advance.

        Results, and spares with them, may come several at once, and whoever keeps several in flight takes them all.  So
        there are too many only if some were left over throughout two rounds of all that is in flight or spare.

        None is wanted in place of what is used again.
        """
        if self.uses_again(count):
            return False
        self.unspent += 1
        if not self.spares:
            return True
        if self.unspent <= 2 * (len(self.spares) + in_flight):
            return True
        self.unspent = 0
        return False


class Tensors(Mapping[str, npt.NDArray[Any]]):
    """Names to views of the arena; each access makes one, and a spent handle raises `SpentHandle`."""

    __slots__ = ("_claim", "_planes", "_row", "_state", "_valid")

    def __init__(
        self, claim: Claim, planes: dict[str, ViewedPlane], state: int, row: int | None, valid: Result | None = None
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
        if plane.spec.least is not None:
            claim.variation.set_shape(claim, plane.plane, self._row, given.shape[len(leading) :])
        claim.view(plane, self._row)[...] = given

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
        claim.variation.set_shape(claim, plane.plane, self._row, tuple(map(operator.index, shape)))
        return self[name]

    def _require_inputs(self, name: str) -> None:
        if self._state != LEASED:
            raise InvalidInput(f"{name!r} is an output, which the model writes; copy it to change it")
        self._claim.require(LEASED)

    def _plane(self, name: str) -> ViewedPlane:
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
