"""Normalisation inside an ONNX model: producers then write pixels, a quarter of the bytes of float32.

::

    images float32 --> Conv ...        images uint8 --> Cast --> Mul gain --> Add bias --> Conv ...

The arithmetic is in float32 whatever the rest is in, and gives what `trtpool run` gives for the same mean and
deviation.  Its numbers are Constant nodes: in files of old versions a weight would have to be an input as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from trtpool.ipc.errors import ModelError
from trtpool.ipc.normalization import Normalization, channel_shape

from .build_float16 import FLOAT, insert_cast, names
from .build_onnx import ELEM_NUMBERS, FLOATS, GraphTensor, import_onnx, inputs

PIXELS: Final = "uint8"


def resolve(model: Any, wanted: Mapping[str, Normalization]) -> dict[str, Normalization]:
    """`wanted` with the name of each input.

    Args:
        model: an ``onnx.ModelProto``.
        wanted: by input; ``""`` stands for the only one that can be an image.

    Raises:
        ConfigError: numbers that cannot be.
        ModelError: an input that is not there, or takes integers.
    """
    found = inputs(model)
    resolved: dict[str, Normalization] = {}
    for given, normalization in wanted.items():
        normalization.check()
        name = _find(given, found).name
        if name in resolved:
            raise ModelError(f"--normalize is given twice for input {name!r}; give it once")
        resolved[name] = normalization
    return resolved


def normalize_inputs(
    model: Any, wanted: Mapping[str, Normalization], dtypes: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Put normalisation behind inputs of `model`, and let them take pixels.

    Args:
        model: an ``onnx.ModelProto``, changed in place; after `convert_to_float16`, to keep the arithmetic in float32.
        wanted: see `resolve`.
        dtypes: what inputs take where that is not uint8, by name, as NumPy calls it.

    Returns:
        What was changed: old and new dtype by input.

    Raises:
        ConfigError, ModelError: see `resolve`; or an input has another number of channels.
    """
    changed = {}
    for name, normalization in resolve(model, wanted).items():
        tensor = next(tensor for tensor in inputs(model) if tensor.name == name)
        changed[name] = tensor.dtype, dtypes.get(name, PIXELS)
        _insert(model.graph, tensor, normalization, changed[name][1])
    return changed


def _find(name: str, found: list[GraphTensor]) -> GraphTensor:
    """The input that is called `name`, or can be an image."""
    shown = ", ".join(f"{tensor} {tensor.dtype}" for tensor in found)
    if not name:
        images = [tensor for tensor in found if tensor.dtype in FLOATS and len(tensor.dims) > 2]
        if len(images) != 1:
            raise ModelError(
                f"--normalize does not say which input it is for, and of {shown} "
                f"{len(images) or 'none'} can be images; say it: --normalize {found[0].name if found else 'x'}=mean=..."
            )
        return images[0]
    tensor = next((tensor for tensor in found if tensor.name == name), None)
    if tensor is None:
        raise ModelError(f"--normalize names {name!r}, which is no input of the model; there are {shown}")
    if tensor.dtype not in FLOATS:
        raise ModelError(f"--normalize {name}: the model takes {tensor.dtype or 'no numbers'} there; leave it out")
    return tensor


def _insert(graph: Any, tensor: GraphTensor, normalization: Normalization, dtype: str) -> None:
    onnx = import_onnx()
    shape = channel_shape(tensor.name, tensor.dims, normalization.channels)
    gain, bias = normalization.gain_and_bias(shape)
    taken = names(graph)

    def fresh(what: str) -> str:
        name = f"{tensor.name}_{what}"
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    inner = fresh("normalized")
    kinds = ELEM_NUMBERS[tensor.dtype], ELEM_NUMBERS[dtype]
    insert_cast(onnx, graph, tensor.name, inner, kinds, is_input=True)
    del graph.node[0]  # the cast; what was the input is `inner` now
    make = onnx.helper.make_node
    pixels = fresh("pixels")
    nodes = [make("Cast", [tensor.name], [pixels], name=f"{pixels}_cast", to=FLOAT)]
    last = pixels
    for operator, what, numbers, nothing in (("Mul", "gain", gain, 1), ("Add", "bias", bias, 0)):
        if (numbers == nothing).all():
            continue
        constant, result = fresh(what), fresh(operator.lower())
        value = onnx.numpy_helper.from_array(numbers, constant)
        nodes.append(make("Constant", [], [constant], name=f"{constant}_constant", value=value))
        nodes.append(make(operator, [last, constant], [result], name=f"{result}_node"))
        last = result
    nodes.append(make("Cast", [last], [inner], name=f"{inner}_cast", to=kinds[0]))
    if kinds[0] == FLOAT:  # a cast to what it is already
        nodes.pop()
        nodes[-1].output[0] = inner
    for node in reversed(nodes):
        graph.node.insert(0, node)
