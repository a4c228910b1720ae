"""Items that differ in shape, and inputs that a whole batch shares: the client's side.

A slot's inputs have the largest shape until they are given another (`Tensors.shaped`); the shape goes out with the
submission, and so does a digest of what is in the shared inputs, since only what is equal in both may be in a batch
together.  The shapes of outputs come back with the result.  Rows are as large as the largest item; one that is smaller
lies dense from its row's start.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import messages as m
from .errors import InvalidInput, ProtocolError
from .layout import ModelLayout, Plane

if TYPE_CHECKING:
    from .claims import Claim

Shape = tuple[int, ...]


class Variation:
    """In what the items of a model differ.

    Attributes:
        inputs, outputs: planes of tensors whose shape varies, in the order in which messages name their shapes.
        shared: planes of inputs that a batch shares.
    """

    def __init__(self, layout: ModelLayout) -> None:
        self.inputs = tuple(plane for plane in layout.inputs if plane.spec.least is not None)
        self.outputs = tuple(plane for plane in layout.outputs if plane.spec.least is not None)
        self.shared = tuple(plane for plane in layout.inputs if plane.spec.shared)
        self._model = layout.spec

    def __bool__(self) -> bool:
        return bool(self.inputs or self.outputs or self.shared)

    def set_shape(self, claim: Claim, plane: Plane, row: int | None, shape: Shape) -> None:
        """Give an input of one slot, or of all of them, a shape.

        Raises:
            InvalidInput: it is not within the model's range.
        """
        spec = plane.spec
        if not spec.takes(shape):
            what = "items of" if spec.least is not None else "no other shape than"
            raise InvalidInput(f"input {spec.name!r} takes {what} {spec.describe_shape()}, got {shape}")
        if spec.least is None:
            return
        for slot in range(claim.count) if row is None else (row,):
            claim.shapes.setdefault(slot, {})[spec.name] = shape

    def submitted(self, claim: Claim, row: int) -> m.Shapes:
        """The shapes of the inputs of one slot."""
        given = claim.shapes.get(row, {})
        return tuple(given.get(plane.spec.name, plane.spec.shape) for plane in self.inputs)

    def variant(self, claim: Claim) -> tuple[m.Shapes, bytes]:
        """What the slots, which are submitted together, have in common.

        Raises:
            InvalidInput: they differ, or the model takes no items of their shapes.
        """
        shapes = self.submitted(claim, 0)
        if claim.shapes and any(self.submitted(claim, row) != shapes for row in range(1, claim.count)):
            raise InvalidInput("slots with items of different shapes were submitted together; use .slots()")
        self._check(shapes)
        for plane in self.shared:
            rows = _rows(claim, plane)
            if (rows[1:] != rows[0]).any():
                raise InvalidInput(
                    f"slots that differ in input {plane.spec.name!r}, which has one value for a whole batch, were "
                    "submitted together; write the same in all, or use .slots()"
                )
        return shapes, self._digest(claim, 0)

    def row_variant(self, claim: Claim, row: int) -> tuple[m.Shapes, bytes]:
        """What must be equal in slots that are submitted together."""
        return self.submitted(claim, row), self._digest(claim, row)

    def _check(self, shapes: m.Shapes) -> None:
        """Each shape is within its own range by now; see `ModelSpec.profiles` for them together."""
        if not self._model.covers(shapes):
            shown = ", ".join(f"{plane.spec.name} {shape}" for plane, shape in zip(self.inputs, shapes, strict=True))
            raise InvalidInput(
                f"model {self._model.name!r} takes items of {self._model.describe_profiles()}, got {shown}"
            )

    def _digest(self, claim: Claim, row: int) -> bytes:
        if not self.shared:
            return b""
        digest = hashlib.blake2b(digest_size=m.SHARED_BYTES)
        for plane in self.shared:
            digest.update(_rows(claim, plane)[row])
        return digest.digest()

    def take_results(self, claim: Claim, at: int, count: int, shapes: m.Shapes) -> None:
        """Note the shapes of the outputs of some slots.

        Raises:
            ProtocolError: rows cannot hold them.
        """
        fits = len(shapes) == len(self.outputs) and all(
            plane.spec.takes(shape) for plane, shape in zip(self.outputs, shapes, strict=True)
        )
        if not fits:
            raise ProtocolError(f"results of the shapes {shapes} do not fit their rows")
        for row in range(at, at + count):
            claim.results[row] = shapes

    def view(self, claim: Claim, plane: Plane, row: int | None, *, done: bool) -> npt.NDArray[Any]:
        """Rows of a plane whose items vary, as `Claim.view`; `done`: it is an output."""
        shape = self._shape(claim, plane, row, done=done)
        spec, model = plane.spec, claim.model
        if model.items_per_slot > 1:
            shape = (model.items_per_slot, *shape)
        strides = [spec.itemsize] * len(shape)
        for axis in range(len(shape) - 1, 0, -1):
            strides[axis - 1] = strides[axis] * shape[axis]
        used = strides[0] * shape[0] if shape else spec.itemsize
        row_bytes = model.row_bytes(plane)
        if row is None:
            shape, strides, used = (claim.count, *shape), [row_bytes, *strides], claim.count * row_bytes
        offset = plane.offset + (claim.first + (row or 0)) * row_bytes
        claim.session.residence.touch(offset, max(1, used))
        return np.ndarray(shape, spec.numpy_dtype, claim.root(), offset, strides)

    def _shape(self, claim: Claim, plane: Plane, row: int | None, *, done: bool) -> Shape:
        """The shape of the items of a slot, or of all slots."""
        rows = range(claim.count) if row is None else (row,)
        if done:
            number = self.outputs.index(plane)
            shapes = {claim.results[slot][number] for slot in rows if slot in claim.results}
        else:
            shapes = {claim.shapes.get(slot, {}).get(plane.spec.name, plane.spec.shape) for slot in rows}
        if len(shapes) != 1:
            one = "result.at(i)" if done else ".slots()"
            raise InvalidInput(
                f"the slots hold {plane.spec.name!r} in different shapes, which are no one array; use {one}"
            )
        return shapes.pop()


def _rows(claim: Claim, plane: Plane) -> npt.NDArray[np.uint8]:
    """The rows of a plane as bytes."""
    row_bytes = claim.model.row_bytes(plane)
    offset = plane.offset + claim.first * row_bytes
    return np.ndarray((claim.count, row_bytes), np.uint8, claim.session.segment, offset)
