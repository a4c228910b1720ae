"""Histograms whose buckets are half octaves: cheap to fill, fine enough for percentiles.

Bucket ``(n * n).bit_length()`` has the `n` from ``2 ** ((bucket - 1) / 2)`` to below ``2 ** (bucket / 2)``: two buckets
for each doubling, found with one multiplication and no search, since a broker does it for every batch::

    n        0   1   .   2   3   4..5   6..7   8..11   12..15   16..22   ...
    bucket   0   1   2   3   4     5      6      7        8        9
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

BUCKETS: Final = 128
"""For any integer of 63 bits."""


def bucket_of(number: int) -> int:
    """Where a number is counted; hot paths spell this out."""
    return (number * number).bit_length()


def upper(bucket: int) -> float:
    """The bound below which a bucket's numbers are."""
    return float(2 ** (bucket / 2))


class Histogram(msgspec.Struct, frozen=True):
    """How often numbers were seen.  The difference of two is what was seen between them.

    Attributes:
        first: the bucket that `counts` begins with.
        counts: of each bucket, from `first` on.
        total: the sum of all numbers.
    """

    first: int = 0
    counts: tuple[int, ...] = ()
    total: int = 0

    @staticmethod
    def of(counts: Sequence[int], total: int) -> Histogram:
        """Without the empty buckets at both ends; `counts` begins with bucket 0."""
        seen = [bucket for bucket, count in enumerate(counts) if count]
        if not seen:
            return Histogram(total=total)
        return Histogram(seen[0], tuple(counts[seen[0] : seen[-1] + 1]), total)

    @property
    def count(self) -> int:
        """How many numbers were seen."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Of all that were seen; 0 if none were."""
        return self.total / self.count if self.counts else 0.0

    def dense(self) -> list[int]:
        """The counts of all `BUCKETS`."""
        return [0] * self.first + list(self.counts) + [0] * (BUCKETS - self.first - len(self.counts))

    def __add__(self, other: Histogram) -> Histogram:
        """What either saw."""
        counts = [one + two for one, two in zip(self.dense(), other.dense(), strict=True)]
        return Histogram.of(counts, self.total + other.total)

    def __sub__(self, earlier: Histogram) -> Histogram:
        """What was seen since `earlier`, which this grew out of."""
        counts = [max(0, one - two) for one, two in zip(self.dense(), earlier.dense(), strict=True)]
        return Histogram.of(counts, max(0, self.total - earlier.total))

    def quantile(self, q: float) -> float:
        """The number that the part `q` of all is at most, interpolated within its bucket; 0 if none were seen.

        Args:
            q: from 0 to 1; 0.99 is the 99th percentile.
        """
        left = q * self.count
        for bucket, count in enumerate(self.counts, self.first):
            if count and left <= count:
                low = 0.0 if bucket == 0 else upper(bucket - 1)
                return low + (upper(bucket) - low) * (left / count) if bucket else 0.0
            left -= count
        return 0.0
