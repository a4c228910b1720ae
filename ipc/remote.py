"""Connecting, and handles that connect by themselves in whatever process they end up in."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt

from .client import Client
from .handles import Lease, Leases
from .report import PoolReport
from .rundir import run_dir_of
from .settings import DEFAULT_TRANSPORT, Priority
from .streams import Stream

T = TypeVar("T")

_lock = threading.Lock()
_clients: dict[tuple[Path, str, bool | None], Client] = {}


def _forget_in_child() -> None:
    global _lock  # noqa: PLW0603  # the parent's may be held, by a thread that does not exist here
    _lock = threading.Lock()
    _clients.clear()


def _close_all() -> None:
    while _clients:
        _clients.popitem()[1].close()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_close_all)


def connect(
    name: str = "default",
    *,
    run_dir: str | os.PathLike[str] | None = None,
    transport: str = DEFAULT_TRANSPORT,
    busy_poll: bool | None = None,
) -> Client:
    """Connect to a running pool.

    Args:
        name: the pool's name, as in ``trtpool start --name``.
        run_dir: its run directory, if it was started with one; `$TRTPOOL_RUN_DIR` otherwise names it.
        transport: what carries the messages: "lifeline", a Unix socket, or "zmq", which costs about twice as much.
        busy_poll: spin while waiting for an answer, which saves the time to be woken and takes a whole CPU meanwhile;
            None: if the pool does (``trtpool start --busy-poll``).

    Raises:
        PoolNotFound: no pool runs there.
        AccessDenied: this user may not attach.
        ProtocolError: the pool runs another version of trtpool.
    """
    return Client(run_dir_of(name, run_dir), transport, busy_poll=busy_poll)


class PoolHandle:
    """Names a pool, can be pickled, and connects when first used, once in each process, also after a fork.

    Give it to `multiprocessing` or DataLoader workers and use it like a client.
    """

    def __init__(self, run_dir: Path, transport: str = DEFAULT_TRANSPORT, busy_poll: bool | None = None) -> None:
        self.run_dir = run_dir
        self.transport = transport
        self.busy_poll = busy_poll

    @property
    def client(self) -> Client:
        """This process's client, which all handles of this pool share; it is closed when the process ends."""
        with _lock:
            key = self.run_dir, self.transport, self.busy_poll
            client = _clients.get(key)
            if client is None or client.session.closed:
                client = _clients[key] = self.connect()
            return client

    def connect(self) -> Client:
        """A client of your own, to close yourself."""
        return Client(self.run_dir, self.transport, busy_poll=self.busy_poll)

    def lease(self, *, model: str | None = None, timeout_s: float | None = None, priority: Priority = "bulk") -> Lease:
        """See `Client.lease`."""
        return self.client.lease(model=model, timeout_s=timeout_s, priority=priority)

    def lease_many(
        self, count: int, *, model: str | None = None, timeout_s: float | None = None, priority: Priority = "bulk"
    ) -> Leases:
        """See `Client.lease_many`."""
        return self.client.lease_many(count, model=model, timeout_s=timeout_s, priority=priority)

    def infer(
        self,
        inputs: Mapping[str, npt.ArrayLike] | None = None,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        gpu: int | None = None,
        priority: Priority = "bulk",
        **arrays: npt.ArrayLike,
    ) -> dict[str, npt.NDArray[Any]]:
        """See `Client.infer`."""
        return self.client.infer(inputs, model=model, timeout_s=timeout_s, gpu=gpu, priority=priority, **arrays)

    def map(
        self,
        write: Callable[[T, Mapping[str, npt.NDArray[Any]]], object],
        items: Iterable[T] | AsyncIterable[T],
        *,
        window: int = 64,
        ordered: bool = True,
        model: str | None = None,
        timeout_s: float | None = None,
        return_exceptions: bool = False,
        gpu: int | None = None,
        priority: Priority = "bulk",
    ) -> Stream[T]:
        """See `Client.map`."""
        return self.client.map(
            write,
            items,
            window=window,
            ordered=ordered,
            model=model,
            timeout_s=timeout_s,
            return_exceptions=return_exceptions,
            gpu=gpu,
            priority=priority,
        )

    def status(self) -> PoolReport:
        """See `Client.status`."""
        return self.client.status()

    def __reduce__(self) -> tuple[type[PoolHandle], tuple[Path, str, bool | None]]:
        return PoolHandle, (self.run_dir, self.transport, self.busy_poll)

    def __repr__(self) -> str:
        return f"<PoolHandle of {self.run_dir}>"
