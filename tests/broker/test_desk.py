"""Who may ask a supervisor for something, and workers that were told to end and do not."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from trtpool.broker import control as c
from trtpool.broker import crew
from trtpool.broker.children import Children
from trtpool.broker.desk import MAX_ASKERS, Asked, Desk
from trtpool.broker.reload.requests import ReloadRequest
from trtpool.broker.requests import Refused, encode
from trtpool.ipc.settings import ModelSource, PoolSettings

REQUEST = ReloadRequest((ModelSource("/new.onnx", "det"),))


class Rig:
    """A desk, and commands that connect to it."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "requests"
        self.epoll = select.epoll()
        self.children = Children(self.epoll)
        self.desk = Desk(run_dir, self.epoll, self.children)
        self.commands: list[socket.socket] = []

    def connect(self) -> socket.socket:
        command = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.commands.append(command)
        command.settimeout(20)
        command.connect(os.fspath(self.path))
        return command

    def look(self) -> list[Asked]:
        """What the desk heard, when there is nothing more to hear."""
        heard = []
        while ready := self.epoll.poll(0):
            heard += [asked for fd, _ in ready if (asked := self.desk.look_at(fd)) is not None]
        return heard

    def close(self) -> None:
        for command in self.commands:
            command.close()
        self.desk.close()
        self.children.close()
        self.epoll.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def test_what_is_asked_is_heard_and_answered(rig: Rig) -> None:
    command = rig.connect()
    command.send(encode(REQUEST))
    ((asker, request, _),) = rig.look()
    assert request == REQUEST
    command.close()
    assert rig.look() == [Asked(asker, None, [])]
    assert asker.gone
    rig.desk.dismiss(asker)  # once more is harmless


def test_only_our_own_user_is_heard(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rig.path.stat().st_mode & 0o777 == 0o600
    command = rig.connect()
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)  # whoever connected is another, seen from us
    assert rig.look() == []
    assert command.recv(1) == b""


def test_what_is_no_request_is_refused(rig: Rig) -> None:
    command = rig.connect()
    command.send(b'{"type": "reload", "models": []}')
    assert rig.look() == []
    refused = msgspec.json.decode(command.recv(65536), type=Refused)
    assert refused.refusal.kind == "ProtocolError"
    assert command.recv(1) == b""


def test_too_many_at_once_are_turned_away(rig: Rig) -> None:
    commands = []
    for _ in range(MAX_ASKERS + 1):
        commands.append(rig.connect())
        assert rig.look() == []
    assert commands[-1].recv(1) == b""
    commands[0].close()
    assert [asked.request for asked in rig.look()] == [None]
    rig.connect().send(encode(REQUEST))
    assert [asked.request for asked in rig.look()] == [REQUEST]


def test_a_worker_that_was_replaced_and_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    settings = PoolSettings(models=(ModelSource("/a.onnx", "a"),), run_dir="/r")
    told = cast("Any", SimpleNamespace(tell=lambda message: None))
    one = crew.Crew(settings, (), cast("Any", None), told)
    (old,) = one.places
    old.process = cast("subprocess.Popen[bytes]", SimpleNamespace(kill=lambda: killed.append(old)))
    old.ready, old.number = True, 7
    (new,) = one.candidates = [crew.Place(0, None, (), 1)]
    new.ready = True
    one.switch()
    assert (one.places, one.leaving, one.generation) == ([new], [old], 1)
    assert one.end_late() is None, "it may have work"
    one.hear(c.WorkerLeaves(7))
    left = one.end_late()
    assert left is not None
    assert 0 < left <= crew.END_GRACE_S
    assert not killed
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + crew.END_GRACE_S)
    one.end_late()
    one.end_late()
    assert killed == [old]
