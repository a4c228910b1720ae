"""How far the answers of two models are apart.

The error of a number is its distance from the reference, relative to the largest number of the same item's output in
the reference: so a logit near 0 beside one of 10 is not called wrong for a difference of 0.001.  An item in which there
is next to nothing (a page without text) counts as if it had a hundredth of the largest number of all items.  Class
numbers and other integers are either equal or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from trtpool.ipc.tensors import TensorSpec

LEAST_SIZE: Final = 0.01
"""Of the largest number of all items: the least that an error is relative to."""

SUM_TOLERANCE: Final = 0.01
"""Scores that add up to 1 this nearly are probabilities."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What is still good.

    Attributes:
        max_error, mean_error: relative, 0.01 is 1 %.
        top1: share of items, 0 to 1.
    """

    max_error: float
    mean_error: float
    top1: float


class OutputReport(msgspec.Struct, frozen=True, kw_only=True):
    """One output of both models.

    Attributes:
        name: the output's.
        dtype, reference_dtype: of the two models.
        items: how many were compared.
        largest: the largest number in the reference, without its sign; errors say little if there is next to nothing.
        max_error, mean_error: relative, see the module; None for integers.
        worst: the item with the largest error; "" if there is no error.
        not_finite: numbers that are NaN or infinite in one model alone; they are in no error.
        top1: share of rows whose largest score is at the same place; None if these are no class scores.
        equal: share of equal numbers, of integers and bool; else None.
    """

    name: str
    dtype: str
    reference_dtype: str
    items: int
    largest: float | None
    max_error: float | None
    mean_error: float | None
    worst: str
    not_finite: int
    top1: float | None
    equal: float | None

    def problems(self, limits: Limits) -> list[str]:
        """What is not good, in words."""
        found = []
        if self.not_finite:
            found.append(f"{self.not_finite} numbers are NaN or infinite in one model alone")
        for what, error, limit in (
            ("largest", self.max_error, limits.max_error),
            ("mean", self.mean_error, limits.mean_error),
        ):
            if error is not None and error > limit:
                found.append(f"the {what} error {error:.3g} is above {limit:g}")
        for what, share in (("top-1 agreement", self.top1), ("share of equal numbers", self.equal)):
            if share is not None and share < limits.top1:
                found.append(f"the {what} {share:.4g} is below {limits.top1:g}")
        return [f"{self.name}: {text}" for text in found]


class OutputMeter:
    """Compares one output, batch by batch.

    Args:
        candidate, reference: the output of either model.
        scores: it has class scores along its last axis; else they must look like it: one vector for each item, or rows
            of probabilities.
    """

    def __init__(self, candidate: TensorSpec, reference: TensorSpec, *, scores: bool = False) -> None:
        self._specs = candidate, reference
        self._exact = all(spec.dtype == "bool" or "int" in spec.dtype for spec in self._specs)
        self._scores = scores
        self._probabilities = True
        self._items = self._numbers = self._rows = 0
        self._not_finite = self._same_top = self._same = 0
        self._sizes: list[float] = []  # of each item, the largest number of the reference,
        self._largest: list[float] = []  # the largest distance from it,
        self._sums: list[float] = []  # and their sum

    def add(self, candidate: npt.NDArray[Any], reference: npt.NDArray[Any]) -> None:
        """Compare some items more: arrays of one shape, ``(items, *item_shape)``."""
        self._items += len(reference)
        self._numbers += reference.size
        if not reference.size:
            return
        if self._exact:
            self._same += int((candidate == reference).sum())
            return
        ours, theirs = (array.astype(np.float64).reshape(len(reference), -1) for array in (candidate, reference))
        with np.errstate(invalid="ignore"):
            distance = np.where((ours == theirs) | (np.isnan(ours) & np.isnan(theirs)), 0.0, np.abs(ours - theirs))
        finite = np.isfinite(distance)
        self._not_finite += int((~finite).sum())
        distance = np.where(finite, distance, 0.0)
        self._sizes += np.where(np.isfinite(theirs), np.abs(theirs), 0.0).max(axis=1).tolist()
        self._largest += distance.max(axis=1).tolist()
        self._sums += distance.sum(axis=1).tolist()
        classes = self._classes()
        if classes > 1:
            self._add_scores(ours.reshape(-1, classes), theirs.reshape(-1, classes))

    def _classes(self) -> int:
        """The length of a row of scores, if these are scores."""
        shape = self._specs[1].shape
        sizes = [size for size in shape if size > 1]
        return sizes[0] if len(sizes) == 1 else shape[-1] if shape else 1

    def _add_scores(self, ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> None:
        top, chosen = theirs.argmax(axis=1), ours.argmax(axis=1)
        rows = np.arange(len(theirs))
        # Where two scores are equal in the reference, either will do.
        self._same_top += int(((chosen == top) | (theirs[rows, chosen] == theirs[rows, top])).sum())
        self._rows += len(theirs)
        sums = theirs.sum(axis=1)
        self._probabilities &= bool(((theirs >= 0).all(axis=1) & (abs(sums - 1) < SUM_TOLERANCE)).all())

    def report(self, keys: Sequence[str]) -> OutputReport:
        """What was found so far; `keys` are what the items are called."""
        sizes = np.array(self._sizes)
        scale = np.maximum(sizes, LEAST_SIZE * sizes.max(initial=0.0))
        scale[scale == 0] = 1.0
        errors = np.array(self._largest) / scale
        worst = keys[int(errors.argmax())] if errors.any() else ""
        candidate, reference = self._specs
        vector = sum(size > 1 for size in reference.shape) == 1
        judged = self._rows > 0 and (self._scores or vector or self._probabilities)
        return OutputReport(
            name=reference.name,
            dtype=candidate.dtype,
            reference_dtype=reference.dtype,
            items=self._items,
            largest=None if self._exact else float(sizes.max(initial=0.0)),
            max_error=None if self._exact else float(errors.max(initial=0.0)),
            mean_error=None if self._exact else float((self._sums / scale).sum()) / max(1, self._numbers),
            worst=worst,
            not_finite=self._not_finite,
            top1=self._same_top / self._rows if judged else None,
            equal=self._same / max(1, self._numbers) if self._exact else None,
        )
