"""The CPU engine: onnxruntime, reading and writing the planes where they are.

::

    plane of input x, slots of 2 items     scratch, max_batch items
    +----+----+----+----+----+----+        +----+----+----+---
    | a0 | a1 | b0 | b1 | c0 |    |        |    |    |    |
    +----+----+----+----+----+----+        +----+----+----+---
      `--- one run -----------'  bound by address: onnxruntime reads and writes the rows
      `--' `--------'            many small runs: copied to scratch, one call, copied back

**By address.** A run of rows is bound with `IOBinding` as ``(items, *item_shape)`` at the rows'
address, and the binding is kept, so that the next run of the same rows costs one call: 2.6 us for
a tiny model, against 6.8 us more to bind a used one anew and 13.5 us to make one (onnxruntime 1.32,
AMD EPYC).  onnxruntime raises when an output turns out to have another shape than was bound.  When it
hands out memory of its own instead (an output that is an input passed through) it says nothing and
leaves our rows as they were, so `BoundMemory` looks at the address after the first run of a binding.

**Gathered.** A call costs more than its bytes when runs are short, so a batch of more than
`GATHER_ABOVE_RUNS` runs of at most `GATHER_RUN_BYTES` on average goes through scratch memory.  This is
the one place where trtpool copies an input; `Times.gathered_items` counts it.

Models whose items differ in shape, share inputs, or come in batches of one size are run by `onnx_calls`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trtpool.ipc.errors import DeviceUnavailable
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.ipc.tensors import ModelSpec, TensorSpec

from .engine import Batch, EngineError, Planes, Rows, Shapes, Times
from .onnx_calls import Calls
from .onnx_describe import describe, element_type
from .onnx_model import load, one_line
from .planes import check_planes, raw_items

GATHER_ABOVE_RUNS: Final = 2
GATHER_RUN_BYTES: Final = 32 * 1024
"""Inputs and outputs of a run, on average, up to which a batch is gathered.

Batches of one-item runs, microseconds gathered / as calls (onnxruntime 1.32, one thread, AMD EPYC):

====================  =======  =======  =======  ========
model, bytes a run    3 runs   4 runs   8 runs   64 runs
====================  =======  =======  =======  ========
negate, 2 KB           9 / 10   10 / 13  17 / 24  32 / 190
negate, 32 KB         12 / 11   13 / 14  20 / 28  107 / 226
negate, 128 KB        24 / 14   31 / 18  51 / 38  576 / 309
mean, 32 KB           19 / 18   23 / 24  37 / 52  172 / 396
mean, 128 KB          40 / 27   54 / 34  80 / 68  783 / 644
matmul to 16, 1 KB    10 / 13   11 / 17  12 / 33  70 / 477
matmul to 16, 32 KB   24 / 39   26 / 51  44 / 101 284 / 800
====================  =======  =======  =======  ========

Where the copy is all the work the two meet at 32 KB and 3 to 4 runs; weights that a larger batch reads
once only (matmul) gain at every size, but copying inputs is the exception here and is kept to small ones.
"""

MAX_BINDINGS: Final = 1024
"""Bindings kept; each takes 2.3 KB (measured).  Beyond that the oldest is bound anew."""


class OnnxEngine:
    """An ONNX model on onnxruntime's CPU provider; implements `trtpool.workers.engine.Engine`.

    Args:
        source: the file, and the model's name.
        settings: `threads` threads run one call; for what counts of the rest see `onnx_describe`.
        cpus_per_worker: what ``threads=0`` stands for.

    Raises:
        ModelError: the file cannot be served; the text says what to change.
        MissingExtra: onnxruntime is not installed.
        DeviceUnavailable: `settings` ask for another device than "cpu".
    """

    def __init__(self, source: ModelSource, settings: EngineSettings, cpus_per_worker: int = 1) -> None:
        if settings.device != "cpu":
            raise DeviceUnavailable(f"device {settings.device!r} is not known; choose --device cpu")
        path = Path(os.path.abspath(source.path))
        self._session: Any = load(path, settings.threads or cpus_per_worker)
        self._spec = describe(self._session, path, source.name, settings)
        self._item_bytes = self._spec.item_bytes
        self._planes: BoundMemory | None = None
        self._calls: Calls | None = None
        self._is_plain = self._spec.is_uniform and self._spec.batched and self._spec.batch_least == 1
        self._scratch: BoundMemory | None = None
        self._items_per_slot = self._max_batch = 0

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def bind(self, inputs: Planes, outputs: Planes, max_batch: int) -> None:
        """Bind to planes of shape ``(slots, items_per_slot, *item_shape)``; see `Engine.bind`."""
        limit = self._spec.batch_limit
        if max_batch < 1 or 0 < limit < max_batch:
            raise ValueError(f"max_batch must be from 1 to {limit or 'any number'}, got {max_batch}")
        self._items_per_slot = check_planes(self._spec, inputs, outputs)
        if not self._is_plain:
            self._calls = Calls(self._session, self._spec, inputs, outputs, self._items_per_slot, max_batch)
            return
        self._planes = BoundMemory(
            self._session,
            self._spec,
            [raw_items(inputs[tensor.name], tensor) for tensor in self._spec.inputs],
            [raw_items(outputs[tensor.name], tensor) for tensor in self._spec.outputs],
        )
        self._max_batch = max_batch
        self._scratch = None
        if max_batch > GATHER_ABOVE_RUNS and self._item_bytes <= GATHER_RUN_BYTES:
            self._scratch = BoundMemory(
                self._session,
                self._spec,
                [_new_items(max_batch, tensor) for tensor in self._spec.inputs],
                [_new_items(max_batch, tensor) for tensor in self._spec.outputs],
            )

    def warm_up(self, items: int) -> None:
        """Run a batch of zeros, of the largest shape, in memory of its own; see `Engine.warm_up`."""
        if self._session is None:
            raise EngineError(f"model {self._spec.name!r} was closed")
        spec, session = self._spec, self._session
        if self._is_plain:
            zeros = [[_new_items(items, tensor) for tensor in tensors] for tensors in (spec.inputs, spec.outputs)]
            BoundMemory(session, spec, *zeros).run(0, items)
            return
        inputs, outputs = (
            {one.name: np.zeros((1, 1 if one.shared else items, *one.shape), one.numpy_dtype) for one in tensors}
            for tensors in (spec.inputs, spec.outputs)
        )
        varying, _ = spec.varying
        largest = tuple(one.shape for one in varying)
        Calls(session, spec, inputs, outputs, items, items).run([Rows(0, 1, items)], largest)

    def run(self, batch: Batch, shapes: Shapes = ()) -> Times:
        """Run `batch`, one call for each of its runs or one for all of them; see `Engine.run`."""
        if self._calls is not None:
            return self._calls.run(batch, shapes)
        if self._planes is None:
            raise EngineError(f"model {self._spec.name!r} is not bound to planes, or was closed")
        spans = [(rows.first * self._items_per_slot, rows.items) for rows in batch]
        items = sum(count for _, count in spans)
        if items > self._max_batch:
            raise EngineError(f"a batch of {items} items is larger than max_batch {self._max_batch}")
        if (
            self._scratch is not None
            and len(spans) > GATHER_ABOVE_RUNS
            and items * self._item_bytes <= len(spans) * GATHER_RUN_BYTES
        ):
            return _run_gathered(self._planes, self._scratch, spans)
        compute_ns = 0
        for first, count in spans:
            compute_ns += self._planes.run(first, count)
        return Times(0, compute_ns, 0)

    def close(self) -> None:
        self._session = self._planes = self._scratch = self._calls = None


class BoundMemory:
    """Inputs and outputs of a model in memory that does not move, and the bindings made to it.

    Args:
        session: an `onnxruntime.InferenceSession`.
        spec: the model.
        inputs, outputs: its tensors, in order, as `items` raw items each: shape ``(items,)``, dtype
            ``V{item_bytes}``.  NumPy copies such items whole, whatever their shape.
    """

    def __init__(
        self, session: Any, spec: ModelSpec, inputs: Sequence[npt.NDArray[Any]], outputs: Sequence[npt.NDArray[Any]]
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.items = len(inputs[0])
        self._session = session
        self._inputs = [(t, array.ctypes.data) for t, array in zip(spec.inputs, inputs, strict=True)]
        self._outputs = [(t, array.ctypes.data) for t, array in zip(spec.outputs, outputs, strict=True)]
        self._bindings: dict[tuple[int, int], Any] = {}

    def run(self, first: int, items: int) -> int:
        """Run `items` items from item `first`; returns the nanoseconds that the call took.

        Raises:
            EngineError: onnxruntime failed, the items lie outside of this memory, or an output was
                not written here.
        """
        binding = self._bindings.get((first, items))
        known = binding is not None
        if not known:
            self.check(first, items)
            binding = self._bind(first, items)
        started_ns = perf_counter_ns()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # pybind11 raises RuntimeError, ValueError and types of its own
            raise EngineError(one_line(error)) from error
        elapsed_ns = perf_counter_ns() - started_ns
        if not known:
            self._check_written(binding, first)
            self._bindings[first, items] = binding
        return elapsed_ns

    def check(self, first: int, items: int) -> None:
        """Raise EngineError unless items `first` to ``first + items`` are in this memory."""
        if first < 0 or items < 1 or first + items > self.items:
            raise EngineError(f"items {first} to {first + items} are not within the {self.items} of the planes")

    def _bind(self, first: int, items: int) -> Any:
        full = len(self._bindings) >= MAX_BINDINGS
        binding = self._bindings.pop(next(iter(self._bindings))) if full else self._session.io_binding()
        for bind, tensors in ((binding.bind_input, self._inputs), (binding.bind_output, self._outputs)):
            for tensor, address in tensors:
                start = address + first * tensor.item_bytes
                bind(tensor.name, "cpu", 0, element_type(tensor), (items, *tensor.shape), start)
        return binding

    def _check_written(self, binding: Any, first: int) -> None:
        for (tensor, address), value in zip(self._outputs, binding.get_outputs(), strict=True):
            if value.data_ptr() != address + first * tensor.item_bytes:
                raise EngineError(f"onnxruntime did not write output {tensor.name!r} to the memory bound for it")


def _run_gathered(planes: BoundMemory, scratch: BoundMemory, spans: Sequence[tuple[int, int]]) -> Times:
    """Copy the items of `spans` (first, count) to scratch, run them as one, copy the outputs back."""
    started_ns = perf_counter_ns()
    rows: list[int] = []
    for first, count in spans:
        planes.check(first, count)
        rows.extend(range(first, first + count))
    items = len(rows)
    index = np.array(rows, np.intp)
    for plane, gathered in zip(planes.inputs, scratch.inputs, strict=True):
        plane.take(index, out=gathered[:items], mode="clip")  # the default copies through a buffer
    copy_in_ns = perf_counter_ns() - started_ns
    compute_ns = scratch.run(0, items)
    started_ns = perf_counter_ns()
    for plane, gathered in zip(planes.outputs, scratch.outputs, strict=True):
        plane[index] = gathered[:items]
    return Times(copy_in_ns, compute_ns, perf_counter_ns() - started_ns, items)


def _new_items(items: int, tensor: TensorSpec) -> npt.NDArray[Any]:
    """Raw items of new memory, aligned for the tensor's dtype."""
    return raw_items(np.zeros((items, *tensor.shape), tensor.numpy_dtype), tensor)
