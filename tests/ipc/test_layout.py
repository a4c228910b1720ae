from __future__ import annotations

import itertools
import mmap

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtpool.ipc.errors import ProtocolError
from trtpool.ipc.layout import PAGE_BYTES, Layout, ModelPlan, plan, plane_array
from trtpool.ipc.tensors import DTYPES, ModelSpec, TensorSpec


@st.composite
def plans(draw: st.DrawFn) -> list[ModelPlan]:
    found = []
    for index in range(draw(st.integers(1, 3))):

        def tensors(prefix: str) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(
                    f"{prefix}{n}",
                    draw(st.sampled_from(sorted(DTYPES))),
                    tuple(draw(st.lists(st.integers(1, 7), max_size=3))),
                )
                for n in range(draw(st.integers(1, 3)))
            )

        spec = ModelSpec(f"m{index}", "/m.onnx", tensors("x"), tensors("y"))
        items = draw(st.integers(1, 4))
        found.append(ModelPlan(spec, draw(st.integers(1, 50)), items, items * draw(st.integers(1, 4))))
    return found


@given(plans())
def test_planes_lie_on_pages_of_their_own_with_nothing_wasted(models):
    layout = plan(models)
    layout.validate()
    spans = []
    for model, wanted in zip(layout.models, models, strict=True):
        assert (model.spec, model.slots, model.items_per_slot, model.max_batch) == (
            wanted.spec, wanted.slots, wanted.items_per_slot, wanted.max_batch,
        )  # fmt: skip
        assert [plane.spec for plane in model.inputs + model.outputs] == [*wanted.spec.inputs, *wanted.spec.outputs]
        assert model.slot_bytes == sum(model.row_bytes(plane) for plane in model.inputs + model.outputs)
        spans += [(p.offset, p.offset + model.slots * model.row_bytes(p)) for p in model.inputs + model.outputs]
    assert spans[0][0] == 0
    for (_, end), (start, _) in itertools.pairwise([*spans, (layout.segment_bytes, 0)]):
        assert start % PAGE_BYTES == 0
        assert 0 <= start - end < PAGE_BYTES
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=Layout) == layout


@given(plans())
def test_every_byte_of_a_plane_is_its_own_and_a_run_of_slots_is_dense(models):
    layout = plan(models)
    segment = mmap.mmap(-1, layout.segment_bytes)
    planes = [plane_array(segment, model, plane) for model in layout.models for plane in model.inputs + model.outputs]
    for number, array in enumerate(planes):
        array.view(np.uint8)[...] = number + 1
    for number, array in enumerate(planes):
        assert np.all(array.view(np.uint8) == number + 1)
        assert array.flags.c_contiguous
        assert array[: len(array) // 2 + 1].flags.c_contiguous
        assert array.ctypes.data % PAGE_BYTES == 0


def test_a_plane_is_slots_items_and_the_items_shape():
    spec = ModelSpec("m", "/m", (TensorSpec("x", "float16", (3, 5)),), (TensorSpec("y", "int64", ()),))
    (model,) = plan([ModelPlan(spec, 7, 2, 4)]).models
    assert model.plane_shape(model.inputs[0]) == (7, 2, 3, 5)
    assert model.plane_shape(model.outputs[0]) == (7, 2)
    assert (model.row_bytes(model.inputs[0]), model.row_bytes(model.outputs[0])) == (60, 16)
    assert model.slot_bytes == 76
    segment = mmap.mmap(-1, 2 * PAGE_BYTES)
    row = plane_array(segment, model, model.outputs[0])[3]
    row[...] = 2**40
    at = PAGE_BYTES + 3 * 16
    assert segment[at : at + 16] == row.tobytes()


def layout_of_two() -> Layout:
    spec = ModelSpec("m", "/m", (TensorSpec("x", "int8", (4096,)),), (TensorSpec("y", "int8", (4096,)),))
    return plan([ModelPlan(spec, 2, 1, 2)])


def moved(layout: Layout, *, x: int = 0, y: int = 2 * PAGE_BYTES, **fields: int) -> Layout:
    """`layout` with its planes elsewhere."""
    replace = msgspec.structs.replace
    (model,) = layout.models
    inputs, outputs = (replace(model.inputs[0], offset=x),), (replace(model.outputs[0], offset=y),)
    return replace(layout, models=(replace(model, inputs=inputs, outputs=outputs),), **fields)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": 1}, "'x' at 1 overlaps or is unaligned"),
        ({"y": PAGE_BYTES}, "'y' at 4096 overlaps"),
        ({"y": 0}, "'y' at 0 overlaps"),
        ({"x": 2 * PAGE_BYTES, "y": 0}, "'y' at 0 overlaps"),
        ({"y": 3 * PAGE_BYTES}, "planes end at 20480, the segment at 16384"),
        ({"y": 2**62}, "planes end at"),
        ({"segment_bytes": PAGE_BYTES}, "planes end at 16384, the segment at 4096"),
    ],
)
def test_a_layout_from_elsewhere_is_checked(change, reason):
    layout = layout_of_two()
    layout.validate()
    with pytest.raises(ProtocolError, match=reason):
        moved(layout, **change).validate()


def test_planes_that_are_not_the_models_are_refused():
    layout = layout_of_two()
    (model,) = layout.models
    swapped = msgspec.structs.replace(model, inputs=model.outputs, outputs=model.inputs)
    less = msgspec.structs.replace(model, outputs=())
    for wrong in (less, msgspec.structs.replace(swapped, inputs=model.inputs, outputs=model.inputs[:0])):
        with pytest.raises(ProtocolError, match="not those of its tensors"):
            msgspec.structs.replace(layout, models=(wrong,)).validate()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("slots",), 0), (("slots",), 2**24 + 1), (("items_per_slot",), 0), (("max_batch",), 0), (("segment",), 1),
        (("inputs", 0, "offset"), -1), (("inputs", 0, "offset"), 2**62 + 1), (("more",), 1),
    ],
)  # fmt: skip
def test_bounds_are_checked_when_it_is_decoded(path, value):
    raw = msgspec.to_builtins(layout_of_two())
    where = raw["models"][0]
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(raw, Layout)


def test_a_layout_has_a_model():
    with pytest.raises(msgspec.ValidationError, match="length >= 1"):
        msgspec.convert({"models": [], "segment_bytes": 4096}, Layout)
