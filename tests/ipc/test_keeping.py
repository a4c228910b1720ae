"""Slots that a client keeps when they are released, and uses again without a word to the broker."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import weakref
from collections import deque
from typing import Any

import numpy as np
import pytest

from tests.ipc.fake_pool import ANSWERS, MODEL, NET_S, FakePool, Threads, in_turn, states, until
from trtpool.ipc import claims, keeping
from trtpool.ipc import messages as m
from trtpool.ipc.claims import ModelState
from trtpool.ipc.client import Client
from trtpool.ipc.errors import LeaseTooLarge, PoolBusy, PoolClosed
from trtpool.ipc.handles import Leases
from trtpool.ipc.keeping import Keeper, Kept
from trtpool.ipc.layout import ModelPlan, plan

CAP = 12
ALL_FREE = (16, 0, 0, 0, 0)


@pytest.fixture(autouse=True)
def reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of any size are used again, and not given back while a test looks."""
    monkeypatch.setattr(claims, "REUSED_BYTES", 0)
    monkeypatch.setattr(keeping, "LOOK_S", NET_S)


def run(client: Client, value: int, count: int = 1) -> list[tuple[int, int]]:
    """One run through the pool; where its slots are."""
    with client.lease_many(count, timeout_s=NET_S) as leases:
        for lease in leases:
            lease.inputs["x"][...] = value
        for submitted in [lease.submit() for lease in leases]:
            assert (submitted.result(NET_S).outputs["y"] == -value).all()
        return [(lease._claim.first, lease._claim.count) for lease in leases]


def rhythm(client: Client, turns: int = 4, count: int = 1) -> None:
    for value in range(turns):
        run(client, value, count)


def use_in_turn(client: Client, in_flight: list[Leases], value: int) -> None:
    """Each run through the pool, released, and leased anew before the next."""
    for place, leases in enumerate(in_flight):
        count = sum(lease.count for lease in leases)
        for lease in leases:
            lease.inputs["x"][...] = value
            assert (lease.submit().result(NET_S).outputs["y"] == -value).all()
        leases.release()
        in_flight[place] = client.lease_many(count, timeout_s=NET_S)


def kept(client: Client) -> list[int]:
    """How many slots there are in each run that is kept."""
    return [run.count for run in client.session.models[0].kept]


def test_a_caller_in_a_rhythm_gets_the_slots_that_it_released(client, monkeypatch):
    rhythm(client, count=3)
    assert kept(client) == [3]
    sent: list[list[m.Message]] = []
    link = client.session.link
    monkeypatch.setattr(link, "send", in_turn(lambda messages: sent.append(list(messages)), link.send))
    before = time.monotonic_ns()
    places = {tuple(run(client, value, 3)) for value in range(5)}
    assert len(places) == 1
    assert [[type(message) for message in frame] for frame in sent] == 5 * [[m.Submit]]
    for (message,) in sent:
        assert isinstance(message, m.Submit)
        assert before < message.leased_ns < time.monotonic_ns()
    assert states(client) == ALL_FREE


def test_all_of_an_arena_can_be_in_flight(client, monkeypatch):
    """None is free beside them, so none could be granted in advance."""
    in_flight = [client.lease_many(3, timeout_s=NET_S) for _ in range(4)]
    sent: list[m.Message] = []
    link = client.session.link
    for turn in range(6):
        if turn == 3:
            monkeypatch.setattr(link, "send", in_turn(sent.extend, link.send))
        use_in_turn(client, in_flight, turn)
    assert {type(message) for message in sent} == {m.Submit}
    for leases in in_flight:
        leases.release()
    assert states(client) == ALL_FREE


def test_a_single_call_keeps_nothing(client):
    run(client, 1)
    assert kept(client) == []
    assert states(client) == ALL_FREE
    assert Keeper.count() == 0


def test_small_runs_are_not_kept(client, monkeypatch):
    monkeypatch.setattr(claims, "REUSED_BYTES", 3 * client.session.models[0].slot_bytes)
    rhythm(client, count=2)
    assert kept(client) == []
    assert client.session.models[0].spares
    rhythm(client, count=3)
    assert kept(client) == [3]


def test_what_is_still_looked_at_is_not_used_again(client):
    rhythm(client, count=2)
    lease, array = client.lease_many(2), None
    lease[0].inputs["x"][...] = 5
    array = lease[0].submit().result(NET_S).outputs["y"]
    lease.release()
    assert kept(client) == []
    first = run(client, 7, 2)
    assert (array == -5).all(), "it shows somebody else's data"
    del array
    assert kept(client) == [2, 2]
    assert run(client, 8, 2) != first, "the youngest is the first to be used again"
    assert states(client) == ALL_FREE


def test_parts_of_a_run_are_kept_by_themselves(client):
    for value in range(3):
        with client.lease_many(4, timeout_s=NET_S) as leases:
            parts = leases.slots()
        for part in parts:
            part.inputs["x"][...] = value
            assert part.submit().result(NET_S).outputs["total"] == 4 * value
            part.release()
    assert set(kept(client)) == {1}
    rhythm(client, 3)
    assert states(client) == ALL_FREE


def test_another_count_gives_back_what_was_kept(client):
    rhythm(client)
    with client.lease_many(CAP, timeout_s=NET_S) as leases:
        assert sum(lease.count for lease in leases) == CAP
        assert kept(client) == []
        assert states(client) == (4, CAP, 0, 0, 0)


def test_one_who_waits_for_slots_keeps_none(client):
    """Another thread of the client may wait for more than was released."""
    rhythm(client, count=4)
    held = [client.lease_many(4, timeout_s=NET_S) for _ in range(3)]
    waiting = Threads(lambda: client.lease_many(5, timeout_s=NET_S))
    until(client, lambda now: now.waiting == 1)
    for leases in held[:2]:
        leases.release()
    (leases,) = waiting.join()
    assert kept(client) == []
    leases.release()
    held[2].release()
    assert states(client) == ALL_FREE


def test_what_is_kept_is_room(client):
    rhythm(client, count=4)
    assert client.session.requests.room(0) == CAP
    held = client.lease_many(4, timeout_s=NET_S)
    assert client.session.requests.room(0) == CAP - 4
    held.release()


def test_a_caller_that_holds_too_much_is_told_so_though_there_is_a_keeper(client, monkeypatch):
    count = threading.active_count
    monkeypatch.setattr(threading, "active_count", lambda: count() - 2)  # the pool's two
    rhythm(client, count=4)
    assert Keeper.count() == 1
    held = client.lease_many(8, timeout_s=NET_S)
    with pytest.raises(LeaseTooLarge, match="holds 8 of the 12 slots that it may hold, and no other thread"):
        client.lease_many(5)
    held.release()


def test_others_who_wait_get_what_is_kept(pool, client):
    rhythm(client, count=4)
    other = pool.connect()
    held = other.lease_many(CAP, timeout_s=NET_S)  # all but what is kept
    third = pool.connect()
    waiting = Threads(lambda: third.lease_many(2, timeout_s=NET_S))
    until(other, lambda now: now.waiting == 1)
    run(client, 1, 4)  # in its rhythm: at the end of it the client has read that others wait
    (leases,) = waiting.join()
    assert kept(client) == []
    for one in (leases, held):
        one.release()
    until(other, lambda now: now.free == 16)
    rhythm(client, 3, 4)
    assert kept(client) == [4], "it was granted slots after that, so nobody waits"


def test_those_who_go_on_for_ever_do_not_starve_another(pool):
    """Three have three quarters of the slots all the time; what a fourth wants is never free by itself."""
    clients = [pool.connect() for _ in range(3)]
    over = threading.Event()

    def go_on(client: Client) -> int:
        turns = 0
        in_flight = [client.lease_many(2, timeout_s=NET_S) for _ in range(2)]
        while not over.is_set():
            use_in_turn(client, in_flight, turns)
            turns += 1
        for leases in in_flight:
            leases.release()
        return turns

    going = Threads(*[lambda client=client: go_on(client) for client in clients])
    late = pool.connect()
    try:
        for _ in range(20):
            with late.lease_many(10, timeout_s=NET_S) as leases:  # each holds two while it waits for two
                assert sum(lease.count for lease in leases) == 10
    finally:
        over.set()
    assert all(turns > 0 for turns in going.join())
    pool.wait_all_free()


def test_what_nobody_uses_goes_back_by_itself(pool, client, monkeypatch):
    monkeypatch.setattr(keeping, "LOOK_S", 0.005)
    rhythm(client, count=4)
    other = pool.connect()
    until(other, lambda now: now.free == 16)  # nobody touches the client meanwhile
    assert kept(client) == []
    rhythm(client, count=4)
    with other.lease_many(CAP, timeout_s=NET_S), pool.connect().lease_many(4, timeout_s=NET_S):
        pass


def test_of_what_is_kept_only_those_that_there_are_too_many_of_go_back():
    state = ModelState(plan([ModelPlan(MODEL, 16, 1, 4)]).models[0], CAP)
    runs = [Kept(number, number, 0, 2) for number in range(5)]
    assert [state.keep(one) for one in runs] == [False, True, True, True, True]
    assert state.take_unused() == [], "none was there at the last look"
    assert [state.take(2), state.take(2)] == [runs[4], runs[3]]
    assert state.keep(runs[3])
    assert state.take_unused() == runs[1:3], "those that were there all the time, the oldest first"
    assert state.take_unused() == [runs[3]]
    assert state.take(2) is None
    assert state.take_unused() == []


def test_a_pool_that_stops_ends_those_who_would_go_on_for_ever(pool, client, monkeypatch):
    """There always is work in flight, so the pool would never have done all."""
    turns: list[int] = []
    quick = ANSWERS["neg"]
    monkeypatch.setitem(ANSWERS, "neg", in_turn(lambda *_: time.sleep(0.005), quick))

    def go_on() -> None:
        with pytest.raises(PoolClosed):
            keep_four_in_flight()

    def keep_four_in_flight() -> None:
        in_flight = deque(client.lease_many(3, timeout_s=NET_S)[0] for _ in range(4))
        submitted = deque(lease.submit() for lease in in_flight)
        while True:
            submitted.popleft().result(NET_S)
            in_flight.popleft().release()
            in_flight.append(client.lease_many(3, timeout_s=NET_S)[0])
            submitted.append(in_flight[-1].submit())
            turns.append(1)

    going = Threads(go_on)
    deadline = time.monotonic() + NET_S
    while len(turns) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    pool.stop()
    going.join()


def test_a_closed_client_leaves_neither_slots_nor_a_thread(pool):
    clients = [Client(pool.run_dir, pool.transport) for _ in range(3)]
    for client in clients:
        rhythm(client)
    assert Keeper.count() == 3
    for client in clients:
        client.close()
    assert Keeper.count() == 0
    until(pool.connect(), lambda now: now.free == 16)


def test_a_client_that_nobody_has_is_not_kept_by_its_keeper(pool):
    clients = [Client(pool.run_dir, pool.transport)]
    rhythm(clients[0])
    session = weakref.ref(clients[0].session)
    with pytest.warns(ResourceWarning, match="was dropped without close"):
        clients.clear()
    gc.collect()
    assert session() is None
    deadline = time.monotonic() + NET_S
    while Keeper.count():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_end_of_the_pool_ends_what_is_kept(pool, client, monkeypatch):
    monkeypatch.setattr(keeping, "LOOK_S", 0.005)
    rhythm(client)
    pool.kill()
    with pytest.raises(PoolClosed):
        run(client, 1, 2)
    assert kept(client) == []


def test_a_child_has_no_keeper(client):
    rhythm(client)
    assert Keeper.count() == 1
    pid = os.fork()
    if not pid:
        os._exit(Keeper.count())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    run(client, 2)


def test_map_uses_its_runs_again(client, monkeypatch):
    items = list(range(200))
    taken: list[m.Message] = []

    def write(item: int, inputs: Any) -> None:
        inputs["x"][...] = item

    link = client.session.link
    monkeypatch.setattr(link, "send", in_turn(taken.extend, link.send))
    for item, result in client.map(write, items, window=8):
        assert result.outputs["total"] == 4 * item
    leases = sum(isinstance(message, m.Lease) for message in taken)
    submits = sum(isinstance(message, m.Submit) for message in taken)
    assert leases < 20 < submits
    assert states(client) == ALL_FREE


def test_tasks_use_each_others_slots_again(client):
    async def work(value: int) -> None:
        for turn in range(20):
            with client.lease(timeout_s=NET_S) as lease:
                lease.inputs["x"][...] = value + turn
                result = await lease.submit()
                assert result.outputs["total"] == 4 * (value + turn)

    async def all_of_them() -> None:
        await asyncio.gather(*(work(100 * number) for number in range(6)))

    asyncio.run(all_of_them())
    assert states(client) == ALL_FREE


@pytest.mark.parametrize("transport", ["lifeline", "zmq"])
def test_threads_share_what_is_kept(tmp_path, transport):
    with FakePool(tmp_path, transport=transport) as pool:
        client = pool.connect()

        def work(value: int) -> None:
            for turn in range(40):
                count = 1 + (turn // 10) % 2
                try:
                    run(client, value + turn, count)
                except PoolBusy:
                    raise AssertionError("nobody holds anything for long") from None

        Threads(*[lambda value=value: work(value) for value in (0, 100, 200, 300)]).join()
        assert states(client) == ALL_FREE


def test_answers_are_those_of_ones_own_items_whatever_is_used_again(pool):
    """Up to six runs in flight of two clients, of sizes by chance, in batches that mix them."""
    random = np.random.default_rng(1)
    clients = [pool.connect(), pool.connect()]
    in_flight: list[Any] = []
    for turn in range(300):
        if len(in_flight) == 6:
            leases, value, parts = in_flight.pop(int(random.integers(6)))
            for submitted in parts:
                assert (submitted.result(NET_S).outputs["y"] == -value).all()
            leases.release()
        try:
            leases = clients[int(random.integers(2))].lease_many(int(random.choice([2, 2, 2, 1])), timeout_s=0)
        except PoolBusy:
            continue
        for lease in leases:
            lease.inputs["x"][...] = turn
        in_flight.append((leases, turn, [lease.submit() for lease in leases]))
    for leases, value, parts in in_flight:
        for submitted in parts:
            assert (submitted.result(NET_S).outputs["y"] == -value).all()
        leases.release()
    pool.wait_all_free()
