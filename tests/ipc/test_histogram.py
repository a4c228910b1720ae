"""Histograms of half octaves."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from trtpool.ipc.histogram import BUCKETS, Histogram, bucket_of, upper

numbers = st.lists(st.integers(0, 2**63 - 1), max_size=50)


def histogram(seen: list[int]) -> Histogram:
    counts = [0] * BUCKETS
    for number in seen:
        counts[bucket_of(number)] += 1
    return Histogram.of(counts, sum(seen))


@given(st.integers(0, 2**31))
def test_a_number_is_below_its_buckets_bound_and_not_below_the_one_before(number):
    bucket = bucket_of(number)
    assert number < upper(bucket)
    assert bucket == 0 or number >= upper(bucket - 1) * (1 - 1e-12)


@given(numbers, numbers)
def test_the_difference_is_what_was_seen_between(before, after):
    assert histogram(before + after) - histogram(before) == histogram(after)
    assert histogram(before) + histogram(after) == histogram(before + after)


@given(numbers)
def test_it_says_how_many_and_how_much(seen):
    made = histogram(seen)
    assert (made.count, made.total) == (len(seen), sum(seen))
    assert made.dense() == [sum(bucket_of(one) == bucket for one in seen) for bucket in range(BUCKETS)]


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=200), st.floats(0.01, 1))
def test_quantiles_are_right_to_half_an_octave(seen, q):
    exact = sorted(seen)[max(0, -int(-q * len(seen) // 1) - 1)]
    assert exact / 1.4143 <= histogram(seen).quantile(q) <= exact * 1.4143


def test_of_nothing():
    assert (Histogram().count, Histogram().mean, Histogram().quantile(0.99)) == (0, 0.0, 0.0)
    assert histogram([0, 0]).quantile(0.5) == 0.0


def test_the_mean_is_exact():
    assert histogram([1_000, 2_000, 4_000]).mean == pytest.approx(7_000 / 3)
