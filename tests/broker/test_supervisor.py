"""What the supervisor makes of its settings before it starts anything; tests/system has the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import msgspec
import pytest

from trtpool.broker import supervisor
from trtpool.broker.supervisor import Supervisor
from trtpool.ipc import errors
from trtpool.ipc.settings import EngineSettings, GpuInfo, ModelSource, PoolSettings

GPU = GpuInfo(
    name="NVIDIA L4",
    uuid="GPU-1",
    pci_bus_id="0000:17:00.0",
    compute_capability="8.9",
    memory_bytes=24 << 30,
    driver=(13, 0),
)


def settings(*paths: str, gpus: tuple[str, ...]) -> PoolSettings:
    models = tuple(ModelSource(path, f"m{number}") for number, path in enumerate(paths))
    return PoolSettings(models=models, run_dir="/r", gpus=gpus, engine=EngineSettings(device="gpu" if gpus else "cpu"))


@pytest.mark.parametrize("kind", ["ModelError", "DeviceUnavailable", "MissingExtra", "ConfigError", "ProtocolError"])
def test_what_a_worker_ended_with_is_raised_as_what_it_was(kind):
    error = getattr(errors, kind)
    assert errors.of_exit_code(error.exit_code) is error


@pytest.mark.parametrize("code", [1, 2, errors.PoolError.exit_code, errors.WorkError.exit_code, 77])
def test_an_exit_code_of_no_single_error_fails_the_start(code):
    assert errors.of_exit_code(code) is errors.StartFailed


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[GpuInfo]]:
    """The GPUs of each time that ONNX files were to be built; they are then called plans."""
    calls: list[Sequence[GpuInfo]] = []

    def ensure_plans(
        asked: PoolSettings, gpus: Sequence[GpuInfo], say: Callable[[str], None], waiting: object
    ) -> PoolSettings:
        calls.append(gpus)
        say("building")
        models = tuple(ModelSource(model.path.replace(".onnx", ".plan"), model.name) for model in asked.models)
        return msgspec.structs.replace(asked, models=models)

    module = ModuleType("trtpool.broker.building")
    monkeypatch.setattr(module, "ensure_plans", ensure_plans, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(supervisor, "probe", lambda gpus, waiting: [GPU for _ in gpus])
    return calls


@pytest.mark.parametrize(
    ("asked", "gpus", "builds", "served"),
    [
        (settings("/a.onnx", "/b.plan", gpus=("0",)), (GPU,), [(GPU,)], ["/a.plan", "/b.plan"]),
        (settings("/b.plan", gpus=("0", "1")), (GPU, GPU), [], ["/b.plan"]),
        (settings("/a.onnx", gpus=()), (), [], ["/a.onnx"]),
    ],
    ids=["ONNX on a GPU", "plans on GPUs", "ONNX on the CPU"],
)
def test_onnx_files_are_built_for_gpus_alone(asked, gpus, builds, served, built):
    said: list[str] = []
    one = Supervisor(asked, lambda _: None, said.append)
    with one._signals.caught(), one._stack:
        assert one._look_at_gpus() == gpus
        assert [request.source.path for request in one._requests] == served
    assert built == builds
    assert said == ["building"] * len(builds)
