"""From float32 to float16 inside an ONNX model, for versions of TensorRT that take all types from the file.

Every float32 tensor becomes float16, and so do the weights.  Operators that lose too much, or whose output is float32
whatever goes in, stay as they are between two Casts, and keep float32 copies of the weights that they read::

    a float16 --> Cast --> Resize (float32) --> Cast --> b float16

Inputs and outputs of the model keep their dtypes.  The two casts between neighbours that both stay cancel out when
TensorRT builds.

The converter of onnxconverter-common 1.16 does the same, but drops a Cast from an integer before such an operator,
gives outputs of such an operator another dtype, and makes a type error of a weight or an output that is used twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

HALF_MAX: Final = 65504.0
HALF_MIN: Final = 2.0**-24
"""The largest number of float16, and the smallest above 0."""

FLOAT, FLOAT16 = 1, 10
"""TensorProto.DataType: part of the format."""

STAYS: Final = frozenset((
    # Sums, orders and coordinates, for which 11 bits are too few.
    "CumSum", "Max", "Min", "NonMaxSuppression", "Range", "Resize", "RoiAlign", "TopK", "Upsample",
    # Float32 comes out, whatever goes in.
    "BlackmanWindow", "ConstantOfShape", "DequantizeLinear", "EyeLike", "HammingWindow", "HannWindow",
    "MelWeightMatrix", "QuantizeLinear", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
))  # fmt: skip


def convert(onnx: Any, model: Any) -> None:
    """Put float16 inside `model`, an ``onnx.ModelProto`` that has its weights and inferred types, and no functions."""
    _Conversion(onnx, model.graph).run()


class _Conversion:
    def __init__(self, onnx: Any, graph: Any) -> None:
        self._onnx = onnx
        self._graph = graph
        self._taken = names(graph)

    def run(self) -> None:
        weights = {tensor.name for tensor in self._graph.initializer}  # listed among the inputs by old exporters
        borders = [
            (value.name, is_input)
            for values, is_input in ((self._graph.input, True), (self._graph.output, False))
            for value in values
            if _elem_type(value) == FLOAT and value.name not in weights
        ]
        self._convert(self._graph, {}, {})
        for name, is_input in borders:
            inner = self._fresh(f"{name}_float16")
            insert_cast(self._onnx, self._graph, name, inner, (FLOAT16, FLOAT), is_input=is_input)

    def _convert(self, graph: Any, types: Mapping[str, int], weights: Mapping[str, Any]) -> None:
        """Convert `graph`, which sees the `types` and float32 `weights` of the graphs around it."""
        self._make_weights(graph)
        declared = (*graph.value_info, *graph.input, *graph.output)
        types = {**types, **{value.name: _elem_type(value) for value in declared}}
        types.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
        read = {name for part in graphs(graph) for node in part.node if node.op_type in STAYS for name in node.input}
        own = [tensor for tensor in graph.initializer if tensor.data_type == FLOAT and tensor.name in read]
        weights = {**weights, **{tensor.name: _copy(tensor) for tensor in own}}
        for tensor in graph.initializer:
            self._halve(tensor)
        for value in declared:
            if _elem_type(value) == FLOAT:
                value.type.tensor_type.elem_type = FLOAT16
        nodes: list[Any] = []
        known: dict[str, str] = {}
        for node in graph.node:
            if node.op_type in STAYS:
                nodes += self._wrap(graph, node, types, weights, known)
                continue
            nodes.append(node)
            for attribute in node.attribute:
                for tensor in (attribute.t, *attribute.tensors):
                    self._halve(tensor)
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
                    attribute.i = FLOAT16
                for inner in (attribute.g, *attribute.graphs):
                    if inner.node:
                        self._convert(inner, types, weights)
        copies = [_copy(node) for node in nodes]  # what is deleted goes with its graph
        del graph.node[:]
        graph.node.extend(copies)

    def _wrap(
        self, graph: Any, node: Any, types: Mapping[str, int], weights: Mapping[str, Any], known: dict[str, str]
    ) -> list[Any]:
        """`node` in float32, and the casts before and after it; `known` has the float32 tensors of this graph."""
        before, after = [], []
        for place, name in enumerate(node.input):
            if types.get(name) != FLOAT:
                continue
            if name not in known:
                known[name] = self._fresh(f"{name}_float32")
                if name in weights:
                    graph.initializer.append(weights[name])
                    graph.initializer[-1].name = known[name]
                else:
                    before.append(self._cast(name, known[name], FLOAT))
            node.input[place] = known[name]
        for place, name in enumerate(node.output):
            if types.get(name) == FLOAT:
                node.output[place] = self._fresh(f"{name}_float32")
                after.append(self._cast(node.output[place], name, FLOAT16))
        return [*before, node, *after]

    def _make_weights(self, graph: Any) -> None:
        """Turn constants into weights, so that both are treated alike; an output of `graph` itself stays a constant."""
        results = {value.name for value in graph.output}
        for node in [node for node in graph.node if node.op_type == "Constant"]:
            (attribute,) = node.attribute
            if attribute.name in ("value_float", "value_floats"):
                value = attribute.f if attribute.name == "value_float" else [*attribute.floats]
                tensor = self._onnx.numpy_helper.from_array(np.array(value, np.float32))
                attribute.CopyFrom(self._onnx.helper.make_attribute("value", tensor))
            if attribute.name == "value" and node.output[0] not in results:
                graph.initializer.append(attribute.t)
                graph.initializer[-1].name = node.output[0]
                graph.node.remove(node)

    def _halve(self, tensor: Any) -> None:
        if tensor.data_type == FLOAT:
            halved = self._onnx.numpy_helper.from_array(to_half(self._onnx.numpy_helper.to_array(tensor)), tensor.name)
            tensor.CopyFrom(halved)

    def _cast(self, source: str, target: str, to: int) -> Any:
        return self._onnx.helper.make_node("Cast", [source], [target], name=self._fresh(f"{target}_cast"), to=to)

    def _fresh(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def to_half(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """`values` as float16, of the same shape.

    What is finite stays so, and what is not 0 does not become 0: a tiny number is often there to be divided by.
    """
    size = np.abs(values)
    low = np.where((size > 0) & (size < HALF_MIN), np.copysign(np.float32(HALF_MIN), values), values)
    return np.where(np.isfinite(low), np.clip(low, -HALF_MAX, HALF_MAX), low).astype(np.float16)


def insert_cast(onnx: Any, graph: Any, name: str, inner: str, dtypes: tuple[int, int], *, is_input: bool) -> None:
    """Give an input or output another dtype, with a Cast behind or before it.

    Args:
        graph: the model's, changed in place.
        name: the input or output.
        inner: a name that is not taken, for the tensor as it was.
        dtypes: its dtype until now, which `inner` gets, and the new one.
    """
    old, new = dtypes
    for part in graphs(graph):
        for node in part.node:
            for used in (node.input, node.output):
                for place, other in enumerate(used):
                    if other == name:
                        used[place] = inner
        for value in (*part.initializer, *part.value_info, *(part.output if part is not graph else ())):
            if value.name == name:
                value.name = inner
    ends, to = ((name, inner), old) if is_input else ((inner, name), new)
    cast = onnx.helper.make_node("Cast", [ends[0]], [ends[1]], name=f"{inner}_cast", to=to)
    graph.node.insert(0 if is_input else len(graph.node), cast)
    for value in graph.input if is_input else graph.output:
        if value.name == name:
            graph.value_info.append(value)
            graph.value_info[-1].name = inner
            value.type.tensor_type.elem_type = new


def graphs(graph: Any) -> list[Any]:
    """`graph` and all graphs inside its nodes."""
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    found += graphs(inner)
    return found


def names(graph: Any) -> set[str]:
    """All names that `graph` and the graphs inside it use, for tensors and for nodes."""
    found: set[str] = set()
    for part in graphs(graph):
        found.update(value.name for value in (*part.input, *part.output, *part.initializer))
        for node in part.node:
            found.update((node.name, *node.input, *node.output))
    return found


def _copy(message: Any) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def _elem_type(value: Any) -> int:
    return int(value.type.tensor_type.elem_type)
