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
from trtpool.ipc.pipe import FRAME_BYTES, HEARD_ALONE, Post
from trtpool.ipc.settings import PROTOCOL_VERSION


class Raw:
    """A lifeline, and a DEALER for the transport "zmq", with nothing between them and the test.

    Args:
        sock: a connected lifeline.
        transport: what carries its messages, "lifeline" or "zmq".
        greet: whether to say Hello.
    """

    def __init__(self, sock: socket.socket, transport: str = "lifeline", *, greet: bool = True) -> None:
        self.lifeline = sock
        self.description, self.arena_fd = lifeline.receive_description(sock)
        sock.settimeout(PATIENCE_S)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.dealer = self.new_dealer() if transport == "zmq" else None
        self.post = Post()
        if greet:
            (welcome,) = self.ask(self.hello)
            assert isinstance(welcome, m.Welcome)

    def new_dealer(self) -> zmq.Socket[bytes]:
        """A connected socket, which is nobody yet."""
        dealer = self.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        dealer.connect(self.description.endpoint)
        return dealer

    @property
    def hello(self) -> m.Hello:
        return m.Hello(PROTOCOL_VERSION, self.description.token)

    def send_frame(self, frame: bytes) -> None:
        (self.dealer or self.lifeline).send(frame)

    def send(self, *messages: Any) -> None:
        """Send one frame."""
        self.send_frame(m.encode(messages))

    def receive(self) -> list[m.FromBroker]:
        """The next frame; over ZeroMQ the broker is told now and then that frames were heard."""
        while True:
            messages = m.decode_from_broker(self.dealer.recv() if self.dealer else self.lifeline.recv(FRAME_BYTES))
            self.post.heard += 1
            if self.dealer and self.post.owes >= HEARD_ALONE:
                self.send(self.post.say_heard())
            messages = [message for message in messages if not isinstance(message, m.Heard)]
            if messages:
                return messages

    def ask(self, *messages: Any) -> list[m.FromBroker]:
        """Send a frame and receive the next."""
        self.send(*messages)
        return self.receive()

    def alive(self) -> bool:
        """Whether the broker answers."""
        (report,) = self.ask(m.Status(9))
        return isinstance(report, m.Report)

    def wait_cut_off(self) -> None:
        """Wait for the end of the lifeline; what else it brings is passed over."""
        while True:
            ready, _, _ = select.select([self.lifeline], [], [], PATIENCE_S)
            assert ready
            with contextlib.suppress(ConnectionResetError):
                if not self.lifeline.recv(FRAME_BYTES):
                    return

    def close(self) -> None:
        """Again: nothing."""
        if self.arena_fd < 0:
            return
        if self.dealer:
            self.dealer.close()
        self.context.term()
        self.lifeline.close()
        os.close(self.arena_fd)
        self.arena_fd = -1
