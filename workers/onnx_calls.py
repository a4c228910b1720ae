"""Batches on onnxruntime that are not simply a slice of each plane: one call for each batch.

These are batches of models whose items differ in shape, so that small ones lie apart in rows for the largest; of
models with shared inputs, of which a call takes one value; of models that take batches of one size only, so that
others are filled up, with the last item again; and of models without a batch axis, whose items are calls::

    plane of x, rows for (3, 8)     scratch                call
    | a a a . . . | b b b . . . |   | a a a b b b |   -->  x: (2, 3, ...)     in place if the bytes lie dense already

An output that varies is of onnxruntime's memory, since only the call tells its shape, and is copied into the rows.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trtpool.ipc.tensors import ModelSpec, TensorSpec

from .engine import Batch, EngineError, Planes, Shapes, Times
from .onnx_describe import call_shape, element_type
from .onnx_model import one_line

Bytes = npt.NDArray[np.uint8]


class _Tensor(NamedTuple):
    """A tensor, its rows as bytes, and memory for a batch of the largest items; none where none is needed."""

    spec: TensorSpec
    rows: Bytes
    scratch: Bytes


class _Piece(NamedTuple):
    """A slot of a batch: its row, how many items it holds, and how many are before them."""

    row: int
    items: int
    at: int


class Calls:
    """See the module's docstring.

    Args:
        session: an `onnxruntime.InferenceSession`.
        spec: the model.
        inputs, outputs: the planes, which `check_planes` found right.
        items_per_slot: of the planes.
        max_batch: items in the largest batch.
    """

    def __init__(
        self, session: Any, spec: ModelSpec, inputs: Planes, outputs: Planes, items_per_slot: int, max_batch: int
    ) -> None:
        self._session = session
        self._spec = spec
        self._items_per_slot = items_per_slot
        self._max_batch = max_batch
        room = max(max_batch, spec.batch_least)

        def tensors(specs: Sequence[TensorSpec], planes: Planes, role: str) -> list[_Tensor]:
            made = []
            for one in specs:
                plane = planes[one.name]
                rows = plane.reshape(-1).view(np.uint8).reshape(len(plane), -1)
                ours = role == "output" and one.least is not None  # onnxruntime's own memory serves
                size = 0 if one.shared or ours else room * one.item_bytes
                made.append(_Tensor(one, rows, np.empty(size, np.uint8)))
            return made

        self._inputs = tensors(spec.inputs, inputs, "input")
        self._outputs = tensors(spec.outputs, outputs, "output")
        self._slots = len(self._inputs[0].rows)

    def run(self, batch: Batch, shapes: Shapes) -> Times:
        """Run a batch; see `Engine.run`."""
        items = self._check(batch, shapes)
        spec, first = self._spec, batch[0].first
        size = max(items, spec.batch_least)
        given = self._item_shapes(shapes)
        is_dense = (
            len(batch) == 1
            and size == items
            and (batch[0].count == 1 or all(given[one.name] == one.shape for one in spec.inputs))
        )
        pieces = [] if is_dense else list(self._pieces(batch))
        started_ns = perf_counter_ns()
        binding = self._session.io_binding()
        for tensor in self._inputs:
            one = tensor.spec
            shape = call_shape(spec, one, size, given[one.name])
            source = tensor.rows[first] if is_dense or one.shared else _gather(tensor, shape, pieces, size)
            binding.bind_input(one.name, "cpu", 0, element_type(one), shape, source.ctypes.data)
        targets = [self._bind_output(binding, tensor, size, first, is_dense) for tensor in self._outputs]
        copied_ns = perf_counter_ns()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # pybind11 raises RuntimeError, ValueError and types of its own
            raise EngineError(one_line(error)) from error
        computed_ns = perf_counter_ns()
        seen = []
        for tensor, value, target in zip(self._outputs, binding.get_outputs(), targets, strict=True):
            if tensor.spec.least is not None:
                seen.append(self._take_output(tensor, value, size, batch))
            elif value.data_ptr() != target:
                raise EngineError(f"onnxruntime did not write output {tensor.spec.name!r} to the memory bound for it")
            elif not is_dense:
                _scatter(tensor, tensor.scratch, tensor.spec.item_bytes, pieces)
        ended_ns = perf_counter_ns()
        return Times(
            *(copied_ns - started_ns, computed_ns - copied_ns, ended_ns - computed_ns),
            0 if is_dense else items,
            tuple(seen),
        )

    def _check(self, batch: Batch, shapes: Shapes) -> int:
        """How many items there are, after checking that they are in the planes and that their shapes are possible."""
        items, per_slot = 0, self._items_per_slot
        for rows in batch:
            full = rows.count * per_slot
            if rows.first < 0 or rows.first + rows.count > self._slots or not full - per_slot < rows.items <= full:
                raise EngineError(f"items of {rows} are not within the {self._slots} slots of the planes")
            items += rows.items
        if not 0 < items <= self._max_batch:
            raise EngineError(f"a batch of {items} items is not from 1 to max_batch {self._max_batch}")
        varying, _ = self._spec.varying
        if len(shapes) != len(varying):
            raise EngineError(f"{len(shapes)} shapes for {len(varying)} inputs that vary")
        for tensor, shape in zip(varying, shapes, strict=True):
            if not tensor.takes(shape):
                raise EngineError(f"input {tensor.name!r} takes items of {tensor.describe_shape()}, not {shape}")
        return items

    def _item_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The shape of an item of each input."""
        given = iter(shapes)
        return {one.name: one.shape if one.least is None else next(given) for one in self._spec.inputs}

    def _pieces(self, batch: Batch) -> Iterator[_Piece]:
        at = 0
        for rows in batch:
            left = rows.items
            for row in range(rows.first, rows.first + rows.count):
                items = min(left, self._items_per_slot)
                yield _Piece(row, items, at)
                at += items
                left -= items

    def _bind_output(self, binding: Any, tensor: _Tensor, size: int, first: int, is_dense: bool) -> int:
        """Bind an output; where it will be, or 0 if onnxruntime says that."""
        spec = tensor.spec
        if spec.least is not None:
            binding.bind_output(spec.name, "cpu")
            return 0
        target = int((tensor.rows[first] if is_dense else tensor.scratch).ctypes.data)
        shape = call_shape(self._spec, spec, size, spec.shape)
        binding.bind_output(spec.name, "cpu", 0, element_type(spec), shape, target)
        return target

    def _take_output(self, tensor: _Tensor, value: Any, size: int, batch: Batch) -> tuple[int, ...]:
        """Copy an output that varies into the rows; returns the shape of an item of it."""
        spec, shape = tensor.spec, tuple(value.shape())
        item = shape[1:] if self._spec.batched else shape
        if call_shape(self._spec, spec, size, item) != shape or not spec.takes(item):
            raise EngineError(
                f"output {spec.name!r} has shape {shape} in a batch of {size}, and its rows hold items of "
                f"{spec.describe_shape()}; if it may be larger, start the pool with --shape {spec.name}=..., the "
                "largest item"
            )
        item_bytes = math.prod(item) * spec.itemsize
        if item_bytes:
            memory = (ctypes.c_uint8 * (size * item_bytes)).from_address(value.data_ptr())
            _scatter(tensor, np.frombuffer(memory, np.uint8), item_bytes, self._pieces(batch))
        return item


def _gather(tensor: _Tensor, shape: tuple[int, ...], pieces: Sequence[_Piece], size: int) -> Bytes:
    """Copy the items of a batch to scratch, side by side; the last again until there are `size`."""
    scratch = tensor.scratch
    item_bytes = math.prod(shape) * tensor.spec.itemsize // size
    end = 0
    for row, items, at in pieces:
        start, end = at * item_bytes, (at + items) * item_bytes
        scratch[start:end] = tensor.rows[row, : items * item_bytes]
    last = scratch[end - item_bytes : end]
    while end < size * item_bytes:
        scratch[end : end + item_bytes] = last
        end += item_bytes
    return scratch


def _scatter(tensor: _Tensor, dense: Bytes, item_bytes: int, pieces: Sequence[_Piece] | Iterator[_Piece]) -> None:
    """Copy items that lie side by side to their rows."""
    for row, items, at in pieces:
        tensor.rows[row, : items * item_bytes] = dense[at * item_bytes : (at + items) * item_bytes]
