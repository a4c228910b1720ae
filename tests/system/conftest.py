"""One pool that most tests here share, since a start costs more than most of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

import trtpool
from tests.models import PICKY, save
from tests.system.rig import NEGATE, SLOW, StartedPool, family, pool_of_ones_own, watching
from tests.workers import fake_bindings as fake

SLOTS = 32


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools that are not told where to live do so in the test's own directory."""
    monkeypatch.delenv("TRTPOOL_RUN_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture(scope="session")
def shared_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedPool]:
    """Models "negate", "picky" and "slow" on one worker, batches of up to 4."""
    folder = tmp_path_factory.mktemp("shared")
    models = [save(model, folder, name) for name, model in (("negate", NEGATE), ("picky", PICKY), ("slow", SLOW))]
    with StartedPool(*models, run_dir=folder / "run", slots=SLOTS, max_batch=4, threads=1) as pool:
        yield pool
        with watching(process.pid for process in family(pool.pid)) as wait:
            pool.kill(15)
            assert pool.wait() == 0
            wait()
    assert not pool.run_dir.exists()


@pytest.fixture
def pool(shared_pool: StartedPool) -> Iterator[StartedPool]:
    """The shared pool; a test must leave all of its slots free, and its processes alive: `small` is for the others."""
    processes = shared_pool.broker, shared_pool.worker
    yield shared_pool
    shared_pool.check_at_rest()
    assert (shared_pool.broker, shared_pool.worker) == processes, "another had to take over"


@pytest.fixture
def client(pool: StartedPool, request: pytest.FixtureRequest) -> Iterator[trtpool.Client]:
    """A client of the shared pool."""
    with pool.connect() as connected:
        yield connected
    request.node.funcargs.pop("client", None)  # else pytest would hold it, and it the arena, when leaks are looked for


@pytest.fixture
def negate(tmp_path: Path) -> Path:
    """A model file: ``y = -x`` for items of 4 float32."""
    return save(NEGATE, tmp_path, "negate")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that everybody can get to, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="trt", dir="/tmp") as found:
        path = Path(found)
        path.chmod(0o755)
        yield path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory, which is not there yet."""
    return tmp_path / "run"


@pytest.fixture
def small(negate: Path, run_dir: Path) -> Iterator[StartedPool]:
    """A pool of its own, at rest in the end, which then ends well unless the test ended it."""
    with pool_of_ones_own(negate, run_dir, max_batch=2, slots=16) as pool:
        yield pool


WORKER_HOOK = """
import os, sys

if sys.orig_argv[-1] == "trtpool.workers":
    import signal
    from trtpool.ipc import errors
    from trtpool.workers import onnx_engine

    class Engine(onnx_engine.OnnxEngine):
        def __init__(self, *arguments, **options):
{load}
            super().__init__(*arguments, **options)

        def run(self, batch, shapes=()):
            inputs = [self._planes.inputs[0][r.first : r.first + r.count].view("f4").reshape(-1, 4) for r in batch]
{run}
            return super().run(batch, shapes)

    onnx_engine.OnnxEngine = Engine
"""


@pytest.fixture
def worker_does(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """An environment in which workers do something else first: when they `load` a model, when they `run` a batch.

    `run` finds the batch in `inputs`, a list of arrays of shape ``(items, 4)``.
    """

    def make(load: str = "pass", run: str = "pass") -> dict[str, str]:
        hook = WORKER_HOOK.format(load=indent(load, 12 * " "), run=indent(run, 12 * " "))
        (tmp_path / "hook").mkdir()
        (tmp_path / "hook" / "sitecustomize.py").write_text(hook)
        return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "hook"), os.environ["PYTHONPATH"]])}

    return make


# A worker "on a GPU" with the CPU's engine, which reports what it sees and its name as its device; its plan is ONNX.
GPU_HOOK = """
import os, sys, types

if sys.orig_argv[-1] in ("trtpool.workers", "trtpool.workers.inspect"):
    import msgspec
    from trtpool.ipc import messages
    from trtpool.workers import loop, onnx_engine

    seen = os.environ["CUDA_DEVICE_ORDER"] + " " + os.environ["CUDA_VISIBLE_DEVICES"]

    class Engine(onnx_engine.OnnxEngine):
        def __init__(self, source, settings, cpus=1):
            assert settings.device == "gpu"
            super().__init__(source, msgspec.structs.replace(settings, device="cpu"), cpus)

    class GpuWorker:
        def __init__(self, joined, config):
            {load}
            self.engines, self.device = None, seen

    def start(joined, config, engines, device):
        ready = lambda _, lanes: messages.Ready(device + ", " + config.name, lanes, config.gpu)
        loop.m = types.SimpleNamespace(**{{**vars(messages), "Ready": ready}})
        return loop.WorkerLoop(joined, config, lambda request, cpus: Engine(request.source, request.engine, cpus))

    for name, content in (("gpu", GpuWorker), ("tensorrt_engine", Engine), ("lane_loop", start)):
        module = sys.modules["trtpool.workers." + name] = types.ModuleType("trtpool.workers." + name)
        module.GpuWorker = module.TensorrtEngine = module.LaneLoop = content
"""

GPUS = {"0": fake.gpu(0), "3": fake.gpu(3, name="NVIDIA L4")}
"""What `CUDA_VISIBLE_DEVICES` may say on that machine."""


@pytest.fixture
def on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """An environment with GPUs 0 and 3, as far as the processes of a pool can tell."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def make(load: str = "pass", **machine: Any) -> dict[str, str]:
        fake.make(tmp_path / "fake")
        (tmp_path / "fake" / "sitecustomize.py").write_text(GPU_HOOK.format(load=load))
        return {**fake.on_path(tmp_path / "fake"), **fake.machine(GPUS, **machine)}

    return make


@pytest.fixture
def plan(negate: Path) -> Path:
    """The model of `negate` in a file that is called a plan."""
    return negate.rename(negate.with_suffix(".plan"))
