"""Memory: flat over a million items, bounded when everybody waits, and limits of it that are reached."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import trtpool
from tests.models import save
from tests.system.cgroup import Group, memory_limit
from tests.system.raw import Raw
from tests.system.rig import (
    CLI,
    Process,
    StartedPool,
    answer,
    figures,
    hold,
    memfds,
    producer,
    submit,
    wait_until,
)
from trtpool.broker.journal import LOG_BYTES
from trtpool.broker.outboxes import MAX_UNSENT_BYTES
from trtpool.ipc import lifeline
from trtpool.ipc import messages as m
from trtpool.ipc.errors import ArenaTooLarge
from trtpool.ipc.settings import MAX_WAITING_REQUESTS

MIB = 1 << 20


def memory(pid: int, which: str = "RssAnon") -> int:
    """Bytes of a process: those that no file and no other process has, or another line of its status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{which}:")).split()[1])


# --- Flat ----------------------------------------------------------------------------------------

MOST = 64
"""Slots of a run at most."""

RUNS = """
    total, most, seed = map(int, sys.argv[2:5])
    rng = np.random.default_rng(seed)
    done = 0
    while done < total:
        work = []
        for lease in pool.lease_many(int(min(rng.integers(1, most + 1), total - done)), timeout_s=60):
            lease.inputs["x"][...] = items = np.arange(done, done + lease.count)[:, None]
            done += lease.count
            work.append((lease.submit(), items))
        for submitted, items in work:
            with submitted.result(timeout_s=60) as result:
                assert (result.outputs["y"] == -items).all()
    pool.close()
"""
"""So many items, one a slot, in runs of up to `most`; every answer is looked at."""


def run_items(pool: StartedPool, total: int) -> None:
    """By three producers at once, each a process of its own, which comes and goes."""
    with contextlib.ExitStack() as stack:
        several = [stack.enter_context(producer(pool, RUNS, total // 3, MOST, seed)) for seed in range(3)]
        for one in several:
            one.succeed()


def table_bytes(pool: StartedPool) -> int:
    """What the table takes of memory."""
    (path,) = (path for path in memfds(pool.pid).values() if "trtpool-table" in str(path.readlink()))
    return path.stat().st_blocks * 512


def test_a_million_items_leave_memory_flat(negate: Path, run_dir: Path) -> None:
    """A run is a lease, a work, a result and several messages; after 28,000 not one object of a run may be left.

    The smallest, an int in a dict, takes 64 bytes at least: 1.8 MB, of which the bound is about half.
    """
    warm_up, rest = 100_000 // 3 * 3, 900_003
    with StartedPool(negate, run_dir=run_dir, max_batch=256, slots=2048, threads=1) as pool:
        run_items(pool, warm_up)
        pids = {"supervisor": pool.pid, "broker": pool.broker, "worker": pool.worker}
        before = {name: memory(pid) for name, pid in pids.items()}
        run_items(pool, rest)
        after = {name: memory(pid) for name, pid in pids.items()}
        with pool.connect() as client:
            assert (figures(client).items, figures(client).failed_items) == (warm_up + rest, 0)
        growth = {name: after[name] - before[name] for name in pids}
        assert max(growth.values()) < 30 * rest // (MOST // 2), growth
        # Two halves, each with a full log and a small snapshot.
        assert table_bytes(pool) < 2 * (LOG_BYTES + MIB // 2)
        pool.check_at_rest()
        pool.stop()


# --- Bounded -------------------------------------------------------------------------------------

PEERS = 10
STATUSES = m.encode([m.Status(1)] * m.MAX_MESSAGES)
REPORT_BYTES = 512


def test_with_all_slots_held_clients_waiting_and_outboxes_full_memory_is_bounded(negate: Path, run_dir: Path) -> None:
    """By what is configured: the slots, the requests of each client, and what waits for all that do not read.

    Without the last, ten that never read could have ten times 1024 frames of up to 160 KiB kept for them.
    """
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=8, slots=64, threads=1) as pool,
        pool.connect() as client,
        pool.connect() as other,
        contextlib.ExitStack() as stack,
    ):
        broker = pool.broker
        before = memory(broker)
        cap = client.session.models[0].cap
        held = [*client.lease_many(cap).slots(), *other.lease_many(64 - cap).slots()]
        assert figures(client).free == 0
        peers = [stack.enter_context(contextlib.closing(Raw(lifeline.connect(run_dir)))) for _ in range(PEERS)]
        for peer in peers:
            peer.lifeline.setblocking(False)
            peer.send(*(m.Lease(2 + number, 0, 20, None) for number in range(MAX_WAITING_REQUESTS)))
        waiting = PEERS * MAX_WAITING_REQUESTS
        wait_until(lambda: figures(client).waiting == waiting, "all wait", client.status)
        assert memory(broker) - before < waiting * 1024, "a request that waits takes less than a kilobyte"

        for slot in held[:24]:  # what works goes on meanwhile
            for peer in peers:
                with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):  # full, or cut off
                    peer.lifeline.send(STATUSES)
            slot.inputs["x"][...] = 3
            assert answer(slot.submit()) == -3
        pool.wait_for_line("reads too slowly, and is cut off", 2)
        # At the worst: what waits, a copy of that in a snapshot, and what one turn makes for each of them.
        one_turn = PEERS * 3 * m.MAX_MESSAGES * REPORT_BYTES
        assert memory(broker) - before < waiting * 1024 + 2 * MAX_UNSENT_BYTES + one_turn
        assert pool.broker == broker

        stack.close()
        for slot in held[24:]:
            slot.release()
        client.close()
        other.close()
        pool.check_at_rest()


# --- Limits that are reached ---------------------------------------------------------------------

# Items of 1 MiB, and the largest number of each.
LARGE = "large (float[N,262144] x) => (float[N,1] y) { y = ReduceMax<axes = [1], keepdims = 1>(x) }"

LIMIT = 512 * MIB
"""Enough for a pool's processes, and an arena of 100 MiB."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return save(LARGE, tmp_path, "large")


@pytest.fixture
def group() -> Iterator[Group]:
    with memory_limit(LIMIT) as group:
        yield group


def test_an_arena_beyond_a_cgroups_limit_is_refused_and_nothing_is_killed(
    large: Path, run_dir: Path, group: Group
) -> None:
    command = [*group.through, *CLI, "start", str(large), f"--run-dir={run_dir}", "--max-batch=8"]
    result = subprocess.run([*command, "--slots=600"], check=False, capture_output=True, text=True)
    assert result.returncode == ArenaTooLarge.exit_code, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("trtpool: the arena needs 600.0 MiB, more than nine tenths of the ")
    assert f"left in the cgroup of {group.limit}; lower --slots, --items-per-slot or --max-batch, or raise" in line
    assert group.killed == 0
    assert not run_dir.exists()
    with StartedPool(large, run_dir=run_dir, through=group.through, max_batch=8, slots=100) as pool:
        pool.stop()


# Takes memory as long as `more()`, for which the kernel kills this process before all others.  It is in a memfd, for
# which the kernel blames nobody.
TAKE = """
import os

def take(more):
    open("/proc/self/oom_score_adj", "w").write("1000")
    memory, some = os.memfd_create("hog"), bytes(1 << 18)
    while more():
        os.write(memory, some)
"""

# Takes what a cgroup has until as much is left, and then, when told, all.
HOG = f"""{TAKE}
import sys

limit, used, left = *sys.argv[1:3], int(sys.argv[3])
read = lambda path: int(open(path).read())
take(lambda: read(limit) - read(used) > left)
print("nearly full", flush=True)
sys.stdin.readline()
take(lambda: True)
"""


def hog(group: Group) -> Process:
    """A process in the group which takes what is left of it."""
    return Process(*group.through, sys.executable, "-c", HOG, str(group.limit), str(group.used), str(16 * MIB))


# In a worker, once, when there is a file that says so.
GREEDY = f"""{TAKE}
if os.path.exists({{flag!r}}):
    os.unlink({{flag!r}})
    take(lambda: True)
"""


def decoy(group: Group) -> Process:
    """What the kernel kills as well, if the memory of the first is not free in time."""
    return Process(*group.through, "sh", "-c", "echo 900 > /proc/self/oom_score_adj && exec cat")


def test_a_limit_that_others_reach_while_a_pool_serves_takes_nothing_from_the_arena(
    large: Path, run_dir: Path, group: Group
) -> None:
    """Its pages were allocated at the start, so all of it can be written though there are no more."""
    slots = 100
    with (
        StartedPool(
            large, run_dir=run_dir, through=group.through, max_batch=8, slots=slots, max_slots_per_producer=slots
        ) as pool,
        pool.connect() as client,
        decoy(group),
        hog(group) as other,
    ):
        pids = pool.broker, pool.worker
        other.wait_for_line("nearly full")
        for round_ in range(2):  # nearly full, and when the kernel has killed
            leases = client.lease_many(slots)
            work: list[tuple[int, trtpool.Submitted]] = []
            for slot in leases.slots():
                value = len(work) + 1000 * round_
                slot.inputs["x"][...] = value
                work.append((value, slot.submit()))
            for value, submitted in work:
                assert answer(submitted) == value
            if not round_:
                other.say()
                assert other.wait() == -signal.SIGKILL
        assert group.killed in (1, 2)
        assert (pool.broker, pool.worker) == pids
        client.close()
        pool.check_at_rest()
        pool.stop()


def test_a_worker_that_is_killed_for_memory_is_replaced_and_its_work_done(
    negate: Path, run_dir: Path, group: Group, tmp_path: Path, worker_does: Callable[..., dict[str, str]]
) -> None:
    flag = tmp_path / "take all"
    env = worker_does(run=GREEDY.format(flag=str(flag)))
    with (
        StartedPool(negate, run_dir=run_dir, env=env, through=group.through, max_batch=2, slots=16) as pool,
        pool.connect() as client,
        decoy(group),
    ):
        with pool.stopped_worker() as worker:
            work = hold(client, [1, 2, 3, 4, 5])
            flag.touch()
        assert [answer(one) for one in work] == [-1, -2, -3, -4, -5]
        assert not flag.exists()
        assert group.killed in (1, 2)
        assert pool.worker != worker
        assert "for want of memory: see dmesg" in pool.wait_for_line("worker 1 ended: SIGKILL", 2)
        assert answer(submit(client, 6)) == -6
        client.close()
        pool.check_at_rest()
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0
