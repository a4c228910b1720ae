"""Slow requests in the logs of broker and client."""

from __future__ import annotations

import logging

import numpy as np

from tests.ipc.fake_pool import NET_S

ITEM = np.ones(4, np.float32)


def test_the_broker_and_the_client_log_it_with_the_same_ids(make_pool, caplog):
    pool = make_pool(slow_ms=0.001)
    client = pool.connect()
    with caplog.at_level(logging.WARNING), client.lease() as lease:
        lease.inputs["x"][...] = 1
        submitted = lease.submit()
        timings = submitted.result(NET_S).timings
    told = {record.name: record.getMessage() for record in caplog.records}
    ids = f"work {submitted.work_id}, 1 "
    assert told["trtpool.client"] == f"slow: {ids}slots of neg: {timings}"
    assert ids in told["trtpool.broker"]


def test_a_client_whose_pool_has_no_limit_logs_nothing(make_pool, caplog):
    client = make_pool().connect()
    with caplog.at_level(logging.INFO, "trtpool.client"):
        for _ in range(3):
            client.infer(x=ITEM)
    assert not caplog.records


def test_a_client_logs_one_line_a_second(make_pool, caplog):
    client = make_pool(slow_ms=0.001).connect()
    with caplog.at_level(logging.WARNING, "trtpool.client"):
        for _ in range(5):
            client.infer(x=ITEM)
        client.session.work._slow_told_ns = 0
        client.infer(x=ITEM)
    told = [record.getMessage() for record in caplog.records if record.name == "trtpool.client"]
    assert told[-1].endswith(f"; {client.session.work._slow_untold + 6 - len(told)} more were slow since the last")
