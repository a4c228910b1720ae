"""mosec: a server in Rust whose workers are Python processes.

Bodies are bytes rather than JSON, and batches form by themselves, as its documentation advises; a batch waits for 1 ms
at most, the least that mosec takes.  One item at a time has a worker without batches.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from functools import partial

import numpy as np
from scripts.benchlib.workload import Array

from . import http
from .contestant import Connects, Contestant
from .job import Job


def decode(body: bytes) -> Array:
    return np.frombuffer(body, np.float32)


class Mosec(Contestant):
    name = "mosec"
    modules = ("mosec",)
    copies = 5
    why = "into the TCP socket, out of it, the body's pieces put together, into the worker's Unix socket, out of it"

    @contextlib.contextmanager
    def serve(self, job: Job) -> Iterator[None]:
        self._port = http.free_port()
        arguments = ("--address", "127.0.0.1", "--port", str(self._port), "--path", str(job.folder / "mosec"),
                     "--log-level", "warning")  # fmt: skip
        with http.server("mosec_server", job, self._port, "/inference", decode, signal.SIGTERM, *arguments):
            yield

    @contextlib.contextmanager
    def producers(self, job: Job, count: int) -> Iterator[Connects]:
        window = job.pick(images=16, small=64) // count or 1
        yield [partial(http.connect, job, self._port, "/inference", window, decode)] * count
