"""How each version of TensorRT is told what to build, against a small copy of its builder."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.models import ADD, BAD_MODELS, COUNTED, MODELS, SHARED, parse, save
from tests.workers.fake_builder import make_tensorrt
from trtpool.ipc.building import BuildRequest, Line, PlanRecord, PlanTensor
from trtpool.ipc.errors import ConfigError, DeviceUnavailable, MissingExtra, ModelError
from trtpool.ipc.settings import BuildSettings, GpuInfo, ModelSource, Profile
from trtpool.workers import builder
from trtpool.workers.builder import Phases, build, describe

VERSIONS = ("8.6.0", "10.13.0.35", "11.4.0.106")
GPU = GpuInfo(
    name="NVIDIA H100 80GB HBM3", uuid="GPU-1", pci_bus_id="0", compute_capability="9.0", memory_bytes=1, driver=(13, 0)
)


class Built:
    """What became of a build."""

    def __init__(self, record: PlanRecord, lines: list[Line], plan: dict[str, Any]) -> None:
        self.record = record
        self.said = [line.said for line in lines if line.said]
        self.progress = [line.progress for line in lines if line.progress and line.progress.of]
        self.plan = plan


@pytest.fixture
def gpu(monkeypatch):
    """There is a GPU."""
    monkeypatch.setattr(builder, "look", lambda: GPU)


@pytest.fixture(params=VERSIONS)
def trt(request, monkeypatch, gpu):
    """Each version of TensorRT in turn, as the one that is installed."""
    return install(request.param, monkeypatch)


def install(version: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = make_tensorrt(version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def major(trt: Any) -> int:
    return int(trt.__version__.partition(".")[0])


@pytest.fixture
def make(tmp_path):
    """Builds a model with options of `BuildSettings`, and others of the request."""

    def make(model: Any = ADD, request: dict[str, Any] | None = None, **options: Any) -> Built:
        path = save(model, tmp_path)
        output = tmp_path / "model.plan"
        asked = BuildRequest(
            source=ModelSource(str(path), "m"), build=BuildSettings(**options), output=str(output), **(request or {})
        )
        lines: list[Line] = []
        record = build(asked, lines.append)
        return Built(record, lines, json.loads(output.read_bytes()))

    return make


Make = Callable[..., Built]


# --- What each version is told -------------------------------------------------------------------


def test_types_come_from_the_file_where_the_version_can(trt, make: Make):
    plan = make().plan
    assert plan["flags"] == []
    assert plan["network"] == {
        8: ["EXPLICIT_BATCH"], 10: ["EXPLICIT_BATCH", "STRONGLY_TYPED"], 11: ["STRONGLY_TYPED"],
    }[major(trt)]  # fmt: skip


def test_float16_is_a_flag_or_in_the_file(trt, make: Make, tmp_path):
    built = make(MODELS["mlp"].model, fp16=True)
    changed = tmp_path / "changed.onnx"
    if major(trt) < 11:
        assert (built.plan["network"], built.plan["flags"]) == (["EXPLICIT_BATCH"], ["FP16"])
        assert not changed.exists()
        assert "precision: float16 where it pays" in built.said
    else:
        assert (built.plan["network"], built.plan["flags"]) == (["STRONGLY_TYPED"], [])
        assert {t.data_type for t in onnx.load(changed).graph.initializer} == {onnx.TensorProto.FLOAT16}
        assert "precision: float16" in built.said
    assert built.plan["inputs"] == {"x": "FLOAT"}


def test_dtypes_of_inputs_and_outputs_are_in_the_file(trt, make: Make):
    built = make(io={"a": "uint8", "sum": "fp16"})
    assert built.plan["inputs"] == {"a": "UINT8", "b": "FLOAT"}
    assert [tensor.dtype for tensor in built.record.tensors] == ["uint8", "float32", "float16"]
    assert {"a: uint8 for float32", "sum: float16 for float32", "precision: as in the file"} <= {*built.said}


@pytest.mark.parametrize("fp16", [False, True])
def test_int8_needs_a_quantized_model_where_types_are_not_those_of_the_file(fp16, trt, make: Make):
    if major(trt) > 10 or (major(trt) == 10 and not fp16):
        assert make(io={"a": "int8"}, fp16=fp16).plan["inputs"]["a"] == "INT8"
        return
    with pytest.raises(ModelError, match=r"takes int8 .* of quantized models alone, .*; choose --io uint8"):
        make(io={"a": "int8"}, fp16=fp16)
    quantized = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> q (float[N,3] a) => (float[N,3] sum) <float s = {0.1}> '
        "{ b = QuantizeLinear(a, s) sum = DequantizeLinear(b, s) }"
    )
    assert make(quantized, io={"a": "int8"}, fp16=fp16).plan["inputs"]["a"] == "INT8"


def test_lanes_can_share_a_profile(trt, make: Make):
    assert make().plan["preview"] == ([["PROFILE_SHARING_0806", True]] if major(trt) < 11 else [])


def test_a_plan_needs_no_cudnn(trt, make: Make):
    assert make().plan["sources"] == ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]


def test_profiles_and_workspace(trt, make: Make):
    plan = make(workspace_bytes=1 << 30, profiles={"a": Profile((1,), (2,), (4,))}, request={"max_batch": 6}).plan
    assert plan["workspace"] == 1 << 30
    assert plan["profiles"] == [{"a": [[1, 3], [2, 3], [4, 3]], "b": [[1, 3], [3, 3], [6, 3]]}]


@pytest.mark.parametrize(("asked", "level"), [({}, 3), ({"optimization_level": 0}, 0), ({"optimization_level": 5}, 5)])
def test_how_long_to_look_for_kernels(asked, level, trt, make: Make):
    assert make(**asked).plan["level"] == level


def test_several_profiles(trt, make: Make):
    a = [Profile((1,), (2,), (4,)), Profile((8,), (8,), (16,))]
    built = make(profiles={"a": a[0]}, more=({"a": a[1]},), request={"max_batch": 16})
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
def test_formats(io, formats, trt, make: Make):
    assert make(IMAGES, io=io).plan["formats"] == formats


@pytest.mark.parametrize(
    ("io", "error", "text"),
    [
        ({"x": "fp16:hwc16"}, ConfigError, r"--io fp16:hwc16: TensorRT .* has no such format; it has chw2, .*, hwc8$"),
        ({"v": "fp16:chw16"}, ModelError, r"--io v=fp16:chw16: its shape is \(-1, 3\), .*; choose --io v=fp16$"),
    ],
)
def test_formats_that_cannot_be(io, error, text, trt, make: Make):
    with pytest.raises(error, match=text):
        make(IMAGES, io=io)


def test_axes_of_which_only_the_name_is_equal_may_differ_in_size(trt, make: Make):
    """TensorRT holds axes of one name to one size, and "?" is what Paddle calls all that are open."""
    model = parse("g (float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Neg(x) }")
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "?"
    plan = make(model, profiles={"x": Profile((1, 3, 2, 8), (1, 3, 4, 8), (2, 3, 8, 16))}).plan
    assert plan["axes"] == {"x": ["N", "", "x_axis_2", "x_axis_3"]}
    assert make(IMAGES).plan["axes"]["x"] == ["N", "", "", ""]


def test_a_format_that_tensorrt_does_not_take_is_named(trt, make: Make):
    trt.fails = "Assertion allowedFormatSet != FormatSet::kNONE failed"
    with pytest.raises(
        ModelError, match=r"kNONE failed; .*; leave out the format of --io x=fp16:chw4, or choose another"
    ):
        make(IMAGES, io={"x": "fp16:chw4"})


def test_a_model_that_shares_an_input_and_one_without_a_batch(trt, make: Make):
    plan = make(SHARED, request={"max_batch": 8}).plan
    assert plan["profiles"] == [{"x": [[1, 3], [4, 3], [8, 3]]}]
    plan = make(COUNTED, request={"no_batch": True, "shapes": {"x": ((1, 8),), "y": (8,)}}).plan
    assert plan["profiles"] == [{"x": [[1], [8], [8]]}]


def test_a_model_of_fixed_shapes_needs_no_profile(trt, make: Make):
    built = make(MODELS["fixed_batch_one"].model)
    assert (built.plan["profiles"], built.plan["workspace"]) == ([], 0)
    assert built.record.tensors[0] == PlanTensor("x", "input", "float32", (1, 4))


def test_plugins_are_there(trt, make: Make):
    make()
    assert trt.plugins == [""]


# --- The record, and what is said ----------------------------------------------------------------


def test_the_record(trt, make: Make, tmp_path):
    before = datetime.now(timezone.utc).replace(microsecond=0)
    record = make(fp16=True).record
    plan = (tmp_path / "model.plan").read_bytes()
    assert (record.flavour, record.version) == ("tensorrt", trt.__version__)
    assert (record.gpu, record.compute_capability) == (GPU.name, "9.0")
    assert (record.plan_bytes, record.plan_sha256) == (len(plan), hashlib.sha256(plan).hexdigest())
    assert (record.options, record.max_batch, record.format) == (BuildSettings(fp16=True), 64, 1)
    assert before <= datetime.strptime(record.built, "%Y-%m-%dT%H:%M:%S%z") <= datetime.now(timezone.utc)
    profile = Profile((1, 3), (32, 3), (64, 3))
    assert record.tensors == (
        PlanTensor("a", "input", "float32", (-1, 3), profile),
        PlanTensor("b", "input", "float32", (-1, 3), profile),
        PlanTensor("sum", "output", "float32", (-1, 3)),
    )


def test_what_was_decided_is_said(trt, make: Make):
    said = make().said
    assert said[0] == f"TensorRT {trt.__version__} for compute capability 9.0 ({GPU.name})"
    assert "input a: float32 (?, 3), from 1x3, best 32x3, to 64x3" in said
    assert said[-1] == "output sum: float32 (?, 3)"


def test_progress_where_the_version_tells(trt, make: Make):
    progress = make().progress
    if major(trt) < 10:
        assert progress == []
        return
    done = [step.done for step in progress]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 1000)
    assert {step.phase for step in progress} >= {"Building engine", "Optimizing graph", "Computing profile costs"}


def test_a_description_builds_nothing(trt, tmp_path):
    path = save(ADD, tmp_path)
    trt.without_driver = True
    answer = describe(BuildRequest(source=ModelSource(str(path), "m")))
    assert (answer.flavour, answer.version, len(answer.source_sha256)) == ("tensorrt", trt.__version__, 64)
    assert [*tmp_path.iterdir()] == [path]


def test_a_description_has_the_digest_of_the_record(trt, make: Make, tmp_path):
    record = make().record
    answer = describe(BuildRequest(source=ModelSource(str(tmp_path / "model.onnx"), "m")))
    assert answer.source_sha256 == record.source_sha256


# --- Phases --------------------------------------------------------------------------------------


@pytest.fixture
def phases():
    seen: list[tuple[str, int]] = []
    made = Phases(lambda line: seen.append((line.progress.phase, line.progress.done)))
    return made, seen


def test_a_phase_inside_a_step_takes_half_of_what_is_left_of_it(phases):
    made, seen = phases
    made.start("all", None, 2)
    made.start("first", "all", 4)
    made.step("first", 1)
    made.finish("first")
    made.start("second", "all", 1)
    made.step("second", 0)
    made.finish("second")
    made.step("all", 0)
    made.step("all", 1)
    assert seen == [
        ("all", 0), ("first", 0), ("first", 125), ("all", 250), ("second", 250), ("second", 375), ("all", 500),
        ("all", 1000),
    ]  # fmt: skip


def test_odd_reports_do_no_harm(phases):
    made, seen = phases
    made.step("unknown", 3)
    made.finish("unknown")
    made.start("empty", None, 0)
    made.step("empty", 5)
    made.start("orphan", "unknown", 2)
    made.finish("orphan")
    assert [done for _, done in seen] == [0, 1000, 1000]


# --- Timing cache --------------------------------------------------------------------------------


def test_timings_are_kept_for_the_next_build(trt, make: Make, tmp_path):
    folder = tmp_path / "cache" / "timing"
    file = folder / f"tensorrt-{trt.__version__}-NVIDIA-H100-80GB-HBM3-9.0.timing"
    for builds in ("+", "++"):
        make(request={"timing_cache": str(folder)})
        assert [*folder.iterdir()] == [file]
        assert file.read_text() == trt.__version__ + builds


def test_timings_that_do_not_fit_are_left_out(trt, make: Make, tmp_path):
    make(request={"timing_cache": str(tmp_path / "timing")})
    (file,) = (tmp_path / "timing").iterdir()
    file.write_text("of another version")
    make(request={"timing_cache": str(tmp_path / "timing")})
    assert file.read_text() == trt.__version__ + "+"


def test_without_a_folder_for_timings_a_build_goes_on(trt, make: Make, tmp_path):
    (tmp_path / "file").touch()
    assert make(request={"timing_cache": str(tmp_path / "file" / "timing")}).record.plan_bytes


# --- Refusals ------------------------------------------------------------------------------------


def test_an_operator_that_tensorrt_does_not_have(trt, make: Make):
    with pytest.raises(ModelError) as raised:
        make(BAD_MODELS["unknown operator"][0])
    assert "operator NoSuchThing (node 0): TensorRT does not have it; export it" in str(raised.value)


def test_an_input_that_decides_about_shapes(trt, make: Make):
    with pytest.raises(ModelError, match="input 'shape_s' decides about shapes"):
        make("g (float[N,4] x, int64[2] shape_s) => (float[K,L] y) { y = Reshape(x, shape_s) }")


def test_a_build_that_fails_says_what_tensorrt_said(trt, make: Make, tmp_path):
    trt.fails = "2: [builder.cpp::build::5] Error Code 2: Internal Error (Assertion k < n failed. )"
    with pytest.raises(ModelError) as raised:
        make()
    assert str(raised.value) == (
        f"TensorRT {trt.__version__} does not take {tmp_path / 'model.onnx'}: Assertion k < n failed; "
        "change --shapes or the model"
    )
    assert not (tmp_path / "model.plan").exists()


def test_a_profile_that_is_refused(trt, make: Make):
    trt.refuses_profiles = True
    with pytest.raises(ModelError, match="the shapes do not fit; change --shapes"):
        make()


def test_a_builder_that_cannot_be_made(trt, make: Make):
    trt.without_driver = True
    with pytest.raises(DeviceUnavailable, match="cannot build here: CUDA initialization failure with error: 35"):
        make()


@pytest.mark.parametrize("error", [DeviceUnavailable("no driver"), MissingExtra("no cuda-python")])
def test_without_a_gpu_tensorrt_is_not_even_started(error, make: Make, monkeypatch):
    trt = install("8.6.0", monkeypatch)
    monkeypatch.delattr(trt, "Builder")

    def look() -> GpuInfo:
        raise error

    monkeypatch.setattr(builder, "look", look)
    with pytest.raises(type(error), match=str(error)):
        make()


def test_only_the_flavour_for_rtx_builds_for_a_gpu_that_is_not_here(trt, make: Make):
    with pytest.raises(ConfigError, match="leave it out, or add --flavour rtx"):
        make(compute_capability="8.9")


def test_no_room_for_the_plan(trt, make: Make, tmp_path, monkeypatch):
    def write_bytes(self: Path, data: object) -> int:
        raise OSError(28, "No space left on device")

    path = save(ADD, tmp_path)
    request = BuildRequest(source=ModelSource(str(path), "m"), output=str(tmp_path / "model.plan"))
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(ConfigError, match="No space left on device; choose another place"):
        build(request, lambda _: None)
