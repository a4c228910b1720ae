"""An engine that is a NumPy function: the contract in its plainest form, for tests that need no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from trtpool.ipc.tensors import ModelSpec, TensorSpec
from trtpool.workers.engine import Batch, EngineError, Planes, Shapes, Times
from trtpool.workers.planes import check_planes

Answer = Callable[[Mapping[str, npt.NDArray[Any]]], dict[str, npt.NDArray[Any]]]


class NumpyEngine:
    """Runs `answer`, items by name in and out, on each run of a batch."""

    def __init__(self, spec: ModelSpec, answer: Answer) -> None:
        self.spec = spec
        self._answer = answer
        self._bound: tuple[Planes, Planes] | None = None
        self._max_batch = 0
        self.warm: list[int] = []

    def bind(self, inputs: Planes, outputs: Planes, max_batch: int) -> None:
        if max_batch < 1 or 0 < self.spec.batch_limit < max_batch:
            raise ValueError(f"max_batch {max_batch} is not within the limit {self.spec.batch_limit}")
        check_planes(self.spec, inputs, outputs)
        self._bound = inputs, outputs
        self._max_batch = max_batch

    def warm_up(self, items: int) -> None:
        if self._bound is None:
            raise EngineError("not bound, or closed")
        self.warm.append(items)

    def run(self, batch: Batch, shapes: Shapes = ()) -> Times:
        if self._bound is None:
            raise EngineError("not bound, or closed")
        if sum(rows.items for rows in batch) > self._max_batch:
            raise EngineError("larger than max_batch")
        inputs, outputs = (self._by_item(planes) for planes in self._bound)
        for rows in batch:
            first = rows.first * next(iter(self._bound[0].values())).shape[1]
            span = slice(first, first + rows.items)
            if first < 0 or not rows.items or span.stop > len(next(iter(inputs.values()))):
                raise EngineError("outside of the planes")
            answers = self._answer({name: items[span] for name, items in inputs.items()})
            for name, items in outputs.items():
                items[span] = answers[name]
        return Times(0, 1, 0)

    def close(self) -> None:
        self._bound = None

    @staticmethod
    def _by_item(planes: Planes) -> dict[str, npt.NDArray[Any]]:
        return {name: plane.reshape(-1, *plane.shape[2:]) for name, plane in planes.items()}


def negate() -> NumpyEngine:
    """``y = -x`` for float32 items of shape (3,)."""
    spec = ModelSpec("negate", "/nowhere", (TensorSpec("x", "float32", (3,)),), (TensorSpec("y", "float32", (3,)),))
    return NumpyEngine(spec, lambda given: {"y": -given["x"]})
