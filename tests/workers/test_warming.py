"""Warm-up: which sizes, in which order, and when it is enough."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.fake_engine import NumpyEngine, negate
from trtpool.workers.engine import EngineError
from trtpool.workers.warming import MAX_SIZES, WARM_UP_S, sizes, warm_up


def bound(max_batch: int) -> NumpyEngine:
    engine = negate()
    engine.bind({"x": np.zeros((32, 1, 3), np.float32)}, {"y": np.zeros((32, 1, 3), np.float32)}, max_batch)
    return engine


def test_the_likeliest_sizes_come_first():
    assert sizes(1) == [1]
    assert sizes(6) == [6, 1, 2, 4, 3, 5]
    assert sizes(8) == [8, 1, 2, 4, 3, 5, 6, 7]


@given(st.integers(1, 2**24))
def test_sizes_are_each_once_and_within_the_batch(max_batch):
    found = sizes(max_batch)
    assert len(found) == len(set(found)) == min(max_batch, MAX_SIZES)
    assert found[0] == max_batch
    assert min(found) == 1


def test_models_take_turns():
    order: list[tuple[str, int]] = []
    one, two = bound(4), bound(2)

    def noting(name: str) -> Callable[[int], None]:
        return lambda items: order.append((name, items))

    one.warm_up, two.warm_up = noting("one"), noting("two")  # type: ignore[method-assign, assignment]
    warm_up([(one, 4), (two, 2)])
    assert order == [("one", 4), ("two", 2), ("one", 1), ("two", 1), ("one", 2), ("one", 3)]


def test_it_ends_when_its_time_is_up(caplog):
    caplog.set_level(logging.INFO, "trtpool.worker")
    times: Iterator[float] = iter([100.0, 100.0, 101.0, 100.0 + WARM_UP_S])
    engine = bound(8)
    warm_up([(engine, 8)], clock=lambda: next(times))
    assert engine.warm == [8, 1]
    assert "not every batch size was warmed up within 5 s" in caplog.text


def test_a_model_that_refuses_zeros_is_left_alone_and_others_go_on(caplog):
    caplog.set_level(logging.INFO, "trtpool.worker")
    refusing, other = bound(4), bound(4)

    def refuse(items: int) -> None:
        refusing.warm.append(items)
        raise EngineError("no zeros, please")

    refusing.warm_up = refuse  # type: ignore[method-assign]
    warm_up([(refusing, 4), (other, 4)])
    assert (refusing.warm, other.warm) == ([4], [4, 1, 2, 3])
    assert "model negate is not warmed up, since it refuses zeros: no zeros, please" in caplog.text


def test_what_is_no_refusal_is_an_error():
    """A device that failed is not trusted again, so its worker must not become ready."""
    broken = bound(4)

    def fail(items: int) -> None:
        raise RuntimeError(items)

    broken.warm_up = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        warm_up([(broken, 4)])


def test_sizes_that_are_filled_up_are_warmed_up_once():
    assert sizes(20, least=20) == [20]
    assert sizes(5, least=20) == [5]
    assert sizes(6, least=3) == [6, 4, 3, 5]
