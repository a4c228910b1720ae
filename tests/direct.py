"""A model as onnxruntime runs it when called directly, and a stream of items through a pool, to compare with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime

from trtpool.ipc.client import Client

Array = npt.NDArray[Any]
Item = Mapping[str, Array]


class Direct:
    """onnxruntime on the CPU, on one thread."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [output.name for output in self.session.get_outputs()]

    def whole(self, **inputs: Array) -> dict[str, Array]:
        """The outputs of one call."""
        return dict(zip(self.names, self.session.run(None, inputs), strict=True))

    def item(self, **inputs: Array) -> dict[str, Array]:
        """The outputs of one item, given without the axis of the batch."""
        whole = self.whole(**{name: array[None] for name, array in inputs.items()})
        return {name: array[0] for name, array in whole.items()}


def stream(client: Client, items: Sequence[Item], model: str | None = None) -> list[dict[str, Array]]:
    """Outputs of items of any shapes, in order."""

    def write(item: Item, inputs: Any) -> None:
        for name, array in item.items():
            inputs[name] = array

    results = client.map(write, items, model=model, window=16)
    return [{name: array.copy() for name, array in result.outputs.items()} for _, result in results]
