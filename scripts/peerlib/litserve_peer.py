"""LitServe: FastAPI in front of worker processes.

With batches and `fast_queue=True` (ZeroMQ in place of a manager's queues), as its documentation advises above 100
requests/s.  It shows inputs as base64 in JSON; here the body is the array's bytes, which is far quicker.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from functools import partial

import numpy as np
from scripts.benchlib.workload import Array

from . import http
from .contestant import Connects, Contestant
from .job import Job


def decode(body: bytes) -> Array:
    return np.array(json.loads(body)["y"], np.float32)


class LitServe(Contestant):
    name = "litserve"
    modules = ("litserve",)
    copies = 11
    why = (
        "into the TCP socket, out of it, the body's pieces put together, pickled, the queue's address put before it, "
        "into a Unix socket and out of it twice (its ZeroMQ broker), the address split off, unpickled"
    )

    @contextlib.contextmanager
    def serve(self, job: Job) -> Iterator[None]:
        self._port = http.free_port()
        with http.server("litserve_server", job, self._port, "/predict", decode, signal.SIGINT):
            yield

    @contextlib.contextmanager
    def producers(self, job: Job, count: int) -> Iterator[Connects]:
        window = job.pick(images=16, small=64) // count or 1
        yield [partial(http.connect, job, self._port, "/predict", window, decode)] * count
