"""Whether the shapes that peers tell are possible: of items submitted, and of outputs written."""

from __future__ import annotations

from trtpool.ipc import messages as m
from trtpool.ipc.layout import ModelLayout

from .batching import UNIFORM, Variant
from .books import Refused


def variant_of(layout: ModelLayout, message: m.Submit) -> Variant:
    """The variant of a submission, after checking that the model takes it.

    Raises:
        Refused: it does not.
    """
    spec = layout.spec
    inputs, _ = spec.varying
    if len(message.shapes) != len(inputs):
        raise Refused(m.BAD_MESSAGE, f"{len(message.shapes)} shapes for {len(inputs)} inputs whose shape varies")
    for tensor, shape in zip(inputs, message.shapes, strict=True):
        if not tensor.takes(shape):
            raise Refused(m.BAD_MESSAGE, f"input {tensor.name!r} takes items of {tensor.describe_shape()}, not {shape}")
    if not spec.covers(message.shapes):
        raise Refused(m.BAD_MESSAGE, f"items of {spec.describe_profiles()} are taken, not {message.shapes}")
    wanted = m.SHARED_BYTES if any(tensor.shared for tensor in spec.inputs) else 0
    if len(message.shared) != wanted:
        raise Refused(m.BAD_MESSAGE, f"a digest of {len(message.shared)} bytes where it has {wanted}")
    return (message.shapes, message.shared) if message.shapes or wanted else UNIFORM


def check_outputs(layout: ModelLayout, shapes: m.Shapes) -> None:
    """Check the shapes of outputs that a worker tells.

    Raises:
        Refused: they are not what the rows hold.
    """
    _, outputs = layout.spec.varying
    fits = len(shapes) == len(outputs) and all(
        tensor.takes(shape) for tensor, shape in zip(outputs, shapes, strict=True)
    )
    if not fits:
        raise Refused(m.BAD_MESSAGE, f"outputs of the shapes {shapes} are not what the rows hold")
