"""Planes as engines take them: arrays of shape ``(slots, items_per_slot, *item_shape)``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trtpool.ipc.tensors import ModelSpec, TensorSpec

from .engine import Planes


def check_planes(spec: ModelSpec, inputs: Planes, outputs: Planes) -> int:
    """Check the planes that an engine is to be bound to, and return their items_per_slot.

    Raises:
        ValueError: planes are missing or too many, or one does not have the shape, dtype or layout that
            `spec` asks for.
    """
    leading: tuple[int, ...] | None = None
    for role, tensors, planes in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        if {tensor.name for tensor in tensors} != set(planes):
            raise ValueError(f"planes for the {role}s {[t.name for t in tensors]} are needed, got {[*planes]}")
        for tensor in tensors:
            plane = planes[tensor.name]
            if leading is None and not tensor.shared:
                leading = plane.shape[:2]
    assert leading is not None  # not all inputs are shared, and a ModelSpec has at least one
    for role, tensors, planes in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        for tensor in tensors:
            plane = planes[tensor.name]
            wanted = (leading[0], 1) if tensor.shared and plane.ndim > 1 else leading
            if plane.ndim < 2 or min(wanted) < 1 or plane.shape != (*wanted, *tensor.shape):
                raise ValueError(
                    f"plane {tensor.name!r} must have shape (slots, items_per_slot, *{tensor.shape}), "
                    f"with slots and items_per_slot like the other planes; got {plane.shape}"
                )
            if plane.dtype != tensor.numpy_dtype:
                raise ValueError(f"plane {tensor.name!r} must be {tensor.dtype}, got {plane.dtype}")
            if not (plane.flags.c_contiguous and plane.flags.aligned):
                raise ValueError(f"plane {tensor.name!r} must be C-contiguous and aligned")
            if role == "output" and not plane.flags.writeable:
                raise ValueError(f"plane {tensor.name!r} is an output and must be writeable")
    return leading[1]


def raw_items(plane: npt.NDArray[Any], tensor: TensorSpec) -> npt.NDArray[Any]:
    """A view of `plane` as raw items: shape ``(slots * items_per_slot,)``, dtype ``V{item_bytes}``."""
    return plane.reshape(-1).view(np.dtype(f"V{tensor.item_bytes}"))
