"""Which shapes a plan is built for, from what a file leaves open and a user says."""

from __future__ import annotations

import pytest

from trtpool.ipc.errors import ModelError
from trtpool.ipc.settings import Profile
from trtpool.workers.build_onnx import GraphTensor
from trtpool.workers.build_profiles import make_profiles

IMAGE = GraphTensor("x", "float32", (None, 3, 224, 224))
OPEN = GraphTensor("x", "float32", (None, 3, None, None))
FIXED = GraphTensor("x", "float32", (8, 3))
IDS = GraphTensor("i", "int64", (None,))
RANGE = Profile((1, 3, 4, 4), (1, 3, 8, 8), (2, 3, 9, 9))


def same(*shape: int) -> Profile:
    return Profile(shape, shape, shape)


@pytest.mark.parametrize(
    ("tensor", "given", "item", "expected"),
    [
        (IMAGE, None, None, Profile((1, 3, 224, 224), (16, 3, 224, 224), (32, 3, 224, 224))),
        (IMAGE, Profile((2,), (3,), (4,)), None, Profile((2, 3, 224, 224), (3, 3, 224, 224), (4, 3, 224, 224))),
        (IMAGE, same(5, 3, 224, 224), None, same(5, 3, 224, 224)),
        (OPEN, None, (3, 4, 5), Profile((1, 3, 4, 5), (16, 3, 4, 5), (32, 3, 4, 5))),
        (OPEN, None, (3, (2, 4), (1, 5)), Profile((1, 3, 2, 1), (16, 3, 4, 5), (32, 3, 4, 5))),
        (OPEN, same(2), (3, 4, 5), same(2, 3, 4, 5)),
        (OPEN, RANGE, (3, 4, 5), RANGE),
        (IDS, None, None, Profile((1,), (16,), (32,))),
        (IDS, same(7), None, same(7)),
        (FIXED, None, None, None),
        (FIXED, same(8), None, None),
    ],
)  # fmt: skip
def test_profiles(tensor, given, item, expected):
    profiles = make_profiles(
        [tensor], {tensor.name: given} if given else {}, {tensor.name: item} if item is not None else {}, 32
    )
    assert profiles == ({tensor.name: expected} if expected else {})


def test_a_batch_of_one_at_most():
    assert make_profiles([IDS], {}, {}, 1) == {"i": same(1)}


@pytest.mark.parametrize(
    ("tensor", "given", "item", "text"),
    [
        (OPEN, None, None, "--shapes x=1x3x640x640:16x3x640x640:32x3x640x640"),
        (OPEN, Profile((1,), (2,), (4,)), None, "--shapes x=1x3x640x640:2x3x640x640:4x3x640x640"),
        (GraphTensor("t", "int64", (None, None)), None, None, "--shapes t=1x128:16x128:32x128"),
        (IMAGE, same(1, 3, 224), None, "does not fit the model's input x"),
        (IMAGE, same(1, 4, 224, 224), None, "does not fit"),
        (FIXED, same(4), None, "does not fit the model's input x \\(8, 3\\)"),
        (OPEN, None, (4, 5, 6), "does not fit"),
        (IMAGE, Profile((2,), (1,), (3,)), None, "does not rise"),
        (IMAGE, Profile((1,), (4,), (3,)), None, "does not rise"),
    ],
)
def test_profiles_that_cannot_be(tensor, given, item, text):
    with pytest.raises(ModelError, match=text):
        make_profiles(
            [tensor], {tensor.name: given} if given else {}, {tensor.name: item} if item is not None else {}, 32
        )


@pytest.mark.parametrize(("given", "item"), [({"z": same(1)}, {}), ({}, {"z": (1,)})])
def test_bounds_of_outputs_are_no_profiles(given, item):
    names = {*given, *item}
    if item:
        assert make_profiles([IMAGE], {}, item, 32, outputs=names) == make_profiles([IMAGE], {}, {}, 32)
    else:
        with pytest.raises(ModelError, match="--shapes names 'z'"):
            make_profiles([IMAGE], given, {}, 32, outputs=names)


def test_inputs_without_a_batch_axis_have_their_shapes_whole():
    shared, scalar = GraphTensor("s", "float32", (2, None)), GraphTensor("k", "float32", ())
    profiles = make_profiles([IDS, shared, scalar], {}, {"s": (2, (3, 5))}, 32)
    assert profiles == {"i": Profile((1,), (16,), (32,)), "s": Profile((2, 3), (2, 5), (2, 5))}
    with pytest.raises(ModelError, match=r"s \(2, \?\), which has no batch axis, .* --shapes s=2x128:2x128:2x128"):
        make_profiles([IDS, shared], {}, {}, 32)
    assert make_profiles([OPEN], {}, {"x": (1, 3, (4, 8), 8)}, 32, batched=False) == {
        "x": Profile((1, 3, 4, 8), (1, 3, 8, 8), (1, 3, 8, 8))
    }


@pytest.mark.parametrize(("given", "item"), [({"z": same(1)}, {}), ({}, {"z": (1,)})])
def test_profiles_of_no_input(given, item):
    with pytest.raises(ModelError, match="--shapes names 'z', but the model's inputs are x"):
        make_profiles([IMAGE], given, item, 32)
