"""`python -m trtpool.workers.build`: JSON in, lines of JSON out, and real plans by TensorRT for RTX, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest

from tests.models import ADD, BAD_MODELS, MODELS, OPEN_ITEM, parse, save
from tests.workers import fake_bindings
from tests.workers.fake_builder import make_package
from trtpool.ipc.building import BuildRequest, Line
from trtpool.ipc.normalization import Normalization
from trtpool.ipc.settings import BuildSettings, ModelSource, Profile
from trtpool.workers.build import answer

pytestmark = pytest.mark.system

TARGET = "8.9"


def ask(request: bytes, **env: str) -> list[Line]:
    """The lines that the process answers `request` with; its exit code must be 0."""
    ended = subprocess.run(
        [sys.executable, "-m", "trtpool.workers.build"],
        input=request,
        capture_output=True,
        env={**os.environ, **env},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    return [msgspec.json.decode(line, type=Line) for line in ended.stdout.splitlines()]


def request(path: Path, output: Path | str = "", *, asked: dict[str, Any] | None = None, **build: Any) -> bytes:
    source = ModelSource(str(path), "m")
    return msgspec.json.encode(
        BuildRequest(source=source, build=BuildSettings(**build), output=str(output), **(asked or {}))
    )


# --- The process ---------------------------------------------------------------------------------


@pytest.fixture
def fakes(tmp_path):
    """An environment with a GPU and TensorRT 10, in small."""
    fake_bindings.make(tmp_path / "fake")
    machine = fake_bindings.machine({"0": fake_bindings.gpu(0)})
    gpu = {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def make(**told: Any) -> dict[str, str]:
        return {**machine, **gpu, **make_package(tmp_path / "fake", tmp_path / "log", **told)}

    return make


def test_nothing_else_reaches_standard_output(fakes, tmp_path):
    env = fakes(first="print('printed'); os.write(1, b'by native code')")
    lines = ask(request(save(ADD, tmp_path), tmp_path / "out.plan"), **env)
    assert lines[-1].built.gpu == fake_bindings.gpu(0)["name"]
    assert any(line.said for line in lines)
    assert any(line.progress for line in lines)
    assert (tmp_path / "out.plan").stat().st_size == lines[-1].built.plan_bytes


def test_errors_are_in_the_refusal_and_not_on_standard_error(fakes, tmp_path):
    command = [sys.executable, "-m", "trtpool.workers.build"]
    given = request(save(ADD, tmp_path), tmp_path / "out.plan")
    for level, shown in ((None, False), ("warning", True)):
        env = {**os.environ, **fakes(fails="it is broken"), **({"TRTPOOL_LOG": level} if level else {})}
        ended = subprocess.run(command, input=given, capture_output=True, env=env, check=True)
        last = msgspec.json.decode(ended.stdout.splitlines()[-1], type=Line)
        assert "it is broken" in last.refusal.text
        assert (b"it is broken" in ended.stderr) == shown


def test_a_model_is_only_described_when_no_output_is_named(fakes, tmp_path):
    (line,) = ask(request(save(ADD, tmp_path)), **fakes())
    assert (line.builder.flavour, line.builder.version) == ("tensorrt", "10.13.0.35")


@pytest.mark.parametrize("garbage", [b"", b"{", b"{}", b'{"source": {"path": 1}}', b"\xff"])
def test_a_request_that_is_none_is_a_protocol_error(garbage):
    assert answer(garbage, lambda _: None).refusal.kind == "ProtocolError"


# --- Real plans ----------------------------------------------------------------------------------


@pytest.fixture
def rtx():
    """TensorRT for RTX, which builds for a GPU that is not here."""
    return pytest.importorskip("tensorrt_rtx", exc_type=ImportError)


def build(path: Path, asked: dict[str, Any] | None = None, **options: Any) -> list[Line]:
    wanted = {"compute_capability": TARGET, **options}
    return ask(request(path, path.with_suffix(".plan"), asked={"flavour": "rtx", **(asked or {})}, **wanted))


BUILDABLE = [name for name in MODELS if name not in ("many_dtypes", "renamed", "bfloat16", "no_batch")]
"""Without those of dtypes that TensorRT does not have or follow, of a Reshape likewise, and of no batch."""


@pytest.mark.parametrize("name", BUILDABLE)
def test_models_are_built(name, rtx, tmp_path):
    path = save(MODELS[name].model, tmp_path)
    record = build(path, {"shapes": dict(MODELS[name].shapes)})[-1].built
    plan = path.with_suffix(".plan").read_bytes()
    assert plan[:4] == b"vtrt"
    assert (len(plan), record.compute_capability, record.gpu) == (record.plan_bytes, TARGET, "")
    assert (record.flavour, record.version) == ("rtx", rtx.__version__)
    assert [tensor.name for tensor in record.tensors] == [
        value.name for part in ("input", "output") for value in getattr(onnx.load(path).graph, part)
    ]
    limit = MODELS[name].batch_limit
    assert {t.profile.max[0] if t.profile else t.shape[0] for t in record.tensors if t.role == "input"} == {limit or 64}


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("io", ["fp32", "fp16", "uint8", "int8"])
def test_dtypes_of_inputs_and_outputs(io, fp16, rtx, tmp_path):
    record = build(save(MODELS["mlp"].model, tmp_path), fp16=fp16, io={"": io})[-1].built
    dtype = {"fp32": "float32", "fp16": "float16"}.get(io, io)
    assert [tensor.dtype for tensor in record.tensors] == [dtype, "float16" if io == "fp16" else "float32"]


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
def test_pixels_are_normalised_in_the_plan(fp16, rtx, tmp_path):
    path = save("g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Neg(x) }", tmp_path)
    how = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    lines = build(path, fp16=fp16, normalize={"x": how})
    assert [tensor.dtype for tensor in lines[-1].built.tensors] == ["uint8", "float32"]
    assert lines[-1].built.options.normalize == {"x": how}
    assert f"x: uint8 for float32, normalised inside: {how}" in [line.said for line in lines]


def test_float16_makes_a_smaller_plan(rtx, tmp_path):
    text = "g (float[N,512] x) => (float[N,512] y) { y = MatMul(x, w) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')
    model.graph.initializer.append(onnx.helper.make_tensor("w", 1, (512, 512), [0.25] * 512 * 512))
    path = save(model, tmp_path)
    full, half = (build(path, fp16=fp16)[-1].built.plan_bytes for fp16 in (False, True))
    assert half < full - 512 * 512  # two bytes less for each weight, and some more code


def test_height_and_width_that_are_both_called_unknown_may_differ(rtx, tmp_path):
    """As in the models of PaddleOCR."""
    model = parse(
        "g (float[N,3,H,W] x) => (float[M,3,P,Q] y) { r = Relu(x) s = Add(r, x) y = Neg(s) }",
    )
    for value in (model.graph.input[0], model.graph.output[0]):
        for axis in (0, 2, 3):
            value.type.tensor_type.shape.dim[axis].dim_param = "?"
    profile = Profile((1, 3, 32, 64), (4, 3, 64, 64), (8, 3, 96, 192))
    (*_, last) = build(save(model, tmp_path), profiles={"x": profile})
    assert last.refusal is None
    assert last.built is not None
    assert last.built.tensors[0].profile == profile


def test_progress_reaches_the_end(rtx, tmp_path):
    progress = [line.progress for line in build(save(ADD, tmp_path)) if line.progress and line.progress.of]
    done = [step.done for step in progress]
    assert done == sorted(done)
    assert done[-1] == progress[-1].of


def test_weights_in_a_file_of_their_own(rtx, tmp_path):
    model = onnx.ModelProto()
    model.CopyFrom(MODELS["mlp"].model)
    path = tmp_path / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    for fp16 in (False, True):
        assert build(path, fp16=fp16)[-1].built.plan_bytes


def test_a_range_of_shapes(rtx, tmp_path):
    profile = Profile((1, 3, 4, 4), (2, 3, 8, 8), (4, 3, 16, 16))
    record = build(save(OPEN_ITEM, tmp_path), profiles={"x": profile})[-1].built
    assert record.tensors[0].profile == profile
    assert record.tensors[0].shape == (-1, 3, -1, -1)


@pytest.mark.parametrize(
    ("model", "options", "kind", "text"),
    [
        (BAD_MODELS["unknown operator"][0], {}, "ModelError", "operator NoSuchThing (node 0): TensorRT does not"),
        (BAD_MODELS["string"][0], {}, "ModelError", "Failed to convert"),
        (BAD_MODELS["sequence"][0], {}, "ModelError", "operator SequenceConstruct (node 0): TensorRT does not"),
        (
            "g (float[N,4] x) => (float[N,4] y) <float[3,3] w = {1,2,3,4,5,6,7,8,9}> { y = MatMul(x, w) }",
            {}, "ModelError", "operator MatMul (node 0): node_of_y: last dimension of input0 = 4",
        ),
        (
            "g (float[N,4] x, int64[2] s) => (float[K,L] y) { y = Reshape(x, s) }",
            {}, "ModelError", "input 's' decides about shapes",
        ),
        (
            "g (float[N,4] x, float[N,4] z) => (float[N,4] y) { y = Add(x, z) }",
            {"profiles": {"x": Profile((1,), (1,), (1,)), "z": Profile((3,), (3,), (3,))}},
            "ModelError", "Input dimensions with this name have different constant values",
        ),
        (ADD, {"compute_capability": "9.0"}, "ConfigError", "8.9, 12.0"),
    ],
    ids=["operator", "string", "sequence", "shape", "shape tensor", "profiles", "GPU"],
)  # fmt: skip
def test_what_tensorrt_refuses(model, options, kind, text, rtx, tmp_path):
    path = save(model, tmp_path)
    refusal = build(path, **options)[-1].refusal
    assert (refusal.kind, text in refusal.text) == (kind, True), refusal.text
    assert "\n" not in refusal.text
    assert "cudaError" not in refusal.text
    assert not path.with_suffix(".plan").exists()


def test_without_a_gpu_a_target_must_be_named(rtx, tmp_path):
    fake_bindings.make(tmp_path / "fake")
    machine = {**fake_bindings.on_path(tmp_path / "fake"), **fake_bindings.machine({}, error=35, driver=0)}
    path = save(ADD, tmp_path)
    (*_, last) = ask(request(path, path.with_suffix(".plan"), asked={"flavour": "rtx"}), **machine)
    assert last.refusal.kind == "DeviceUnavailable"
    assert last.refusal.text.endswith("or build for another GPU: --compute-capability 8.9")
