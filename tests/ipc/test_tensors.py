from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtpool.ipc.errors import InvalidInput, ModelError
from trtpool.ipc.tensors import DTYPES, ModelSpec, TensorSpec, check_array

SPEC = TensorSpec("x", "float32", (2, 3))


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 9), max_size=4))
def test_a_spec_knows_its_bytes_and_survives_the_way(dtype, shape):
    spec = TensorSpec("x", dtype, tuple(shape))
    assert spec.item_bytes == np.zeros(shape, dtype).nbytes
    assert spec.numpy_dtype == np.dtype(dtype)
    for codec in (msgspec.json, msgspec.msgpack):
        assert codec.decode(codec.encode(spec), type=TensorSpec) == spec


def test_the_size_of_a_huge_item_does_not_overflow():
    assert TensorSpec("x", "float64", (2**40,) * 16).item_bytes == 8 * math.prod([2**40] * 16)


@pytest.mark.parametrize("dtype", ["int4", "object", "str", "complex64", ">f4", "f4", ""])
def test_a_dtype_that_planes_cannot_hold(dtype):
    with pytest.raises(ModelError, match="convert the model so that it uses one of bool, int8"):
        TensorSpec("x", dtype, ())


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [0]}, {"shape": [-1]}, {"shape": [2**40 + 1]}, {"shape": [1] * 17}, {"shape": ["N"]}, {"name": ""},
        {"name": "x" * 257}, {"more": 1},
    ],
)  # fmt: skip
def test_a_spec_from_elsewhere_is_checked(fields):
    raw = {"name": "x", "dtype": "int8", "shape": [1], **fields}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(raw, TensorSpec)


def test_how_a_spec_reads():
    assert str(SPEC) == "x float32 (N, 2, 3)"
    assert str(TensorSpec("y", "int64", ())) == "y int64 (N)"


def test_a_models_bytes_and_names():
    y = TensorSpec("y", "int8", ())
    assert ModelSpec("m", "/m", (SPEC,), (y, TensorSpec("x", "int16", (5,)))).item_bytes == 24 + 1 + 10
    with pytest.raises(ModelError, match="two inputs of one name"):
        ModelSpec("m", "/m", (SPEC, SPEC), (y,))
    with pytest.raises(ModelError, match="two outputs of one name"):
        ModelSpec("m", "/m", (SPEC,), (y, y))


def test_a_fitting_array_is_taken_as_it_is():
    array = np.ones((4, 2, 3), np.float32)
    assert check_array(SPEC, array, (4,)) is array
    view = array[::2, ::-1]
    assert check_array(SPEC, view, (2,)) is view, "strides are the copy's business"
    scalars = TensorSpec("s", "bool", ())
    assert check_array(scalars, [True, False], (2,)).dtype == np.bool_


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.ones((2, 3), np.float32), r"must have shape \(4, 2, 3\), got \(2, 3\)"),
        (np.ones((3, 2, 3), np.float32), "got .3, 2, 3"),
        (np.ones((4, 3, 2), np.float32), "got .4, 3, 2"),
        (np.ones((1, 2, 3), np.float32), "got .1, 2, 3"),
        (np.ones((4, 2, 3)), r"must be float32, got float64; convert it with .astype\('float32'\)"),
        (np.ones((4, 2, 3), ">f4"), "got >f4"),
        (np.ones((4, 2, 3), np.float16), "got float16"),
        (np.ones((4, 2, 3), object), "got object"),
        ([[1], [1, 2]], "cannot be made an array"),
        (None, r"got \(\)"),
        ("text", r"got \(\)"),
    ],
)
def test_what_does_not_fit_is_said(array, reason):
    with pytest.raises(InvalidInput, match=reason) as caught:
        check_array(SPEC, array, (4,))
    assert "'x'" in str(caught.value)
    assert isinstance(caught.value, ValueError)
