"""The process that serves a pool's figures over HTTP: `python -m trtpool.broker.metrics`, a child of the supervisor.

::

    GET /metrics   for Prometheus
    GET /healthz   200: the pool answers.  503: it does not; the text says why
    GET /readyz    200: it answers, has a worker, and grants slots.  503: not yet, or no more

It is a client like any other, for as long as an answer takes, so the broker is asked when somebody asks here, and does
nothing else for it.  The supervisor listens, so that nothing is refused while this process is started again.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import CollectorRegistry

from trtpool.ipc.client import Client
from trtpool.ipc.errors import TrtpoolError
from trtpool.ipc.logs import set_up_logging
from trtpool.ipc.process import tie_to_parent
from trtpool.ipc.report import PoolReport

from .control import MetricsConfig
from .exposition import Figures

log = logging.getLogger("trtpool.metrics")

READ_TIMEOUT_S: Final = 10.0
"""For a request to come in whole."""


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; `run_dir` is the pool's."""

    protocol_version = "HTTP/1.0"  # no connection outlives its answer
    timeout = READ_TIMEOUT_S
    run_dir: Path

    def do_GET(self) -> None:  # http.server's name
        answer = {"/metrics": self._metrics, "/healthz": self._health, "/readyz": self._readiness}
        path = urlsplit(self.path).path
        if path not in answer:
            self._say(HTTPStatus.NOT_FOUND, "there are /metrics, /healthz and /readyz\n")
            return
        try:
            report = self._ask()
        except (TrtpoolError, OSError) as error:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, f"the pool does not answer: {error}\n")
            return
        answer[path](report)

    do_HEAD = do_GET  # noqa: N815

    def _ask(self) -> PoolReport:
        with Client(self.run_dir) as client:
            return client.status()

    def _metrics(self, report: PoolReport) -> None:
        registry = CollectorRegistry()
        registry.register(Figures(report))
        encode, content_type = choose_encoder(self.headers.get("Accept") or "")
        self._answer(HTTPStatus.OK, encode(registry), content_type)

    def _health(self, _report: PoolReport) -> None:
        self._say(HTTPStatus.OK, "ok\n")

    def _readiness(self, report: PoolReport) -> None:
        if report.draining:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, "the pool is stopping\n")
        elif not report.workers:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, "no worker is ready\n")
        else:
            self._say(HTTPStatus.OK, "ok\n")

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._answer(status, text.encode(), "text/plain; charset=utf-8")

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # http.server's name
        """Not to standard error, for each request."""
        log.debug(format, *args)


class Server(ThreadingHTTPServer):
    """Serves the figures of the pool in `run_dir` on a socket that listens already."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, run_dir: Path) -> None:
        handler = type("Handler", (_Handler,), {"run_dir": run_dir})
        super().__init__(listener.getsockname()[:2], handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener


def main() -> None:
    """Serve until the supervisor ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=MetricsConfig)
    set_up_logging("metrics")
    tie_to_parent(config.parent_pid)
    Server(socket.socket(fileno=config.listener_fd), Path(config.run_dir)).serve_forever()


if __name__ == "__main__":
    main()
