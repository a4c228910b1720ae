"""Normalisation inside a network, and the ONNX file with it: equal to NumPy before the network, by onnxruntime."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from tests.models import parse, save
from trtpool.ipc.building import ONNX, BuildRequest, Line
from trtpool.ipc.errors import ConfigError, ModelError
from trtpool.ipc.normalization import Normalization, channel_shape
from trtpool.ipc.settings import BuildSettings, ModelSource
from trtpool.workers import build_onnx
from trtpool.workers.build_normalize import normalize_inputs
from trtpool.workers.build_rewrite import rewrite

IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PLANAR = "g (float[N,3,2,4] x) => (float[N,3,2,4] y) { y = Neg(x) }"
INTERLEAVED = "g (float[N,2,4,3] x) => (float[N,2,4,3] y) { y = Neg(x) }"
TWO = "g (float[N,3,2,2] x, float[N,5] k) => (float[N,3,2,2] y, float[N,5] z) { y = Neg(x) z = Neg(k) }"


def run(model: onnx.ModelProto, **arrays: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[npt.NDArray[Any]] = session.run(None, arrays)
    return outputs


def pixels(*shape: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, shape, np.uint8)


def by_hand(given: npt.NDArray[Any], how: Normalization, axis: int) -> npt.NDArray[np.float64]:
    """In float64, and by the book."""
    shape = [1] * given.ndim
    shape[axis] = -1
    mean, std = (np.reshape(numbers if len(numbers) > 1 else numbers * 3, shape) for numbers in (how.mean, how.std))
    return np.asarray((given * how.scale - mean) / std)


@pytest.mark.parametrize(("graph", "axis"), [(PLANAR, 1), (INTERLEAVED, 3)], ids=["planar", "interleaved"])
@pytest.mark.parametrize(
    "how",
    [
        IMAGENET,
        Normalization(mean=(0.5,), std=(0.5,)),
        Normalization(mean=(103.5, 116.3, 123.7), std=(57.4,), scale=1),
        Normalization(),
        Normalization(scale=1),
    ],
    ids=["imagenet", "one number", "of 255", "unit", "none"],
)
def test_a_normalised_input_takes_pixels(graph, axis, how):
    model = parse(graph)
    assert normalize_inputs(model, {"x": how}, {}) == {"x": ("float32", "uint8")}
    (tensor,) = build_onnx.inputs(model)
    given = pixels(2, *(dim or 0 for dim in tensor.dims[1:]))
    (answer,) = run(model, x=given)
    np.testing.assert_allclose(-answer, by_hand(given, how, axis), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["float16", "float", "double"])
@pytest.mark.parametrize("io", ["uint8", "float32", "float16"])
def test_a_network_of_any_precision_with_any_input(kind, io):
    model = parse(PLANAR.replace("float[", f"{kind}["))
    old = build_onnx.inputs(model)[0].dtype
    assert normalize_inputs(model, {"": IMAGENET}, {"x": io}) == {"x": (old, io)}
    given = pixels(2, 3, 2, 4)
    (answer,) = run(model, x=given.astype(io))
    assert answer.dtype == old
    np.testing.assert_allclose(-answer, by_hand(given, IMAGENET, 1), atol=2e-3 if kind == "float16" else 2e-6)


def test_a_weight_that_is_no_input_needs_a_newer_file_than_this():
    model = parse(PLANAR)
    model.ir_version = 3
    normalize_inputs(model, {"x": IMAGENET}, {})
    assert not model.graph.initializer
    given = pixels(1, 3, 2, 4)
    np.testing.assert_allclose(-run(model, x=given)[0], by_hand(given, IMAGENET, 1), atol=2e-6)


def test_names_that_are_taken_and_an_input_used_inside_a_branch():
    model = parse(
        "g (float[N,3,1,1] x, bool[1] c) => (float[N,3,1,1] y) { x_pixels = Abs(x) y = If(c)<"
        "then_branch = t () => (float[N,3,1,1] p) { p = Neg(x) }, "
        "else_branch = e () => (float[N,3,1,1] q) { q = Add(x_pixels, x) }> }"
    )
    normalize_inputs(model, {"x": IMAGENET}, {})
    given = pixels(2, 3, 1, 1)
    wanted = by_hand(given, IMAGENET, 1)
    np.testing.assert_allclose(run(model, x=given, c=np.array([True]))[0], -wanted, atol=2e-6)
    np.testing.assert_allclose(run(model, x=given, c=np.array([False]))[0], abs(wanted) + wanted, atol=4e-6)


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        ((None, 3, None, None), (3, 1, 1)),
        ((None, 3, 8, 3), (3, 1, 1)),
        ((None, None, None, 3), (3,)),
        ((None, None, None, None), (3, 1, 1)),
        ((None, 3), (3,)),
        ((3, 8, 8), (3, 1, 1)),
    ],
)
def test_where_channels_are(dims, shape):
    assert channel_shape("x", dims, 3) == shape
    assert channel_shape("x", dims, 1) == ()


@pytest.mark.parametrize(
    ("graph", "wanted", "error", "text"),
    [
        (PLANAR, {"z": IMAGENET}, ModelError, r"names 'z', .* no input of the model; there are x \(\?, 3, 2, 4\)"),
        (TWO, {"k": IMAGENET}, ModelError, r"numbers for 3 channels, and input k \(\?, 5\) has no such axis"),
        (TWO, {"": IMAGENET, "x": IMAGENET}, ModelError, "given twice for input 'x'"),
        (TWO.replace("float[N,5]", "float[N,5,5]"), {"": IMAGENET}, ModelError, "does not say which input it is for"),
        (PLANAR.replace("float", "uint8"), {"x": IMAGENET}, ModelError, "the model takes uint8 there"),
        (PLANAR, {"x": Normalization(std=(1.0, 0.0, 1.0))}, ConfigError, "is no number"),
        (PLANAR, {"x": Normalization(mean=(1.0, 0.0), std=(1.0, 1.0, 2.0))}, ConfigError, "2 means and 3 deviations"),
    ],
)  # fmt: skip
def test_what_cannot_be_normalised(graph, wanted, error, text):
    with pytest.raises(error, match=text):
        normalize_inputs(parse(graph), wanted, {})


# --- Written out ---------------------------------------------------------------------------------


def written(path: Path, **options: Any) -> tuple[onnx.ModelProto, list[str]]:
    lines: list[Line] = []
    output = path.with_name("changed.onnx")
    build = BuildSettings(**options)
    record = rewrite(
        BuildRequest(source=ModelSource(str(path), "m"), build=build, output=str(output), onnx=True), lines.append
    )
    data = output.read_bytes()
    assert (record.plan_bytes, record.plan_sha256) == (len(data), hashlib.sha256(data).hexdigest())
    named = {name or "x": how for name, how in build.normalize.items()}
    assert record.options == msgspec.structs.replace(build, normalize=named)
    assert (record.flavour, record.source) == (ONNX, str(path))
    model = onnx.load(output)
    tensors = [(value.name, value.type.tensor_type.elem_type) for value in (*model.graph.input, *model.graph.output)]
    assert [(tensor.name, build_onnx.ELEM_NUMBERS[tensor.dtype]) for tensor in record.tensors] == tensors
    return model, [line.said for line in lines if line.said]


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
def test_the_changed_file_has_dtypes_normalisation_and_float16(fp16, tmp_path):
    model, said = written(save(TWO, tmp_path), fp16=fp16, io={"": "fp16"}, normalize={"": IMAGENET})
    assert [tensor.dtype for tensor in build_onnx.inputs(model)] == ["uint8", "float16"]
    assert [tensor.dtype for tensor in build_onnx.outputs(model)] == ["float16", "float16"]
    assert sorted(said) == sorted(
        [f"x: uint8 for float32, normalised inside: {IMAGENET}", *(f"{name}: float16 for float32" for name in "kyz")]
    )
    given, k = pixels(2, 3, 2, 2), np.arange(10, dtype=np.float16).reshape(2, 5)
    y, z = run(model, x=given, k=k)
    np.testing.assert_allclose(-y, by_hand(given, IMAGENET, 1), atol=2e-3)
    np.testing.assert_array_equal(-z, k)


def test_normalisation_stays_in_float32_in_a_network_of_float16(tmp_path):
    # Of 11 bits, half would be lost in the difference of two large numbers.
    how = Normalization(mean=(1000.0,), std=(1.0,), scale=4.0)
    model, _ = written(save(PLANAR, tmp_path), fp16=True, normalize={"x": how})
    given = np.full((1, 3, 2, 4), 251, np.uint8)
    np.testing.assert_array_equal(run(model, x=given)[0], np.full(given.shape, -4, np.float32))


def test_a_named_dtype_goes_before_pixels(tmp_path):
    model, _ = written(save(TWO, tmp_path), io={"x": "fp32"}, normalize={"x": IMAGENET})
    assert [tensor.dtype for tensor in build_onnx.inputs(model)] == ["float32", "float32"]


def test_a_file_in_which_nothing_changes_is_not_written(tmp_path):
    with pytest.raises(ModelError, match="say what to change: --normalize, --io or --fp16"):
        written(save(TWO, tmp_path), io={"": "fp32"})
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
