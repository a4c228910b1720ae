"""Who may have a trace, seen from the supervisor: real commands' sockets, and a broker that is played."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from tests.broker.test_desk import Rig
from trtpool.broker import control as c
from trtpool.broker.requests import Refused
from trtpool.broker.tracing.requests import TraceEnd, TraceOver, TraceRequest, Tracing
from trtpool.broker.tracing.traces import Traces

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Refused | Tracing | TraceOver).decode


class Link:
    """The broker's: what it is told, and how many descriptors that comes with."""

    def __init__(self) -> None:
        self.told: list[tuple[c.Control, int]] = []

    def tell(self, message: c.Control, fds: list[int] | None = None) -> None:
        for fd in fds or []:
            os.fstat(fd)  # it is open still
        self.told.append((message, len(fds or [])))


class TracesRig(Rig):
    """A supervisor's desk and traces."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.link = Link()
        self.traces = Traces(cast("Any", self.link), self.desk)
        self.ready = True
        self.passed, self.kept = os.pipe()

    def ask(self, fds: int = 1) -> socket.socket:
        command = self.connect()
        self.say(command, TraceRequest(), fds)
        return command

    def say(self, command: socket.socket, request: msgspec.Struct, fds: int = 0) -> None:
        socket.send_fds(command, [_encode(request)], [self.passed] * fds)
        self.hear()

    def hear(self) -> None:
        for asked in self.look():
            self.traces.hear(asked, ready=self.ready)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[TracesRig]:
    rig = TracesRig(tmp_path)
    yield rig
    rig.close()
    os.close(rig.passed)
    with pytest.raises(BrokenPipeError):  # nobody has it any more
        os.write(rig.kept, b"x")
    os.close(rig.kept)


def answer(command: socket.socket) -> object:
    return _decode(command.recv(65536))


def refused(command: socket.socket) -> tuple[str, str]:
    """The kind and text of a refusal, after which nothing more comes."""
    said = answer(command)
    assert isinstance(said, Refused)
    assert command.recv(1) == b""
    return said.refusal.kind, said.refusal.text


def test_a_trace_from_its_beginning_to_its_end(rig: TracesRig) -> None:
    command = rig.ask()
    assert rig.link.told == [(c.StartTrace(1), 1)]
    rig.traces.broker_said(c.TraceStarted(1))
    assert answer(command) == Tracing()
    second = rig.ask()
    assert refused(second)[0] == "PoolBusy"
    rig.say(command, TraceEnd())
    assert rig.link.told[1:] == [(c.StopTrace(1), 0)]
    rig.traces.broker_said(c.TraceStopped(1))
    assert answer(command) == TraceOver()
    assert command.recv(1) == b""
    rig.ask()
    assert rig.link.told[2:] == [(c.StartTrace(2), 1)]


def test_one_that_is_gone_ends_its_trace_and_the_next_is_not_mistaken_for_it(rig: TracesRig) -> None:
    rig.ask().close()
    rig.hear()
    rig.commands.clear()
    second = rig.ask()
    assert [message for message, _ in rig.link.told] == [c.StartTrace(1), c.StopTrace(1), c.StartTrace(2)]
    rig.traces.broker_said(c.TraceStarted(1))
    rig.traces.broker_said(c.TraceStopped(1))
    rig.traces.broker_said(c.TraceStarted(2))
    assert answer(second) == Tracing()


def test_a_broker_that_ends_ends_the_trace(rig: TracesRig) -> None:
    command = rig.ask()
    rig.traces.broker_ended()
    said = answer(command)
    assert isinstance(said, TraceOver)
    assert "another took over" in said.text
    rig.ready = False
    assert refused(rig.ask()) == (
        "PoolBusy", "the pool's broker ended and another is taking over; ask again in a moment"
    )  # fmt: skip
    assert len(rig.link.told) == 1


def test_what_a_broker_cannot_write_to_is_refused(rig: TracesRig) -> None:
    command = rig.ask()
    rig.traces.broker_said(c.TraceStopped(1, "it is no memory"))
    assert refused(command) == ("ProtocolError", "it is no memory")


@pytest.mark.parametrize("fds", [0, 2])
def test_a_trace_is_asked_for_with_one_descriptor(rig: TracesRig, fds: int) -> None:
    assert refused(rig.ask(fds))[0] == "ProtocolError"
    assert rig.link.told == []


def test_who_has_no_trace_cannot_end_one(rig: TracesRig) -> None:
    command = rig.ask()
    other = rig.connect()
    rig.say(other, TraceEnd())
    assert refused(other) == ("ProtocolError", "no trace of yours is under way")
    rig.traces.broker_said(c.TraceStarted(1))
    assert answer(command) == Tracing()
    assert len(rig.link.told) == 1
