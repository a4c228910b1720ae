"""Where every tensor of every slot lies in the arena: pure arithmetic.

::

    segment 0
    |<------------- model "det": 4 slots ------------->|<-------- model "cls" ...
    +----+----+----+----+--+----+----+----+----+--+-------------------
    | x0 | x1 | x2 | x3 |//| y0 | y1 | y2 | y3 |//|  ...
    +----+----+----+----+--+----+----+----+----+--+-------------------
    ^ plane of input x     ^ plane of output y     // pad to the next page
      row i = items_per_slot items, dense            slot i = row i of every plane

A plane is an array of shape ``(slots, items_per_slot, *item_shape)``; its rows have no gaps, so any run
of slots is one contiguous array for each tensor, and a batch of adjacent slots needs one copy.

Where items differ in shape, rows have room for the largest.  Items of another shape lie dense from their row's start::

    | a a a . . . . . | b b b . . . . . |     two slots of one item, three of eight numbers used

A shared tensor (`TensorSpec.shared`) has one value in each row, whatever `items_per_slot` is.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from .errors import ProtocolError
from .tensors import ModelSpec, TensorSpec

PAGE_BYTES: Final = 4096


def row_items(spec: TensorSpec, items_per_slot: int) -> int:
    """How many items of a tensor a row holds."""
    return 1 if spec.shared else items_per_slot


class Plane(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor of one model for all its slots, `offset` bytes into its segment."""

    spec: TensorSpec
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class ModelLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The planes of one model.

    Attributes:
        spec: the model.
        slots: how many slots it has.
        items_per_slot: items in each.
        max_batch: the largest batch, in items.
        inputs, outputs: one plane for each tensor, in the model's order.
        segment: the segment that holds them.
    """

    spec: ModelSpec
    slots: Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    items_per_slot: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    max_batch: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    inputs: tuple[Plane, ...]
    outputs: tuple[Plane, ...]
    segment: Annotated[int, msgspec.Meta(ge=0, le=0)] = 0

    def plane_shape(self, plane: Plane) -> tuple[int, ...]:
        """Shape of the whole plane: ``(slots, items_per_slot, *item_shape)``; a shared tensor has 1 item in each."""
        return (self.slots, row_items(plane.spec, self.items_per_slot), *plane.spec.shape)

    def row_bytes(self, plane: Plane) -> int:
        """Bytes of one row, which holds one slot's items."""
        return row_items(plane.spec, self.items_per_slot) * plane.spec.item_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot over all planes."""
        return sum(self.row_bytes(plane) for plane in self.inputs + self.outputs)


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All models of a pool and the size of the one segment that holds them."""

    models: Annotated[tuple[ModelLayout, ...], msgspec.Meta(min_length=1, max_length=1024)]
    segment_bytes: Annotated[int, msgspec.Meta(ge=PAGE_BYTES, le=2**62)]

    def validate(self) -> None:
        """Check that all planes lie in the segment, aligned and apart.

        Raises:
            ProtocolError: they do not; nothing may be mapped by this layout.
        """
        end = 0
        for model in self.models:
            if model.max_batch < model.items_per_slot:
                raise ProtocolError(f"model {model.spec.name!r} has batches smaller than a slot")
            for plane in model.inputs + model.outputs:
                if plane.offset % PAGE_BYTES or plane.offset < end:
                    raise ProtocolError(f"plane {plane.spec.name!r} at {plane.offset} overlaps or is unaligned")
                end = plane.offset + model.slots * model.row_bytes(plane)
            specs = tuple(p.spec for p in model.inputs), tuple(p.spec for p in model.outputs)
            if specs != (model.spec.inputs, model.spec.outputs):
                raise ProtocolError(f"the planes of model {model.spec.name!r} are not those of its tensors")
        if end > self.segment_bytes:
            raise ProtocolError(f"planes end at {end}, the segment at {self.segment_bytes}")


class ModelPlan(msgspec.Struct, frozen=True):
    """What `plan` needs to know of a model: its tensors and how many slots of which size."""

    spec: ModelSpec
    slots: int
    items_per_slot: int
    max_batch: int


def plan(models: Sequence[ModelPlan]) -> Layout:
    """Lay out the planes of `models` one after the other, each on a page of its own."""
    offset = 0
    layouts = []

    def place(specs: tuple[TensorSpec, ...], model: ModelPlan) -> tuple[Plane, ...]:
        nonlocal offset
        planes = []
        for spec in specs:
            planes.append(Plane(spec, offset))
            size = model.slots * row_items(spec, model.items_per_slot) * spec.item_bytes
            offset += -(-size // PAGE_BYTES) * PAGE_BYTES
        return tuple(planes)

    for model in models:
        inputs, outputs = place(model.spec.inputs, model), place(model.spec.outputs, model)
        layouts.append(ModelLayout(model.spec, model.slots, model.items_per_slot, model.max_batch, inputs, outputs))
    return Layout(tuple(layouts), offset)


def plane_array(segment: mmap.mmap, model: ModelLayout, plane: Plane) -> npt.NDArray[Any]:
    """The whole plane as an array over the mapped segment, which it keeps alive."""
    return np.ndarray(model.plane_shape(plane), plane.spec.numpy_dtype, segment, plane.offset)
