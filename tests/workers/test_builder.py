"""What a build gives TensorRT to read, and what it writes, against a small copy of TensorRT's builder."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from pathlib import Path

import onnx
import pytest

from tests.models import ADD, MODELS, parse, save
from tests.workers.build_rig import GPU, Make, major
from trtpool.ipc.building import BuildRequest, PlanTensor
from trtpool.ipc.errors import ConfigError, ModelError
from trtpool.ipc.settings import BuildSettings, ModelSource, Profile
from trtpool.workers.builder import build, describe

# --- What TensorRT reads -------------------------------------------------------------------------


def test_float16_is_a_flag_or_in_the_file(trt, make_plan: Make, tmp_path):
    built = make_plan(MODELS["mlp"].model, fp16=True)
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


def test_dtypes_of_inputs_and_outputs_are_in_the_file(trt, make_plan: Make):
    built = make_plan(io={"a": "uint8", "sum": "fp16"})
    assert built.plan["inputs"] == {"a": "UINT8", "b": "FLOAT"}
    assert [tensor.dtype for tensor in built.record.tensors] == ["uint8", "float32", "float16"]
    assert {"a: uint8 for float32", "sum: float16 for float32", "precision: as in the file"} <= {*built.said}


@pytest.mark.parametrize("fp16", [False, True])
def test_int8_needs_a_quantized_model_where_types_are_not_those_of_the_file(fp16, trt, make_plan: Make):
    if major(trt) > 10 or (major(trt) == 10 and not fp16):
        assert make_plan(io={"a": "int8"}, fp16=fp16).plan["inputs"]["a"] == "INT8"
        return
    with pytest.raises(ModelError, match=r"takes int8 .* of quantized models alone, .*; choose --io uint8"):
        make_plan(io={"a": "int8"}, fp16=fp16)
    quantized = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> q (float[N,3] a) => (float[N,3] sum) <float s = {0.1}> '
        "{ b = QuantizeLinear(a, s) sum = DequantizeLinear(b, s) }"
    )
    assert make_plan(quantized, io={"a": "int8"}, fp16=fp16).plan["inputs"]["a"] == "INT8"


def test_axes_of_which_only_the_name_is_equal_may_differ_in_size(trt, make_plan: Make):
    """TensorRT holds axes of one name to one size, and "?" is what Paddle calls all that are open."""
    model = parse("g (float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Neg(x) }")
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "?"
    plan = make_plan(model, profiles={"x": Profile((1, 3, 2, 8), (1, 3, 4, 8), (2, 3, 8, 16))}).plan
    assert plan["axes"] == {"x": ["N", "", "x_axis_2", "x_axis_3"]}
    assert make_plan("g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Neg(x) }").plan["axes"]["x"] == ["N", "", "", ""]


# --- The plan and its record ---------------------------------------------------------------------


def test_the_record(trt, make_plan: Make, tmp_path):
    before = datetime.now(timezone.utc).replace(microsecond=0)
    record = make_plan(fp16=True).record
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


def test_what_was_decided_is_said(trt, make_plan: Make):
    said = make_plan().said
    assert said[0] == f"TensorRT {trt.__version__} for compute capability 9.0 ({GPU.name})"
    assert "input a: float32 (?, 3), from 1x3, best 32x3, to 64x3" in said
    assert said[-1] == "output sum: float32 (?, 3)"


def test_a_description_builds_nothing(trt, tmp_path):
    path = save(ADD, tmp_path)
    trt.without_driver = True
    answer = describe(BuildRequest(source=ModelSource(str(path), "m")))
    assert (answer.flavour, answer.version, len(answer.source_sha256)) == ("tensorrt", trt.__version__, 64)
    assert [*tmp_path.iterdir()] == [path]


def test_a_description_has_the_digest_of_the_record(trt, make_plan: Make, tmp_path):
    record = make_plan().record
    answer = describe(BuildRequest(source=ModelSource(str(tmp_path / "model.onnx"), "m")))
    assert answer.source_sha256 == record.source_sha256


def test_no_room_for_the_plan(trt, make_plan: Make, tmp_path, monkeypatch):
    def write_bytes(self: Path, data: object) -> int:
        raise OSError(28, "No space left on device")

    path = save(ADD, tmp_path)
    request = BuildRequest(source=ModelSource(str(path), "m"), output=str(tmp_path / "model.plan"))
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(ConfigError, match="No space left on device; choose another place"):
        build(request, lambda _: None)
