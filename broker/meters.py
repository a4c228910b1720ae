"""What a model did on each GPU, or on the CPU, and how its times were spread.

A batch that ends is noted, which takes the broker a tenth of a microsecond; what was noted is counted many at a time,
by NumPy, when there is enough of it or somebody asks.  Waiting in the queue and the time from arrival to end are
counted for each item, as the mean of its batch: batch-mates came together.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec
import numpy as np

from trtpool.ipc.histogram import BUCKETS, Histogram

HISTOGRAMS: Final = ("sizes", "queue", "dispatch", "latency", "copy_in", "compute", "copy_out")
"""Of batches: items less one, and nanoseconds; `queue` and `latency` are of items.

`dispatch` is the time that a batch was with its worker and not on the device, `latency` that from arrival to end.
Batches that nothing was copied for are not in `copy_in` and `copy_out`.
"""

_SIZES, _QUEUE, _DISPATCH, _LATENCY = range(4)
_DEVICE: Final = slice(4, 7)
_OFFSETS: Final = BUCKETS * np.arange(len(HISTOGRAMS))[:, None]

NOTE: Final = struct.Struct("<7q")
"""Of batches that ended together: items, batches, sum of their items' time in the queue, time since they were sent, and
the sums over the batches of copy-in, compute and copy-out."""
NOTE_BYTES: Final = NOTE.size
note = NOTE.pack_into

NOTES_BYTES: Final = 512 * NOTE.size
"""By then they are counted: a tenth of a millisecond's work."""

LARGEST: Final = 2**62
"""No time is longer, and no sum of bytes larger: a worker that lies must not make a sum that 64 bits cannot hold."""


class SavedMeter(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A meter in a snapshot."""

    gpu: int | None
    items: int
    batches: int
    histograms: list[Histogram]
    copied_in_bytes: int
    copied_out_bytes: int


class Meter:
    """See the module.

    Args:
        saved: what it goes on from.

    Attributes:
        items, batches: that were counted.
        copied_in_bytes, copied_out_bytes: to and from the GPU, where they do not follow from `items`; see `copied`.
        notes, at: those that were not counted yet, and where the next one goes; `count` makes room.
    """

    __slots__ = ("_counts", "_sums", "at", "batches", "copied_in_bytes", "copied_out_bytes", "items", "notes")

    def __init__(self, saved: SavedMeter | None = None) -> None:
        self.items = self.batches = 0
        self.copied_in_bytes = self.copied_out_bytes = 0
        self.notes = bytearray(NOTES_BYTES)
        self.at = 0
        self._counts = np.zeros((len(HISTOGRAMS), BUCKETS))
        self._sums = np.zeros(len(HISTOGRAMS))
        if saved is not None:
            self.items, self.batches = saved.items, saved.batches
            self.copied_in_bytes, self.copied_out_bytes = saved.copied_in_bytes, saved.copied_out_bytes
            self._counts[:] = [one.dense() for one in saved.histograms]
            self._sums[:] = [one.total for one in saved.histograms]

    def count(self) -> None:
        """Count what was noted."""
        if not self.at:
            return
        noted = np.frombuffer(self.notes, "<i8", self.at // 8).reshape(-1, len(HISTOGRAMS))
        self.at = 0
        columns = noted.T.astype(np.float64, order="C")  # each dense, for speed
        items, batches, queue_ns, with_worker_ns, *_ = columns
        device_ns = columns[4:]
        ended = items > 0  # else their owners are gone
        numbers, times, sums = np.zeros((3, len(HISTOGRAMS), len(noted)))
        times[_SIZES], sums[_SIZES] = ended * batches, ended * (items - batches)
        times[_QUEUE], sums[_QUEUE] = items, queue_ns
        times[_LATENCY], sums[_LATENCY] = items, queue_ns + with_worker_ns * items
        times[_DISPATCH] = 1
        numbers[_DISPATCH] = sums[_DISPATCH] = with_worker_ns - device_ns.sum(0)  # negative, if they ran side by side
        times[_DEVICE], sums[_DEVICE] = (device_ns > 0) * batches, device_ns
        numbers[_QUEUE] = queue_ns / np.maximum(items, 1)
        numbers[_LATENCY] = numbers[_QUEUE] + with_worker_ns
        numbers[_SIZES] = items / batches - 1
        numbers[_DEVICE] = device_ns / batches
        np.maximum(numbers, 0, out=numbers)
        numbers = np.floor(numbers, out=numbers)
        places = np.frexp(numbers * numbers)[1] + _OFFSETS  # the exponent is `histogram.bucket_of`
        self._counts += np.bincount(places.ravel(), times.ravel(), self._counts.size).reshape(self._counts.shape)
        self._sums += np.maximum(sums, 0).sum(1)
        self.items += int(items.sum())
        self.batches += int(batches.sum())

    def add_copied(self, into: int, out: int) -> None:
        """Count bytes to the GPU and from it, which do not follow from `items`."""
        self.copied_in_bytes = min(self.copied_in_bytes + into, LARGEST)
        self.copied_out_bytes = min(self.copied_out_bytes + out, LARGEST)

    def histogram(self, name: str) -> Histogram:
        """One of `HISTOGRAMS`, of all that was counted."""
        which = HISTOGRAMS.index(name)
        return Histogram.of([int(count) for count in self._counts[which]], int(min(self._sums[which], LARGEST)))

    def save(self, gpu: int | None) -> SavedMeter:
        """All that was counted and noted, for another broker."""
        self.count()
        histograms = [self.histogram(name) for name in HISTOGRAMS]
        return SavedMeter(gpu, self.items, self.batches, histograms, self.copied_in_bytes, self.copied_out_bytes)
