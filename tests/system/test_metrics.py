"""A real pool that serves its figures over HTTP."""

from __future__ import annotations

import signal
import socket
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.system.rig import CLI, PATIENCE_S, Process, StartedPool, wait_until
from trtpool.broker.exporter import split_address
from trtpool.ipc.errors import ConfigError


def get(url: str) -> tuple[int, str]:
    """Status and text; 0 if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except (urllib.error.URLError, ConnectionError):
        return 0, ""


def url_of(pool: StartedPool) -> str:
    (line,) = [line for line in pool.announced.splitlines() if line.startswith("metrics: ")]
    return line.removeprefix("metrics: ")


def sample(text: str, name: str, **labels: str) -> float:
    (value,) = [
        one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name == name and labels.items() <= one.labels.items()
    ]
    return value


def test_a_pool_serves_its_figures_and_says_that_it_is_well(negate, run_dir):
    with StartedPool(negate, run_dir=run_dir, metrics="127.0.0.1:0") as pool:
        url = url_of(pool)
        with pool.connect() as client:
            client.infer(x=np.ones((20, 4), np.float32))
        code, text = get(url)
        assert code == 200
        assert sample(text, "trtpool_items_total", model="negate", gpu="cpu") == 20
        assert sample(text, "trtpool_request_seconds_count", model="negate", gpu="cpu") == 20
        assert sample(text, "trtpool_clients") == 0
        assert get(url.replace("/metrics", "/healthz")) == (200, "ok\n")
        assert get(url.replace("/metrics", "/readyz")) == (200, "ok\n")
        assert get(url.replace("/metrics", "/nothing"))[0] == 404
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0
        assert get(url)[0] == 0
    pool.check_nothing_left()


def test_a_pool_without_a_worker_is_healthy_and_not_ready(negate, run_dir):
    with StartedPool(negate, run_dir=run_dir, metrics="127.0.0.1:0", workers=1) as pool:
        ready = url_of(pool).replace("/metrics", "/readyz")
        (worker,) = pool.pids("trtpool.workers")
        psutil.Process(worker).kill()
        wait_until(lambda: get(ready) == (503, "no worker is ready\n") or sample_ends(pool) > 0)
        wait_until(lambda: get(ready) == (200, "ok\n"))
        assert sample_ends(pool) == 1


def sample_ends(pool: StartedPool) -> float:
    return sample(get(url_of(pool))[1], "trtpool_worker_ends_total")


def test_the_process_that_serves_is_started_again_and_the_port_stays(negate, run_dir):
    with StartedPool(negate, run_dir=run_dir, metrics="127.0.0.1:0") as pool:
        (server,) = pool.pids("trtpool.broker.metrics")
        psutil.Process(server).kill()
        wait_until(lambda: pool.pids("trtpool.broker.metrics") not in ([], [server]))
        assert get(url_of(pool))[0] == 200
        with pool.connect() as client:  # nobody else noticed
            assert client.status().worker_ends == 0


def test_figures_outlive_a_broker(negate, run_dir):
    with StartedPool(negate, run_dir=run_dir, metrics="127.0.0.1:0") as pool:
        url = url_of(pool)
        with pool.connect() as client:
            client.infer(x=np.ones((20, 4), np.float32))
            before = get(url)[1]
            psutil.Process(pool.broker).kill()
            client.infer(x=np.ones((1, 4), np.float32))
        text = wait_until(lambda: get(url)[1] if get(url)[0] == 200 else "")
        assert sample(text, "trtpool_broker_restarts_total") == 1
        labels = {"model": "negate", "gpu": "cpu"}
        assert sample(text, "trtpool_compute_seconds_sum", **labels) > sample(
            before, "trtpool_compute_seconds_sum", **labels
        )
        assert sample(text, "trtpool_items_total", **labels) == 21


def test_an_address_in_use_is_said_before_anything_starts(negate, run_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = (*CLI, "start", negate, f"--run-dir={run_dir}", f"--metrics=127.0.0.1:{port}")
        with Process(*command) as process:
            assert process.wait() == ConfigError.exit_code
            assert "choose another address or port" in process.rest(2)
    assert not run_dir.exists()


@pytest.mark.parametrize("text", ["9400", "127.0.0.1", ":9400", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:x", ""])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match=r"such as 127\.0\.0\.1:9400"):
        split_address(text)


def test_addresses():
    assert split_address("127.0.0.1:9400") == ("127.0.0.1", 9400)
    assert split_address("[::1]:0") == ("::1", 0)
    assert split_address("0.0.0.0:80") == ("0.0.0.0", 80)
