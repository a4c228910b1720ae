"""Faults that a pool survives, under load, with every item accounted for; test_life and test_producers have more."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trtpool
from tests.system.rig import (
    CLI,
    Process,
    StartedPool,
    answer,
    family,
    figures,
    hold,
    ones,
    only_the_third_ends_workers,
    producer,
    submit,
    wait_all_free,
    wait_until,
    watching,
)
from trtpool.ipc import lifeline

# --- Workers that hang ---------------------------------------------------------------------------


def test_a_worker_that_hangs_is_killed_and_its_work_done_by_the_next(negate, run_dir):
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=4, slots=16, batch_timeout_s=0.5) as pool,
        pool.connect() as client,
    ):
        with pool.stopped_worker() as worker:
            work = hold(client, [1, 2, 3, 4, 5, 6])
            # Nobody kills it but the pool, and until it does nothing comes of the work.
            assert [answer(one) for one in work] == [-1, -2, -3, -4, -5, -6]
            assert pool.worker != worker
        line = pool.wait_for_line("worker 1 ended", 2)
        assert "it hung: a batch ran for more than 0.5 s, so the pool killed it; if batches" in line
        assert line.endswith("longer --batch-timeout-s (SIGKILL from the pool); another is started")
        wait_all_free(client)
        client.close()
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


def test_an_input_that_hangs_workers_fails_alone(negate, run_dir, worker_does):
    env = worker_does(run="if any((items == 13).any() for items in inputs): os.kill(os.getpid(), signal.SIGSTOP)")
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=4, slots=16, env=env, batch_timeout_s=0.3) as pool,
        pool.connect() as client,
    ):
        only_the_third_ends_workers(client, r"it hung: a batch ran for more than 0\.3 s")
        client.close()
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


def test_a_worker_that_never_becomes_ready_fails_the_start(negate, run_dir, worker_does):
    env = worker_does(load="os.kill(os.getpid(), signal.SIGSTOP)")
    command = [*CLI, "start", negate, f"--run-dir={run_dir}", "--start-timeout-s=0.5"]
    with Process(*command, env=env) as start:
        assert start.wait() == 15
        (line,) = start.rest(2).splitlines()
        assert line.startswith("trtpool: worker 1: it was not ready after 0.5 s, so the pool killed it; if loading")
    assert not run_dir.exists()


def test_a_worker_that_never_becomes_ready_again_is_started_until_it_does(negate, run_dir, worker_does, tmp_path):
    stuck = tmp_path / "stuck"
    env = worker_does(load=f"if os.path.exists({str(stuck)!r}): os.kill(os.getpid(), signal.SIGSTOP)")
    # Long enough for a worker to start on a busy machine, and the time that this test takes.
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=1, env=env, start_timeout_s=10) as pool,
        pool.connect() as client,
    ):
        with pool.stopped_worker() as worker:
            work = hold(client, [1, 2, 3])
            stuck.touch()
            os.kill(worker, signal.SIGKILL)
        pool.wait_for_line("worker 1 ended: SIGKILL", 2)
        pool.wait_for_line("worker 1 ended: it was not ready after 10 s, so the pool killed it", 2)
        stuck.unlink()
        assert [answer(one) for one in work] == [-1, -2, -3]
        wait_until(lambda: figures(client).running == 0)
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


# --- Faults under load ---------------------------------------------------------------------------

SEEDS = range(2)

# Streams its items and checks each; says when a fault may come, and counts what it got.
STREAM = """
    me, count = int(sys.argv[2]), int(sys.argv[3])

    def write(item, inputs):
        inputs["x"][...] = me, item, me * item, 1

    seen = []
    for item, result in pool.map(write, range(count), window=8, ordered=me % 2 == 0, model="negate"):
        assert result.outputs["y"].tolist() == [-me, -item, -me * item, -1], (me, item, result.outputs["y"])
        seen.append(item)
        if item == count // 4:
            print("streams", flush=True)
    assert sorted(seen) == list(range(count))
    pool.close()
"""


@contextlib.contextmanager
def streams(pool: StartedPool, count: int = 2, items: int = 800) -> Iterator[None]:
    """Producers with work in flight; at the end of the block each must get every one of its items, right and once."""
    with contextlib.ExitStack() as stack:
        several = [
            stack.enter_context(producer(pool, STREAM, me, items, transport="zmq" if me % 3 == 0 else "lifeline"))
            for me in range(1, count + 1)
        ]
        for one in several:
            one.wait_for_line("streams")
        yield
        for one in several:
            one.succeed()


@pytest.fixture
def two(negate: Path, run_dir: Path) -> Iterator[StartedPool]:
    """A pool with two workers, which must be at rest in the end, and end well."""
    with StartedPool(negate, run_dir=run_dir, workers=2, threads=1, slots=32, max_batch=4) as pool:
        yield pool
        pool.check_at_rest()
        with pool.connect() as client:
            report = client.status()
            assert (report.violations, report.models[0].failed_items) == (0, 0)
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0
    assert not run_dir.exists()


def ready_workers(pool: StartedPool) -> list[int]:
    with pool.connect() as client:
        return sorted(worker.pid for worker in client.status().workers)


@pytest.mark.parametrize("seed", SEEDS)
def test_workers_are_killed_ended_and_stopped_and_nobody_misses_an_item(seed, two):
    rng = random.Random(seed)
    with streams(two), two.connect() as client:
        for number in rng.sample([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP], 3):
            wait_until(lambda: len(client.status().workers) == 2, "both workers there")
            victim = rng.choice(ready_workers(two))
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, number)
                done = figures(client).items
                # The other goes on, or has nothing to do: what a stopped one runs may be all that is waited for.
                wait_until(lambda: figures(client).items > done or not figures(client).queued, "work goes on")  # noqa: B023
                os.kill(victim, signal.SIGCONT)


def test_both_workers_are_killed_at_once(two):
    with streams(two), watching(ready_workers(two)) as wait:
        for victim in ready_workers(two):
            os.kill(victim, signal.SIGKILL)
        wait()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_producer_and_a_worker_are_killed_at_once(seed, two):
    rng = random.Random(seed)
    with streams(two), producer(two, STREAM, 9, 100_000) as victim:
        victim.wait_for_line("streams")
        pids = [victim.pid, rng.choice(ready_workers(two))]
        rng.shuffle(pids)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_producer_that_stands_still_starves_nobody_and_goes_on_or_ends(number, two):
    """It keeps what it has; the others go on, and it does too when it is let."""
    with producer(two, STREAM, 1, 800) as still, producer(two, STREAM, 2, 100_000) as ends:
        for one in (still, ends):
            one.wait_for_line("streams")
            one.kill(signal.SIGSTOP)
        with streams(two):
            pass
        still.kill(signal.SIGCONT)
        still.succeed()
        ends.kill(number)
        ends.kill(signal.SIGCONT)  # a signal but SIGKILL waits for that
        assert ends.wait() == -number


def test_a_broker_that_stands_still_is_waited_for(two):
    with streams(two):
        os.kill(two.broker, signal.SIGSTOP)
        with producer(two, "assert pool.infer(x=np.full(4, 2, 'f4'))['y'].tolist() == [-2] * 4") as late:
            os.kill(two.broker, signal.SIGCONT)
            late.succeed()


# What a producer does with two slots, and never anything after it.
LEAVES = {
    "leaks its leases": "kept = [pool.lease() for _ in range(2)]; wait('there')",
    "drops its leases": "import gc; pool.lease(); pool.lease(); gc.collect(); wait('there')",
    "never reads": "w = [pool.lease().submit() for _ in range(2)]; wait('there')",
    "submits and exits": "w = [pool.lease().submit() for _ in range(2)]; print('there', flush=True); sys.exit(0)",
    "submits and _exits": "w = [pool.lease().submit() for _ in range(2)]; print('there', flush=True); os._exit(0)",
    "keeps an array": ("s = pool.lease(); r = s.submit().result(); y = r.outputs['y']; s.release(); wait('there')"),
    "forks, and the child stays": (
        "s = pool.lease()\n    if not os.fork(): os.close(1); os.read(0, 1); os._exit(0)\n    wait('there')"
    ),
    "closes and stays": "s = pool.lease(); x = s.inputs['x']; pool.close(); wait('there')",
}


@pytest.mark.parametrize("code", LEAVES.values(), ids=LEAVES)
def test_a_producer_that_leaves_badly_leaves_nothing_and_others_notice_nothing(code, two):
    with streams(two), producer(two, "\n    " + code + "\n") as one:
        one.wait_for_line("there")
        one.kill()
        one.wait()


# --- The supervisor ------------------------------------------------------------------------------


def test_a_supervisor_killed_under_load_leaves_nothing_and_its_producers_are_told(negate, run_dir):
    code = """
    print("there", flush=True)
    try:
        for i in range(10**6):
            pool.infer(x=np.full(4, i % 100, "f4"), timeout_s=60)
            if i == 10:
                print("works", flush=True)
    except trtpool.PoolClosed as error:
        assert "ended unexpectedly" in str(error), error
        print("told")
"""
    with (
        StartedPool(negate, run_dir=run_dir, workers=2, threads=1) as pool,
        producer(pool, code) as one,
        producer(pool, code, transport="zmq") as two,
    ):
        for producing in (one, two):
            producing.wait_for_line("works")
        with watching(process.pid for process in family(pool.pid)) as wait:
            os.kill(pool.worker if len(pool.pids("trtpool.workers")) == 1 else pool.pids("trtpool.workers")[0], 9)
            pool.kill()
            wait()
        for producing in (one, two):
            assert "told" in producing.succeed()
    assert [path.name for path in run_dir.iterdir() if path.name == "lock"] == ["lock"]
    with StartedPool(negate, run_dir=run_dir) as pool:
        pool.stop()
    assert not run_dir.exists()


# --- Limits --------------------------------------------------------------------------------------


@contextlib.contextmanager
def descriptors_left(pid: int, count: int) -> Iterator[None]:
    """A process may open so many beyond those that it has."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    unused = [number for number in range(len(used) + count + 1) if number not in used]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (unused[count], limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def test_a_worker_is_replaced_though_clients_hold_all_descriptors(negate, run_dir, worker_does, tmp_path):
    """Clients take those that the worker's end sets free, while the next is waited for, which comes with two."""
    cannot = tmp_path / "cannot"
    env = worker_does(f"if os.path.exists({str(cannot)!r}): raise errors.ModelError('no disk')")
    with (
        contextlib.ExitStack() as stack,
        StartedPool(negate, run_dir=run_dir, max_batch=1, slots=8, env=env) as pool,
        pool.connect() as client,
    ):
        with descriptors_left(pool.broker, 0), pool.stopped_worker() as worker:
            work = hold(client, [1, 2])
            for _ in range(16):
                stack.enter_context(contextlib.closing(lifeline.connect(run_dir)))
            pool.wait_for_line("raise the limit on open files (ulimit -n)", 2)
            cannot.touch()
            os.kill(worker, signal.SIGKILL)
            for _ in range(3):
                pool.wait_for_line("no disk (exit code 4); another is started", 2)
            cannot.unlink()
            assert [answer(one) for one in work] == [-1, -2]
        assert client.infer(x=ones())["y"].tolist() == [-1] * 4
        client.close()
        stack.close()
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


def test_a_worker_is_replaced_though_kept_clients_hold_all_descriptors_of_the_supervisor(small):
    with small.connect() as client, descriptors_left(small.pid, 0), small.stopped_worker() as worker:
        work = hold(client, [1, 2])
        with contextlib.closing(lifeline.connect(small.run_dir)):
            small.wait_for_line("a client could not be kept", 2)
            os.kill(worker, signal.SIGKILL)
            assert [answer(one) for one in work] == [-1, -2]


def test_a_client_that_would_not_outlive_the_broker_is_refused(small):
    """The supervisor has no descriptors to keep it with; the broker has."""
    with small.connect():
        with (
            descriptors_left(small.pid, 0),
            pytest.raises(trtpool.AccessDenied, match=r"can take no more clients: .*raise its limit \(ulimit -n\)"),
        ):
            small.connect()
        with small.connect() as other:
            os.kill(small.broker, signal.SIGKILL)
            assert answer(submit(other, 2)) == -2


def test_a_client_that_no_descriptor_is_left_for_is_told_so(pool, client):
    """Its connection takes the last one; the broker needs one more to watch its process."""
    with (
        descriptors_left(pool.broker, 1),
        pytest.raises(trtpool.AccessDenied, match=r"can take no more clients: .*raise its limit \(ulimit -n\)"),
    ):
        pool.connect()
    with pool.connect() as other:
        assert answer(submit(other, 2)) == -2


@contextlib.contextmanager
def small_disk(path: Path, options: str) -> Iterator[None]:
    """A tmpfs of its own at `path`; skips where it cannot be mounted."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(path)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting needs a privileged user")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


# A page that is taken already, and too few inodes: for directory and lock, for the lifeline, for ZeroMQ's socket.
FULL = {
    "no page": ("size=4k", b"x" * 4096, "nothing can be written in the run directory"),
    "no directory": ("nr_inodes=1", b"", "cannot be made: No space left on device"),
    "no lock": ("nr_inodes=2", b"", "cannot be opened: No space left on device"),
    "no lifeline": ("nr_inodes=3", b"", "no socket can be made in the run directory"),
    "no endpoint": ("nr_inodes=4", b"", "the broker did not become ready: exit code 6"),
}


@pytest.mark.parametrize(("options", "content", "text"), FULL.values(), ids=FULL)
def test_a_full_run_directory_fails_the_start_with_what_to_do(options, content, text, negate, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, options):
        if content:
            (disk / "full").write_bytes(content)
        command = [*CLI, "start", str(negate), f"--run-dir={disk / 'run'}"]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        *before, last = result.stderr.splitlines()
        assert result.returncode == 6, result.stderr
        assert text in last
        assert "choose another with --run-dir" in " ".join([*before, last])
        assert "Traceback" not in result.stderr
        assert not any((disk / "run").rglob("*")) if (disk / "run").exists() else True


def test_a_run_directory_that_fills_up_while_it_serves_is_no_matter(negate, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "size=8k"):
        with StartedPool(negate, run_dir=disk / "run", max_batch=1, slots=8) as pool, pool.connect() as client:
            with pytest.raises(OSError, match="No space left"):
                (disk / "full").write_bytes(bytes(16384))
            with pool.stopped_worker() as worker:
                work = hold(client, [1, 2, 3])
                os.kill(worker, signal.SIGKILL)
                assert [answer(one) for one in work] == [-1, -2, -3]
            with pool.connect("zmq") as other:
                assert other.infer(x=ones())["y"].tolist() == [-1] * 4
            client.close()
            pool.kill(signal.SIGTERM)
            assert pool.wait() == 0
        assert not (disk / "run").exists()


# --- Zombies, pids, clocks -----------------------------------------------------------------------

# A process whose child uses the pool, ends, and is never reaped.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.readline()
"""


def test_a_zombie_holds_nothing(pool, client):
    """A producer that was killed and that its parent never reaps: its process has ended all the same."""
    code = (
        "import sys, trtpool; pool = trtpool.connect(run_dir=sys.argv[1]); "
        "slot = pool.lease(model='negate'); view = slot.inputs['x']; print('there', flush=True); sys.stdin.readline()"
    )
    with Process(sys.executable, "-c", PARENT, code, str(pool.run_dir)) as parent:
        lines = {parent.line(), parent.line()}
        (child,) = (int(line) for line in lines if line != "there")
        wait_until(lambda: figures(client).leased == 1)
        os.kill(child, signal.SIGKILL)
        wait_all_free(client)
        assert "State:\tZ" in Path(f"/proc/{child}/status").read_text()
        assert client.status().producers == 1


def test_a_zombie_of_a_supervisor_is_no_pool(negate, run_dir):
    """Its lock is free, and its pid, still taken by the zombie, names nobody who could be told to stop."""
    command = [*CLI, "start", str(negate), f"--run-dir={run_dir}"]
    code = f"import subprocess; child = subprocess.Popen({command!r}); print(child.pid, flush=True); input()"
    with Process(sys.executable, "-c", code) as parent:
        pid = int(parent.line())
        parent.wait_for_line("ready:")
        with watching(process.pid for process in family(pid)) as wait:
            os.kill(pid, signal.SIGKILL)
            wait()
        wait_until(lambda: "State:\tZ" in Path(f"/proc/{pid}/status").read_text(), "it is a zombie")
        result = subprocess.run([*CLI, "stop", f"--run-dir={run_dir}"], check=False, capture_output=True, text=True)
        assert result.returncode == 11
        with StartedPool(negate, run_dir=run_dir) as pool:
            pool.stop()


def test_a_pid_that_somebody_else_has_now_is_not_signalled(run_dir):
    """A lock that nobody holds, with the pid of a process that has nothing to do with it."""
    run_dir.mkdir(mode=0o700)
    code = "print('there', flush=True); input()"
    with Process(sys.executable, "-c", code) as innocent:
        innocent.wait_for_line("there")
        (run_dir / "lock").write_text(f"{innocent.pid}\n")
        (run_dir / "lock").chmod(0o600)
        result = subprocess.run([*CLI, "stop", f"--run-dir={run_dir}"], check=False, capture_output=True, text=True)
        assert result.returncode == 11
        innocent.say()
        assert innocent.wait() == 0


def next_pid(wanted: int) -> None:
    """Have the kernel give `wanted` to the next process, if this user may ask for that."""
    try:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(wanted - 1))
    except OSError:
        pytest.skip("choosing pids needs a privileged user")


def test_a_producer_with_the_pid_of_one_that_was_killed_is_another(pool, client):
    code = "slot = pool.lease(model='negate'); view = slot.inputs['x']; print(os.getpid(), flush=True); wait('there')"
    with producer(pool, code) as first:
        first.wait_for_line("there")
        with client.lease_many(2, model="negate"):
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
            for _ in range(50):  # others start processes too
                next_pid(first.pid)
                with producer(pool, code) as second:
                    second.wait_for_line("there")
                    wait_until(lambda: figures(client).leased == 3, "the first's slot is free, the second's is not")
                    assert client.status().producers == 2
                    if second.pid == first.pid:
                        break
            else:
                pytest.skip("others took that pid each time")
    wait_all_free(client)


# The hook of a process whose wall clock jumps by an hour each time that it is asked.
STEPPED = """
import itertools, time

_jumps, _time, _time_ns = itertools.count(1), time.time, time.time_ns
time.time = lambda: _time() + (-1) ** next(_jumps) * 3600 * next(_jumps)
time.time_ns = lambda: int(time.time() * 1e9)
"""


def test_a_wall_clock_that_is_stepped_changes_nothing(negate, run_dir, tmp_path, monkeypatch):
    """Deadlines, time-outs and restarts go by the monotonic clock, in every process of the pool."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(STEPPED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "hook"), os.environ["PYTHONPATH"]]))
    code = """
    import time
    assert abs(time.time() - time.time()) > 1000
    for i in range(50):
        assert pool.infer(x=np.full(4, i, "f4"), timeout_s=60)["y"].tolist() == [-i] * 4
    with pool.lease(timeout_s=60) as slot:
        slot.inputs["x"][...] = 1
        assert slot.submit(deadline_s=1800).result(60).outputs["y"].tolist() == [-1] * 4
    wait("served")
"""
    with StartedPool(negate, run_dir=run_dir, max_batch=1, batch_timeout_s=60) as pool, pool.connect() as client:
        with producer(pool, code) as one:
            one.wait_for_line("served")
            one.say()
            one.succeed()
        with pool.stopped_worker() as worker:
            work = [*hold(client, [1, 2]), submit(client, 3, deadline_s=1800)]
            os.kill(worker, signal.SIGKILL)
            assert [answer(one) for one in work] == [-1, -2, -3]
        assert 0 < client.status().uptime_s < 600
        client.close()
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0
