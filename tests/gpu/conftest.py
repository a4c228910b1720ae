"""What tests on a GPU share: engines with samples, the device in this process, and a pool with all engines.

In this process CUDA is used only by tests that look at an engine alone; pools have processes of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

import trtpool
from tests.gpu.harness import given_back
from tests.gpu.zoo import KINDS, Zoo
from tests.system.rig import StartedPool, family, watching
from trtpool.workers.cuda import Cuda


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    """Plans, and samples for them."""
    folder = tmp_path_factory.mktemp("zoo")
    yield Zoo(folder)
    shutil.rmtree(folder)  # some hundred MiB


@pytest.fixture
def rng(zoo: Zoo, request: pytest.FixtureRequest) -> np.random.Generator:
    """Another for each test."""
    print(f"TRTPOOL_TEST_SEED={zoo.seed}")  # noqa: T201  # shown when the test fails
    return np.random.default_rng([zoo.seed, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(scope="session")
def cuda() -> Cuda:
    """The device, in this process."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")  # what NVIDIA's modules do at import is theirs
        importlib.import_module("cuda.bindings.runtime")
        importlib.import_module("tensorrt")
    return Cuda()


@pytest.fixture(scope="session")
def every_engine(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedPool]:
    """A pool with all engines of `KINDS` on GPU 0, by their names, with the slots and batches that are the default."""
    plans = []
    for name in KINDS:
        with contextlib.suppress(pytest.skip.Exception):  # the tests of that one are skipped
            plans.append(zoo.plan(name))
    run_dir = tmp_path_factory.mktemp("every") / "run"
    with StartedPool(*plans, run_dir=run_dir, gpus=0) as pool:
        yield pool
        with watching(process.pid for process in family(pool.pid)) as wait:
            pool.kill(15)
            assert pool.wait() == 0
            wait()
    assert not run_dir.exists()


@pytest.fixture
def client(every_engine: StartedPool, request: pytest.FixtureRequest) -> Iterator[trtpool.Client]:
    """A client of that pool; a test must leave all slots free."""
    with given_back(every_engine):
        with every_engine.connect() as connected:
            yield connected
        request.node.funcargs.pop("client", None)  # else pytest would hold it, and it the arena, when leaks are sought
