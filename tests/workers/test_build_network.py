"""How each version of TensorRT is told what to build, and what it refuses, against a small copy of its builder."""

from __future__ import annotations

import pytest

from tests.models import BAD_MODELS, COUNTED, MODELS, SHARED
from tests.workers.build_rig import Make, major
from trtpool.ipc.building import PlanTensor
from trtpool.ipc.errors import ConfigError, DeviceUnavailable, ModelError
from trtpool.ipc.settings import Profile


def test_types_come_from_the_file_where_the_version_can(trt, make_plan: Make):
    plan = make_plan().plan
    assert plan["flags"] == []
    assert plan["network"] == {
        8: ["EXPLICIT_BATCH"], 10: ["EXPLICIT_BATCH", "STRONGLY_TYPED"], 11: ["STRONGLY_TYPED"],
    }[major(trt)]  # fmt: skip


def test_lanes_can_share_a_profile(trt, make_plan: Make):
    assert make_plan().plan["preview"] == ([["PROFILE_SHARING_0806", True]] if major(trt) < 11 else [])


def test_a_plan_needs_no_cudnn(trt, make_plan: Make):
    assert make_plan().plan["sources"] == ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]


def test_profiles_and_workspace(trt, make_plan: Make):
    plan = make_plan(workspace_bytes=1 << 30, profiles={"a": Profile((1,), (2,), (4,))}, request={"max_batch": 6}).plan
    assert plan["workspace"] == 1 << 30
    assert plan["profiles"] == [{"a": [[1, 3], [2, 3], [4, 3]], "b": [[1, 3], [3, 3], [6, 3]]}]


@pytest.mark.parametrize(("asked", "level"), [({}, 3), ({"optimization_level": 0}, 0), ({"optimization_level": 5}, 5)])
def test_how_long_to_look_for_kernels(asked, level, trt, make_plan: Make):
    assert make_plan(**asked).plan["level"] == level


def test_several_profiles(trt, make_plan: Make):
    a = [Profile((1,), (2,), (4,)), Profile((8,), (8,), (16,))]
    built = make_plan(profiles={"a": a[0]}, more=({"a": a[1]},), request={"max_batch": 16})
    b = [[1, 3], [8, 3], [16, 3]]
    assert built.plan["profiles"] == [
        {"a": [[1, 3], [2, 3], [4, 3]], "b": b}, {"a": [[8, 3], [8, 3], [16, 3]], "b": b},
    ]  # fmt: skip
    first = built.record.tensors[0]
    assert (first.profile.max, [more.max for more in first.more]) == ((4, 3), [(16, 3)])


IMAGES = (
    "i (float[N,3,8,8] x, int64[N,2,2,2] k, float[N,3] v) => (float[N,3,8,8] y, float[N,3] z) { y = Neg(x) z = Neg(v) }"
)


@pytest.mark.parametrize(
    ("io", "formats"),
    [
        ({"": "fp16"}, {}),
        ({"": "fp16:chw16"}, {"x": ["CHW16"], "y": ["CHW16"]}),
        ({"": "fp16", "x": "fp16:hwc8"}, {"x": ["HWC8"]}),
        ({"": "fp16:chw2", "y": "fp32"}, {"x": ["CHW2"]}),
    ],
)
def test_formats(io, formats, trt, make_plan: Make):
    assert make_plan(IMAGES, io=io).plan["formats"] == formats


def test_a_model_that_shares_an_input_and_one_without_a_batch(trt, make_plan: Make):
    plan = make_plan(SHARED, request={"max_batch": 8}).plan
    assert plan["profiles"] == [{"x": [[1, 3], [4, 3], [8, 3]]}]
    plan = make_plan(COUNTED, request={"no_batch": True, "shapes": {"x": ((1, 8),), "y": (8,)}}).plan
    assert plan["profiles"] == [{"x": [[1], [8], [8]]}]


def test_a_model_of_fixed_shapes_needs_no_profile(trt, make_plan: Make):
    built = make_plan(MODELS["fixed_batch_one"].model)
    assert (built.plan["profiles"], built.plan["workspace"]) == ([], 0)
    assert built.record.tensors[0] == PlanTensor("x", "input", "float32", (1, 4))


def test_plugins_are_there(trt, make_plan: Make):
    make_plan()
    assert trt.plugins == [""]


# --- Refusals ------------------------------------------------------------------------------------


def test_an_operator_that_tensorrt_does_not_have(trt, make_plan: Make):
    with pytest.raises(ModelError) as raised:
        make_plan(BAD_MODELS["unknown operator"][0])
    assert "operator NoSuchThing (node 0): TensorRT does not have it; export it" in str(raised.value)


def test_an_input_that_decides_about_shapes(trt, make_plan: Make):
    with pytest.raises(ModelError, match="input 'shape_s' decides about shapes"):
        make_plan("g (float[N,4] x, int64[2] shape_s) => (float[K,L] y) { y = Reshape(x, shape_s) }")


def test_a_build_that_fails_says_what_tensorrt_said(trt, make_plan: Make, tmp_path):
    trt.fails = "2: [builder.cpp::build::5] Error Code 2: Internal Error (Assertion k < n failed. )"
    with pytest.raises(ModelError) as raised:
        make_plan()
    assert str(raised.value) == (
        f"TensorRT {trt.__version__} does not take {tmp_path / 'model.onnx'}: Assertion k < n failed; "
        "change --shapes or the model"
    )
    assert not (tmp_path / "model.plan").exists()


def test_a_format_that_tensorrt_does_not_take_is_named(trt, make_plan: Make):
    trt.fails = "Assertion allowedFormatSet != FormatSet::kNONE failed"
    with pytest.raises(
        ModelError, match=r"kNONE failed; .*; leave out the format of --io x=fp16:chw4, or choose another"
    ):
        make_plan(IMAGES, io={"x": "fp16:chw4"})


@pytest.mark.parametrize(
    ("io", "error", "text"),
    [
        ({"x": "fp16:hwc16"}, ConfigError, r"--io fp16:hwc16: TensorRT .* has no such format; it has chw2, .*, hwc8$"),
        ({"v": "fp16:chw16"}, ModelError, r"--io v=fp16:chw16: its shape is \(-1, 3\), .*; choose --io v=fp16$"),
    ],
)
def test_formats_that_cannot_be(io, error, text, trt, make_plan: Make):
    with pytest.raises(error, match=text):
        make_plan(IMAGES, io=io)


def test_a_profile_that_is_refused(trt, make_plan: Make):
    trt.refuses_profiles = True
    with pytest.raises(ModelError, match="the shapes do not fit; change --shapes"):
        make_plan()


def test_a_builder_that_cannot_be_made(trt, make_plan: Make):
    trt.without_driver = True
    with pytest.raises(DeviceUnavailable, match="cannot build here: CUDA initialization failure with error: 35"):
        make_plan()
