"""`trtpool.Pool`: a pool that belongs to a process, whatever kind of process it is and however it ends."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import trtpool
from tests.models import FIXED_BATCH_ONE, OPEN_ITEM, save
from tests.system.rig import Process, command_of, family, ones, wait_until, watching
from trtpool.ipc.arena import free_huge_pages
from trtpool.ipc.settings import BuildSettings


def supervisor_of(pool: trtpool.Pool) -> subprocess.Popen[bytes]:
    assert pool._process is not None
    return pool._process


def descriptors() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


# --- In any kind of program ----------------------------------------------------------------------

SCRIPT = """
import sys, warnings
warnings.simplefilter("error")
import numpy as np
import trtpool
with trtpool.Pool(model=sys.argv[1]) as pool:
    print(pool.infer(x=np.full(4, 2, "f4"))["y"].tolist())
"""
# As a notebook does it: cells, executed one by one in a namespace that no file stands for.
NOTEBOOK = """
cells = [
    "import trtpool, numpy as np, sys",
    "pool = trtpool.Pool(model=sys.argv[1])",
    "print(pool.infer(x=np.full(4, 2, 'f4'))['y'].tolist())",
    "pool.close()",
]
namespace = {"__name__": "__main__"}
for cell in cells:
    exec(compile(cell, "<cell>", "exec"), namespace)
"""
NEVER_CLOSED = """
import sys
import numpy as np
import trtpool
pool = trtpool.Pool(model=sys.argv[1])
print(pool.infer(x=np.full(4, 2, "f4"))["y"].tolist())
"""


@pytest.mark.parametrize(
    "text", [SCRIPT, NOTEBOOK, NEVER_CLOSED], ids=["script without a guard", "notebook", "never closed"]
)
def test_a_pool_in_a_program(text, negate, tmp_path):
    if text is SCRIPT:
        (tmp_path / "program.py").write_text(text)
        command = [str(tmp_path / "program.py")]
    else:
        command = ["-c", text]
    with Process(sys.executable, *command, negate) as program:
        assert program.succeed() == "[-2.0, -2.0, -2.0, -2.0]\n"
    place = tmp_path / "trtpool"
    wait_until(lambda: [*place.iterdir()] == [], "the run directory's end")


OWNER = """
import sys
import trtpool
pool = trtpool.Pool(model=sys.argv[1], run_dir=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
"""


def test_a_pool_ends_with_a_process_that_is_killed(negate, run_dir):
    with Process(sys.executable, "-c", OWNER, negate, run_dir) as owner:
        owner.wait_for_line("ready")
        processes = family(owner.pid)
        assert sorted(map(command_of, processes)) == [
            "trtpool.broker", "trtpool.broker.supervise", "trtpool.workers",
        ]  # fmt: skip
        with trtpool.connect(run_dir=run_dir) as client, client.lease() as slot:
            slot.inputs["x"][...] = 1
            with watching(process.pid for process in processes) as wait:
                owner.kill()
                owner.wait()
                with pytest.raises(trtpool.PoolClosed, match=r"is stopping|was stopped"):
                    client.infer(x=ones())
                wait()
            assert slot.inputs["x"].tolist() == [1] * 4  # what is mapped stays
        assert owner.rest(2) == ""
    assert not run_dir.exists()


@pytest.mark.parametrize("module", ["trtpool.workers.inspect", "trtpool.workers"])
def test_a_start_that_is_interrupted_leaves_nothing(module, negate, run_dir):
    with Process(sys.executable, "-c", OWNER, negate, run_dir) as owner:
        wait_until(lambda: any(command_of(process) == module for process in family(owner.pid)), module)
        owner.kill(signal.SIGINT)
        assert "KeyboardInterrupt" in owner.rest(2)
        assert owner.wait() == -signal.SIGINT
    assert not run_dir.exists()


FORK = """
import os, sys
import numpy as np
import trtpool
with trtpool.Pool(model=sys.argv[1]) as pool:
    handle = pool.handle()
    child = os.fork()
    if not child:
        try:
            pool.infer(x=np.ones(4, "f4"))
        except trtpool.ForkedClient:
            pool.close()  # ends nothing: it is the parent's
            os._exit(int(handle.infer(x=np.full(4, -5, "f4"))["y"][0]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    print(pool.infer(x=np.full(4, 2, "f4"))["y"].tolist())
"""


def test_a_forked_child_cannot_end_its_parents_pool(negate):
    with Process(sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, negate) as program:
        assert program.succeed() == "[-2.0, -2.0, -2.0, -2.0]\n"


# --- Errors --------------------------------------------------------------------------------------


def test_what_cannot_be_is_raised_as_what_it_is(negate, tmp_path, capfd):
    one, many = save(FIXED_BATCH_ONE, tmp_path, "one"), save(OPEN_ITEM, tmp_path, "open")
    (tmp_path / "open directory").mkdir(mode=0o755)
    before = descriptors()
    with pytest.raises(trtpool.ModelError, match="No such file or directory; check path"):
        trtpool.Pool(model=tmp_path / "none.onnx")
    with pytest.raises(trtpool.ModelError, match="--shape x=3x640x640"):
        trtpool.Pool(model=many)
    with pytest.raises(trtpool.ConfigError, match="takes batches of at most 1"):
        trtpool.Pool(model=one, max_batch=4)
    with pytest.raises(trtpool.ConfigError, match="no model given"):
        trtpool.Pool(model=[])
    with pytest.raises(trtpool.ConfigError, match="two models are called"):
        trtpool.Pool(model=[one, one])
    with pytest.raises(trtpool.ConfigError, match="a setting is not possible"):
        trtpool.Pool(model=one, workers=0)
    with pytest.raises(trtpool.RunDirError, match="chmod 700"):
        trtpool.Pool(model=one, run_dir=tmp_path / "open directory")
    with pytest.raises(trtpool.DeviceUnavailable, match="use --device cpu"):
        trtpool.Pool(model=one, device="tpu")
    with pytest.raises(trtpool.ConfigError, match="name the GPUs to use, such as --gpus 0"):
        trtpool.Pool(model=one, device="gpu")
    with pytest.raises(trtpool.ConfigError, match=r"det\.plan is a TensorRT plan, which needs a GPU"):
        trtpool.Pool(model=tmp_path / "det.plan")
    with pytest.raises(trtpool.ConfigError, match="is not a list of different GPUs"):
        trtpool.Pool(model=one, gpus=[])
    with pytest.raises(trtpool.ConfigError, match="as many as --workers-per-gpu says"):
        trtpool.Pool(model=one, gpus=0, workers=2)
    with pytest.raises(trtpool.ConfigError, match="building a plan is for GPUs"):
        trtpool.Pool(model=one, build=BuildSettings(fp16=True))
    gc.collect()
    assert descriptors() == before
    assert capfd.readouterr() == ("", "")


def test_a_supervisor_that_dies_while_it_starts_is_reported(negate, tmp_path, monkeypatch):
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import os, sys\nif sys.orig_argv[-1] == 'trtpool.workers.inspect': os.kill(os.getppid(), 9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "hook"), os.environ["PYTHONPATH"]]))
    with pytest.raises(trtpool.StartFailed, match="supervisor ended while it started: SIGKILL"):
        trtpool.Pool(model=negate)


# --- Where it runs -------------------------------------------------------------------------------


def test_a_pool_on_gpus(plan, on_gpus, monkeypatch, capfd):
    for name, value in on_gpus().items():
        monkeypatch.setenv(name, value)
    with trtpool.Pool(model=plan, gpus=[0, "3"], workers_per_gpu=1, lanes=2, max_batch=4) as pool:
        assert pool.infer(x=ones(2))["y"].tolist() == [-2] * 4
        report = pool.status()
        assert {worker.device for worker in report.workers} == {
            "PCI_BUS_ID 0, worker 1 on GPU 0", "PCI_BUS_ID 3, worker 2 on GPU 1",
        }  # fmt: skip
        assert (report.models[0].slots, report.models[0].max_batch) == (4096, 4)  # of small items
    with pytest.raises(trtpool.DeviceUnavailable, match="--gpus 1: CUDA finds no GPU 1 here"):
        trtpool.Pool(model=plan, gpus="0,1")
    assert capfd.readouterr() == ("", "")


def test_a_pool_on_huge_pages_or_else_with_a_warning(negate, capfd):
    enough = free_huge_pages() >= 1
    with trtpool.Pool(model=negate, huge_pages=True) as pool:
        assert pool.infer(x=ones(2))["y"].tolist() == [-2] * 4
        assert pool.status().arena_bytes == 2 << 20
    said = capfd.readouterr().err
    assert ("huge pages of 2 MiB" in said) != enough, said


# --- Several, and several times ------------------------------------------------------------------


def test_two_pools_in_one_process(negate, run_dir):
    with trtpool.Pool(model=negate) as one, trtpool.Pool(model=f"n={negate}", name="two", run_dir=run_dir) as two:
        assert (one.name, two.name) == (f"embedded-{os.getpid()}-{one.name.rpartition('-')[2]}", "two")
        assert two.run_dir == run_dir
        with trtpool.connect(run_dir=run_dir) as client:
            assert client.infer(x=ones(3))["y"].tolist() == [-3] * 4
        assert one.infer(x=ones(4))["y"].tolist() == [-4] * 4
        with pytest.raises(trtpool.NameInUse, match=f"pid {supervisor_of(two).pid}"):
            trtpool.Pool(model=negate, run_dir=run_dir)
        two.close()
        two.close()
        with pytest.raises(trtpool.PoolClosed):
            two.infer(x=ones())
        assert one.infer(x=ones(5))["y"].tolist() == [-5] * 4
    assert not run_dir.exists()
    assert "closed" in repr(two)


def test_a_pool_whose_supervisor_is_killed_says_so_and_can_be_closed(negate):
    with trtpool.Pool(model=negate) as pool, pool.lease() as slot:
        supervisor = supervisor_of(pool)
        with watching(process.pid for process in family(supervisor.pid)) as wait:
            supervisor.kill()
            wait()
        with pytest.raises(trtpool.PoolClosed, match="ended unexpectedly"):
            pool.infer(x=ones())
        with pytest.raises(trtpool.PoolClosed):
            slot.submit()


def test_an_error_in_the_block_is_not_hidden(negate):
    with pytest.raises(ZeroDivisionError), trtpool.Pool(model=negate) as pool, pool.lease():
        raise ZeroDivisionError


def test_a_pool_that_is_dropped_warns_and_ends(negate):
    pool = trtpool.Pool(model=negate)
    pid = supervisor_of(pool).pid
    with pytest.warns(ResourceWarning, match="was dropped without close"):
        del pool
    assert not psutil.pid_exists(pid)


def test_starting_again_and_again_leaves_nothing(negate, tmp_path):
    counts = []

    def cycle() -> None:
        with trtpool.Pool(model=negate, name="again") as pool:
            pool.infer(x=ones())

    for turn in range(4):
        if turn % 2:  # a pool may be started and ended in any thread
            thread = threading.Thread(target=cycle)
            thread.start()
            thread.join()
        else:
            cycle()
        gc.collect()
        counts.append((descriptors(), Path("/proc/self/maps").read_text().count("memfd"), threading.active_count()))
    assert len(set(counts)) == 1
    assert [*(tmp_path / "trtpool").iterdir()] == []


@pytest.mark.parametrize("transport", ["lifeline", "zmq"])
def test_a_pool_that_spins_works_and_ends_as_any_other(transport, negate):
    """Also with several threads that wait, of which one spins for all, and after its broker has died."""
    with trtpool.Pool(model=negate, busy_poll=True, transport=transport) as pool:
        broker, worker = (
            next(one for one in family(supervisor_of(pool).pid) if command_of(one) == module)
            for module in ("trtpool.broker", "trtpool.workers")
        )
        before_s = [sum(one.cpu_times()[:2]) for one in (broker, worker)]
        values = [value % 7 for value in range(60)]
        with ThreadPoolExecutor(3) as threads:
            answers = list(threads.map(lambda value: pool.infer(x=ones(value))["y"].tolist(), values))
        assert answers == [[-value] * 4 for value in values]
        wait_until(
            lambda: all(
                sum(one.cpu_times()[:2]) > spent_s + 0.05
                for one, spent_s in zip((broker, worker), before_s, strict=True)
            ),
            "broker and worker spin",
        )
        with pool.lease_many(pool.models[0].slots // 2), pytest.raises(trtpool.TrtpoolError, match="slots"):
            pool.lease_many(pool.models[0].slots // 2 + 1, timeout_s=0.01)
        os.kill(broker.pid, signal.SIGKILL)
        assert pool.infer(x=ones(5))["y"].tolist() == [-5] * 4


@pytest.mark.parametrize("spins", [True, False])
def test_a_client_may_spin_where_its_pool_does_not_and_the_other_way_round(spins, negate, run_dir):
    with trtpool.Pool(model=negate, run_dir=run_dir, busy_poll=not spins):
        client = trtpool.connect(run_dir=run_dir, busy_poll=spins)
        with client:
            assert client.session.link._spins is spins
            assert client.infer(x=ones(5))["y"].tolist() == [-5] * 4
            assert pickle.loads(pickle.dumps(client.handle())).busy_poll is spins
