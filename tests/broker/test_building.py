"""Plans built on first use, by children with a small copy of TensorRT: what is kept, found, built again and refused."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest

from tests.models import ADD, BAD_MODELS, FIXED_BATCH_ONE, OPEN_ITEM, save
from tests.workers import fake_bindings
from tests.workers.fake_builder import make_package
from trtpool.broker.building import cache_root, ensure_plans, is_intact, record_of, split_by_model
from trtpool.ipc.building import PlanRecord
from trtpool.ipc.errors import ConfigError, MissingExtra, ModelError
from trtpool.ipc.settings import BuildSettings, EngineSettings, GpuInfo, ModelSource, PoolSettings, Profile

pytestmark = pytest.mark.system

H100 = GpuInfo(
    name="NVIDIA H100 80GB HBM3", uuid="GPU-1", pci_bus_id="0", compute_capability="9.0", memory_bytes=1, driver=(13, 0)
)


class Cache:
    """A cache of its own, a machine with a GPU and a TensorRT, for children of this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.plans = folder / "cache" / "trtpool" / "plans"
        self.said: list[str] = []
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
        fake_bindings.make(folder / "fake")
        self._path = os.environ["PYTHONPATH"]
        for name, value in fake_bindings.machine({"0": fake_bindings.gpu(0)}).items():
            monkeypatch.setenv(name, value)
        self.tensorrt()

    def tensorrt(self, **told: Any) -> None:
        """Install a TensorRT that does what it is told."""
        self._monkeypatch.setenv("PYTHONPATH", self._path)
        for name, value in make_package(self.folder / "fake", self.folder / "log", **told).items():
            self._monkeypatch.setenv(name, value)

    @property
    def builds(self) -> int:
        log = self.folder / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def ensure(self, *models: Path, gpu: GpuInfo = H100, **settings: Any) -> list[Path]:
        """Plans for `models`, which are called "m0" and so on."""
        return [Path(source.path) for source in self.ensure_settings(*models, gpu=gpu, **settings).models]

    def ensure_settings(self, *models: Path, gpu: GpuInfo = H100, **settings: Any) -> PoolSettings:
        sources = tuple(ModelSource(str(path), f"m{number}") for number, path in enumerate(models))
        wanted = PoolSettings(models=sources, run_dir="/run", gpus=("0",), **settings)
        return ensure_plans(wanted, [gpu], self.said.append)

    def files(self) -> list[str]:
        """What is in the cache, but for the locks."""
        return sorted(path.name for path in self.plans.iterdir() if path.suffix != ".lock")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return Cache(tmp_path, monkeypatch)


@pytest.fixture
def model(tmp_path):
    return save(ADD, tmp_path, "det")


# --- Built once ----------------------------------------------------------------------------------


def test_a_plan_is_built_and_then_found(cache, model):
    (plan,) = cache.ensure(model)
    assert plan.parent == cache.plans
    assert plan.name.startswith("det-")
    assert cache.files() == [plan.name, f"{plan.name}.json"]
    record = msgspec.json.decode(record_of(plan).read_bytes(), type=PlanRecord)
    assert (record.source, record.gpu, record.plan_bytes) == (str(model), H100.name, plan.stat().st_size)
    assert "m0: building a plan of det.onnx for NVIDIA H100 80GB HBM3 with tensorrt 10.13.0.35" in cache.said[0]
    assert "input a: float32 (?, 3), from 1x3, best 32x3, to 64x3" in "\n".join(cache.said)
    assert cache.said[-1].startswith("model m0: built in ")
    assert cache.said[-1].endswith(f"kept in {plan}")

    cache.said.clear()
    assert cache.ensure(model) == [plan]
    assert cache.said == [f"model m0: the plan for {H100.name} was found in the cache, {plan}"]
    assert cache.builds == 1


def test_progress_is_said_now_and_then(cache, model):
    cache.ensure(model)
    told = [line for line in cache.said if "% built" in line]
    assert [line.split()[2] for line in told] == ["25%", "50%", "75%", "100%"]


def test_the_settings_keep_all_but_the_path(cache, model):
    before = PoolSettings(
        models=(ModelSource(str(model), "det"),),
        run_dir="/run",
        gpus=("0",),
        max_batch=4,
        build=BuildSettings(fp16=True),
    )
    after = ensure_plans(before, [H100, H100], cache.said.append)
    assert after.models[0].name == "det"
    assert msgspec.structs.replace(after, models=before.models) == before


def test_a_pool_of_plans_asks_nobody(cache, tmp_path):
    plan = tmp_path / "m.plan"
    settings = PoolSettings(models=(ModelSource(str(plan), "m"),), run_dir="/run", gpus=("0",))
    other = msgspec.structs.replace(H100, name="NVIDIA L4")
    assert ensure_plans(settings, [H100, other], cache.said.append) is settings
    assert (cache.said, cache.plans.exists()) == ([], False)


def test_plans_stay_beside_models_that_are_built(cache, model, tmp_path):
    plan = tmp_path / "other.plan"
    built, kept = cache.ensure(model, plan)
    assert kept == plan
    assert is_intact(built)


OTHER_GPU = {"gpu": msgspec.structs.replace(H100, name="NVIDIA H200")}
OTHER_DRIVER = {"gpu": msgspec.structs.replace(H100, driver=(12, 9))}
PROFILE = Profile((1,), (2,), (4,))


@pytest.mark.parametrize(
    "changed",
    [
        {"build": BuildSettings(fp16=True)}, {"build": BuildSettings(io={"a": "fp16"})}, {"max_batch": 65}, OTHER_GPU,
        {"build": BuildSettings(profiles={"a": PROFILE, "b": PROFILE})},
        {"build": BuildSettings(workspace_bytes=1 << 20)}, OTHER_DRIVER,
    ],
    ids=["fp16", "io", "max_batch", "GPU", "profiles", "workspace", "driver"],
)  # fmt: skip
def test_a_plan_for_something_else_is_another(changed, cache, model):
    assert cache.ensure(model, **changed) != cache.ensure(model)
    assert cache.builds == 2


def test_a_plan_of_another_file_or_by_another_version_is_another(cache, model):
    plans = {*cache.ensure(model)}
    changed = onnx.load(model)
    changed.producer_name = "another"
    model.write_bytes(changed.SerializeToString())
    plans.update(cache.ensure(model))
    cache.tensorrt(version="11.4.0.106")
    plans.update(cache.ensure(model))
    assert (len(plans), cache.builds) == (3, 3)


@pytest.mark.parametrize(
    "changed",
    [
        {"max_batch": 8},
        {"engine": EngineSettings(device="gpu", lanes=2)},
        {"gpu": msgspec.structs.replace(H100, uuid="GPU-2", driver=(13, 1))},
    ],
    ids=["smaller batch", "lanes", "same kind of GPU"],
)
def test_what_does_not_change_a_plan(changed, cache, model):
    assert cache.ensure(model, **changed) == cache.ensure(model)
    assert cache.builds == 1


def test_item_shapes_are_built_in(cache, tmp_path):
    model = save(OPEN_ITEM, tmp_path)
    plans = set()
    for shape in ((3, 4, 5), (3, 8, 8)):
        (plan,) = cache.ensure(model, engine=EngineSettings(device="gpu", shapes={"x": shape}))
        plans.add(plan)
        (x, _) = msgspec.json.decode(record_of(plan).read_bytes(), type=PlanRecord).tensors
        assert x.profile == Profile((1, *shape), (32, *shape), (64, *shape))
    assert len(plans) == 2


def test_options_go_to_the_model_that_they_name(cache, model, tmp_path):
    other = save(FIXED_BATCH_ONE, tmp_path, "one")
    plans = cache.ensure(model, other, build=BuildSettings(io={"m0:a": "uint8", "m1:x": "fp16"}))
    inputs = [msgspec.json.decode(plan.read_bytes())["inputs"] for plan in plans]
    assert inputs == [{"a": "UINT8", "b": "FLOAT"}, {"x": "HALF"}]


# --- Damaged, killed, at once --------------------------------------------------------------------


def truncate(plan: Path) -> None:
    os.truncate(plan, plan.stat().st_size - 1)


def flip(plan: Path) -> None:
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)


def cut_record(plan: Path) -> None:
    record_of(plan).write_text("{")


@pytest.mark.parametrize("damage", [truncate, flip, cut_record, lambda plan: record_of(plan).unlink()])
def test_a_damaged_plan_is_built_again(damage, cache, model):
    (plan,) = cache.ensure(model)
    damage(plan)
    assert not is_intact(plan)
    cache.said.clear()
    assert cache.ensure(model) == [plan]
    assert cache.said[0] == "model m0: the plan in the cache is damaged, and is built again"
    assert is_intact(plan)
    assert cache.builds == 2


def test_what_a_killed_build_left_goes_with_the_next(cache, model):
    (plan,) = cache.ensure(model)
    plan.unlink()
    left = cache.plans / f".{plan.stem}"
    left.mkdir()
    (left / "model.plan").write_bytes(b"half")
    cache.ensure(model)
    assert cache.files() == [plan.name, f"{plan.name}.json"]


def test_two_pools_build_once(cache, model, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    cache.tensorrt(first=f"open({str(gate)!r}).read()")
    waits = threading.Event()
    said: dict[int, list[str]] = {1: [], 2: []}
    plans: dict[int, Any] = {}
    settings = PoolSettings(models=(ModelSource(str(model), "m"),), run_dir="/run", gpus=("0",))

    def pool(number: int) -> None:
        def say(line: str) -> None:
            said[number].append(line)
            if "another pool builds this plan now" in line:
                waits.set()

        plans[number] = ensure_plans(settings, [H100], say).models[0]

    threads = [threading.Thread(target=pool, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    assert waits.wait(60)
    gate.write_text("")  # opens when the build has come to read it
    for thread in threads:
        thread.join(60)
    assert plans[1] == plans[2]
    assert cache.builds == 1
    last = sorted(lines[-1].split(":")[1].split(" in ")[0] for lines in said.values())
    assert last == [" another pool built the plan for NVIDIA H100 80GB HBM3, " + plans[1].path, " built"]


class Stopped(Exception):
    """As the supervisor's, by a signal."""


def test_a_build_that_is_stopped_leaves_nothing(cache, model, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    cache.tensorrt(first=f"open({str(gate)!r}).read()")  # which nobody ever writes to
    entered = []

    @contextmanager
    def waiting() -> Iterator[None]:
        entered.append(1)
        yield

    def say(line: str) -> None:
        if "output sum" in line:  # the last thing that is said before TensorRT builds
            raise Stopped

    settings = PoolSettings(models=(ModelSource(str(model), "m"),), run_dir="/run", gpus=("0",))
    with pytest.raises(Stopped):
        ensure_plans(settings, [H100], say, waiting)
    assert len(entered) == 2  # for who would build, and for the build
    assert cache.files() == []


# --- Refused -------------------------------------------------------------------------------------


def test_gpus_of_different_kinds_need_a_pool_each(cache, model):
    settings = PoolSettings(models=(ModelSource(str(model), "m"),), run_dir="/run", gpus=("0", "1"))
    other = msgspec.structs.replace(H100, name="NVIDIA L4")
    with pytest.raises(ConfigError, match=r"different kinds \(NVIDIA H100 80GB HBM3, NVIDIA L4\).* one pool for each"):
        ensure_plans(settings, [H100, other], cache.said.append)


def test_a_cache_that_cannot_be_written(cache, model, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot write to .*/file/trtpool/plans: Not a directory; .*XDG_CACHE_HOME"):
        cache.ensure(model)


def test_a_model_that_tensorrt_refuses(cache, tmp_path):
    with pytest.raises(ModelError, match="operator NoSuchThing"):
        cache.ensure(save(BAD_MODELS["unknown operator"][0], tmp_path))
    assert cache.files() == []


def test_a_file_that_is_not_there(cache, tmp_path):
    with pytest.raises(ModelError, match=r"cannot read the model .*nothing\.onnx: No such file"):
        cache.ensure(tmp_path / "nothing.onnx")


def test_a_builder_that_crashes(cache, model):
    cache.tensorrt(first="os.abort()")
    with pytest.raises(ModelError, match=r"building a plan ended with SIGABRT"):
        cache.ensure(model)
    assert cache.files() == []


def test_no_tensorrt(cache, model, tmp_path):
    for name in ("tensorrt", "tensorrt_rtx"):
        (tmp_path / "fake" / name).mkdir(exist_ok=True)
        (tmp_path / "fake" / name / "__init__.py").write_text("raise ImportError('not here')")
    with pytest.raises(MissingExtra, match=r"pip install 'trtpool\[tensorrt\]'"):
        cache.ensure(model)


# --- Parts ---------------------------------------------------------------------------------------


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, root in (("/c", "/c/trtpool"), ("", f"{tmp_path}/.cache/trtpool"), ("c", f"{tmp_path}/.cache/trtpool")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert str(cache_root()) == root

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        cache_root()


@pytest.mark.parametrize(
    ("io", "models", "expected"),
    [
        ({"": "fp16"}, ["a", "b"], [{"": "fp16"}, {"": "fp16"}]),
        ({"a:x": "fp16", "b:x": "uint8", "b:y:0": "fp32"}, ["a", "b"], [{"x": "fp16"}, {"x": "uint8", "y:0": "fp32"}]),
        ({"x": "fp16", "input:0": "int8"}, ["a"], [{"x": "fp16", "input:0": "int8"}]),
        ({"a:x": "fp16"}, ["a"], [{"x": "fp16"}]),
    ],
)
def test_options_of_several_models(io, models, expected):
    parts = split_by_model(BuildSettings(fp16=True, io=io), models)
    assert [part.io for part in parts] == expected
    assert all(part.fp16 for part in parts)


@pytest.mark.parametrize("name", ["x", "c:x", "a:"])
def test_an_option_that_could_be_for_any_model(name):
    with pytest.raises(ConfigError, match=r"--shapes .*: say of which model, such as a:"):
        split_by_model(BuildSettings(profiles={name: PROFILE}), ["a", "b"])


def test_profiles_are_split_too():
    first, second = split_by_model(BuildSettings(profiles={"b:x": PROFILE}), ["a", "b"])
    assert (first.profiles, second.profiles) == ({}, {"x": PROFILE})
