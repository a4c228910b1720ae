"""256 clients connected at once, with no more descriptors than most systems allow a process unless asked."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

import trtpool
from tests.system.rig import StartedPool, figures, producer, wait_all_free, wait_until

PROCESSES, CLIENTS, ROUNDS = 4, 64, 3
SOFT_LIMIT = 1024

MANY = """
    me, clients, rounds = map(int, sys.argv[2:])
    pools = [pool] + [trtpool.connect(run_dir=run_dir) for _ in range(clients - 1)]
    for turn in range(rounds):
        wait("ready")
        work = []
        for number, one in enumerate(pools):
            lease = one.lease(timeout_s=60)
            lease.inputs["x"][...] = me, number, turn, 1
            work.append(lease.submit())
        wait("submitted")
        for number, submitted in enumerate(work):
            with submitted.result(timeout_s=60) as result:
                assert result.outputs["y"].tolist() == [-me, -number, -turn, -1]
        del work, lease, submitted, result
    wait("answered")
    for one in pools:
        one.close()
"""


@pytest.fixture
def usual_limit() -> Iterator[None]:
    """This process, and what it starts, may have 1,024 descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, SOFT_LIMIT), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("usual_limit")
def test_256_clients_at_once_get_each_its_own_answers(negate: Path, run_dir: Path) -> None:
    everyone = PROCESSES * CLIENTS
    with (
        StartedPool(negate, run_dir=run_dir, slots=everyone + 64, max_batch=32, threads=1) as pool,
        pool.connect() as client,
        contextlib.ExitStack() as stack,
    ):
        producers = [stack.enter_context(producer(pool, MANY, me, CLIENTS, ROUNDS)) for me in range(PROCESSES)]
        for _ in range(ROUNDS):
            for one in producers:
                one.wait_for_line("ready")
            assert client.status().producers == everyone + 1
            with pool.stopped_worker():  # so that all have something in flight at the same time
                for one in producers:
                    one.say()
                for one in producers:
                    one.wait_for_line("submitted")
                wait_until(lambda: in_flight(client) == everyone, "all are in flight", client.status)
            for one in producers:
                one.say()
        for one in producers:
            one.wait_for_line("answered")
        assert client.status().producers == everyone + 1
        for one in producers:
            one.say()
            assert one.succeed() == ""
        wait_all_free(client)
        wait_until(lambda: client.status().producers == 1, "all have left", client.status)


def in_flight(client: trtpool.Client) -> int:
    now = figures(client)
    return now.queued + now.running
