"""How many bytes a batch takes to a GPU and back: those of its items' real shapes, and of what they share once.

::

    in     (items + items that were copied again to fill it up) x bytes of an item, of inputs with a batch axis
           + bytes of inputs that the batch shares
    out    items x bytes of an item, of outputs

Where all items are of one shape and share nothing, this follows from their number, whatever the batches were.
"""

from __future__ import annotations

import math

from trtpool.ipc.messages import Shapes
from trtpool.ipc.tensors import ModelSpec


class CopiedBytes:
    """See the module; of one model."""

    __slots__ = ("_each_in", "_each_out", "_once_in", "_varying_in", "_varying_out")

    def __init__(self, spec: ModelSpec) -> None:
        fixed = [tensor for tensor in spec.inputs if tensor.least is None]
        self._each_in = sum(tensor.item_bytes for tensor in fixed if not tensor.shared)
        self._once_in = sum(tensor.item_bytes for tensor in fixed if tensor.shared)
        self._each_out = sum(tensor.item_bytes for tensor in spec.outputs if tensor.least is None)
        inputs, outputs = spec.varying
        self._varying_in = [(tensor.itemsize, tensor.shared) for tensor in inputs]
        self._varying_out = [tensor.itemsize for tensor in outputs]

    def of(self, items: int, inputs: Shapes = (), outputs: Shapes = (), *, filled: int = 0) -> tuple[int, int]:
        """Bytes to the GPU and from it, of one batch; of any number of batches if items are of one shape.

        Args:
            items: in it.
            inputs, outputs: the shapes of its items, of tensors that vary.
            filled: items that were copied again.
        """
        each, once, out = self._each_in, self._once_in, self._each_out
        for (itemsize, is_shared), shape in zip(self._varying_in, inputs, strict=True):
            size = math.prod(shape) * itemsize
            if is_shared:
                once += size
            else:
                each += size
        for itemsize, shape in zip(self._varying_out, outputs, strict=True):
            out += math.prod(shape) * itemsize
        return (items + filled) * each + once, items * out
