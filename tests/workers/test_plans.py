"""What a plan may be, and what is said of one that cannot be served."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.workers.fake_cuda import FakeRuntime
from tests.workers.fake_tensorrt import (
    VERSIONS,
    Tensor,
    batched,
    installed,
    make_module,
    neg,
    write_plan,
)
from trtpool.ipc.errors import ConfigError, DeviceUnavailable, MissingExtra, ModelError
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.ipc.tensors import TensorSpec
from trtpool.workers.cuda import Cuda
from trtpool.workers.engine import EngineError
from trtpool.workers.flavours import take_errors
from trtpool.workers.plan_describe import DTYPES
from trtpool.workers.plans import Plan

MAGIC = {"tensorrt": b"ftrt", "lean": b"ftrt", "rtx": b"vtrt"}
Y = Tensor("y", ("N", 4))


@pytest.fixture
def runtime():
    made = FakeRuntime()
    yield made
    made.check()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.plan"


def load(path: Path, runtime: FakeRuntime, module: str = "tensorrt", version: str = "", **settings: Any) -> Plan:
    """Load a plan where `module` is the one flavour that is installed."""
    with installed(make_module(module, runtime, version)):
        return Plan(ModelSource(str(path), "a"), EngineSettings(**settings), Cuda(runtime))


def refusal(path: Path, runtime: FakeRuntime, module: str = "tensorrt", version: str = "", **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, runtime, module, version, **settings)
    assert type(caught.value) is ModelError
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, inputs: Sequence[Tensor], outputs: Sequence[Tensor] = (Y,), **options: Any) -> None:
    write_plan(path, "neg", inputs, outputs, **options)


# --- Plans that are served -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavour", "version"),
    [("tensorrt", "8.6.0.12"), *VERSIONS.items()],
)
def test_a_plan_is_described(flavour, version, path, runtime):
    write_plan(path, *neg(2, 9), magic=MAGIC[flavour], version=[*map(int, version.split("."))])
    plan = load(path, runtime, flavour, version)
    assert (plan.spec.name, plan.spec.path) == ("a", str(path))
    assert plan.spec.inputs == (TensorSpec("x", "float32", (4,)),)
    assert plan.spec.outputs == (TensorSpec("y", "float32", (4,)),)
    assert (plan.spec.batch_least, plan.spec.batch_limit) == (2, 9)


def test_a_relative_path_becomes_absolute(path, runtime, monkeypatch):
    write_plan(path, *neg())
    monkeypatch.chdir(path.parent)
    assert load(Path(path.name), runtime).spec.path == str(path)


def test_every_dtype(path, runtime):
    inputs = [batched(f"{dtype}_in", (2,), dtype) for dtype in DTYPES]
    outputs = [Tensor(f"{dtype}_out", ("N", 2), dtype=dtype) for dtype in DTYPES]
    write_plan(path, "same", inputs, outputs)
    spec = load(path, runtime).spec
    assert [tensor.dtype for tensor in spec.inputs] == [tensor.dtype for tensor in spec.outputs] == [*DTYPES.values()]


def test_tensors_keep_the_plans_order(path, runtime):
    """TensorRT numbers inputs and outputs as it likes."""
    write_plan(path, "sum", [batched("a", ()), batched("b", ())], [Tensor("sum", ["N"]), Tensor("twice", ["N"])])
    spec = load(path, runtime).spec
    assert [tensor.name for tensor in spec.inputs] == ["a", "b"]
    assert [tensor.name for tensor in spec.outputs] == ["sum", "twice"]
    assert spec.inputs[0].shape == ()


def test_a_batch_of_one_may_be_fixed(path, runtime):
    write(path, [Tensor("x", (1, 4))])
    plan = load(path, runtime)
    assert (plan.spec.batch_least, plan.spec.batch_limit, plan.spec.inputs[0].shape) == (1, 1, (4,))


def test_a_fixed_batch_is_padded(path, runtime):
    write(path, [Tensor("x", (8, 4))], [Tensor("y", (8, 4))])
    plan = load(path, runtime)
    assert (plan.spec.batch_least, plan.spec.batch_limit, plan.spec.inputs[0].shape) == (8, 8, (4,))


def test_a_batch_is_one_that_all_inputs_take(path, runtime):
    write(path, [batched("a", (4,), least=2, most=9), batched("b", (4,), least=1, most=6)])
    plan = load(path, runtime)
    assert (plan.spec.batch_least, plan.spec.batch_limit) == (2, 6)


def test_inputs_without_a_batch_axis_are_shared(path, runtime):
    inputs = [Tensor("b", (2, 4)), batched("x", (4,)), Tensor("k", ())]
    write(path, inputs)
    plan = load(path, runtime)
    assert (plan.spec.batch_least, plan.spec.batch_limit) == (1, 64)
    assert [(one.name, one.shape, one.shared) for one in plan.spec.inputs] == [
        ("b", (2, 4), True), ("x", (4,), False), ("k", (), True),
    ]  # fmt: skip


def test_a_plan_without_a_batch_axis_is_called_item_by_item(path, runtime):
    write_plan(path, "whole", [Tensor("x", (2, 3))], [Tensor("y", ()), Tensor("z", (2,))])
    spec = load(path, runtime, no_batch=("a",)).spec
    assert (spec.batched, spec.batch_limit, spec.inputs[0].shape) == (False, 1, (2, 3))
    assert [one.shape for one in spec.outputs] == [(), (2,)]


@pytest.mark.parametrize("partial", ["pad", "refuse"])
@pytest.mark.parametrize("profiles", [(), [[(8, 4)] * 3]])
def test_partial_batches_of_the_only_size_may_be_refused(partial, profiles, path, runtime):
    write(path, [Tensor("x", (-1 if profiles else 8, 4), profiles)], [Tensor("y", ("N", 4))])
    spec = load(path, runtime, partial=partial).spec
    assert (spec.batch_least, spec.batch_limit, spec.whole_slots) == (8, 8, partial == "refuse")


def profiled(*ranges: tuple[tuple[int, int], tuple[int, int]]) -> Tensor:
    """An input ``(N, T)`` with a profile for each range of N and T, best at the largest."""
    return Tensor("x", (-1, -1), [[(n[0], t[0]), (n[1], t[1]), (n[1], t[1])] for n, t in ranges])


T = Tensor("y", ("N", "x.1"))


def test_profiles_for_other_batches_make_one_range(path, runtime):
    write(path, [profiled(((1, 16), (4, 4)), ((32, 128), (4, 4)))], [T])
    spec = load(path, runtime).spec
    assert (spec.batch_least, spec.batch_limit, spec.profiles) == (1, 128, ())
    assert spec.inputs[0].least is None


def test_profiles_for_other_items_are_all_served_in_batches_that_each_takes(path, runtime):
    write(path, [profiled(((1, 64), (1, 8)), ((1, 4), (16, 32)), ((1, 2), (20, 30)))], [T])
    plan = load(path, runtime)
    assert plan.spec.batch_limit == 4
    assert plan.spec.inputs[0] == TensorSpec("x", "float32", (32,), (1,))
    assert plan.spec.outputs[0] == TensorSpec("y", "float32", (32,), (0,))
    assert plan.spec.describe_profiles() == "x (1 to 8) or x (16 to 32)"
    assert [plan.spec.covers(((size,),)) for size in (8, 9, 15, 16, 32)] == [True, False, False, True, True]
    assert plan.spec.largest == ((32,),)


def test_equal_profiles_count_once(path, runtime):
    write(path, [profiled(*[((1, 8), (1, 8))] * 3)], [T])
    plan = load(path, runtime)
    assert [profile.number for profile in plan.description.profiles] == [0]
    assert plan.spec.profiles == ()


def test_a_profile_whose_inputs_have_no_batch_in_common_is_left_out(path, runtime):
    a, b = profiled(((1, 4), (1, 8)), ((1, 8), (1, 8))), profiled(((5, 9), (1, 8)), ((5, 9), (1, 8)))
    write(path, [a._replace(name="a"), b._replace(name="b")], [Tensor("y", ("N", "a.1"))])
    plan = load(path, runtime)
    assert [(profile.number, profile.least, profile.most) for profile in plan.description.profiles] == [(1, 5, 8)]


def test_a_range_is_that_of_the_plan_or_a_part_of_it(path, runtime):
    write(path, [OPEN], [TOTAL])
    assert load(path, runtime).spec.inputs[0] == TensorSpec("x", "float32", (3, 32), (3, 8))
    given = load(path, runtime, shapes={"x": (3, (10, 20))})
    assert given.spec.inputs[0] == TensorSpec("x", "float32", (3, 20), (3, 10))
    assert given.description.best_shapes(given.description.profiles[0]) == ((3, 16),)


def test_an_output_that_depends_on_the_data_needs_a_bound(path, runtime):
    write_plan(path, "upto", [batched("x", (4,))], [Tensor("y", ("N", "?")), Tensor("n", ("N", 1))])
    said = refusal(path, runtime)
    assert f"output 'y' of {path} has items of ?, as the data says: give the largest, for example --shape y=100" in said
    plan = load(path, runtime, shapes={"y": (3,)})
    assert plan.spec.outputs == (TensorSpec("y", "float32", (3,), (0,)), TensorSpec("n", "float32", (1,)))
    assert plan.description.told == {"y"}


@pytest.mark.parametrize(
    ("word", "channels", "item"),
    [("CHW2", 3, (2, 5, 6, 2)), ("CHW4", 3, (1, 5, 6, 4)), ("CHW16", 3, (1, 5, 6, 16)), ("CHW32", 33, (2, 5, 6, 32)),
     ("HWC", 3, (5, 6, 3)), ("HWC8", 3, (5, 6, 8)), ("HWC16", 17, (5, 6, 32))],
)  # fmt: skip
@pytest.mark.parametrize("flavour", ["tensorrt", "lean"])
def test_formats_are_described_as_they_lie_in_memory(flavour, word, channels, item, path, runtime):
    x = batched("x", (channels, 5, 6), "HALF")._replace(format=f"Some format (k{word})")
    write(path, [x], [Tensor("y", ("N", 4))], version=[*map(int, VERSIONS[flavour].split("."))])
    spec = load(path, runtime, flavour).spec
    assert spec.inputs[0] == TensorSpec("x", "float16", item, format=word.lower())
    assert str(spec.inputs[0]) == f"x float16:{word.lower()} (N, {', '.join(map(str, item))})"


OPEN = Tensor("x", (-1, 3, -1), [[(1, 3, 8), (4, 3, 16), (8, 3, 32)]])
TOTAL = Tensor("y", ["N"])


def test_an_open_item_shape_is_given(path, runtime):
    write(path, [OPEN], [TOTAL])
    assert load(path, runtime, shapes={"x": (3, 20)}).spec.inputs[0].shape == (3, 20)


def test_an_item_shape_that_only_seems_open_need_not_be_given(path, runtime):
    write(path, [Tensor("x", (-1, -1), [[(1, 4), (4, 4), (8, 4)]])])
    assert load(path, runtime).spec.inputs[0].shape == (4,)


# --- Plans that are not --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        (
            [Tensor("x", ())],
            [Y],
            "(x scalars) have no first axis for the batch: build it of a model with one, or run each item as a ",
        ),
        (
            [Tensor("a", (2, 4)), Tensor("b", (4, 4))],
            [Y],
            "(a 2x4, b 4x4) have different first axes, so none can be the batch",
        ),
        (
            [batched("a", (4,), most=4), batched("b", (4,), least=5)],
            [Y],
            "have no batch size in common: a 1 to 4, b 5 to 64; build it again",
        ),
        ([], [Y], "{path} has no inputs; there is nothing to serve"),
        ([batched("x", (4,))], [], "{path} has no outputs; there is nothing to serve"),
        ([batched("x", (4,))], [Tensor("y", (4,))], "output 'y' of {path} has shape 4 in a batch of 1: its first axis"),
        ([batched("x", (4,))], [Tensor("y", (1, 4))], "output 'y' of {path} has shape 1x4 in a batch of 64"),
        ([batched("x", (4,))], [Tensor("y", ())], "output 'y' of {path} has shape scalars in a batch of 1"),
        ([batched("x", (4,))], [Tensor("y", ("2N", 4))], "has shape 2x4 in a batch of 1: its first axis must be the"),
        ([batched("x", (4,))], [Tensor("y", ("?", 4))], "has shape ?x4 in a batch of 1: its first axis must be the"),
        ([batched("x", (4,))], [Tensor("y", ("N", "N"))], "has shape 64x64 in a batch of 64"),
        ([batched("x", (4,), "INT4")], [Y], "tensor 'x' of {path} has dtype INT4, which planes cannot hold; build it"),
        ([batched("x", (4,))], [Tensor("y", ("N", 4), dtype="INT4")], "tensor 'y' of {path} has dtype INT4"),
        (
            [batched("x", (4,)), batched("s", (2,), "INT32")._replace(location="HOST")],
            [Y],
            "tensor 's' of {path} is read on the host (a shape tensor); make it a constant of the model",
        ),
        (
            [batched("x", (4, 2, 2))._replace(format="Some format (kDLA_LINEAR)")],
            [Y],
            "tensor 'x' of {path} has the format 'Some format (kDLA_LINEAR)', which planes cannot hold; build it with ",
        ),
        (
            [Tensor("x", (-1, -1, 2, 2), [[(1, 3, 2, 2)] * 3], format="Some format (kCHW4)")],
            [Y],
            "has the format 'chw4', which planes cannot hold",
        ),
        ([batched("x", (0,))], [Y], "tensor 'x' of {path} is empty: its shape is Nx0; remove it"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_served_is_refused(inputs, outputs, words, path, runtime):
    write(path, inputs, outputs)
    assert words.format(path=path) in refusal(path, runtime)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"x": (3, 33)}, "--shape x=3x33 does not fit {path}, which was built for items from 3x8 to 3x32"),
        ({"x": (3, 7)}, "--shape x=3x7 does not fit"),
        ({"x": (4, 16)}, "--shape x=4x16 does not fit"),
        ({"x": (16,)}, "--shape x=16 does not fit"),
        ({"x": (3, (8, 33))}, "--shape x=3x8..33 does not fit {path}, which was built for items from 3x8 to 3x32"),
        ({"y": (2,)}, "--shape y=2 does not fit {path}, whose output has items of scalars"),
        ({"x": (3, 16), "z": (1,)}, "--shape z: {path} has no such input; it has x"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(asked, words, path, runtime):
    write(path, [OPEN], [TOTAL])
    assert words.format(path=path) in refusal(path, runtime, shapes=asked)


def test_a_shape_for_what_is_fixed_is_refused_unless_it_is_the_same(path, runtime):
    write_plan(path, *neg())
    assert load(path, runtime, shapes={"x": (4,)}).spec.inputs[0].shape == (4,)
    assert "which was built for items of 4" in refusal(path, runtime, shapes={"x": (5,)})


# --- Files that are no plans ---------------------------------------------------------------------


def test_a_missing_file_is_refused(path, runtime):
    assert "cannot read the plan" in refusal(path, runtime)


def test_a_file_that_may_not_be_read_is_refused(path, runtime, monkeypatch):
    write_plan(path, *neg())

    def denied(*_args: Any, **_kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied; check path and permissions" in refusal(path, runtime)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_is_refused(make, path, runtime):
    make(path)
    assert "is not a file; name the plan itself" in refusal(path, runtime)


def test_an_empty_file_is_refused(path, runtime):
    path.touch()
    assert "is empty; build or copy the plan again" in refusal(path, runtime)


def test_a_file_that_is_no_plan_is_refused(path, runtime):
    path.write_bytes(b"\x08\x07pytorch and some more bytes")
    assert "this is not a TensorRT plan" in refusal(path, runtime)


@pytest.mark.parametrize("left", [20, 28, 100, -1])
def test_a_plan_that_is_cut_short_is_not_taken_for_another_version(left, path, runtime):
    write_plan(path, *neg())
    path.write_bytes(path.read_bytes()[:left])
    said = refusal(path, runtime)
    assert "copy it again, or build it again on this machine from its ONNX file: trtpool build" in said
    assert "was built by version" not in said


def test_a_plan_of_another_version_is_refused(path, runtime):
    write_plan(path, *neg(), version=(8, 6, 1, 6))
    said = refusal(path, runtime)
    assert f"{path} was built by version 8.6.1.6, and here is TensorRT 10.13.0.35; build it again on this mach" in said


def test_a_plan_of_a_newer_format_is_refused_as_one_of_another_version(path, runtime, monkeypatch):
    write_plan(path, *neg(), version=(11, 4, 0, 106))
    monkeypatch.setattr(
        "tests.workers.fake_tensorrt.Runtime._read",
        lambda self, _raw: self._library.error(
            "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion magicTagRead == "
            "kMAGIC_TAG failed.Magic tag does not match)"
        ),
    )
    monkeypatch.setattr("tests.workers.fake_tensorrt.Engine", lambda _library, _body: None)
    assert "was built by version 11.4.0.106, and here is TensorRT 10.13.0.35" in refusal(path, runtime)


def test_a_plan_for_another_gpu_is_refused(path, runtime):
    write_plan(path, *neg(), capability=(8, 6))
    said = refusal(path, runtime)
    assert f"{path} was built for another GPU than Fake GPU; build it again on this machine" in said
    assert "expecting compute 9.0 got compute 8.6" in said


def test_code_for_the_host_must_be_allowed(path, runtime):
    write_plan(path, *neg(), host_code=True)
    assert "if you trust it like a program, start the pool with --allow-host-code" in refusal(path, runtime)
    assert load(path, runtime, host_code=True).spec.batch_limit == 64


@pytest.mark.parametrize("option", ["weights_bytes", "scratch_bytes"])
def test_a_plan_too_large_for_the_device_is_refused(option, path, runtime):
    options: dict[str, Any] = {option: 2 << 30}
    write_plan(path, *neg(), **options)
    with pytest.raises(DeviceUnavailable) as caught:
        load(path, runtime)
    assert f"the GPU's memory is too small for {path}: 1.0 GiB of 1.0 GiB are free; lower" in str(caught.value)


def test_the_tensorrt_that_a_plan_needs_is_named(path, runtime):
    write_plan(path, *neg(), magic=b"vtrt", version=(1, 7, 1, 116))
    with pytest.raises(MissingExtra, match=r"trtpool\[rtx\]"):
        load(path, runtime, "tensorrt")


def test_a_plan_that_the_chosen_tensorrt_cannot_run_is_refused(path, runtime):
    write_plan(path, *neg())
    assert "which TensorRT for RTX cannot run" in refusal(path, runtime, "rtx", flavour="rtx")


# --- Contexts ------------------------------------------------------------------------------------


@pytest.fixture
def stream(runtime):
    made = Cuda(runtime).new_stream()
    yield made
    runtime.cudaStreamDestroy(made)


def test_a_context_says_what_it_refuses(path, runtime, stream):
    write_plan(path, *neg(2, 8))
    context = load(path, runtime).new_context(stream)
    for _ in range(2):  # it was not taken for set
        with pytest.raises(EngineError, match="exceed min ~ max range"):
            context.set_shapes({"x": (9, 4)})
    with pytest.raises(EngineError, match="cannot be at 8"):
        context.bind("x", 8)
    with pytest.raises(EngineError, match="a tensor has no address"):
        context.enqueue({"x": (8, 4)}, int(stream))
    assert context.shape("y") == (8, 4)


def test_a_batch_that_one_input_refuses_is_set_for_none(path, runtime, stream):
    write_plan(path, "sum", [batched("a", (), most=8), batched("b", (), most=8)], [Tensor("sum", ["N"])])
    context = load(path, runtime).new_context(stream)
    eight = {"a": (8,), "b": (8,)}
    context.set_shapes(eight)
    context._raw._engine.inputs["a"] = batched("a", (), most=16)
    with pytest.raises(EngineError):
        context.set_shapes({"a": (9,), "b": (9,)})
    context.set_shapes(eight)
    assert context.shape("sum") == (8,)


def test_a_shape_is_set_when_it_changed_and_only_then(path, runtime, stream):
    write_plan(path, "sum", [batched("a", ()), batched("b", ())], [Tensor("sum", ["N"])])
    context = load(path, runtime).new_context(stream)
    before = runtime.calls["set_input_shape"]
    for shapes, calls in (
        ({"a": (8,), "b": (8,)}, 2),
        ({"a": (8,), "b": (8,)}, 0),
        ({"a": (8,), "b": (7,)}, 1),
        ({"a": (9,), "b": (9,)}, 2),
    ):
        context.set_shapes(shapes)
        assert runtime.calls["set_input_shape"] - before == calls
        before += calls


@pytest.mark.parametrize("where", ["select", "enqueue"])
def test_a_second_context_on_a_profile_that_is_not_shared(where, path, runtime, stream):
    write_plan(path, *neg(), unshared=where, version=(8, 6, 0, 12))
    plan = load(path, runtime, version="8.6.0.12")
    first = plan.new_context(stream)
    with pytest.raises(EngineError, match=r"has been chosen for another|mOptimizationProfile >= 0"):
        plan.new_context(stream).enqueue({"x": (1, 4)}, int(stream))
    first.close()
    assert plan.new_context(stream).shape("y")[1:] == (4,)


def test_a_context_without_a_reason_is_an_error_all_the_same(path, runtime, stream, monkeypatch):
    write_plan(path, *neg())
    plan = load(path, runtime)
    take_errors()
    monkeypatch.setattr(plan._engine, "create_execution_context", lambda: None)
    with pytest.raises(EngineError, match="TensorRT made no execution context"):
        plan.new_context(stream)


def test_nothing_runs_on_a_plan_that_was_closed(path, runtime, stream):
    write_plan(path, *neg())
    plan = load(path, runtime)
    plan.close()
    with pytest.raises(EngineError, match="closed"):
        plan.new_context(stream)


@pytest.mark.parametrize(
    ("flavour", "uncapturable", "can"), [("rtx", True, False), ("rtx", False, True), ("tensorrt", True, True)]
)
def test_only_rtx_knows_beforehand_what_can_be_captured(flavour, uncapturable, can, path, runtime, stream):
    version = [*map(int, VERSIONS[flavour].split("."))]
    write_plan(path, *neg(), magic=MAGIC[flavour], version=version, uncapturable=uncapturable)
    assert load(path, runtime, flavour).new_context(stream).can_capture(int(stream)) is can
