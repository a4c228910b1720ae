"""What a builder does to ONNX files; onnxruntime says whether a changed model still means the same."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from tests.models import ADD, MLP_WEIGHTS, MODELS, OPEN_ITEM, parse, save, save_without_its_weights
from trtpool.ipc.errors import ConfigError, MissingExtra, ModelError
from trtpool.workers import build_float16, build_onnx
from trtpool.workers.build_float16 import HALF_MAX, HALF_MIN, to_half
from trtpool.workers.build_onnx import GraphTensor, change_io, convert_to_float16, digest, load

GRAPHS = {
    "mlp": MODELS["mlp"].model,
    # A weight that only an operator which stays in float32 reads, and one that is read on both sides of it.
    "resize": (
        "g (float[N,1,4,4] x) => (float[N,1,8,8] y) <float[4] s = {1, 1, 2, 2}, float k = {0.5}> "
        '{ a = Mul(x, k) r = Resize<mode="nearest">(a, , s) y = Mul(r, k) }'
    ),
    "weight of both": "g (float[N,4] x) => (float[N,4] y) <float k = {0.25}> { a = Max(x, k) y = Add(a, k) }",
    "constants": (
        "g (float[N,4] x) => (float[N,4] y) { w = Constant<value = float[1] {1e-12}>() "
        "k = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>() h = Constant<value_float = 0.5>() "
        "a = Mul(x, h) b = Add(a, w) y = Max(b, k) }"
    ),
    "casts inside": "g (float[N,4] x) => (float[N,4] y) { i = Cast<to = 7>(x) f = Cast<to = 1>(i) y = Add(f, x) }",
    "cast of an integer": (
        "g (int64[N,4] i) => (float[N,2] v, int64[N,2] j) <int64[1] k = {2}> { a = Cast<to = 1>(i) v, j = TopK(a, k) }"
    ),
    "output that stays": (
        "g (float[N,4] x) => (float[N,2] v, int64[N,2] i) <int64[1] k = {2}> { a = Neg(x) v, i = TopK(a, k) }"
    ),
    "output used inside": "g (float[N,4] x) => (float[N,4] y, float[N,4] z) { a = Neg(x) y = Abs(a) z = Add(x, y) }",
    "input of two that stay": "g (float[N,4] x) => (float[N,4] y) { a = Max(x, x) b = Min(x, a) y = Add(a, b) }",
    "filled": "g (float[N,4] x) => (float[N,4] y) { s = Shape(x) z = ConstantOfShape(s) y = Add(z, x) }",
    "branches": (
        "g (float[N,4] x, bool[1] c) => (float[N,4] y) { y = If(c)<"
        "then_branch = t () => (float[N,4] p) { k = Constant<value = float[1] {2}>() q = Max(x, k) p = Neg(q) }, "
        "else_branch = e () => (float[N,4] q) { q = Abs(x) }> }"
    ),
    "taken names": (
        "g (float[N,4] x) => (float[N,4] y) { x_float32 = Neg(x) y_float16 = Max(x_float32, x) y = Neg(y_float16) }"
    ),
}  # fmt: skip


def feeds(model: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    """Three items of small whole numbers, for which float16 and integers are exact."""
    random = np.random.default_rng(5)
    arrays = {}
    for tensor in build_onnx.inputs(model):
        shape = [3 if dim is None else dim for dim in tensor.dims]
        values = np.ones(shape) if tensor.dtype == "bool" else random.integers(0, 5, shape)
        arrays[tensor.name] = values.astype(tensor.dtype)
    return arrays


def run(model: onnx.ModelProto, arrays: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[npt.NDArray[Any]] = session.run(None, dict(arrays))
    return outputs


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("io", ["", "fp16", "uint8", "int8", "fp32"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_changed_model_means_the_same(name, io, fp16, tmp_path):
    path = save(GRAPHS[name], tmp_path)
    original = load(path)
    given = feeds(original)
    expected = run(original, given)
    model = load(path, types=True)
    changed = change_io(model, {"": io} if io else {})
    if fp16:
        convert_to_float16(model)
    arrays = {name: array.astype(changed[name][1]) if name in changed else array for name, array in given.items()}
    for declared, before, got, want in zip(
        build_onnx.outputs(model), build_onnx.outputs(original), run(model, arrays), expected, strict=True
    ):
        assert (got.dtype == "float16") == (io == "fp16" and before.dtype == "float32")
        assert (declared.dtype, declared.dims) == (got.dtype.name, before.dims)
        np.testing.assert_allclose(got, want, rtol=4e-3, atol=4e-3)


def test_float16_is_really_inside(tmp_path):
    model = load(save(GRAPHS["mlp"], tmp_path), types=True)
    convert_to_float16(model)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds == {"w": onnx.TensorProto.FLOAT16, "b": onnx.TensorProto.FLOAT16}
    assert [node.op_type for node in model.graph.node] == ["Cast", "MatMul", "Add", "Relu", "Cast"]


def test_an_operator_that_stays_reads_its_weights_in_float32(tmp_path):
    model = load(save(GRAPHS["resize"], tmp_path), types=True)
    convert_to_float16(model)
    (resize,) = [node for node in model.graph.node if node.op_type == "Resize"]
    (scales,) = [tensor for tensor in model.graph.initializer if tensor.name == resize.input[2]]
    assert scales.data_type == onnx.TensorProto.FLOAT
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(scales), [1, 1, 2, 2])


def test_the_numbers_of_float16():
    values = np.array([0, -0.0, 1, 1e-12, -1e-12, 1e6, -1e6, np.inf, -np.inf, np.nan], np.float32)
    expected = [0, -0.0, 1, HALF_MIN, -HALF_MIN, HALF_MAX, -HALF_MAX, np.inf, -np.inf, np.nan]
    half = to_half(values)
    np.testing.assert_array_equal(half, np.array(expected, np.float16))
    assert np.signbit(half[1])
    assert np.finfo(np.float16).max == HALF_MAX
    assert np.finfo(np.float16).smallest_subnormal == HALF_MIN


def test_functions_are_resolved_before_the_conversion(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "own": 1]> g (float[N,4] x) => (float[N,4] y) { y = own.Twice(x) }'
        '<domain: "own", opset_import: ["": 17]> Twice (a) => (b) { b = Add(a, a) }'
    )
    model = load(save(model, tmp_path), types=True)
    convert_to_float16(model)
    assert [node.op_type for node in model.graph.node] == ["Cast", "Add", "Cast"]


# --- Inputs and outputs --------------------------------------------------------------------------


def dtypes(model: onnx.ModelProto) -> dict[str, str]:
    return {tensor.name: tensor.dtype for tensor in build_onnx.inputs(model) + build_onnx.outputs(model)}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, ["float32", "float32", "float32"]),
        ({"": "fp16"}, ["float16", "float16", "float16"]),
        ({"": "uint8"}, ["uint8", "uint8", "float32"]),
        ({"a": "uint8", "sum": "float16"}, ["uint8", "float32", "float16"]),
        ({"": "fp16", "b": "int8", "sum": "fp32"}, ["float16", "int8", "float32"]),
    ],
)
def test_which_tensors_get_which_dtype(wanted, expected):
    model = parse(ADD)
    changed = change_io(model, wanted)
    assert dtypes(model) == dict(zip(("a", "b", "sum"), expected, strict=True))
    assert changed == {name: ("float32", to) for name, to in dtypes(model).items() if to != "float32"}


def test_an_axis_of_minus_one_is_open():
    model = parse(ADD)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert build_onnx.inputs(model)[0].dims == (None, 3)


def test_inputs_as_the_file_declares_them():
    assert build_onnx.inputs(parse(OPEN_ITEM)) == [GraphTensor("x", "float32", (None, 3, None, None))]
    old = parse("g (float[N,4] x, float[4] w) => (float[N,4] y) { y = Add(x, w) }")
    old.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4, np.float32), "w"))
    assert [tensor.name for tensor in build_onnx.inputs(old)] == ["x"]
    assert build_float16.names(old.graph) >= {"x", "w", "y"}


def test_an_option_for_all_leaves_integers_alone():
    model = parse("g (int64[N] i, float[N] x) => (int64[N] j, float[N] y) { j = Neg(i) y = Neg(x) }")
    change_io(model, {"": "fp16"})
    assert dtypes(model) == {"i": "int64", "j": "int64", "x": "float16", "y": "float16"}
    change_io(model, {"i": "uint8"})
    assert dtypes(model)["i"] == "uint8"


@pytest.mark.parametrize(
    ("wanted", "error", "text"),
    [
        (
            {"z": "fp16"},
            ModelError,
            "--io names 'z', which the model does not have; its inputs are x, c, its outputs y",
        ),
        ({"x": "bf16"}, ConfigError, "choose one of fp32, fp16, uint8 and int8"),
        ({"c": "uint8"}, ModelError, "is no number"),
    ],
)
def test_io_that_cannot_be(wanted, error, text):
    with pytest.raises(error, match=text):
        change_io(parse(GRAPHS["branches"]), wanted)


# --- Files ---------------------------------------------------------------------------------------


def save_in_two_files(folder: Path) -> Path:
    model = onnx.ModelProto()
    model.CopyFrom(GRAPHS["mlp"])
    path = folder / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_weights_in_a_file_of_their_own(tmp_path):
    path = save_in_two_files(tmp_path)
    bare = load(path, weights=False)
    assert build_onnx.weight_files(bare) == ["weights.bin"]
    assert not any(tensor.raw_data for tensor in bare.graph.initializer)
    model = load(path, types=True)
    assert build_onnx.weight_files(model) == []
    (weights,) = [tensor for tensor in model.graph.initializer if tensor.name == "w"]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(weights), MLP_WEIGHTS)


def test_a_weights_file_that_is_missing(tmp_path):
    path = save_without_its_weights(tmp_path)
    with pytest.raises(ModelError, match=r"has weights in weights\.bin, which is not there"):
        load(path)
    with pytest.raises(ModelError, match=r"weights\.bin"):
        digest(path, load(path, weights=False))


def test_a_large_model_is_written_with_its_weights_beside_it(tmp_path, monkeypatch):
    model = load(save(GRAPHS["mlp"], tmp_path))
    expected = run(model, given := feeds(model))
    monkeypatch.setattr(build_onnx, "MAX_FILE_BYTES", 4096)
    path = tmp_path / "large.onnx"
    build_onnx.save(model, path)
    assert build_onnx.weight_files(load(path, weights=False)) == ["large.onnx.weights"]
    np.testing.assert_array_equal(run(load(path), given), expected)


def test_the_digest_is_of_every_byte(tmp_path):
    path = save_in_two_files(tmp_path)
    digests = {digest(path, load(path, weights=False))}
    weights = bytearray((tmp_path / "weights.bin").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "weights.bin").write_bytes(weights)
    digests.add(digest(path, load(path, weights=False)))
    model = load(path, weights=False)
    model.producer_name = "another"
    path.write_bytes(model.SerializeToString())
    digests.add(digest(path, load(path, weights=False)))
    assert len(digests) == 3
    assert digest(path, load(path, weights=False)) in digests


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "no ONNX model"),
        (b"\xff" * 99, "damaged or no ONNX model"),
        (None, "No such file"),
        ("folder", "not a file"),
    ],
)
def test_files_that_are_no_model(content, text, tmp_path):
    path = tmp_path / "model.onnx"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=text):
        load(path)


def test_onnx_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trtpool\[build\]'"):
        load(tmp_path / "model.onnx")
