"""What a client may try on a running pool: it is answered with an error or ignored, and others notice nothing."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

import trtpool
from tests.system.raw import Raw
from tests.system.rig import PATIENCE_S, StartedPool, answer, figures, submit, wait_until
from trtpool.ipc import lifeline
from trtpool.ipc import messages as m
from trtpool.ipc.settings import MAX_FRAME_BYTES, PROTOCOL_VERSION


def connect(pool: StartedPool, *, greet: bool = True) -> Raw:
    return Raw(lifeline.connect(pool.run_dir), greet=greet)


@pytest.fixture
def raw(pool: StartedPool) -> Iterator[Raw]:
    one = connect(pool)
    yield one
    one.close()


@pytest.fixture
def stranger(pool: StartedPool) -> Iterator[Raw]:
    """Has connected and not said Hello."""
    one = connect(pool, greet=False)
    yield one
    one.close()


@pytest.fixture(autouse=True)
def others_notice_nothing(client: trtpool.Client) -> Iterator[None]:
    """Someone has work in flight meanwhile, and slots of their own."""
    with client.lease(model="negate") as slot:
        slot.inputs["x"][...] = 6
        assert answer(submit(client, 3)) == -3
        yield
        assert answer(submit(client, 4)) == -4
        assert slot.inputs["x"].tolist() == [6] * 4


def refused(answers: list[m.FromBroker], code: int = m.BAD_MESSAGE) -> str:
    (error,) = answers
    assert isinstance(error, m.Error)
    assert error.code == code
    return error.text


@contextlib.contextmanager
def violations(client: trtpool.Client, count: int) -> Iterator[None]:
    """The broker counts as many in the block."""
    before = client.status().violations
    yield
    wait_until(lambda: client.status().violations >= before + count, f"{count} violations")
    assert client.status().violations == before + count


GARBAGE = {
    "nothing": b"",
    "text": b"hello",
    "zeros": bytes(64),
    "no list": msgspec.msgpack.encode({"a": 1}),
    "an empty list": msgspec.msgpack.encode([]),
    "unknown tag": msgspec.msgpack.encode([[99, 1]]),
    "a field too many": msgspec.msgpack.encode([[14, 1, 2]]),
    "a negative number": msgspec.msgpack.encode([[7, -1, 0, 1]]),
    "a number too large": msgspec.msgpack.encode([[7, 2**64 - 1, 0, 1]]),
    "bad text": b"\x91\x92\x11\xa2\xff\xff",
    "deep": b"\x91" * 10_000,
    "promises more": b"\xdd\xff\xff\xff\xff",
    "too many messages": m.encode([m.Status(1)] * (m.MAX_MESSAGES + 1)),
}


@pytest.mark.parametrize("frame", GARBAGE.values(), ids=GARBAGE)
def test_a_frame_of_garbage_is_answered_and_counted(frame, raw, client):
    with violations(client, 1):
        raw.dealer.send(frame)
        assert "is not a list of messages" in refused(raw.receive())
    assert raw.alive()


def test_a_frame_in_parts_is_none(raw, client):
    with violations(client, 1):
        raw.dealer.send_multipart([m.encode([m.Status(1)]), b"more"])
        refused(raw.receive())
    assert raw.alive()


def test_a_frame_too_large_ends_the_connection(raw, client):
    raw.dealer.send(bytes(MAX_FRAME_BYTES + 1))
    # ZeroMQ cuts it off and connects anew, as somebody who never said Hello.
    with violations(client, 1):
        assert "must be Hello" in refused(raw.ask(m.Status(1)), m.DENIED)


def test_nobody_gets_in_without_a_token(stranger, client):
    with violations(client, 3):
        wrong = m.Hello(PROTOCOL_VERSION, stranger.description.token[:8] + bytes(32))
        assert "must be Hello with a token" in refused(stranger.ask(wrong), m.DENIED)
        stranger.dealer.send(m.encode([m.Lease(1, 0, 1, None)]))
        stranger.dealer.send(b"garbage")
    # It was answered once; the next answer is to a good Hello.
    (welcome,) = stranger.ask(stranger.hello)
    assert isinstance(welcome, m.Welcome)
    assert stranger.alive()


def test_a_token_is_good_for_one_identity(raw, client):
    with violations(client, 1), contextlib.closing(raw.context.socket(zmq.DEALER)) as second:
        second.setsockopt(zmq.LINGER, 0)
        second.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        second.connect(raw.description.endpoint)
        second.send(m.encode([raw.hello]))
        refused(m.decode_from_broker(second.recv()), m.DENIED)
    assert raw.alive()


def test_hello_is_said_once(raw, client):
    with violations(client, 1):
        refused(raw.ask(raw.hello))
    assert raw.alive()


ILLEGAL = {
    "submit nothing": m.Submit(999_999, 0, 1, 0, 1),
    "release nothing": m.Release(999_999, 0, 1),
    "no such model": m.Lease(5, 77, 1, None),
    "the work of a worker": m.Finished(1, 0, 0, 0, 0, 0),
    "a worker's Ready": m.Ready("cpu", 64),
}


@pytest.mark.parametrize("message", ILLEGAL.values(), ids=ILLEGAL)
def test_a_message_that_is_illegal_is_refused(message, raw, client):
    with violations(client, 1):
        refused(raw.ask(message))
    assert raw.alive()


def test_the_lease_of_another_is_out_of_reach(raw, client, pool):
    other = connect(pool)
    try:
        lease = other.lease()
        leased = figures(client).leased
        with violations(client, 2):
            assert "is not yours" in refused(raw.ask(m.Submit(lease, 0, 1, 0, 1)))
            assert "is not yours" in refused(raw.ask(m.Release(lease, 0, 1)))
        assert not [one for one in raw.ask(m.Cancel(lease, 0, 1), m.Status(1)) if isinstance(one, m.Error)]
        assert figures(client).leased == leased
        (done,) = other.ask(m.Submit(lease, 0, 1, 0, 1))
        assert isinstance(done, m.Done)
        assert done.status == m.OK
        other.dealer.send(m.encode([m.Release(lease, 0, 1)]))
        assert other.alive()
    finally:
        other.close()


def test_a_lease_is_used_once_and_within_its_bounds(raw, client):
    lease = raw.lease()
    with violations(client, 6):
        for message in (
            m.Submit(lease, 1, 1, 0, 1),  # beyond it
            m.Submit(lease, 0, 2, 0, 2),
            m.Submit(lease, 0, 1, 0, 2),  # more items than a slot holds
            m.Submit(lease, 2**31 - 1, 2**31 - 1, 0, 1),
            m.Submit(lease, 0, 1, 0, 1, None, 2**31 - 1),
        ):
            refused(raw.ask(message))
        (done,) = raw.ask(m.Submit(lease, 0, 1, 0, 1))
        assert isinstance(done, m.Done)
        refused(raw.ask(m.Submit(lease, 0, 1, 1, 1)))  # it is DONE
    raw.dealer.send(m.encode([m.Release(lease, 0, 1)]))
    with violations(client, 1):
        refused(raw.ask(m.Release(lease, 0, 1)))


def test_writing_to_the_lifeline_ends_the_connection(raw, client):
    producers = client.status().producers
    raw.lifeline.send(b"hello")
    raw.wait_cut_off()
    wait_until(lambda: client.status().producers == producers - 1, "it is forgotten")


def test_a_socket_that_only_connects_holds_nothing(pool, client):
    """Not even when it goes at once, or never reads."""
    broker = Path(f"/proc/{pool.broker}/fd")
    before = len([*broker.iterdir()])
    for _ in range(50):
        lifeline.connect(pool.run_dir).close()
    idle = [lifeline.connect(pool.run_dir) for _ in range(50)]
    assert client.status().producers == 1  # they are none before they say Hello
    wait_until(lambda: len([*broker.iterdir()]) >= before + len(idle), "they are connected")
    for sock in idle:
        sock.close()
    wait_until(lambda: len([*broker.iterdir()]) <= before, "they are forgotten")


def test_a_broker_without_descriptors_goes_on_when_there_are_some(pool, client):
    limits = resource.prlimit(pool.broker, resource.RLIMIT_NOFILE)
    used = len([*Path(f"/proc/{pool.broker}/fd").iterdir()])
    resource.prlimit(pool.broker, resource.RLIMIT_NOFILE, (used, limits[1]))
    try:
        sock = lifeline.connect(pool.run_dir)
        pool.wait_for_line("raise the limit on open files (ulimit -n)", 2)
        assert figures(client).leased == 1  # those who are in are served
    finally:
        resource.prlimit(pool.broker, resource.RLIMIT_NOFILE, limits)
    late = Raw(sock)
    assert late.alive()
    late.close()
