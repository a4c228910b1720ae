"""`trtpool.torch`: a DataLoader whose batches come out of a pool.

::

    DataLoader's worker process                                          the process that iterates
    dataset[i] --written once--> its slots --engine--> its slots --one copy--> torch's shared memory --> tensors
      main thread: dataset, slots, submit         queue's thread: result, copy

Each worker process is a producer with a client of its own.  What `Collate` returns there waits for its results only
when it is pickled, which the thread behind the DataLoader's queue does: so the next samples are made meanwhile, and
`prefetch_factor` bounds how many batches are out.  Slots belong to the process that leased them and come free when it
ends, whatever others still look at, so no view of them may leave it: results are copied into the shared memory that
torch moves tensors through anyway.  Without worker processes the tensors are views of the slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from .client import Client
from .errors import InvalidInput
from .extras import load_extra
from .handles import Leases, Result
from .layout import ModelLayout
from .remote import PoolHandle
from .settings import Priority
from .submitted import Submitted
from .tensors import TensorSpec, check_array


def pytorch() -> ModuleType:
    """The package.

    Raises:
        MissingExtra: it is not installed.
    """
    return load_extra("torch", "trtpool.torch needs torch", "torch")


def view(result: Result) -> dict[str, Any]:
    """The outputs of a result as tensors over the slots themselves: no copy.

    Shapes and dtypes are those of ``result.outputs``.  The slots go back when the result was released *and* the
    tensors, and all views of them, have ended; ``clone()`` what you keep.

    Raises:
        MissingExtra: torch is not installed.
        SpentHandle: the slots were released.
    """
    torch = pytorch()
    return {name: torch.from_numpy(array) for name, array in result.outputs.items()}


class PendingBatch:
    """A batch on its way, in a DataLoader's worker process; pickled, it is the batch."""

    def __init__(
        self, layout: ModelLayout, leases: Leases, work: list[Submitted], rest: Any, timeout_s: float | None
    ) -> None:
        self._layout = layout
        self._leases = leases
        self._work = work
        self._rest = rest
        self._timeout_s = timeout_s

    def result(self, *, share: bool = False) -> Any:
        """Wait for the batch; once.

        Args:
            share: copy the outputs into torch's shared memory; else they are views of the slots.

        Raises:
            WorkError, PoolClosed, TimeoutError: see `Submitted.result`.
        """
        try:
            results = [work.result(self._timeout_s) for work in self._work]
            outputs = {spec.name: self._joined(spec.name, results) for spec in self._layout.spec.outputs}
            if share:
                for tensor in outputs.values():
                    tensor.share_memory_()
        finally:
            self._leases.release()  # views of them keep them all the same
        if isinstance(self._rest, dict):
            return {**outputs, **self._rest}
        return (outputs, *self._rest) if isinstance(self._rest, tuple) else outputs

    def _joined(self, name: str, results: list[Result]) -> Any:
        """An output of all runs, of shape ``(items, *item_shape)``; a copy if there are several."""
        shape = next(spec.shape for spec in self._layout.spec.outputs if spec.name == name)
        arrays = [result.outputs[name].reshape(-1, *shape)[: result.items] for result in results]
        return pytorch().from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))

    def __reduce__(self) -> tuple[Any, ...]:
        # An error that is raised here would be printed by the queue's thread, and the loader would wait for ever; one
        # that is sent like this is raised where the loader is read, as those of the dataset are.
        from torch._utils import ExceptionWrapper

        try:
            batch = self.result(share=True)
        except Exception:  # noqa: BLE001
            batch = ExceptionWrapper(where="in a DataLoader worker, in trtpool.torch.Collate")
        return _as_it_is, (batch,)


def _as_it_is(batch: Any) -> Any:
    return batch


class Collate:
    """A `collate_fn` that runs each batch of a DataLoader through a pool.

    ::

        loader = DataLoader(dataset, batch_size=32, num_workers=8, collate_fn=trtpool.torch.Collate(pool.handle()))
        for batch in loader:
            save(batch["path"], batch["boxes"])

    A sample may be

    - a mapping: what is called like an input is written into its slot, the rest goes through torch's `default_collate`;
      the batch is a dict of outputs and rest.
    - a tuple or list, if the model has one input: ``(input, *rest)``; the batch is ``(outputs, *rest)``.
    - else the input itself, if the model has one; the batch is a dict of outputs.

    An input is an array or CPU tensor of the item's shape and dtype, or a callable, which is called with the slot's
    array to write into: a decoder's output buffer is then the slot.

    Outputs are tensors of shape ``(batch, *item_shape)`` and the model's dtype: views of the slots where
    ``num_workers=0``, which keep them as long as they live, else tensors in torch's shared memory.

    Args:
        pool: a handle, or a client, which stays in this process: workers connect by themselves.
        model: which model; not needed when the pool has one.
        timeout_s: seconds for each step: waiting for slots, and for each result.
        gpu, priority: see `Client.infer`.

    Raises, where the loader is read (with worker processes: of the same kind, with the worker's traceback as text):
        InvalidInput: a sample that does not fit the model.
        LeaseTooLarge: the batch is more than one producer may hold; make `batch_size` smaller, or start the pool with
            more ``--slots``.
        PoolBusy, PoolClosed, WorkError, TimeoutError: see `Client.infer`.
        MissingExtra: torch is not installed.
    """

    def __init__(
        self,
        pool: Client | PoolHandle,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        gpu: int | None = None,
        priority: Priority = "bulk",
    ) -> None:
        pytorch()
        self._pool = pool if isinstance(pool, PoolHandle) else pool.handle()
        self._model = model
        self._timeout_s = timeout_s
        self._gpu = gpu
        self._priority: Priority = priority

    def __call__(self, samples: Sequence[Any]) -> Any:
        from torch.utils.data import get_worker_info

        client = self._pool.client
        index = client.model_index(self._model)
        layout = client.models[index]
        inputs, rest = _split(layout, samples)
        slots = -(-len(samples) // layout.items_per_slot)
        leases = client.lease_many(slots, model=layout.spec.name, timeout_s=self._timeout_s, priority=self._priority)
        try:
            work, start = [], 0
            for lease in leases:
                end = min(len(samples), start + lease.count * layout.items_per_slot)
                for spec in layout.spec.inputs:
                    rows = lease.inputs[spec.name].reshape(-1, *spec.shape)
                    for row, sample in enumerate(inputs[start:end]):
                        _write(spec, rows[row, ...], sample[spec.name])
                work.append(lease.submit(items=end - start, gpu=self._gpu))
                start = end
        except BaseException:
            leases.release()
            raise
        pending = PendingBatch(layout, leases, work, rest, self._timeout_s)
        return pending.result() if get_worker_info() is None else pending


def _split(layout: ModelLayout, samples: Sequence[Any]) -> tuple[list[Mapping[str, Any]], Any]:
    """The inputs of each sample by name, and what else the samples hold, collated: a dict, a tuple or None."""
    from torch.utils.data import default_collate

    names = [spec.name for spec in layout.spec.inputs]
    first = samples[0]
    if isinstance(first, Mapping):
        if missing := [name for name in names if any(name not in sample for sample in samples)]:
            raise InvalidInput(
                f"model {layout.spec.name!r} takes {', '.join(names)}, and a sample has no {missing[0]!r}"
            )
        rest = [key for key in first if key not in names]
        if twice := {spec.name for spec in layout.spec.outputs}.intersection(rest):
            raise InvalidInput(f"samples have {', '.join(sorted(twice))}, which the model gives as well; rename it")
        return list(samples), {key: default_collate([sample[key] for sample in samples]) for key in rest}
    if len(names) > 1:
        raise InvalidInput(
            f"model {layout.spec.name!r} takes {', '.join(names)}: make each sample a dict with these names"
        )
    if isinstance(first, (tuple, list)):
        inputs, *others = zip(*samples, strict=True)
        return [{names[0]: value} for value in inputs], tuple(default_collate(list(other)) for other in others)
    return [{names[0]: sample} for sample in samples], None


def _write(spec: TensorSpec, row: npt.NDArray[Any], value: Any) -> None:
    if callable(value) and not hasattr(value, "__array__"):
        value(row)
    else:
        row[...] = check_array(spec, value, ())
