"""Both transports: what is sent arrives whole and in order, and every way to end a wait ends it."""

from __future__ import annotations

import gc
import os
import socket
import threading
import weakref
from collections.abc import Iterator

import msgspec
import pytest

from tests.ipc.fake_pool import NET_S, FakePool, in_turn
from trtpool.ipc import messages as m
from trtpool.ipc.client import Client
from trtpool.ipc.errors import InvalidInput, PoolClosed, ProtocolError
from trtpool.ipc.lifeline import Description, receive_description
from trtpool.ipc.lifeline import connect as connect_lifeline
from trtpool.ipc.link import MAX_SENT, TRANSPORTS, Attendant, Link, ZmqLink
from trtpool.ipc.settings import MAX_FRAME_BYTES


def attach(pool: FakePool) -> tuple[socket.socket, Description]:
    lifeline = connect_lifeline(pool.run_dir)
    description, fd = receive_description(lifeline)
    os.close(fd)
    return lifeline, description


@pytest.fixture(params=list(TRANSPORTS))
def link(request: pytest.FixtureRequest, pool: FakePool) -> Iterator[Link]:
    made = TRANSPORTS[request.param](*attach(pool))
    yield made
    made.close()


def receive(link: Link, count: int) -> list[m.FromBroker]:
    """Wait for `count` messages."""
    found = link.receive()  # first, for a send may have used up the edge that ZeroMQ's descriptor tells an arrival by
    while len(found) < count:
        link.wait(NET_S)
        found += link.receive()
    return found


def test_it_is_welcome(link):
    assert link.welcome.caps == [12]
    assert not link.ended
    assert link.receive() == link.early == []


def test_answers_come_in_order(link):
    link.send([m.Status(number) for number in range(1, 4)])
    link.send([m.Status(4)])
    assert [answer.request for answer in receive(link, 4)] == [1, 2, 3, 4]


def test_very_many_messages_are_several_frames(link, monkeypatch):
    frames: list[bytes] = []
    send = link._send_frame
    monkeypatch.setattr(link, "_send_frame", in_turn(frames.append, send))
    link.send([m.Status(number) for number in range(1, 2 * MAX_SENT + 2)])
    assert [answer.request for answer in receive(link, 2 * MAX_SENT + 1)] == list(range(1, 2 * MAX_SENT + 2))
    assert len(frames) == 3


def test_messages_with_many_shapes_are_several_frames(link, monkeypatch):
    frames: list[bytes] = []
    monkeypatch.setattr(link, "_send_frame", frames.append)
    longest = m.Submit(1, 0, 1, 0, 1, shapes=16 * (16 * (2**40,),))
    link.send(MAX_SENT * [longest])
    assert max(map(len, frames)) <= MAX_FRAME_BYTES
    assert [one for frame in frames for one in m.decode_to_broker(frame)] == MAX_SENT * [longest]


def test_the_most_that_is_sent_in_a_frame_is_taken():
    huge = 2**63 - 1
    longest = m.Submit(huge, 2**31 - 1, 2**31 - 1, huge, 2**31 - 1, huge, 2**31 - 1, 2**31 - 1, 1)
    assert len(m.encode(MAX_SENT * [longest])) < MAX_FRAME_BYTES
    assert m.decode_to_broker(m.encode([longest])) == [longest]


def test_time_passes(link):
    link.wait(0)
    link.wait(0.001)
    link.wait(-1)
    assert link.receive() == []


def test_a_wake_ends_a_wait_even_if_it_comes_first(link):
    link.wake()
    link.wait(None)
    thread = threading.Thread(target=link.wait, args=(None,))
    thread.start()
    link.wake()
    thread.join(NET_S)
    assert not thread.is_alive()


def test_the_end_of_the_broker_ends_waits(pool, link):
    pool.kill()
    while not link.ended:
        link.wait(None)
        link.receive()
    link.wait(0)
    link.send([m.Status(1)])  # to nobody, and no error
    assert link.receive() == []


def test_what_was_sent_before_the_end_is_there_after_it(pool, link):
    pool.stop()
    (bye,) = receive(link, 1)
    assert bye == m.Bye("pool 'fake' was stopped")


def test_closing_twice(link):
    link.close()
    link.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_token_of_nobody(pool, transport):
    lifeline, description = attach(pool)
    try:
        with pytest.raises((ProtocolError, PoolClosed)):
            TRANSPORTS[transport](lifeline, msgspec.structs.replace(description, token=bytes(40)))
        assert lifeline.fileno() == -1, "the link owned it, and closed it"
    finally:
        lifeline.close()
    assert pool.connect().status().violations == 1
    pool._loop._core.violations = 0  # it was meant


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_pool_ends_while_one_connects(pool, transport):
    lifeline, description = attach(pool)
    pool.kill()
    try:
        with pytest.raises(PoolClosed, match="the pool ended while we connected"):
            TRANSPORTS[transport](lifeline, description)
    finally:
        lifeline.close()


def test_a_transport_that_is_not_there(pool):
    with pytest.raises(InvalidInput, match="there is no transport 'pigeon'; there are lifeline, zmq"):
        Client(pool.run_dir, "pigeon")


def test_an_idle_client_over_zeromq_notices_what_comes_over_its_lifeline(pool):
    client = Client(pool.run_dir, "zmq")
    link = client.session.link
    assert isinstance(link, ZmqLink)
    assert link._attendant is not None
    pool.kill()
    link._attendant.join(NET_S)  # nobody uses the client meanwhile
    assert not link._attendant.is_alive()
    assert link.ended
    client.close()


def test_a_closed_client_leaves_no_thread(pool):
    clients = [Client(pool.run_dir, "zmq") for _ in range(3)]
    assert Attendant.count() == 3
    for client in clients:
        client.close()
    assert Attendant.count() == 0


def test_a_client_that_nobody_has_is_not_kept_by_its_thread(pool):
    clients = [Client(pool.run_dir, "zmq")]
    session = weakref.ref(clients[0].session)
    with pytest.warns(ResourceWarning, match="was dropped without close"):
        clients.clear()
    gc.collect()
    assert session() is None
    assert Attendant.count() == 0
