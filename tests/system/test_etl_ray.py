"""`trtpool.ray` on a local cluster of two nodes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.system.rig import Process

pytest.importorskip("ray")

HEAD = """
import collections, logging, os, signal, subprocess, sys, threading
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
import numpy as np
import psutil
import ray, ray.data
from ray.cluster_utils import Cluster
import trtpool.ray

class Noting(trtpool.ray.TrtPool):
    '''Says of each row where it ran.'''

    def __call__(self, batch):
        out = super().__call__(batch)
        rows = len(out["y"])
        out["node"] = np.array([ray.get_runtime_context().get_node_id()] * rows)
        out["pool"] = np.array([str(self.client.run_dir)] * rows)
        out["actor"] = np.array([os.getpid()] * rows)
        return out

actors = lambda size: ray.data.ActorPoolStrategy(size=size)

def row(given):
    return {"id": given["id"], "x": np.full(4, given["id"], np.float32)}

@ray.remote(num_cpus=0, resources={"head": 0.1})
class Once:
    '''Lets one caller through, once so many came.'''

    def __init__(self):
        self.came = 0

    def first_after(self, count):
        self.came += 1
        return self.came == count

    def seen(self):
        return self.came

def accounted(rows, count):
    assert sorted(r["id"] for r in rows) == list(range(count)), len(rows)
    assert all((np.asarray(r["y"]) == -r["id"]).all() for r in rows)

def pools_alive():
    found = 0
    for process in psutil.process_iter():
        try:
            found += "trtpool.broker.supervise" in process.cmdline() and process.environ().get("MARK") == mark
        except psutil.Error:
            pass
    return found

def say(*words):
    print(">", *words, flush=True)

mark = os.environ["MARK"] = sys.argv[2]
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 2,
    "resources": {"head": 1},
    "num_gpus": 1,
    "include_dashboard": False,
    "_system_config": {  # so that a node that is gone is noticed in seconds
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 2000,
        "health_check_failure_threshold": 4,
    },
})
other = cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
context = ray.data.DataContext.get_current()
context.enable_progress_bars = False
logging.getLogger("ray").setLevel(logging.ERROR)
model = sys.argv[1]

def dataset(count, blocks=40):
    return ray.data.range(count, override_num_blocks=blocks).map(row)

def run(pools, count, kind=Noting, **options):
    options = {"fn_constructor_args": [pools], "batch_size": 8, "compute": actors(3), "num_cpus": 0.25, **options}
    return dataset(count).map_batches(kind, **options).take_all()
"""

TAIL = """
ray.shutdown()
cluster.shutdown()
say("well")
"""

SPREAD = """
with trtpool.ray.NodePools(model, num_cpus=0, max_batch=4, threads=1) as pools:
    rows = run(pools, 400)
    accounted(rows, 400)
    places = collections.defaultdict(set)
    for r in rows:
        places[r["node"]].add(r["pool"])
    say(len(places), [len(pools) for pools in places.values()], pools_alive())

    table = dataset(40).map_batches(
        trtpool.ray.TrtPool, fn_constructor_args=[pools], batch_format="pyarrow", batch_size=8, compute=actors(1)
    ).take_all()
    accounted(table, 40)
say(pools_alive())

left = trtpool.ray.NodePools(model, threads=1)  # ends with the job
accounted(run(left, 40), 40)
say(pools_alive() > 0)
"""

FAILING = """
once = Once.remote()
who, = sys.argv[3:]

class Killing(Noting):
    '''One caller ends its pool, or itself, or its node's every process, in the middle of the job.'''

    def __call__(self, batch):
        if ray.get(once.first_after.remote(6)):
            if who == "pool":
                for process in psutil.process_iter():
                    if str(self.client.run_dir) in open_files(process):
                        process.kill()
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)

def open_files(process):
    '''What a supervisor of ours has open: its pool's lock.'''
    try:
        if "trtpool.broker.supervise" not in process.cmdline():
            return ""
        return " ".join(file.path for file in process.open_files())
    except psutil.Error:
        return ""

pools = trtpool.ray.NodePools(model, threads=1)
rows = run(pools, 400, Killing)
accounted(rows, 400)
assert ray.get(once.seen.remote()) >= 6
say("accounted for")
pools.close()
"""

LOSING_A_NODE = """
once = Once.remote()

class Counting(Noting):
    def __call__(self, batch):
        out = super().__call__(batch)
        ray.get(once.first_after.remote(0))
        return out

def lose_it():
    while ray.get(once.seen.remote()) < 6:
        pass
    cluster.remove_node(other, allow_graceful=False)
    say("lost")

pools = trtpool.ray.NodePools(model, threads=1)
loser = threading.Thread(target=lose_it)
loser.start()
rows = run(pools, 400, Counting)
loser.join()
accounted(rows, 400)
say("accounted for")
pools.close()
"""


ON_A_GPU = """
class Device(trtpool.ray.TrtPool):
    def __call__(self, batch):
        out = super().__call__(batch)
        out["device"] = np.array([worker.device for worker in self.client.status().workers] * len(out["y"]))
        return out

with trtpool.ray.NodePools(model, num_gpus=1) as pools:
    rows = run(pools, 40, Device, resources={"head": 0.1})
    accounted(rows, 40)
    say({r["device"] for r in rows}, ray.available_resources().get("GPU", 0))
"""


def run(tmp_path: Path, negate: Path, code: str, *arguments: str, env: Mapping[str, str] | None = None) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(HEAD + code + TAIL)
    with Process(sys.executable, "-W", "ignore", path, negate, tmp_path.name, *arguments, env=env) as process:
        out = process.rest(1)
        assert process.wait() == 0, process.rest(2)
        return [line[2:] for line in out.splitlines() if line.startswith("> ")]  # Ray says a lot besides


@pytest.mark.timeout(240)
def test_each_node_has_one_pool_which_ends_with_its_job(negate, tmp_path):
    first, second, third, last = run(tmp_path, negate, SPREAD)
    assert first == "2 [1, 1] 2"
    assert (second, third, last) == ("0", "True", "well")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("who", ["pool", "actor"])
def test_every_row_is_accounted_for_when_something_is_killed(who, negate, tmp_path):
    assert run(tmp_path, negate, FAILING, who) == ["accounted for", "well"]


@pytest.mark.timeout(240)
def test_every_row_is_accounted_for_when_a_node_is_lost(negate, tmp_path):
    assert run(tmp_path, negate, LOSING_A_NODE) == ["lost", "accounted for", "well"]


@pytest.mark.timeout(240)
def test_a_pool_has_the_gpus_that_ray_gave_it(plan, tmp_path, on_gpus: Callable[..., dict[str, str]]):
    devices, last = run(tmp_path, plan, ON_A_GPU, env=on_gpus())
    assert devices == "{'PCI_BUS_ID 0, worker 1 on GPU 0'} 0"
    assert last == "well"
