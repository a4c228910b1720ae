"""A broker that is killed, in real pools: another takes over, and nobody notices more than a pause."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import trtpool
from tests.system.rig import (
    StartedPool,
    answer,
    figures,
    hold,
    ones,
    producer,
    submit,
    wait_all_free,
    wait_until,
    watching,
)


@pytest.fixture
def pool(negate: Path, run_dir: Path) -> Iterator[StartedPool]:
    with StartedPool(negate, run_dir=run_dir, max_batch=2, slots=16) as pool:
        yield pool
        if pool.popen.poll() is None:  # else the test ended it
            pool.check_at_rest()
            end(pool)


@pytest.fixture(params=["lifeline", "zmq"])
def transport(request: pytest.FixtureRequest) -> str:
    """What carries a client's messages."""
    return str(request.param)


@pytest.fixture
def client(pool: StartedPool, transport: str, request: pytest.FixtureRequest) -> Iterator[trtpool.Client]:
    with pool.connect(transport) as connected:
        yield connected
    request.node.funcargs.pop("client", None)  # else pytest would hold it, and it the arena, when leaks are looked for


def kill_broker(pool: StartedPool) -> None:
    """Kill it, and see that it has ended; the next is perhaps not there yet."""
    broker = pool.broker
    with watching([broker]) as wait:
        os.kill(broker, signal.SIGKILL)
        wait()


def open_descriptors(pool: StartedPool) -> int:
    """How many the supervisor has."""
    return len(list(Path(f"/proc/{pool.pid}/fd").iterdir()))


def has_table(pid: int) -> bool:
    """Whether a process has its descriptor, or maps it."""
    links = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(path.readlink()))
    return "memfd:trtpool-table" in " ".join([*links, Path(f"/proc/{pid}/maps").read_text()])


def end(pool: StartedPool) -> None:
    pool.kill(signal.SIGTERM)
    assert pool.wait() == 0, pool.rest(2)
    assert not pool.run_dir.exists()


def test_leases_results_and_work_outlive_a_broker(pool: StartedPool, client: trtpool.Client) -> None:
    done = submit(client, 7).result(timeout_s=60)
    lease = client.lease()
    lease.inputs["x"][...] = 8
    with pool.stopped_worker():
        work = hold(client, [1, 2, 3, 4])
        kill_broker(pool)
        leased = lease.submit()
    assert [answer(one) for one in work] == [-1, -2, -3, -4]
    assert answer(leased) == -8
    assert float(done.outputs["y"][0]) == -7
    done.release()
    assert client.status().epoch == 2
    wait_all_free(client)


def test_messages_that_a_broker_has_not_read_are_read_by_the_next(pool: StartedPool, client: trtpool.Client) -> None:
    broker = pool.broker
    leases = client.lease_many(4)
    os.kill(broker, signal.SIGSTOP)
    work = []
    for lease in leases:
        lease.inputs["x"][...] = 5
        work.append(lease.submit())
    kill_broker(pool)
    for one in work:
        with one.result(timeout_s=60) as result:
            assert (result.outputs["y"] == -5).all()
    wait_all_free(client)


def test_a_request_that_waits_is_granted_by_the_next(pool: StartedPool, client: trtpool.Client, transport: str) -> None:
    with pool.connect(transport) as other:
        held = client.lease_many(12)
        granted: list[trtpool.Leases] = []
        asking = threading.Thread(target=lambda: granted.append(other.lease_many(8, timeout_s=60)))
        asking.start()
        wait_until(lambda: figures(client).waiting == 1, "it waits", client.status)
        kill_broker(pool)
        for lease in held:
            lease.release()
        asking.join()
        assert sum(lease.count for lease in granted[0]) == 8
        for lease in granted[0]:
            lease.release()
        wait_all_free(client)


def test_who_connects_while_there_is_no_broker_is_served_by_the_next(pool: StartedPool, transport: str) -> None:
    broker = pool.broker
    os.kill(broker, signal.SIGSTOP)
    answers: list[list[float]] = []

    def connect_and_infer() -> None:
        with pool.connect(transport) as late:
            answers.append(late.infer(x=ones(3))["y"].tolist())

    threads = [threading.Thread(target=connect_and_infer) for _ in range(4)]
    for thread in threads:
        thread.start()
    kill_broker(pool)
    for thread in threads:
        thread.join()
    assert answers == [[-3.0] * 4] * 4


def test_a_worker_and_the_broker_killed_together(pool: StartedPool, client: trtpool.Client) -> None:
    with pool.stopped_worker() as worker:
        work = hold(client, [1, 2, 3, 4])
        os.kill(worker, signal.SIGKILL)
        kill_broker(pool)
    assert [answer(one) for one in work] == [-1, -2, -3, -4]
    wait_all_free(client)


def test_a_producer_and_the_broker_killed_together(pool: StartedPool, client: trtpool.Client, transport: str) -> None:
    code = """
        leases = pool.lease_many(6)
        wait("leased")
    """
    with producer(pool, code, transport=transport) as other:
        assert other.line() == "leased"
        os.kill(pool.broker, signal.SIGSTOP)
        other.kill()
        other.wait()
        kill_broker(pool)
        wait_all_free(client)


def test_stopping_right_after_a_brokers_death_delivers_what_is_in_flight(
    pool: StartedPool, client: trtpool.Client
) -> None:
    with pool.stopped_worker():
        work = hold(client, [1, 2, 3])
        kill_broker(pool)
        pool.kill(signal.SIGTERM)
    assert [answer(one) for one in work] == [-1, -2, -3]
    assert pool.wait() == 0


LOAD = """
    import collections
    number, count, batch = (int(word) for word in sys.argv[2:5])
    values = [number * 100_000 + at for at in range(count)]

    def write(value, inputs):
        inputs["x"][...] = value

    answers = collections.Counter()
    for value, result in pool.map(write, values, window=batch, ordered=bool(number % 2)):
        assert (result.outputs["y"] == -value).all(), (value, result.outputs["y"])
        answers[value] += 1
    assert answers == collections.Counter(values), "an item was lost or came twice"
    print("all", len(values), flush=True)
"""


def test_brokers_killed_again_and_again_under_load_lose_nothing(negate: Path, run_dir: Path, transport: str) -> None:
    moments = random.Random(4)
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=4, slots=48, workers=2) as pool,
        pool.connect(transport) as client,
    ):
        loads = [producer(pool, LOAD, number, 4000, 1 + 3 * number, transport=transport) for number in range(1, 4)]
        kills = 0
        try:
            while any(load.popen.poll() is None for load in loads) and kills < 12:
                target = client.status().models[0].items + moments.randrange(20, 400)
                wait_until(
                    lambda: (
                        client.status().models[0].items >= target  # noqa: B023
                        or all(load.popen.poll() is not None for load in loads)
                    ),
                    "some work",
                    client.status,
                )
                kill_broker(pool)
                kills += 1
            for load in loads:
                assert load.succeed() == "all 4000\n"
        finally:
            for load in loads:
                load.__exit__(None, None, None)
        assert kills >= 3
        report = client.status()
        assert report.epoch == 1 + kills
        assert report.violations == 0
        assert report.models[0].items == 3 * 4000, "something ran twice, or was not counted"
        assert report.models[0].failed_items == 0
        wait_all_free(client)
        end(pool)


def test_clients_that_leave_are_forgotten_by_the_supervisor_too(
    pool: StartedPool, client: trtpool.Client, transport: str
) -> None:
    assert np.all(client.infer(x=ones(1))["y"] == -1)
    kill_broker(pool)
    client.status()
    before = open_descriptors(pool)
    code = """
        pool.infer(x=np.ones(4, np.float32))
    """
    for _ in range(3):
        with producer(pool, code, transport=transport) as other:
            other.succeed()
    with producer(pool, code, transport=transport) as other:
        other.succeed()
        kill_broker(pool)
    client.status()
    wait_until(lambda: open_descriptors(pool) == before, "they are closed", lambda: open_descriptors(pool))


def test_nobody_but_broker_and_supervisor_has_the_table(pool: StartedPool, client: trtpool.Client) -> None:
    kill_broker(pool)
    workers = [worker.pid for worker in client.status().workers]
    assert has_table(pool.pid)
    assert has_table(pool.broker)
    assert workers
    assert not any(has_table(pid) for pid in [*workers, os.getpid()])


def test_brokers_that_never_get_ready_end_the_pool(negate: Path, run_dir: Path, tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"if sys.orig_argv[-1] == 'trtpool.broker' and os.path.exists({str(tmp_path / 'spoilt')!r}):\n"
        "    os._exit(3)\n"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(hook), os.environ["PYTHONPATH"]])}
    with StartedPool(negate, run_dir=run_dir, env=env, slots=8) as pool, pool.connect() as client:
        with pool.stopped_worker() as worker, watching([pool.broker, worker]) as wait:
            work = hold(client, [1, 2])
            (tmp_path / "spoilt").touch()
            os.kill(pool.broker, signal.SIGKILL)
            assert pool.wait() == trtpool.PoolClosed.exit_code
            wait()
        assert "so did 3 that were to take over" in pool.rest(2)
        for one in work:
            with pytest.raises(trtpool.PoolClosed):
                one.result(timeout_s=60)
    assert not run_dir.exists()
