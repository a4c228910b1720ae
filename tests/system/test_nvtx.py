"""A pool under a profiler: what NVTX tells it of each batch that a worker launches, on a fake GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.system.rig import StartedPool
from tests.workers.fake_tensorrt import Tensor, batched, make_packages, write_plan

COMPILER = shutil.which("cc")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler, cc, to make a profiler's library with")


@pytest.fixture
def listener(tmp_path: Path) -> Path:
    """A library to listen to NVTX with; see there."""
    assert COMPILER is not None
    source, library = Path(__file__).with_name("nvtx_listener.c"), tmp_path / "listener.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    return library


def test_each_batch_is_a_range_whose_payload_is_its_number(listener, tmp_path):
    plan = write_plan(tmp_path / "neg.plan", "neg", [batched("x", (3,))], [Tensor("y", ("N", 3))])
    heard = tmp_path / "heard"
    env = {
        **make_packages(tmp_path / "packages"),
        "NVTX_INJECTION64_PATH": str(listener),
        "NVTX_LISTENER_LOG": str(heard),
    }
    with StartedPool(plan, run_dir=tmp_path / "run", env=env, gpus=0) as pool:
        with pool.connect() as client:
            for items in (1, 4, 1):
                x = np.ones((items, 3), np.float32)
                np.testing.assert_array_equal(client.infer(x=x)["y"], -x)
        pool.kill(15)
        assert pool.wait() == 0
    lines = heard.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["push", "pop"] * 3
    pushed = [line.split(" ", 3) for line in lines[::2]]
    assert [domain for _, domain, _, _ in pushed] == ["trtpool"] * 3
    assert [name for _, _, _, name in pushed] == ["1 items of neg", "4 items of neg", "1 items of neg"]
    numbers = [int(number) for _, _, number, _ in pushed]
    assert numbers == [numbers[0], numbers[0] + 1, numbers[0] + 2]
