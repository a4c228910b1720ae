"""Small ONNX models, made as they are needed: `save(MEAN, folder)` writes one and returns its path.

Their answers are exact for small whole numbers, whatever the order of the sums, so tests compare with ``==``.
Each good model has its answer in NumPy beside it, in `MODELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser

Arrays = Mapping[str, npt.NDArray[Any]]
"""Tensor name to items, shape ``(items, *item_shape)``."""

OPSET = 17
HEADER = f'<ir_version: 8, opset_import: ["": {OPSET}]>\n'

DTYPES = {
    "bool": "bool", "int8": "int8", "uint8": "uint8", "int16": "int16", "uint16": "uint16", "int32": "int32",
    "uint32": "uint32", "int64": "int64", "uint64": "uint64", "float16": "float16", "float": "float32",
    "double": "float64",
}  # fmt: skip
"""ONNX's name for each dtype that a plane can have, and NumPy's."""


class Good(NamedTuple):
    """A model that can be served.

    Attributes:
        model: the graph in ONNX's text form, or a made model.
        answer: what it computes.
        shapes: item shapes to give, for inputs that leave theirs open.
        batch_limit: what its spec must say.
        settings: how it is loaded, beside `shapes`.
    """

    model: str | onnx.ModelProto
    answer: Callable[[Arrays], dict[str, npt.NDArray[Any]]]
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    batch_limit: int = 0
    settings: Mapping[str, Any] = MappingProxyType({})


def _mlp() -> onnx.ModelProto:
    """256 to 16: ``max(x @ w + b, 0)``."""
    model = onnx.parser.parse_model(
        HEADER + "mlp (float[N,256] x) => (float[N,16] y) { h = MatMul(x, w) s = Add(h, b) y = Relu(s) }"
    )
    for name, values in (("w", MLP_WEIGHTS), ("b", MLP_BIAS)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


MLP_WEIGHTS = (np.arange(256 * 16).reshape(256, 16) % 7 - 3).astype(np.float32)
MLP_BIAS = np.arange(-8, 8, dtype=np.float32)

# The mean is over 4 numbers: a quarter of a small whole number is exact.
MEAN = "mean (float[N,2,2] x) => (float[N,1] y) { f = Flatten(x) y = ReduceMean<axes=[1],keepdims=1>(f) }"
ADD = "add (float[N,3] a, float[N,3] b) => (float[N,3] sum) { sum = Add(a, b) }"
SCALAR = (
    "scalar (int64[N] x) => (int64[N] y, float[N,5] z) <float[5] o = {1, 2, 3, 4, 5}, int64[1] axis = {1}> "
    "{ y = Neg(x) f = Cast<to=1>(x) u = Unsqueeze(f, axis) z = Mul(u, o) }"
)
MANY_DTYPES = (
    "many ("
    + ", ".join(f"{kind}[N,3] {kind}_in" for kind in DTYPES)
    + ") => ("
    + ", ".join(f"{kind}[N,3] {kind}_out" for kind in DTYPES)
    + ") {"
    + " ".join(f"{kind}_out = Identity({kind}_in)" for kind in DTYPES)
    + "}"
)
FIXED_BATCH_ONE = "one (float[1,4] x) => (float[1,4] y) { y = Neg(x) }"
OPEN_ITEM = "open (float[N,3,H,W] x) => (float[N,H,W] y) <int64[1] axis = {1}> { y = ReduceSum<keepdims=0>(x, axis) }"
FIXED_BATCH = "fixed (float[20,4] x) => (float[20,4] y) { y = Neg(x) }"
BFLOAT16 = "bf (bfloat16[N,4] x) => (float8e5m2[N,4] z, bfloat16[N,4] y) { z = Cast<to=19>(x) y = Identity(x) }"
# One value for the whole call, and an output with its batch, of 1, behind.
NO_BATCH = (
    "whole (float[2,3] x) => (float y, float[2] z) <int64 zero = {0}> "
    "{ y = ReduceSum<keepdims=0>(x) z = Gather<axis=1>(x, zero) }"
)
# Items of several shapes; one output has the input's, one loses an axis, one has always the same.
VARYING = (
    "varying (float[N,2,T] x) => (float[N,2,T] y, float[N,T] s, float[N,1] m) <int64[1] axis = {1}, "
    "int64[2] flat = {0, -1}> "
    "{ y = Neg(x) s = ReduceSum<keepdims=0>(x, axis) r = Reshape(x, flat) m = ReduceMax<axes=[1]>(r) }"
)
# A factor for the whole batch.
SHARED = (
    "shared (float[N,3] x, float k, float[2,3] b) => (float[N,3] y) "
    "{ m = ReduceMax<axes=[0]>(b) p = Mul(x, k) y = Add(p, m) }"
)
# As many rows as the item has numbers that are not 0.
COUNTED = "counted (float[T] x) => (int64[K] y) <int64[1] axis = {0}> { z = NonZero(x) y = Squeeze(z, axis) }"
UNNAMED = "unnamed (float[?,4] x) => (float[?,?] y) { y = Concat<axis=1>(x, x) }"
# An output whose first axis has a name of its own: only a run can tell that it is the batch.
RENAMED = "renamed (float[N,4] x) => (float[M,2,2] y) <int64[3] s = {-1, 2, 2}> { y = Reshape(x, s) }"

MODELS: dict[str, Good] = {
    "mean": Good(MEAN, lambda given: {"y": given["x"].reshape(-1, 4).mean(1, keepdims=True)}),
    "mlp": Good(_mlp(), lambda given: {"y": np.maximum(given["x"] @ MLP_WEIGHTS + MLP_BIAS, 0)}),
    "add": Good(ADD, lambda given: {"sum": given["a"] + given["b"]}),
    "scalar": Good(
        SCALAR,
        lambda given: {
            "y": -given["x"],
            "z": given["x"][:, None].astype(np.float32) * np.arange(1, 6, dtype=np.float32),
        },
    ),
    "many_dtypes": Good(
        MANY_DTYPES, lambda given: {name.replace("_in", "_out"): array for name, array in given.items()}
    ),
    "fixed_batch_one": Good(FIXED_BATCH_ONE, lambda given: {"y": -given["x"]}, batch_limit=1),
    "open_item": Good(
        OPEN_ITEM,
        lambda given: {"y": given["x"].sum(1)},
        shapes={"x": (3, 4, 5)},
    ),
    "unnamed": Good(UNNAMED, lambda given: {"y": np.concatenate([given["x"], given["x"]], axis=1)}),
    "renamed": Good(RENAMED, lambda given: {"y": given["x"].reshape(-1, 2, 2)}),
    "fixed_batch": Good(FIXED_BATCH, lambda given: {"y": -given["x"]}, batch_limit=20),
    "bfloat16": Good(
        BFLOAT16, lambda given: {"z": given["x"].astype(np.float32).astype(ml_dtypes.float8_e5m2), "y": given["x"]}
    ),
    "no_batch": Good(
        NO_BATCH,
        lambda given: {"y": given["x"].sum((1, 2)), "z": given["x"][:, :, 0]},
        batch_limit=1,
        settings={"no_batch": ("no_batch",)},
    ),
}


NOT_THE_BATCH = "first axis must be the batch"

# Models that cannot be served, each with a part of the text that must say so.
BAD_MODELS: dict[str, tuple[str, str]] = {
    "no axes": ("g (float x) => (float y) { y = Neg(x) }", "need a first axis for the batch"),
    "different first axes": (
        "g (float[4,3] x, float[2,3] a) => (float[4,3] y) { m = ReduceMax<keepdims=0>(a) y = Mul(x, m) }",
        "(x (4, 3), a (2, 3)) have different first axes, so none can be the batch",
    ),
    "batch on the second axis": (
        "g (float[N,3] x, float[2,N] s) => (float[N,3] y) { m = ReduceMax<keepdims=0>(s) y = Mul(x, m) }",
        "input 's' of bad.onnx has shape (2, N), whose first axis is not the batch",
    ),
    "open item": (
        "g (float[N,3,?,?] x) => (float[N,3,?,?] y) { y = Neg(x) }",
        (
            "input 'x' of bad.onnx has shape (N, 3, ?, ?): give its item shape, for example --shape x=3x640x640, "
            "or with a range, such as 32..640, for each axis in which items differ"
        ),
    ),
    "empty item": ("g (float[N,0] x) => (float[N,0] y) { y = Neg(x) }", "make its size fixed"),
    "output without batch": (
        "g (float[N,4] x) => (float[K] y) <int64[1] axis = {0}> { y = ReduceSum<keepdims=0>(x, axis) }",
        NOT_THE_BATCH,
    ),
    "output of fixed length": (
        "g (float[N,4] x) => (float[2,4] y) <int64[2] s = {2, 4}> { m = ReduceMean(x) y = Expand(m, s) }",
        NOT_THE_BATCH,
    ),
    # One row whatever the batch, and not declared: a run on 1 item alone would take it for the batch.
    "output of secretly fixed length": (
        (
            "g (float[N,4] x) => (float[K,4] y) <float[1] one = {1}, int64[1] four = {4}, float zero = {0}> "
            "{ m = ReduceMean<axes=[0]>(x) t = ReduceSum<keepdims=0>(x) z = Mul(t, zero) o = Add(z, one)"
            " k = Cast<to=7>(o) s = Concat<axis=0>(k, four) y = Expand(m, s) }"
        ),
        NOT_THE_BATCH,
    ),
    "output declared wrongly": (
        (
            "g (float[N,4] x) => (float[K,3] y) <int64[1] any = {-1}, float[1] four = {4}, float zero = {0}> "
            "{ t = ReduceSum<keepdims=0>(x) z = Mul(t, zero) f = Add(z, four)"
            " k = Cast<to=7>(f) s = Concat<axis=0>(any, k) y = Reshape(x, s) }"
        ),
        "is declared (K, 3) and had shape (1, 4) in a batch of 1: correct the declaration",
    ),
    "output that grows with the batch": (
        "g (float[N,4] x) => (float[N,K] y) { t = Transpose<perm=[1,0]>(x) y = MatMul(x, t) }",
        "change with the batch",
    ),
    "output that depends on the data": (
        "g (float[N,4] x) => (int64[K,L] y) { z = NonZero(x) y = Transpose<perm=[1,0]>(z) }",
        NOT_THE_BATCH,
    ),
    "scalar output": ("g (float[N,4] x) => (float y) { y = ReduceSum<keepdims=0>(x) }", NOT_THE_BATCH),
    "fails on zeros": (
        "g (float[N,4] x) => (float[N,K] y) <int64[2] s = {7, 3}> { y = Reshape(x, s) }",
        "fails on zeros in a batch of 1",
    ),
    "input handed through": (
        "g (float[N,4] x) => (float[N,4] y, float[N,4] x) { y = Neg(x) }",
        "remove those outputs",
    ),
    "string": ("g (string[N,4] x) => (string[N,4] y) { y = Identity(x) }", "is a tensor(string)"),
    "sequence": (
        "g (float[N,4] x) => (seq(float[N,4]) y) { y = SequenceConstruct(x, x) }",
        "is a seq(tensor(float))",
    ),
    "unknown operator": ("g (float[N,4] x) => (float[N,4] y) { y = NoSuchThing(x) }", "NoSuchThing"),
}

# They load and describe themselves well, and fail when they run: an index out of range, another shape than
# declared.
PICKY = "picky (int64[N] x) => (float[N] y) <float[4] table = {0, 1, 2, 3}> { y = Gather(table, x) }"
LIAR = "liar (float[N,2] x) => (int64[N,2] y) { z = NonZero(x) y = Transpose<perm=[1,0]>(z) }"


def parse(model: str | onnx.ModelProto) -> onnx.ModelProto:
    """`model` as a made model; text is a graph without its header."""
    return onnx.parser.parse_model(HEADER + model) if isinstance(model, str) else model


def save(model: str | onnx.ModelProto, folder: Path, name: str = "model") -> Path:
    """Write `model` to ``folder/name.onnx`` and return that path."""
    path = folder / f"{name}.onnx"
    path.write_bytes(parse(model).SerializeToString())
    return path


def save_without_its_weights(folder: Path, name: str = "model") -> Path:
    """Write a model whose weights are in a file beside it, and remove that file."""
    model = onnx.ModelProto()
    model.CopyFrom(MODELS["mlp"].model)
    path = folder / f"{name}.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (folder / "weights.bin").unlink()
    return path
