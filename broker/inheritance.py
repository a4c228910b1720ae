"""What a supervisor kept of a broker that ended, told to the next one."""

from __future__ import annotations

import socket
from typing import NamedTuple

from trtpool.ipc import lifeline
from trtpool.ipc.errors import ProtocolError

from . import control as c


class Kept(NamedTuple):
    """A lifeline, and its process; `generation` is that of a worker's engines."""

    pid: int
    sock: socket.socket
    pidfd: int
    generation: int = 0


class Inheritance(NamedTuple):
    """Clients by their numbers as peers, and workers that live by the supervisor's for them."""

    peers: dict[int, Kept]
    workers: dict[int, Kept]


def inherit(control: socket.socket) -> Inheritance:
    """Wait for all that the supervisor kept, up to `TakeOver`.

    Raises:
        SystemExit: the supervisor ended.
        ProtocolError: there are no descriptors for the workers.
    """
    kept = Inheritance({}, {})
    while True:
        try:
            data, fds = lifeline.receive_packet(control)
        except ProtocolError:
            if not kept.peers:  # then it may be a worker, which is told of first, and which nobody may lose sight of
                raise
            continue  # no descriptors are left for a client; the loop finds it missing
        if not data:
            raise SystemExit(1)
        message = c.decode(data)
        if isinstance(message, c.PeerKept):
            kept.peers[message.peer] = Kept(message.pid, socket.socket(fileno=fds[0]), fds[1])
        elif isinstance(message, c.WorkerStarted):
            kept.workers[message.worker] = Kept(message.pid, socket.socket(fileno=fds[0]), fds[1], message.generation)
        elif isinstance(message, c.TakeOver):
            return kept
        else:
            raise TypeError(f"the supervisor said {type(message).__name__} before TakeOver")
