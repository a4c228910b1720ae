"""What is computed: means of arrays, so that transport is all there is to see.

::

    images  x float32 (N, 3, 224, 224)  602,112 bytes an item  ->  y float32 (N, 3)
    small   x float32 (N, 256)            1,024 bytes an item  ->  y float32 (N, 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Compute = Callable[[Array, Array], None]
"""``compute(x, y)`` fills y ``(n, outputs)`` from x ``(n, *shape)``, both float32."""

TOLERANCE: Final = 1e-3
"""Neighbouring items' means are at least 0.1 apart, and float32 sums are good to 1e-4."""


@dataclass(frozen=True)
class Workload:
    """One kind of item.

    Attributes:
        name: for the report.
        shape: of one item, float32; the first axis is kept if there is more than one.
        period: a prime; `Source` repeats itself after so many items.
    """

    name: str
    shape: tuple[int, ...]
    period: int

    @property
    def outputs(self) -> int:
        """Length of one item's result."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def item_bytes(self) -> int:
        return 4 * math.prod(self.shape)

    def write_model(self, path: Path) -> None:
        """Write the ONNX model, one ReduceMean over ``(N, *shape)``, to `path`."""
        import onnx
        from onnx import TensorProto, helper

        axes = list(range(2, len(self.shape) + 1)) or [1]
        node = helper.make_node("ReduceMean", ["x"], ["y"], axes=axes, keepdims=int(self.outputs == 1))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *self.shape])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", self.outputs])
        graph = helper.make_graph([node], "mean", [x], [y])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, str(path))


IMAGES: Final = Workload("600 KB images", (3, 224, 224), period=7)
SMALL: Final = Workload("1 KB items", (256,), period=193)


class Source:
    """Prepared items to write, and the results they must give.

    The period is a prime, so that a slot which is used again gets another item than before
    and a result left over from the last use is found out.

    Args:
        workload: what kind of items.
        most: the largest count that `take` will be asked for.
    """

    def __init__(self, workload: Workload, most: int) -> None:
        rows = workload.period + most
        noise = np.random.default_rng(20).random((rows, *workload.shape), dtype=np.float32)
        parts = noise.reshape(rows, workload.outputs, -1)
        parts += np.arange(parts.shape[0] * parts.shape[1], dtype=np.float32).reshape(rows, -1, 1)
        self._items = noise
        self._expected = parts.mean(axis=2, dtype=np.float64)
        self._period, self._at = workload.period, 0

    def take(self, count: int) -> tuple[Array, npt.NDArray[np.float64]]:
        """The next `count` items: ``(count, *shape)`` float32 and ``(count, outputs)`` float64."""
        here = slice(self._at, self._at + count)
        self._at = (self._at + count) % self._period
        return self._items[here], self._expected[here]


def check(got: Array, expected: npt.NDArray[np.float64]) -> None:
    """Raise ValueError unless `got` is the result that its item must give.

    One item's result is compared as floats: that costs a tenth of what NumPy does for so few.
    """
    if expected.shape[0] == 1:
        right = all(abs(a - b) < TOLERANCE for a, b in zip(got.ravel().tolist(), expected[0].tolist(), strict=True))
    else:
        right = bool(np.abs(got.reshape(expected.shape) - expected).max() < TOLERANCE)
    if not right:
        raise ValueError(f"wrong result: {got!r} where {expected!r} was due")


def load(engine: str, model: Path) -> Compute:
    """The compute function of `engine`, "numpy" or "onnxruntime" (one thread, like the pool's)."""
    if engine == "numpy":

        def mean(x: Array, y: Array) -> None:
            np.mean(x.reshape(*y.shape, -1), axis=2, out=y)

        return mean

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def run(x: Array, y: Array) -> None:
        y[...] = session.run(None, {"x": x})[0]

    return run
