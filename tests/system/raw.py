"""A peer of a broker that sends whatever it is told to."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import Any

import zmq

from tests.system.rig import PATIENCE_S
from trtpool.ipc import lifeline
from trtpool.ipc import messages as m
from trtpool.ipc.settings import PROTOCOL_VERSION


class Raw:
    """A lifeline and a DEALER with nothing between them and the test.

    Args:
        sock: a connected lifeline.
        greet: whether to say Hello.
    """

    def __init__(self, sock: socket.socket, *, greet: bool = True) -> None:
        self.lifeline = sock
        self.description, self.arena_fd = lifeline.receive_description(self.lifeline)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.dealer = self.context.socket(zmq.DEALER)
        self.dealer.setsockopt(zmq.LINGER, 0)
        self.dealer.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        self.dealer.connect(self.description.endpoint)
        if greet:
            (welcome,) = self.ask(self.hello)
            assert isinstance(welcome, m.Welcome)

    @property
    def hello(self) -> m.Hello:
        return m.Hello(PROTOCOL_VERSION, self.description.token)

    def ask(self, *messages: Any) -> list[m.FromBroker]:
        """Send a frame and receive the next."""
        self.dealer.send(m.encode(messages))
        return self.receive()

    def receive(self) -> list[m.FromBroker]:
        return m.decode_from_broker(self.dealer.recv())

    def lease(self) -> int:
        (grant,) = self.ask(m.Lease(1, 0, 1, None))
        assert isinstance(grant, m.Grant)
        return grant.leases[0][0]

    def alive(self) -> bool:
        """Whether the broker answers."""
        (report,) = self.ask(m.Status(9))
        return isinstance(report, m.Report)

    def wait_cut_off(self) -> None:
        ready, _, _ = select.select([self.lifeline], [], [], PATIENCE_S)
        assert ready
        with contextlib.suppress(ConnectionResetError):
            assert self.lifeline.recv(1) == b""

    def close(self) -> None:
        """Again: nothing."""
        if self.arena_fd < 0:
            return
        self.dealer.close()
        self.context.term()
        self.lifeline.close()
        os.close(self.arena_fd)
        self.arena_fd = -1
