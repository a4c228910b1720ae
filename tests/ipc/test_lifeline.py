from __future__ import annotations

import array
import contextlib
import os
import resource
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtpool.ipc import lifeline
from trtpool.ipc.arena import create_segment, map_segment
from trtpool.ipc.errors import AccessDenied, PoolNotFound, ProtocolError, RunDirError, TrtpoolError
from trtpool.ipc.layout import Layout, ModelPlan, plan
from trtpool.ipc.lifeline import (
    PACKET_BYTES,
    Denial,
    Description,
    close_all,
    connect,
    listen,
    receive_description,
    receive_packet,
    send_packet,
)
from trtpool.ipc.rundir import LIFELINE
from trtpool.ipc.settings import PROTOCOL_VERSION
from trtpool.ipc.tensors import ModelSpec, TensorSpec

Pair = tuple[socket.socket, socket.socket]


def a_layout(models: int = 1) -> Layout:
    x, y = TensorSpec("x", "float32", (3,)), TensorSpec("y", "float32", ())
    return plan([ModelPlan(ModelSpec(f"m{n}", "/m.onnx", (x,), (y,)), 4, 1, 4) for n in range(models)])


def a_description(**fields: object) -> Description:
    whole = Description(PROTOCOL_VERSION, 1, "default", "ipc:///x", bytes(range(40)), a_layout())
    return msgspec.structs.replace(whole, **fields)


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The broker's end and the client's."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ends[0], ends[1]:
        yield ends


@pytest.fixture
def segment() -> Iterator[int]:
    fd = create_segment(a_layout().segment_bytes)
    yield fd
    os.close(fd)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="trt", dir="/tmp") as found:
        yield Path(found)


def test_a_description_and_the_arena_arrive_together(pair, segment):
    broker, client = pair
    sent = a_description()
    send_packet(broker, sent, [segment])
    received, fd = receive_description(client)
    try:
        assert received == sent
        assert fd != segment
        assert not os.get_inheritable(fd)
        size = received.layout.segment_bytes
        map_segment(fd, size)[7] = 99
        assert map_segment(segment, size)[7] == 99
    finally:
        os.close(fd)


def test_packets_keep_their_bounds(pair):
    broker, client = pair
    for text in ("one", "two"):
        send_packet(broker, Denial(text))
    assert [receive_packet(client)[0] for _ in range(2)] == [msgspec.msgpack.encode(Denial(t)) for t in ("one", "two")]


def test_a_description_of_many_models_fits_a_packet(pair, segment):
    broker, client = pair
    send_packet(broker, a_description(layout=a_layout(300)), [segment])
    description, fd = receive_description(client)
    os.close(fd)
    assert len(description.layout.models) == 300


def test_what_does_not_fit_a_packet_is_not_sent(pair):
    broker, client = pair
    with pytest.raises(ProtocolError, match="serve fewer models in one pool"):
        send_packet(broker, Denial("x" * PACKET_BYTES))
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        receive_packet(client)


def test_sending_never_waits(pair):
    """A peer that takes nothing in is an error, and not a wait."""
    broker, _ = pair

    def fill():
        for _ in range(10_000):
            send_packet(broker, Denial("x" * 1000))

    with pytest.raises(BlockingIOError):
        fill()


def test_sending_to_one_who_left_is_an_error_and_no_signal(pair):
    broker, client = pair
    client.close()
    with pytest.raises(BrokenPipeError):
        send_packet(broker, Denial("too late"))


def test_the_end_of_file_is_an_empty_packet(pair):
    broker, client = pair
    broker.close()
    assert receive_packet(client) == (b"", [])


# --- What a client refuses; it is never left with a descriptor ---


def refuses(pair: Pair, error: type[TrtpoolError], match: str) -> None:
    before = descriptors()
    with pytest.raises(error, match=match):
        receive_description(pair[1])
    assert descriptors() == before


def test_a_denial_says_why(pair, segment):
    send_packet(pair[0], Denial("user 7 may not attach; ask 3"))
    refuses(pair, AccessDenied, "user 7 may not attach; ask 3")
    send_packet(pair[0], Denial("with the arena all the same"), [segment])
    refuses(pair, AccessDenied, "with the arena")


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1])
def test_another_version_says_what_to_do(pair, segment, version):
    send_packet(pair[0], a_description(version=version), [segment])
    refuses(pair, ProtocolError, rf"protocol {version}, this trtpool {PROTOCOL_VERSION}; install the same")


@pytest.mark.parametrize("count", [0, 2, 3, 4])
def test_any_number_of_descriptors_but_one(pair, segment, count):
    send_packet(pair[0], a_description(), [segment] * count)
    refuses(pair, ProtocolError, f"passed {count} descriptors")


def test_more_descriptors_than_there_is_room_for(pair, segment):
    send_packet(pair[0], a_description(), [segment] * 40)
    refuses(pair, ProtocolError, "cut off")


def test_descriptors_that_this_process_may_not_open(pair, segment):
    """The kernel drops them and says so; the first may have come."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    send_packet(pair[0], a_description(), [segment] * 4)
    before = descriptors()
    highest = max(map(int, before))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    fill = []
    try:
        with contextlib.suppress(OSError):
            while True:
                fill.append(os.dup(0))
        with pytest.raises(ProtocolError, match=r"cut off; is the limit on open files reached \(ulimit -n\)"):
            receive_packet(pair[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        close_all(fill)
    assert descriptors() == before


def test_a_packet_that_is_too_long(pair):
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * PACKET_BYTES)
    pair[0].send(bytes(PACKET_BYTES + 1))
    refuses(pair, ProtocolError, "cut off")


def raw_description(**fields: object) -> bytes:
    return msgspec.msgpack.encode({**msgspec.to_builtins(a_description(), builtin_types=(bytes,)), **fields})


def layout_with(dtype: str) -> object:
    raw = msgspec.to_builtins(a_layout())
    raw["models"][0]["spec"]["inputs"][0]["dtype"] = dtype
    return raw


@pytest.mark.parametrize(
    "data",
    [
        b"\x00", b"\xff" * 100, b"\x81\xa4type\xa1\xff", msgspec.msgpack.encode(["description"]),
        msgspec.msgpack.encode({"type": "other"}), msgspec.msgpack.encode({"type": "denial"}),
        msgspec.msgpack.encode({"type": "denial", "text": "no", "more": 1}), raw_description(more=1),
        raw_description(token=b"short"), raw_description(token=bytes(41)), raw_description(version="1"),
        raw_description(layout=None), raw_description(layout={"models": [], "segment_bytes": 4096}),
        raw_description(layout=layout_with("complex64")),
        msgspec.msgpack.encode({"type": "denial", "text": "no"}).replace(b"no", b"\xff\xff"),
    ],
)  # fmt: skip
def test_garbage(pair, segment, data):
    with_arena = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [segment]))]
    pair[0].sendmsg([data], with_arena)
    refuses(pair, ProtocolError, "cannot be read .*same version of trtpool")


@settings(max_examples=50)
@given(st.binary(min_size=1, max_size=200))
def test_random_garbage(data):
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ends[0], ends[1]:
        ends[0].send(data)
        refuses(ends, ProtocolError, "cannot be read")


def test_a_layout_that_does_not_fit_its_segment(pair, segment):
    layout = msgspec.structs.replace(a_layout(), segment_bytes=4096)
    send_packet(pair[0], a_description(layout=layout), [segment])
    refuses(pair, ProtocolError, "planes end at")


def test_a_pool_that_ended_meanwhile(pair):
    pair[0].close()
    refuses(pair, PoolNotFound, "ended while we connected; start it again")


def test_a_pool_that_was_killed_with_our_words_unread(pair):
    pair[1].send(b"unread")
    pair[0].close()
    refuses(pair, PoolNotFound, "did not answer|ended while we connected")


def test_a_pool_that_does_not_answer(pair, monkeypatch):
    monkeypatch.setattr(lifeline, "CONNECT_TIMEOUT_S", 0.001)
    refuses(pair, PoolNotFound, "did not answer")


# --- The socket in the run directory ---


def test_listen_and_connect(run_dir, segment):
    with listen(run_dir) as listener:
        assert (run_dir / LIFELINE).stat().st_mode & 0o777 == 0o600
        with pytest.raises(BlockingIOError):
            listener.accept()
        with connect(run_dir) as client:
            broker, _ = listener.accept()
            with broker:
                assert not any(os.get_inheritable(sock.fileno()) for sock in (listener, client, broker))
                send_packet(broker, a_description(), [segment])
                description, fd = receive_description(client)
                os.close(fd)
                assert description.pool == "default"


def test_a_second_listener_is_refused_and_leaves_nothing(run_dir):
    with listen(run_dir):
        before = descriptors()
        with pytest.raises(RunDirError, match="in use; make room, or choose another"):
            listen(run_dir)
        assert descriptors() == before


def nothing(path: Path) -> None:
    pass


def a_dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(path))


def a_socket_of_another_kind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))


@pytest.mark.parametrize("make", [nothing, a_dead_socket, a_socket_of_another_kind, Path.touch, Path.mkdir])
def test_where_nobody_listens(run_dir, make):
    make(run_dir / LIFELINE)
    before = descriptors()
    with pytest.raises(PoolNotFound, match=r"no pool answers in .*; start one with `trtpool start`"):
        connect(run_dir)
    assert descriptors() == before


def test_a_path_that_no_socket_can_have(run_dir):
    before = descriptors()
    with pytest.raises(PoolNotFound, match="too long"):
        connect(run_dir / ("x" * 200))
    assert descriptors() == before


def test_a_closed_directory(run_dir, monkeypatch):
    """As root nothing is closed, so the kernel's answer is made here."""

    class Closed(socket.socket):
        def connect(self, _address: object) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "socket", Closed)
    before = descriptors()
    with pytest.raises(AccessDenied, match=f"user {os.getuid()} may not attach to the pool in {run_dir}"):
        connect(run_dir)
    assert descriptors() == before


def test_closing_what_is_closed():
    read, write = os.pipe()
    close_all([read, read, write, -1])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(write)
