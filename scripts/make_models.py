#!/usr/bin/env python
"""Write the ONNX files from which the engines of tests and benchmarks are built: ``make_models.py FOLDER [NAME...]``.

========================  ==========================================  =============================
file                      input                                       output
========================  ==========================================  =============================
``resnet50.onnx``         ``images`` float32 (N, 3, 224, 224)         ``logits`` float32 (N, 1000)
``resnet50_u8.onnx``      ``images`` uint8 (N, 224, 224, 3)           ``logits`` float32 (N, 1000)
``mlp.onnx``              ``x`` float32 (N, 256)                      ``y`` float32 (N, 16)
``reduce1600x2560.onnx``  ``image`` float32 (N, 3, 1600, 2560)        ``means`` float32 (N, 3)
========================  ==========================================  =============================

Weights are pseudo-random and seeded, so that the files are the same on every machine, to the byte for one version of
onnx.  Those of convolutions are +-a, one bit each: such plans compress well, and cost a GPU what trained ones do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET: Final = 17
"""The newest that TensorRT 8.6 parses, with `IR_VERSION`."""
IR_VERSION: Final = 8

SEED: Final = 7
STAGES: Final = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
"""ResNet-50's: width, blocks, and the stride of the first of them."""
MEAN: Final = (123.675, 116.28, 103.53)
DEVIATION: Final = (58.395, 57.12, 57.375)
"""ImageNet's, of pixels from 0 to 255."""

Value = tuple[str, int, list[Any]]
"""An input or output: name, ONNX's number for its dtype, shape."""


class Graph:
    """A list of nodes that grows; what adds one returns the name of its output."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._named = 0

    def add(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        """Add a node whose output is called `output`, or by a number."""
        if not output:
            self._named += 1
            output = f"t{self._named}"
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def weight(self, array: npt.NDArray[np.float32]) -> str:
        """Add a constant."""
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(array, name))
        return name

    def convolve(self, x: str, inwards: int, outwards: int, kernel: int, stride: int = 1, *, relu: bool = True) -> str:
        """Add a convolution of `inwards` to `outwards` channels, by default with a ReLU."""
        scale = np.sqrt(2 / (inwards * kernel * kernel))
        weights = self._rng.choice([-1.0, 1.0], (outwards, inwards, kernel, kernel)) * scale
        bias = np.zeros(outwards, np.float32)
        y = self.add(
            "Conv", [x, self.weight(weights.astype(np.float32)), self.weight(bias)],
            kernel_shape=[kernel, kernel], pads=[kernel // 2] * 4, strides=[stride, stride],
        )  # fmt: skip
        return self.add("Relu", [y]) if relu else y

    def model(self, name: str, inputs: list[Value], outputs: list[Value]) -> onnx.ModelProto:
        """All of it as a checked model."""
        ends = [[helper.make_tensor_value_info(*value) for value in values] for values in (inputs, outputs)]
        graph = helper.make_graph(self._nodes, name, *ends, self._weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model)
        return model


def resnet50(rng: np.random.Generator) -> onnx.ModelProto:
    """ResNet-50; its speed is real, its answers mean nothing."""
    return _resnet50("resnet50", rng, uint8=False)


def resnet50_u8(rng: np.random.Generator) -> onnx.ModelProto:
    """The same for pixels as cameras give them, which are normalised inside."""
    return _resnet50("resnet50_u8", rng, uint8=True)


def _resnet50(name: str, rng: np.random.Generator, *, uint8: bool) -> onnx.ModelProto:
    graph = Graph(rng)
    x = graph.convolve(_normalise(graph, "images") if uint8 else "images", 3, 64, 7, 2)
    x = graph.add("MaxPool", [x], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])
    channels = 64
    for width, blocks, stride in STAGES:
        for block in range(blocks):
            x = _bottleneck(graph, x, channels, width, 1 if block else stride, project=not block)
            channels = 4 * width
    x = graph.add("Flatten", [graph.add("GlobalAveragePool", [x])])
    head = (rng.choice([-1.0, 1.0], (2048, 1000)) * 0.02).astype(np.float32)
    graph.add("Gemm", [x, graph.weight(head), graph.weight(np.zeros(1000, np.float32))], "logits")
    image: Value = (
        ("images", TensorProto.UINT8, ["N", 224, 224, 3]) if uint8
        else ("images", TensorProto.FLOAT, ["N", 3, 224, 224])
    )  # fmt: skip
    return graph.model(name, [image], [("logits", TensorProto.FLOAT, ["N", 1000])])


def _normalise(graph: Graph, x: str) -> str:
    """Channels first, mean 0 and deviation 1."""
    x = graph.add("Transpose", [graph.add("Cast", [x], to=TensorProto.FLOAT)], perm=[0, 3, 1, 2])
    mean = np.array(MEAN, np.float32).reshape(1, 3, 1, 1)
    scale = (1 / np.array(DEVIATION, np.float32)).reshape(1, 3, 1, 1)
    return graph.add("Mul", [graph.add("Sub", [x, graph.weight(mean)]), graph.weight(scale.astype(np.float32))])


def _bottleneck(graph: Graph, x: str, channels: int, width: int, stride: int, *, project: bool) -> str:
    """1x1, 3x3 and 1x1 beside a short cut, which is a convolution where `project`; gives ``4 * width`` channels."""
    short = graph.convolve(x, channels, 4 * width, 1, stride, relu=False) if project else x
    y = graph.convolve(graph.convolve(x, channels, width, 1), width, width, 3, stride)
    y = graph.convolve(y, width, 4 * width, 1, relu=False)
    y = graph.add("Mul", [y, graph.weight(np.array(0.2, np.float32))])  # without it float16 would overflow
    return graph.add("Relu", [graph.add("Add", [y, short])])


def mlp(rng: np.random.Generator) -> onnx.ModelProto:
    """256 to 256 to 16: next to no work, so what is measured is all that is around the engine."""
    graph = Graph(rng)

    def dense(x: str, inwards: int, outwards: int, output: str = "") -> str:
        weights = (rng.standard_normal((inwards, outwards)) / np.sqrt(inwards)).astype(np.float32)
        return graph.add("MatMul", [x, graph.weight(weights)], output)

    dense(graph.add("Relu", [dense("x", 256, 256)]), 256, 16, "y")
    return graph.model("mlp", [("x", TensorProto.FLOAT, ["N", 256])], [("y", TensorProto.FLOAT, ["N", 16])])


def reduce1600x2560(rng: np.random.Generator) -> onnx.ModelProto:
    """The means of an image's channels: all of it is the way there."""
    graph = Graph(rng)
    graph.add("ReduceMean", ["image"], "means", axes=[2, 3], keepdims=0)
    shape = ["N", 3, 1600, 2560]
    image, means = ("image", TensorProto.FLOAT, shape), ("means", TensorProto.FLOAT, ["N", 3])
    return graph.model("reduce1600x2560", [image], [means])


MODELS: Final[dict[str, Callable[[np.random.Generator], onnx.ModelProto]]] = {
    make.__name__: make for make in (resnet50, resnet50_u8, mlp, reduce1600x2560)
}
"""In an order that stays: one generator makes the weights of all."""


def write(folder: Path, names: Sequence[str] = tuple(MODELS)) -> list[Path]:
    """Write some of `MODELS` into `folder`, which is made, and return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    written = []
    for name, make in MODELS.items():
        model = make(rng)
        if name in names:
            written.append(folder / f"{name}.onnx")
            onnx.save(model, str(written[-1]))
    return written


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("names", nargs=-1, type=click.Choice(list(MODELS)), metavar="[NAME]...")
def main(folder: Path, names: tuple[str, ...]) -> None:
    """Write the benchmark's ONNX files into FOLDER: those named, or all."""
    for path in write(folder, names or tuple(MODELS)):
        click.echo(path)


if __name__ == "__main__":
    sys.exit(main())
