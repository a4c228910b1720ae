"""From settings to a layout; and looking at models in children."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import trtpool
from tests.models import FIXED_BATCH_ONE, MODELS, save
from tests.workers import fake_bindings as fake
from trtpool.broker.planning import error_of, inspect, is_plan, lay_out, probe, requests
from trtpool.ipc import errors
from trtpool.ipc.settings import EngineSettings, GpuInfo, InspectRequest, ModelSource, PoolSettings, Refusal, ShapeRange
from trtpool.ipc.tensors import ModelSpec, TensorSpec


def settings(*names: str, shapes: dict[str, ShapeRange] | None = None, lanes: int = 3, **options: Any) -> PoolSettings:
    sources = tuple(ModelSource(f"/models/{name}.onnx", name) for name in names or ("det",))
    engine = EngineSettings(device="gpu" if "gpus" in options else "cpu", shapes=shapes or {}, lanes=lanes)
    return PoolSettings(models=sources, run_dir="/run/p", engine=engine, **options)


IMAGE = (3, 1024, 1024)


def spec(name: str = "det", limit: int = 0, shape: tuple[int, ...] = IMAGE) -> ModelSpec:
    return ModelSpec(name, "/m", (TensorSpec("x", "float32", shape),), (TensorSpec("y", "float64", ()),), limit)


# --- Shapes --------------------------------------------------------------------------------------


def test_shapes_go_to_the_model_that_they_name():
    one, two = requests(settings("det", "cls", shapes={"det:x": (3, 4), "cls:x": (5,), "cls:z": ()}))
    assert (one.source.name, one.engine.shapes) == ("det", {"x": (3, 4)})
    assert (two.source.name, two.engine.shapes) == ("cls", {"x": (5,), "z": ()})


def test_with_one_model_its_name_need_not_be_said():
    (only,) = requests(settings("det", shapes={"x": (3,), "det:z": (4,)}))
    assert only.engine.shapes == {"x": (3,), "z": (4,)}


def test_no_batch_must_name_a_model():
    chosen = settings("det", "cls")
    chosen = msgspec.structs.replace(chosen, engine=msgspec.structs.replace(chosen.engine, no_batch=("cls", "rec")))
    with pytest.raises(errors.ConfigError, match="--no-batch rec: no model is called that; there are det, cls"):
        requests(chosen)


def test_slots_of_a_model_that_takes_whole_batches_only_are_batches():
    whole = msgspec.structs.replace(spec(limit=6), batch_least=6, whole_slots=True)
    (model,) = lay_out(settings(), [whole]).models
    assert (model.items_per_slot, model.max_batch) == (6, 6)
    assert lay_out(settings(items_per_slot=6), [whole]).models == (model,)
    with pytest.raises(errors.ConfigError, match="so --items-per-slot 3 is not possible"):
        lay_out(settings(items_per_slot=3), [whole])
    with pytest.raises(errors.ConfigError, match="--max-batch 4 is smaller than the batches of 6"):
        lay_out(settings(max_batch=4), [whole])


def test_a_model_with_one_batch_size_has_batches_of_it():
    (model,) = lay_out(settings(), [msgspec.structs.replace(spec(limit=20), batch_least=20)]).models
    assert (model.items_per_slot, model.max_batch) == (1, 20)


def test_engine_settings_reach_each_model():
    chosen = PoolSettings(
        models=(ModelSource("/a", "a"), ModelSource("/b", "b")), run_dir="/r", engine=EngineSettings(threads=3)
    )
    assert [request.engine.threads for request in requests(chosen)] == [3, 3]


@pytest.mark.parametrize(
    ("names", "key", "words"),
    [
        (("det", "cls"), "x", "say --shape MODEL:x=..."),
        (("det",), "cls:x", "no model is called 'cls'; there are det"),
        (("det", "cls"), ":x", "no model is called ''; there are det, cls"),
    ],
)
def test_a_shape_for_no_model_is_refused(names, key, words):
    with pytest.raises(errors.ConfigError, match=words):
        requests(settings(*names, shapes={key: (3,)}))


# --- Plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "plan"),
    [
        ("m.onnx", b"ftrt\0\0", True),
        ("m", b"vtrt", True),
        ("m.onnx", b"\x08\x08\x12\x07pytorch", False),
        ("m.onnx", b"ftr", False),
        ("m.plan", b"", True),
        ("m.engine", None, True),
        ("m.trt", None, True),
        ("m.onnx", None, False),
        ("m.trt.onnx", None, False),
    ],
)
def test_what_is_a_plan(name, content, plan, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert is_plan(tmp_path / name) == plan


def test_a_directory_is_no_plan(tmp_path):
    assert not is_plan(tmp_path)


def test_a_plan_needs_a_gpu():
    with pytest.raises(
        errors.ConfigError,
        match=r"^b.plan is a TensorRT plan, which needs a GPU: name the GPUs to use, such as --gpus 0$",
    ):
        requests(PoolSettings(models=(ModelSource("/a.onnx", "a"), ModelSource("/m/b.plan", "b")), run_dir="/r"))
    (request,) = requests(PoolSettings(models=(ModelSource("/m/b.plan", "b"),), run_dir="/r", gpus=("0",)))
    assert request.source.path == "/m/b.plan"


# --- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "limit", "slots", "max_batch"),
    [
        ({}, 0, 32, 8),  # (1 lane + 1) batches for the worker and 2 for producers
        ({"workers": 3}, 0, 64, 8),
        ({"max_batch": 2}, 0, 8, 2),
        ({"slots": 5}, 0, 5, 8),
        ({}, 1, 4, 1),  # as many as the model takes
        ({"max_batch": 1}, 1, 4, 1),
        ({"items_per_slot": 3}, 0, 11, 8),  # rounded up, so that 32 items fit
        ({"items_per_slot": 20}, 0, 4, 20),
        ({"items_per_slot": 4, "max_batch": 8}, 16, 8, 8),
        ({}, 64, 32, 8),
        # On GPUs, batches as large as the plan takes, and (lanes + 1) of them for each worker.
        ({"gpus": ("0",)}, 64, (4 + 2) * 64, 64),
        ({"gpus": ("0",)}, 2, (4 + 2) * 2, 2),
        ({"gpus": ("0",)}, 0, (4 + 2) * 8, 8),
        ({"gpus": ("0", "1"), "lanes": 2}, 64, (2 * 3 + 2) * 64, 64),
        ({"gpus": ("0", "1"), "workers_per_gpu": 3, "lanes": 1}, 4, (6 * 2 + 2) * 4, 4),
        ({"gpus": ("0",), "max_batch": 16}, 64, (4 + 2) * 16, 16),
        ({"gpus": ("0",), "items_per_slot": 4}, 64, (4 + 2) * 16, 64),
        ({"gpus": ("0",), "slots": 7}, 64, 7, 64),
    ],
)
def test_slots_and_batches_by_default(options, limit, slots, max_batch):
    (model,) = lay_out(settings(**options), [spec(limit=limit)]).models
    assert (model.slots, model.max_batch) == (slots, max_batch)
    assert model.items_per_slot == options.get("items_per_slot", 1)


@pytest.mark.parametrize(
    ("options", "numbers", "slots"),
    [
        ({}, 2, 4096),
        ({}, 1022, 4096),
        ({}, 2046, 2048),  # 8 KiB an item, of 16 MiB
        ({}, 2**16, 63),
        ({}, 2**17, 32),  # what workers and producers need, as of larger ones
        ({"items_per_slot": 64}, 62, 1024),  # a slot takes 16 KiB
        ({"gpus": ("0",), "max_batch": 64}, 2**14, 6 * 64),
        ({"slots": 5}, 2, 5),
    ],
)
def test_models_of_small_items_have_many_slots_by_default(options, numbers, slots):
    (model,) = lay_out(settings(**options), [spec(shape=(numbers,))]).models
    assert model.slots == slots


def test_each_model_has_slots_of_its_own():
    layout = lay_out(settings("a", "b"), [spec("a"), spec("b", limit=1)])
    assert [(model.spec.name, model.slots) for model in layout.models] == [("a", 32), ("b", 4)]
    layout.validate()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"items_per_slot": 5}, "so --items-per-slot 5 is too large; lower it, or export the model"),
        ({"max_batch": 5}, "so --max-batch 5 is too large; lower it, or export the model"),
        ({"max_batch": 5, "gpus": ("0",)}, "so --max-batch 5 is too large; lower it, or build the plan for larger"),
    ],
)
def test_more_than_a_model_takes_is_refused(options, words):
    with pytest.raises(errors.ConfigError, match=f"'det' takes batches of at most 4, {words}"):
        lay_out(settings(**options), [spec(limit=4)])


def test_for_huge_pages_the_arena_is_a_whole_number_of_them():
    models = [spec("a", shape=(8,)), spec("b", shape=(8,))]
    small = lay_out(settings("a", "b", slots=32), models)
    assert small.segment_bytes == 4 * 4096
    huge = lay_out(settings("a", "b", slots=32, huge_pages=True), models)
    assert huge.segment_bytes == 2 << 20
    assert huge.models == small.models
    exact = lay_out(settings("a", slots=1 << 20, huge_pages=True), models[:1])
    assert exact.segment_bytes == 40 << 20


# --- Children ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ModelError", "MissingExtra", "DeviceUnavailable", "ProtocolError"])
def test_a_refusal_is_the_error_that_it_names(kind):
    error = error_of(Refusal(kind, "mend it"))
    assert type(error) is getattr(trtpool, kind)
    assert str(error) == "mend it"


@pytest.mark.parametrize("kind", ["SystemExit", "annotations", "", "NoSuchError", "__class__"])
def test_a_refusal_that_names_no_error_of_ours_fails_the_start(kind):
    assert type(error_of(Refusal(kind, "mend it"))) is trtpool.StartFailed


def wanted(path: Path) -> InspectRequest:
    return InspectRequest(ModelSource(str(path), path.stem), EngineSettings())


@pytest.mark.system
def test_models_are_looked_at_by_children(tmp_path):
    paths = [save(MODELS["mean"].model, tmp_path, "mean"), save(FIXED_BATCH_ONE, tmp_path, "one")]
    mean, one = inspect([wanted(path) for path in paths])
    assert (mean.name, mean.batch_limit, mean.inputs) == ("mean", 0, (TensorSpec("x", "float32", (2, 2)),))
    assert (one.name, one.batch_limit) == ("one", 1)
    bad = tmp_path / "bad.onnx"
    bad.write_text("hello")
    with pytest.raises(errors.ModelError, match="damaged or no ONNX model"):
        inspect([wanted(paths[0]), wanted(bad)])


@pytest.mark.system
def test_who_stops_waiting_leaves_no_child(tmp_path, monkeypatch):
    """As when a signal comes; the children would otherwise wait for their question for ever."""
    children = []

    class Watched(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            children.append(self)

    @contextlib.contextmanager
    def impatient() -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(subprocess, "Popen", Watched)
    with pytest.raises(KeyboardInterrupt):
        inspect([wanted(tmp_path / "a.onnx"), wanted(tmp_path / "b.onnx")], impatient)
    assert [child.returncode for child in children] == [-9, -9]


@pytest.mark.system
@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("os.kill(os.getpid(), 11)", r"/a.onnx: looking at it ended with SIGSEGV \(a crash in native code"),
        ("os._exit(3)", "ended with exit code 3"),
        ("os._exit(0)", "ended with exit code 0"),  # and no answer
    ],
)
def test_a_model_that_ends_the_child_is_named(end, words, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(f"import os\n{end}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(errors.ModelError, match=words):
        inspect([wanted(tmp_path / "a.onnx")])


@pytest.mark.system
def test_models_for_a_gpu_are_looked_at_where_it_is_seen(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(int(os.environ['CUDA_VISIBLE_DEVICES']))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with pytest.raises(errors.ModelError, match="ended with exit code 6"):
        inspect([wanted(tmp_path / "a.plan")], gpu="1")


# --- GPUs ----------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Children see a machine with the GPUs that a test names, see `fake_bindings.machine`."""
    fake.make(tmp_path)
    for name, value in fake.on_path(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def show(*arguments: Any, **options: Any) -> None:
        monkeypatch.setenv("FAKE_CUDA", fake.machine(*arguments, **options)["FAKE_CUDA"])

    return show


@pytest.mark.system
def test_each_gpu_is_looked_at_by_a_child_that_sees_it_alone(machine):
    machine({"2": fake.gpu(2), "0": fake.gpu(0, name="NVIDIA L4", capability=[8, 9])})
    second, first = probe(["2", "0"])
    assert second == GpuInfo(
        name="NVIDIA H100 80GB HBM3",
        uuid=f"GPU-{fake.uuid_of(2)}",
        pci_bus_id="0000:19:00.0",
        compute_capability="9.0",
        memory_bytes=85_000_000_000,
        driver=(13, 0),
    )
    assert (first.name, first.compute_capability, first.uuid) == ("NVIDIA L4", "8.9", f"GPU-{fake.uuid_of(0)}")


@pytest.mark.system
@pytest.mark.parametrize("gpus", [["0", f"GPU-{fake.uuid_of(0)}"], ["0", "0"]])
def test_one_gpu_twice_is_refused(gpus, machine):
    machine(dict.fromkeys(gpus, fake.gpu(0)))
    with pytest.raises(errors.ConfigError) as raised:
        probe(gpus)
    assert str(raised.value) == (
        f"--gpus {','.join(gpus)}: both are GPU-{fake.uuid_of(0)}; name each GPU once, and say --workers-per-gpu for "
        "more workers on it"
    )


@pytest.mark.system
def test_a_gpu_that_cannot_be_used_is_named(machine):
    machine({"0": fake.gpu(0)})
    with pytest.raises(errors.DeviceUnavailable, match=r"^--gpus 3: CUDA finds no GPU 3 here; `nvidia-smi -L` lists"):
        probe(["0", "3"])
    machine({"0": fake.gpu(0)}, first="import signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(errors.DeviceUnavailable, match=r"^--gpus 0: looking at it ended with SIGSEGV"):
        probe(["0"])


@pytest.mark.system
def test_without_cuda_python_a_gpu_cannot_be_looked_at(tmp_path, monkeypatch):
    (tmp_path / "cuda.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(errors.MissingExtra, match=r"--gpus 0: cuda-python cannot be imported \(not here\)"):
        probe(["0"])
