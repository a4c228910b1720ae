"""How far answers are apart, by numbers that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trtpool.broker.check.compare import Limits, OutputMeter, OutputReport
from trtpool.ipc.tensors import TensorSpec

LIMITS = Limits(max_error=0.05, mean_error=0.01, top1=0.9)


def compared(ours: Any, theirs: Any, dtype: str = "float32", *, other: str = "", scores: bool = False) -> OutputReport:
    ours, theirs = np.array(ours, other or dtype), np.array(theirs, dtype)
    specs = (TensorSpec("y", array.dtype.name, array.shape[1:]) for array in (ours, theirs))
    meter = OutputMeter(*specs, scores=scores)
    for item in range(len(ours)):
        meter.add(ours[item : item + 1], theirs[item : item + 1])
    return meter.report([f"item {number}" for number in range(len(ours))])


def test_equal_answers_have_no_error():
    report = compared([[1, 2], [0, 0]], [[1, 2], [0, 0]])
    assert (report.items, report.max_error, report.mean_error, report.worst) == (2, 0.0, 0.0, "")
    assert report.problems(LIMITS) == []


def test_errors_are_relative_to_the_largest_number_of_the_item():
    report = compared([[100, 1], [10, 0.5]], [[100, 0], [10, 0]])
    assert report.max_error == pytest.approx(0.05)
    assert report.mean_error == pytest.approx((0.01 + 0.05) / 4)
    assert (report.worst, report.largest) == ("item 1", 100.0)
    assert report.problems(LIMITS) == ["y: the mean error 0.015 is above 0.01"]


def test_an_item_with_next_to_nothing_in_it_counts_as_a_hundredth_of_the_others():
    report = compared([[100.0], [2e-6]], [[100.0], [1e-6]])
    assert report.max_error == pytest.approx(1e-6)


def test_zeros_everywhere_have_absolute_errors():
    assert compared([[0.25, 0.0]], [[0.0, 0.0]]).max_error == 0.25


def test_what_is_not_finite_in_one_alone_is_counted_and_not_in_the_errors():
    inf, nan = float("inf"), float("nan")
    report = compared([[inf, nan, 1.0, -inf], [nan, inf, 2.0, 1.0]], [[inf, nan, 1.0, -inf], [1.0, 2.0, 2.0, 1.0]])
    assert (report.not_finite, report.max_error) == (2, 0.0)
    assert report.problems(LIMITS) == [
        "y: 2 numbers are NaN or infinite in one model alone",
        "y: the top-1 agreement 0.5 is below 0.9",
    ]


def test_vectors_look_like_class_scores_and_maps_do_not():
    report = compared([[0.1, 0.9], [0.6, 0.4]], [[0.1, 0.9], [0.4, 0.6]])
    assert report.top1 == 0.5
    assert "y: the top-1 agreement 0.5 is below 0.9" in report.problems(LIMITS)
    assert compared([[[1.0, 2.0], [5.0, 6.0]]], [[[1.0, 2.0], [5.0, 6.0]]]).top1 is None


def test_rows_of_probabilities_are_class_scores_too_and_others_if_it_is_said():
    ours = [[[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]]]
    theirs = [[[0.8, 0.2], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]]]
    assert compared(ours, theirs).top1 == 0.75
    doubled = np.array(ours) * 2, np.array(theirs) * 2
    assert compared(*doubled).top1 is None
    assert compared(*doubled, scores=True).top1 == 0.75


def test_of_two_equal_scores_either_will_do():
    assert compared([[1.0, 3.0, 2.9]], [[1.0, 3.0, 3.0]]).top1 == 1.0
    assert compared([[1.0, 2.9, 3.0]], [[1.0, 3.0, 3.0]]).top1 == 1.0


@pytest.mark.parametrize(("dtype", "other"), [("int64", "int32"), ("bool", "bool"), ("uint8", "uint8")])
def test_integers_are_equal_or_not(dtype, other):
    report = compared([[1, 0, 1, 1]], [[1, 0, 1, 0]], dtype, other=other)
    assert (report.equal, report.max_error, report.top1) == (0.75, None, None)
    assert report.problems(LIMITS) == ["y: the share of equal numbers 0.75 is below 0.9"]


@pytest.mark.parametrize("other", ["float16", "uint8"])
def test_dtypes_may_differ(other):
    report = compared([[1, 2]], [[1, 2.5]], other=other)
    assert (report.dtype, report.reference_dtype, report.max_error) == (other, "float32", 0.2)


def test_nothing_is_good():
    assert compared(np.zeros((2, 0)), np.zeros((2, 0))).problems(LIMITS) == []
