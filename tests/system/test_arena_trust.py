"""What the arena's seals stop, and what they cannot; and that what must stay secret is said nowhere."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import signal

import numpy as np
import pytest

from tests.models import save
from tests.system.raw import Raw
from tests.system.rig import CLI, NEGATE, Process, StartedPool, answer, submit
from trtpool.ipc import lifeline
from trtpool.ipc import messages as m
from trtpool.ipc.arena import map_segment
from trtpool.ipc.errors import ProtocolError
from trtpool.ipc.settings import PROTOCOL_VERSION

F_SEAL_FUTURE_WRITE = 0x10
FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01


@pytest.fixture
def raw(pool):
    """A client that has the arena's descriptor."""
    with contextlib.closing(Raw(lifeline.connect(pool.run_dir))) as one:
        yield one


def test_a_client_cannot_resize_the_arena(raw, client):
    """The processes that map it would end by SIGBUS."""
    size = os.fstat(raw.arena_fd).st_size
    for length in (0, size - 4096, size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(raw.arena_fd, length)
    with pytest.raises(PermissionError):
        os.posix_fallocate(raw.arena_fd, size, 4096)
    assert os.fstat(raw.arena_fd).st_size == size
    assert answer(submit(client, 2)) == -2


@pytest.mark.parametrize("seal", [fcntl.F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, fcntl.F_SEAL_SEAL])
def test_a_client_cannot_seal_the_arena_for_others(seal, raw, pool):
    """No client and no worker that comes later could map it."""
    with pytest.raises(PermissionError):
        fcntl.fcntl(raw.arena_fd, fcntl.F_ADD_SEALS, seal)
    with pool.connect() as late:
        assert answer(submit(late, 2)) == -2


def punch_hole(fd: int, size: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    done: int = libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(size))
    return done


def test_what_the_seals_cannot_stop_a_hole(raw, client):
    """Who may write the arena may also empty it: a reader finds zeros; nobody is ended by it, and the pool goes on."""
    with client.lease(model="negate") as slot:
        slot.inputs["x"][...] = 6
        assert punch_hole(raw.arena_fd, os.fstat(raw.arena_fd).st_size) == 0
        assert slot.inputs["x"].tolist() == [0] * 4
    assert answer(submit(client, 5)) == -5


def test_what_the_seals_cannot_stop_a_row_of_somebody_else(raw, client):
    """Clients of one arena trust each other: the broker keeps the leases apart, and not the memory."""
    size = os.fstat(raw.arena_fd).st_size
    with client.lease(model="negate") as slot:
        slot.inputs["x"][...] = 6
        everything = np.frombuffer(map_segment(raw.arena_fd, size), np.float32)
        at = int(np.flatnonzero(everything == 6)[0])
        everything[at] = 7
        assert slot.inputs["x"].tolist() == [7, 6, 6, 6]
        del everything


# --- Secrets ---


def shown(secret: bytes) -> list[str]:
    """What of a secret would be seen in a text, however it was printed."""
    return [secret.hex(), repr(secret)[2:-1], repr(secret[:8])[2:-1], secret[:8].hex()]


def test_no_token_is_logged_printed_or_said(tmp_path):
    """With all that is ever logged, after each way to get a token wrong, in texts and figures."""
    model = save(NEGATE, tmp_path, "negate")
    with StartedPool(model, run_dir=tmp_path / "run", env={"TRTPOOL_LOG": "DEBUG"}, slots=8) as pool:
        secrets, answers = [], []
        for transport in ("lifeline", "zmq"):
            with contextlib.closing(Raw(lifeline.connect(pool.run_dir), transport)) as raw:
                secrets.append(raw.description.token[8:])
                answers += raw.ask(raw.hello)  # again
                answers += raw.ask(m.Submit(99, 0, 1, 0, 1))
                raw.send_frame(m.encode([m.Hello(PROTOCOL_VERSION, raw.description.token)]) + b"garbage")
                answers += raw.receive()
            with contextlib.closing(Raw(lifeline.connect(pool.run_dir), transport, greet=False)) as stranger:
                secrets.append(stranger.description.token[8:])
                stranger.send(m.Hello(PROTOCOL_VERSION + 1, stranger.description.token))
                if stranger.dealer:
                    answers += stranger.receive()
                else:
                    stranger.wait_cut_off()
        with pool.connect() as client:
            answers.append(m.Bye(str(client.status())))
        with Process(*CLI, "status", "--json", "--run-dir", pool.run_dir) as status:
            text = status.succeed()
        pool.kill(signal.SIGTERM)
        text += pool.announced + pool.rest(1) + pool.rest(2) + "".join(map(str, answers))
        assert pool.wait() == 0
    assert "broke the protocol" in text
    assert "is process" in text, "or nothing was logged"
    assert len(secrets) == 4
    for secret in secrets:
        for form in shown(secret):
            assert form not in text


def test_no_token_is_in_what_objects_look_like(raw, caplog):
    token = raw.description.token
    logging.getLogger("test").error("%r %s %r", raw.description, raw.description, raw.hello)
    assert "Description(version=" in caplog.text
    for form in (*shown(token), *shown(token[8:])):
        assert form not in caplog.text
    with pytest.raises(ProtocolError) as caught:
        m.decode_to_broker(m.encode([raw.hello]) + b"!")
    assert not any(form in str(caught.value) for form in shown(token[8:]))
