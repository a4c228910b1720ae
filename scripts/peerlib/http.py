"""Servers that speak HTTP: starting and ending one, and producers that keep connections to it.

A producer has one connection for each item in flight and keeps them; bodies are the bytes of an array, so that neither
side parses text that is as long as the input.  The client is written by hand since `http.client` and its like take
longer for a request of 1 KB than these servers do.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from scripts.benchlib.crew import STUCK_S, Driver, Stream
from scripts.benchlib.workload import Array, Source, check

from .job import Job

if TYPE_CHECKING:
    import numpy.typing as npt

ROOT: Final = Path(__file__).resolve().parent.parent.parent
START_S: Final = 60.0
STOP_S: Final = 15.0
RETRY_S: Final = 0.05
OK: Final = 200

Decode = Callable[[bytes], Array]
"""Makes an array of the body of an answer."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class Connection:
    """One kept connection, with at most one request under way."""

    def __init__(self, port: int, path: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=STUCK_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = self._socket.makefile("rb")
        self._path = path

    def send(self, body: bytes | memoryview) -> None:
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        sent = self._socket.sendmsg([head, body])
        if sent < len(head) + len(body):
            assert sent >= len(head)
            self._socket.sendall(memoryview(body)[sent - len(head) :])

    def receive(self) -> bytes:
        """The body of the answer.

        Raises:
            ValueError: the answer is no 200.
            ConnectionError: the server closed the connection.
        """
        status = self._reader.readline()
        length = 0
        while (line := self._reader.readline()) not in (b"\r\n", b""):
            key, _, value = line.partition(b":")
            if key.lower() == b"content-length":
                length = int(value)
        body = self._reader.read(length)
        if len(body) < length or not status:
            raise ConnectionError("the server closed the connection in the middle of an answer")
        if int(status.split()[1]) != OK:
            raise ValueError(f"the server answered {status!r}: {body[:500]!r}")
        return body

    def close(self) -> None:
        self._reader.close()
        self._socket.close()


class HttpTransport:
    def __init__(self, port: int, path: str, window: int, decode: Decode) -> None:
        self._decode = decode
        self._free = deque(Connection(port, path) for _ in range(window))
        self._used: deque[Connection] = deque()

    def send(self, items: Array) -> None:
        one = self._free.popleft()
        one.send(items.data.cast("B"))
        self._used.append(one)

    def collect(self, expected: npt.NDArray[np.float64]) -> None:
        one = self._used.popleft()
        check(self._decode(one.receive()), expected)
        self._free.append(one)

    def close(self) -> None:
        for one in (*self._free, *self._used):
            one.close()


def connect(job: Job, port: int, path: str, window: int, decode: Decode) -> Driver:
    """A producer with so many items in flight."""
    return Stream(HttpTransport(port, path, window, decode), Source(job.workload, 1), window, 1)


@contextlib.contextmanager
def server(module: str, job: Job, port: int, path: str, decode: Decode, stop: int, *arguments: str) -> Iterator[None]:
    """Run `module`, a server, until the block ends; yields when it has answered a request.

    Args:
        module: in this package; takes port, kind, model and engine, and then `arguments`.
        job, port, path, decode: what to ask it for.
        stop: the signal that it is to end on.
        arguments: for the server itself.
    """
    command = [sys.executable, "-m", f"{__package__}.{module}", *arguments]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
           "PEER_PORT": str(port), "PEER_KIND": job.kind.name, "PEER_MODEL": str(job.model),
           "PEER_ENGINE": job.engine}  # fmt: skip
    process = subprocess.Popen(command, env=env, cwd=job.folder)
    try:
        _wait_ready(process, job, port, path, decode)
        yield
    finally:
        process.send_signal(stop)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def job_of_environment() -> tuple[Job, int]:
    """In a server: the job that `server` started it for, and its port."""
    from .job import KINDS

    env = os.environ
    kind, model = KINDS[env["PEER_KIND"]], Path(env["PEER_MODEL"])
    return Job(kind, model, env["PEER_ENGINE"], model.parent), int(env["PEER_PORT"])


def _wait_ready(process: subprocess.Popen[bytes], job: Job, port: int, path: str, decode: Decode) -> None:
    items, expected = Source(job.workload, 1).take(1)
    until_s = time.monotonic() + START_S
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it was ready")
        try:
            with contextlib.closing(HttpTransport(port, path, 1, decode)) as transport:
                transport.send(items)
                transport.collect(expected)
                return
        except (ConnectionError, ValueError):  # not listening yet, or its worker is not there yet
            if time.monotonic() > until_s:
                raise
        time.sleep(RETRY_S)
