"""What a client may try on a running pool: it is answered with an error or ignored, and others notice nothing."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import trtpool
from tests.system.raw import Raw
from tests.system.rig import PATIENCE_S, StartedPool, answer, figures, submit, wait_until
from trtpool.ipc import lifeline
from trtpool.ipc import messages as m
from trtpool.ipc.pipe import FRAME_BYTES
from trtpool.ipc.settings import MAX_FRAME_BYTES, PROTOCOL_VERSION


def connect(pool: StartedPool, transport: str, *, greet: bool = True) -> Raw:
    return Raw(lifeline.connect(pool.run_dir), transport, greet=greet)


@pytest.fixture(params=["lifeline", "zmq"])
def raw(pool: StartedPool, request: pytest.FixtureRequest) -> Iterator[Raw]:
    """A client over either transport."""
    with contextlib.closing(connect(pool, request.param)) as one:
        yield one


@pytest.fixture
def over_zmq(pool: StartedPool) -> Iterator[Raw]:
    with contextlib.closing(connect(pool, "zmq")) as one:
        yield one


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
        raw.send_frame(frame)
        assert "is not a list of messages" in refused(raw.receive())
    assert raw.alive()


def test_an_empty_frame_is_garbage_or_the_end(raw, client):
    """On a socket of packets it cannot be told from the end of file."""
    with violations(client, 1 if raw.dealer else 0):
        raw.send_frame(b"")
        if raw.dealer:
            refused(raw.receive())
        else:
            raw.wait_cut_off()


def test_a_frame_in_parts_is_none(over_zmq, client):
    with violations(client, 1):
        over_zmq.dealer.send_multipart([m.encode([m.Status(1)]), b"more"])
        refused(over_zmq.receive())
    assert over_zmq.alive()


def test_a_frame_too_large_ends_a_zeromq_connection(over_zmq, client):
    over_zmq.send_frame(bytes(MAX_FRAME_BYTES + 1))
    # ZeroMQ cuts it off and connects anew, as somebody who never said Hello.
    with violations(client, 1):
        assert "must be Hello" in refused(over_zmq.ask(m.Status(1)), m.DENIED)


def test_a_frame_too_large_for_a_lifeline_is_garbage(pool, client):
    with contextlib.closing(connect(pool, "lifeline")) as raw:
        raw.lifeline.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * FRAME_BYTES)
        with violations(client, 1):
            raw.send_frame(m.encode([m.Status(1)]) + bytes(FRAME_BYTES + 100))
            refused(raw.receive())
        assert raw.alive()


def test_nobody_gets_in_over_zeromq_without_a_token(pool, client):
    with contextlib.closing(connect(pool, "zmq", greet=False)) as stranger:
        with violations(client, 4):
            wrong = m.Hello(PROTOCOL_VERSION, stranger.description.token[:8] + bytes(32))
            assert "must be Hello with a token" in refused(stranger.ask(wrong), m.DENIED)
            stranger.send(m.Lease(1, 0, 1, None))
            stranger.send_frame(b"garbage")
            stranger.send(m.Hello(PROTOCOL_VERSION + 1, stranger.description.token))
        # It was answered once; the next answer is to a good Hello.
        (welcome,) = stranger.ask(stranger.hello)
        assert isinstance(welcome, m.Welcome)
        assert stranger.alive()


STRANGE: dict[str, Callable[[Raw], bytes]] = {
    "another token": lambda raw: m.encode([m.Hello(PROTOCOL_VERSION, raw.description.token[:8] + bytes(32))]),
    "another version": lambda raw: m.encode([m.Hello(PROTOCOL_VERSION + 1, raw.description.token)]),
    "no Hello": lambda raw: m.encode([m.Lease(1, 0, 1, None)]),
    "garbage": lambda raw: b"garbage",
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE)
def test_nobody_gets_in_over_a_lifeline_without_its_token(make, pool, client):
    with contextlib.closing(connect(pool, "lifeline", greet=False)) as stranger, violations(client, 1):
        stranger.send_frame(make(stranger))
        stranger.wait_cut_off()


def test_the_token_of_another_lifeline_is_none(pool, client):
    with (
        contextlib.closing(connect(pool, "lifeline", greet=False)) as one,
        contextlib.closing(connect(pool, "lifeline", greet=False)) as other,
    ):
        with violations(client, 1):
            one.send(other.hello)
            one.wait_cut_off()
        (welcome,) = other.ask(other.hello)
        assert isinstance(welcome, m.Welcome)


def test_a_token_is_good_once(raw, client):
    with violations(client, 1), contextlib.closing(raw.new_dealer()) as second:
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


def lease_of(raw: Raw) -> int:
    (grant,) = raw.ask(m.Lease(1, 0, 1, None))
    assert isinstance(grant, m.Grant)
    return grant.leases[0][0]


def test_the_lease_of_another_is_out_of_reach(raw, client, over_zmq):
    lease = lease_of(over_zmq)
    leased = figures(client).leased
    with violations(client, 2):
        assert "is not yours" in refused(raw.ask(m.Submit(lease, 0, 1, 0, 1)))
        assert "is not yours" in refused(raw.ask(m.Release(lease, 0, 1)))
    assert not [one for one in raw.ask(m.Cancel(lease, 0, 1), m.Status(1)) if isinstance(one, m.Error)]
    assert figures(client).leased == leased
    (done,) = over_zmq.ask(m.Submit(lease, 0, 1, 0, 1))
    assert isinstance(done, m.Done)
    assert done.status == m.OK
    over_zmq.send(m.Release(lease, 0, 1))
    assert over_zmq.alive()


def test_a_lease_is_used_within_its_bounds_and_by_rising_numbers(raw, client):
    lease = lease_of(raw)
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
        refused(raw.ask(m.Submit(lease, 0, 1, 0, 1)))  # it is DONE, and may go on, but by another number
    raw.send(m.Release(lease, 0, 1))
    with violations(client, 1):
        refused(raw.ask(m.Release(lease, 0, 1)))


def test_who_chose_zeromq_must_not_write_to_the_lifeline(over_zmq, client):
    producers = client.status().producers
    over_zmq.lifeline.send(b"hello")
    over_zmq.wait_cut_off()
    wait_until(lambda: client.status().producers == producers - 1, "it is forgotten")


def test_what_was_said_before_a_close_counts_though_answers_were_not_read(pool, client):
    """The kernel tells of the unread first, as a reset connection; after that comes what was sent."""
    raw = connect(pool, "lifeline")
    lease = lease_of(raw)
    raw.send(m.Status(1))
    assert select.select([raw.lifeline], [], [], PATIENCE_S)[0]
    os.kill(pool.broker, signal.SIGSTOP)  # so that the end is there when it reads what came before
    try:
        raw.send(m.Release(lease, 0, 1))
        raw.close()
    finally:
        os.kill(pool.broker, signal.SIGCONT)
    # This process lives on, so nothing else would bring the slot back.
    wait_until(lambda: figures(client).leased == 1)


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
