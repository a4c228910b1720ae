"""The copies between planes and device for one batch, which lies dense on the device.

::

    rows in the plane                                     on the device       copies
    | a a a a | b b b b | c c c c |   items fill them     a a a a b b b b ..  one
    | a a . . | b b . . | c c . . |   they are smaller    a a b b c c         one of two dimensions: `pitch` from row
      `-----' pitch                                                           to row, of which `width` is copied
    | a a a . | b . . . |             slots of 3 items    a a a b             one of full slots, one of the last

So only the bytes that are there cross the bus.  A copy must not cross from one registration to the next, and is cut
there; one of two dimensions becomes one for each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from .cuda import Cuda
from .engine import Batch
from .registration import pieces

BATCH_COPIES: Final = 3
"""Copies from which one batched call costs less than one call each."""

MAX_PITCH: Final = 2**31 - 1
"""Largest pitch that CUDA takes, in bytes."""


class Buffer(NamedTuple):
    """A tensor in host memory, and where a batch of it lies on the device.

    Attributes:
        address: of its plane.
        item_bytes: of one item as large as those of the batch.
        slot_bytes: one row of the plane.
        device: where the first item lies.
        full_bytes: the items of a full slot.
    """

    address: int
    item_bytes: int
    slot_bytes: int
    device: int
    full_bytes: int

    @property
    def is_dense(self) -> bool:
        """Whether items fill their rows, so that adjacent slots are one copy."""
        return self.full_bytes == self.slot_bytes


class Copies:
    """Copies that are collected and then enqueued, all in one direction.

    Args:
        bounds: host addresses that none may cross.
    """

    def __init__(self, bounds: Sequence[int]) -> None:
        self._bounds = bounds
        self._hosts: list[int] = []
        self._devices: list[int] = []
        self._sizes: list[int] = []
        self._blocks: list[tuple[int, int, int, int, int]] = []  # host, pitch, device, width, height

    def add(self, buffer: Buffer, batch: Batch) -> int:
        """The items of a batch, in its order; returns where on the device the next would lie."""
        address, item_bytes, slot_bytes, device, full = buffer
        for rows in batch:
            size = rows.items * item_bytes
            start = address + rows.first * slot_bytes
            if full == slot_bytes or rows.count == 1:
                self.add_part(start, device, size)
            else:
                count = size // full if full else 0  # slots that are full
                self._add_block(start, slot_bytes, device, full, count)
                done = count * full
                self.add_part(start + count * slot_bytes, device + done, size - done)
            device += size
        return device

    def add_shared(self, buffer: Buffer, batch: Batch) -> None:
        """The one value that all slots of a batch have."""
        self.add_part(buffer.address + batch[0].first * buffer.slot_bytes, buffer.device, buffer.item_bytes)

    def add_last_again(self, buffer: Buffer, batch: Batch, device: int, count: int) -> None:
        """The last item of a batch, `count` times, to `device` and behind."""
        rows = batch[-1]
        address, item_bytes, slot_bytes, _, full = buffer
        slots = rows.count - 1
        before = (rows.items - 1) * item_bytes - slots * full  # in its slot
        for number in range(count):
            self.add_part(
                address + (rows.first + slots) * slot_bytes + before, device + number * item_bytes, item_bytes
            )

    def add_part(self, host: int, device: int, size: int) -> None:
        """Bytes that lie side by side."""
        if not size:
            return
        parts: Iterable[tuple[int, int]] = pieces(host, size, self._bounds) if self._bounds else ((host, size),)
        for start, part in parts:
            self._hosts.append(start)
            self._devices.append(device)
            self._sizes.append(part)
            device += part

    def _add_block(self, host: int, pitch: int, device: int, width: int, height: int) -> None:
        end = host + height * pitch
        if height > 1 and width and pitch <= MAX_PITCH and not any(host < bound < end for bound in self._bounds):
            self._blocks.append((host, pitch, device, width, height))
            return
        for row in range(height):
            self.add_part(host + row * pitch, device + row * width, width)

    def enqueue(self, cuda: Cuda, stream: Any, *, to_device: bool) -> None:
        """Put them on a stream.

        Raises:
            CudaError: CUDA refused one.
        """
        for host, pitch, device, width, height in self._blocks:
            cuda.copy_rows(host, pitch, device, width, height, stream, to_device=to_device)
        if len(self._sizes) >= BATCH_COPIES and cuda.copies_batches:
            if to_device:
                cuda.copy_batch(self._devices, self._hosts, self._sizes, stream)
            else:
                cuda.copy_batch(self._hosts, self._devices, self._sizes, stream)
            return
        for host, device, size in zip(self._hosts, self._devices, self._sizes, strict=True):
            if to_device:
                cuda.copy_in(device, host, size, stream)
            else:
                cuda.copy_out(host, device, size, stream)
