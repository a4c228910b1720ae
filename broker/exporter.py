"""What the supervisor does about metrics: it listens, and keeps a process that serves them; see `metrics`."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import time
from typing import Final

from trtpool.ipc.errors import ConfigError, MissingExtra
from trtpool.ipc.process import describe_exit
from trtpool.ipc.settings import PoolSettings

from .children import Child, Children
from .control import MetricsConfig

log = logging.getLogger("trtpool.supervisor")

RESTART_PAUSE_S: Final = 1.0
"""Before another is started."""


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; a host with colons stands in brackets.

    Raises:
        ConfigError: it is not of that form.
    """
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(
            f"--metrics {text!r} is not HOST:PORT, such as 127.0.0.1:9400; 0.0.0.0:9400 serves all networks"
        )
    return host, int(port)


def listen(address: str) -> socket.socket:
    """A socket that listens for scrapes.

    Raises:
        ConfigError: the address cannot be used.
        MissingExtra: prometheus-client is not installed.
    """
    host, port = split_address(address)
    if importlib.util.find_spec("prometheus_client") is None:
        raise MissingExtra("--metrics needs prometheus-client: pip install 'trtpool[metrics]'")
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(where[:2], family=family, backlog=64)
    except OSError as error:
        raise ConfigError(
            f"--metrics {address} cannot be listened on: {error}; choose another address or port"
        ) from None


class Exporter:
    """See the module.

    Args:
        settings: of the pool, which has `metrics`.
        children: how to start it.
        listener: what it serves on; stays the caller's.
    """

    def __init__(self, settings: PoolSettings, children: Children, listener: socket.socket) -> None:
        self._settings = settings
        self._children = children
        self._listener = listener
        self._child: Child | None = None
        self._start_at: float | None = None
        self._stopped = False

    @property
    def url(self) -> str:
        """Where the figures are."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}/metrics" if ":" in host else f"http://{host}:{port}/metrics"

    def start(self) -> None:
        """Start the process."""
        config = MetricsConfig(os.getpid(), self._listener.fileno(), self._settings.run_dir)
        with self._children.room():
            self._child = self._children.spawn("trtpool.broker.metrics", config, [config.listener_fd])
        self._start_at = None

    def is_child(self, pidfd: int) -> bool:
        """Whether this is its pidfd."""
        return self._child is not None and self._child.pidfd == pidfd

    def ended(self, returncode: int) -> None:
        """It was reaped; `start_due` starts another."""
        self._child = None
        if self._stopped:
            return
        log.error("the process that serves metrics ended: %s; another is started", describe_exit(returncode))
        self._start_at = time.monotonic() + RESTART_PAUSE_S

    def start_due(self) -> float | None:
        """Start another if it is time; returns the seconds until then."""
        if self._start_at is None:
            return None
        left = self._start_at - time.monotonic()
        if left > 0:
            return left
        self.start()
        return None

    def stop(self) -> None:
        """End it for good; that comes by its pidfd."""
        self._start_at, self._stopped = None, True
        if self._child is not None:
            self._child.process.kill()
