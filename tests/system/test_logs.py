"""What a real pool logs: nothing by default, and with --log-level debug the way of each work under one id."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import msgspec
import pytest

import trtpool
from tests.models import save
from tests.system.rig import NEGATE, StartedPool, answer, submit, wait_until


def log_of(pool: StartedPool) -> list[dict[str, Any]]:
    """What a pool said on standard error, after its end."""
    return [msgspec.json.decode(line, type=dict[str, Any]) for line in pool.rest(2).splitlines()]


def followed(lines: list[dict[str, Any]], work: str) -> list[tuple[str, str]]:
    """Who says something about a work, and what, in order of time."""
    about = [line for line in lines if work == line.get("work") or work in line.get("works", ())]
    return [(line["who"], line["message"].partition(": ")[0]) for line in sorted(about, key=lambda line: line["time"])]


def test_one_id_leads_from_the_client_to_the_worker_and_back(negate, run_dir, caplog):
    caplog.set_level(logging.DEBUG, "trtpool.client")
    with StartedPool(negate, run_dir=run_dir, log_level="debug", log_format="json") as pool:
        with pool.connect() as client:
            submitted = submit(client, 3)
            assert answer(submitted) == -3
        pool.kill(signal.SIGTERM)
        lines = log_of(pool)
        assert pool.wait() == 0
    work = submitted.work_id
    own = [record.getMessage() for record in caplog.records if vars(record).get("work") == work]
    assert own == [f"work {work} submitted: 1 items in 1 slots", f"work {work} ended: done"]
    # The broker hears of the end, and says so, after the worker; of when its line is written nothing is known.
    assert followed(lines, work)[:2] == [
        ("broker", f"work {work} of peer 2 queued"),
        ("broker", "batch 1, attempt 0, sent to peer 1"),
    ]
    assert {who for who, _ in followed(lines, work)} == {"broker", "worker 1"}
    said = dict(line[::-1] for line in followed(lines, work))
    assert said["batch 1, attempt 0, received"] == "worker 1"
    assert said[f"work {work} ended"] == "broker"
    assert any(message.startswith("batch 1, attempt 0, ended after") for message in said)
    assert {line["level"] for line in lines} == {"debug", "info"}
    assert "the pool drains" in [line["message"] for line in lines]


def test_by_default_a_pool_says_nothing(negate, run_dir):
    with StartedPool(negate, run_dir=run_dir, env={"TRTPOOL_LOG": "", "TRTPOOL_LOG_FORMAT": ""}) as pool:
        with pool.connect() as client:
            assert answer(submit(client, 3)) == -3
        pool.stop()  # which sees that nothing was said


def test_who_fails_names_its_work(tmp_path, run_dir, worker_does):
    env = worker_does(run="if any((x == 13).any() for x in inputs): raise RuntimeError('thirteen')")
    model = save(NEGATE, tmp_path, "negate")
    with StartedPool(model, run_dir=run_dir, env=env, log_format="json") as pool, pool.connect() as client:
        submitted = submit(client, 13)
        with pytest.raises(trtpool.WorkError) as failed:
            submitted.result(timeout_s=60)
        submitted.release()
        client.close()
        assert failed.value.work_id == submitted.work_id
        pool.kill(signal.SIGTERM)
        assert {line["level"] for line in log_of(pool)} <= {"critical", "error", "warning"}


def test_another_broker_follows_what_comes_and_does_not_say_the_past_again(negate, run_dir):
    with StartedPool(negate, run_dir=run_dir, log_level="debug", log_format="json") as pool:
        with pool.connect() as client:
            before = submit(client, 3)
            assert answer(before) == -3
            broker = pool.broker
            os.kill(broker, signal.SIGKILL)
            after = submit(client, 4)
            assert answer(after) == -4
            wait_until(lambda: pool.broker != broker, "another broker")
        pool.kill(signal.SIGTERM)
        lines = log_of(pool)
        assert pool.wait() == 0
    brokers = {line["pid"] for line in lines if line["who"] == "broker"}
    assert len(brokers) == 2
    about_before = [line for line in lines if line.get("work") == before.work_id]
    assert {line["pid"] for line in about_before} == {broker}
    about_after = [line["pid"] for line in lines if line.get("work") == after.work_id]
    assert about_after
    assert broker not in about_after
