"""Which engines can take the place of which."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from trtpool.ipc.layout import ModelLayout, ModelPlan, plan
from trtpool.ipc.signature import differences
from trtpool.ipc.tensors import ModelSpec, Span, TensorSpec

A = TensorSpec("a", "float32", (3, 8), (3, 1))
B = TensorSpec("b", "int64", ())
Y = TensorSpec("y", "float16", (2,))
SPEC = ModelSpec("det", "/old.onnx", (A, B), (Y,), batch_limit=16)


def layout(spec: ModelSpec = SPEC, items_per_slot: int = 1, max_batch: int = 8) -> ModelLayout:
    return plan([ModelPlan(spec, 8, items_per_slot, max_batch)]).models[0]


@pytest.mark.parametrize(
    "changed", [{}, {"path": "/new.onnx"}, {"batch_limit": 8}, {"batch_limit": 0}, {"batch_least": 8}], ids=str
)
def test_what_fits(changed: dict[str, Any]) -> None:
    assert differences(layout(), msgspec.structs.replace(SPEC, **changed)) == []


WIDE = msgspec.structs.replace(A, shape=(3, 9))
INT = msgspec.structs.replace(Y, dtype="int8")
C = msgspec.structs.replace(B, name="c")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "cls"}, ["it is called 'cls', not 'det'"]),
        ({"inputs": (WIDE, B)}, ["input a float32 (N, 3, 1 to 9) in place of a float32 (N, 3, 1 to 8)"]),
        ({"outputs": (INT,)}, ["output y int8 (N, 2) in place of y float16 (N, 2)"]),
        ({"inputs": (A,)}, ["input b int64 (N) is missing"]),
        ({"inputs": (A, B, C)}, ["input c int64 (N) is new"]),
        ({"inputs": (A, C), "outputs": (INT,)}, 3),
        ({"inputs": (B, A)}, ["its inputs are in another order: b, a instead of a, b"]),
        ({"batch_limit": 4}, ["it takes batches of up to 4, and the pool makes batches of up to 8"]),
        ({"batched": False, "batch_limit": 1}, ["its tensors have no batch axis"]),
        (
            {"batch_limit": 8, "whole_slots": True},
            ["it takes whole batches of 8 only, and the pool serves one that takes batches of up to 16"],
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said(changed: dict[str, Any], said: list[str] | int) -> None:
    found = differences(layout(), msgspec.structs.replace(SPEC, **changed))
    assert (len(found) if isinstance(said, int) else found) == said


def test_whole_batches_must_be_of_the_slots_size() -> None:
    whole = msgspec.structs.replace(SPEC, batch_limit=4, whole_slots=True)
    assert differences(layout(whole, 4, 4), whole) == []
    assert differences(layout(whole, 4, 4), msgspec.structs.replace(whole, batch_limit=8)) != []


def test_ranges_of_shapes_must_be_the_same_or_wider() -> None:
    wide = msgspec.structs.replace(SPEC, inputs=(WIDE, B))
    both = ((Span((3, 1), (3, 4)),), (Span((3, 6), (3, 9)),))
    profiled = msgspec.structs.replace(wide, profiles=both)
    assert differences(layout(profiled), profiled) == []
    assert differences(layout(profiled), wide) == []
    (said,) = differences(layout(wide), profiled)
    assert said == (
        "it takes items of a (3, 1 to 4) or a (3, 6 to 9), and the pool serves one that takes all shapes between its "
        "smallest and its largest"
    )
