"""How TensorRT lays out a tensor in memory, beside the plain way.

::

    format    image (C, H, W) in memory              dtypes, as TensorRT has them
    chw2      (C / 2, H, W, 2)                       float16, bfloat16
    chw4      (C / 4, H, W, 4)                       int8, float16
    chw16     (C / 16, H, W, 16)                     float16
    chw32     (C / 32, H, W, 32)                     int8, float16
    hwc       (H, W, C)                              float32, uint8
    hwc8      (H, W, C padded to 8)                  float16, bfloat16
    hwc16     (H, W, C padded to 16)                 float16

Channels are filled up to a whole group.  A plane holds what TensorRT reads, so an item's shape is the one in memory.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from trtpool.ipc.building import IO_FORMATS as FORMATS

Dims = tuple[int, ...]

LINEAR: Final = "linear"


class Format(NamedTuple):
    """How the items of a tensor lie in memory; `LINEAR` is the plain way.

    Attributes:
        word: a key of `FORMATS`, or `LINEAR`.
        channels: how many there really are.
    """

    word: str = LINEAR
    channels: int = 0

    @property
    def is_linear(self) -> bool:
        return self.word == LINEAR

    def in_memory(self, item: Dims) -> Dims:
        """The shape in memory of an item ``(C, *others)``."""
        if self.is_linear:
            return item
        together = FORMATS[self.word]
        groups = -(-item[0] // together)
        if self.word.startswith("hwc"):
            return (*item[1:], groups * together)
        return (groups, *item[1:], together)

    def declared(self, item: Dims) -> Dims:
        """The shape that the network declares for an item of that shape in memory."""
        if self.is_linear:
            return item
        others = item[:-1] if self.word.startswith("hwc") else item[1:-1]
        return (self.channels, *others)


def format_word(engine: Any, name: str) -> str:
    """The format of a tensor of a plan: a key of `FORMATS`, `LINEAR`, or else TensorRT's own words."""
    description = str(engine.get_tensor_format_desc(name))
    try:
        word = str(engine.get_tensor_format(name).name)
    except (AttributeError, TypeError):  # the lean runtime cannot say
        match = re.search(r"\(k(\w+)\)", description)
        if match:
            word = match[1]
        else:
            word = "LINEAR" if engine.get_tensor_vectorized_dim(name) < 0 and "HWC" not in description else ""
    word = word.lower()
    return word if word in FORMATS or word == LINEAR else description
