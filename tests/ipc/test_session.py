"""Futures, limits, recalls, threads, and random interleavings of all that a client can do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import threading
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as StateBundle
from hypothesis.stateful import RuleBasedStateMachine, consumes, invariant, precondition, rule

from tests.ipc.fake_pool import BAD, MODEL, NET_S, SUM, FakePool, Threads, figures, in_turn, states, until
from trtpool.ipc import claims
from trtpool.ipc import messages as m
from trtpool.ipc.claims import ModelState
from trtpool.ipc.client import Client
from trtpool.ipc.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineFailed,
    LeaseTooLarge,
    PoolBusy,
    PoolClosed,
)
from trtpool.ipc.handles import Lease, Result
from trtpool.ipc.layout import ModelPlan, plan
from trtpool.ipc.link import MAX_SENT, TRANSPORTS, Link
from trtpool.ipc.submitted import Submitted
from trtpool.ipc.tensors import ModelSpec, TensorSpec

ALL_FREE = (16, 0, 0, 0, 0)
CAP = 12


@pytest.fixture(params=list(TRANSPORTS))
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def submit(client: Client, value: float = 1.0, **options: Any) -> Submitted:
    lease = client.lease(timeout_s=NET_S)
    lease.inputs["x"][...] = value
    return lease.submit(**options)


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "trtpool-client"]


# --- Futures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "when", [concurrent.futures.ALL_COMPLETED, concurrent.futures.FIRST_COMPLETED, concurrent.futures.FIRST_EXCEPTION]
)
def test_concurrent_futures_wait(client, when):
    for _ in range(20):
        work = [submit(client, value) for value in range(10)]
        done, not_done = concurrent.futures.wait(work, NET_S, when)
        assert done
        if when != concurrent.futures.FIRST_COMPLETED:
            assert not not_done
        for value, submitted in enumerate(work):
            assert submitted.result(NET_S).outputs["total"] == 4 * value
            submitted.release()


def test_as_completed(client):
    work = [submit(client, value) for value in range(10)]
    seen: list[float] = []
    futures: list[concurrent.futures.Future[Result]] = [*work]
    for future in concurrent.futures.as_completed(futures, NET_S):
        with future.result() as result:
            seen.append(result.outputs["total"].item())
    assert sorted(seen) == [4 * value for value in range(10)]


def test_a_future_is_announced_while_another_thread_waits_for_it(pool, client):
    """`concurrent.futures.wait` holds the locks of its futures while it registers, and must not announce one itself."""
    for _ in range(100):
        work = [submit(client, value) for value in range(4)]
        drivers = Threads(*(partial(one.result, NET_S) for one in work))
        assert not concurrent.futures.wait(work, NET_S).not_done
        drivers.join()
        for one in work:
            one.release()


def test_a_callback_comes_once_and_with_the_future(pool, client):
    called: list[Any] = []
    event = threading.Event()
    with pool.held():
        submitted = submit(client, 2)
        note = in_turn(lambda future: called.append(future.result().outputs["total"]), lambda _: event.set())
        submitted.add_done_callback(note)
        assert not called
    assert event.wait(NET_S)
    assert called == [8]
    submitted.add_done_callback(called.append)
    assert called == [8, submitted], "at once, when it is over"
    submitted.release()


def test_a_callback_may_use_the_client(client):
    """Lease, wait, release and ask, in whichever thread it is called."""
    said: list[float] = []
    event = threading.Event()

    def follow_up(future: concurrent.futures.Future[Result]) -> None:
        submitted.release()
        with client.lease(timeout_s=NET_S) as lease:
            lease.inputs["x"][...] = 3
            said.append(float(lease.submit().result(NET_S).outputs["total"]))
        client.status()
        event.set()

    submitted = submit(client)
    submitted.add_done_callback(follow_up)
    submitted.exception(NET_S)  # this thread may be the one that receives it
    assert event.wait(NET_S)
    assert said == [12]


def test_a_callback_may_close_the_client(client):
    event = threading.Event()
    submitted = submit(client)
    submitted.add_done_callback(in_turn(lambda _: client.close(), lambda _: event.set()))
    assert event.wait(NET_S)
    with pytest.raises(PoolClosed):
        client.lease()


def test_a_callback_that_fails_harms_nobody(pool, client, caplog):
    event = threading.Event()
    with pool.held():
        submitted = submit(client)
        submitted.add_done_callback(lambda _: 1 / 0)
        submitted.add_done_callback(lambda _: event.set())
    assert event.wait(NET_S)
    assert submitted.result(NET_S).outputs["total"] == 4
    submitted.release()
    assert "ZeroDivisionError" in caplog.text


def test_a_result_that_comes_while_a_kept_array_ends_is_announced(pool, client):
    """What comes in while finalizers are seen to has no other occasion to be announced."""
    event = threading.Event()
    for _ in range(50):
        event.clear()
        with client.lease() as lease:
            lease.inputs["x"][...] = 1
            kept = [lease.submit().result(NET_S).outputs["y"]]
        submitted = submit(client)
        submitted.add_done_callback(lambda _: event.set())
        kept.clear()
        assert event.wait(NET_S)
        submitted.release()


def test_exception_tells_and_does_not_raise(client):
    good, bad = submit(client, 1), submit(client, BAD)
    assert good.exception(NET_S) is None
    assert isinstance(bad.exception(NET_S), EngineFailed)
    assert isinstance(concurrent.futures.wait([bad], NET_S).done.pop().exception(), EngineFailed)
    with pytest.raises(EngineFailed, match="a bad item"):
        bad.result()
    good.release()
    bad.release()


def test_time_passes_and_the_work_goes_on(pool, client):
    with pool.held():
        submitted = submit(client, 5)
        for wait in (
            lambda: submitted.result(timeout_s=0),
            lambda: submitted.result(timeout=0.001),
            lambda: submitted.exception(0),
        ):
            with pytest.raises(TimeoutError, match="the work goes on, call result"):
                wait()
        assert not submitted.done()
        assert submitted.running()
    assert submitted.result(NET_S).outputs["total"] == 20
    assert submitted.done()
    assert not submitted.running()
    submitted.release()


@pytest.mark.parametrize("timeout_s", [1e12, float("inf")])
def test_times_that_are_longer_than_any_clock(client, timeout_s):
    with client.lease(timeout_s=timeout_s) as lease:
        lease.inputs["x"][...] = 1
        assert lease.submit(deadline_s=timeout_s).result(timeout_s).outputs["total"] == 4


def test_done_looks_at_the_socket(client):
    submitted = submit(client)
    for _ in range(1_000_000):
        if submitted.done():
            break
    assert submitted.done()
    submitted.release()


def test_cancelling_what_is_queued(pool, client):
    with pool.held():
        first = [submit(client) for _ in range(8)]
        until(client, lambda now: now.running >= 2 and now.queued > 0)
        last = submit(client)
        assert not last.cancel(), "it has not ended yet"
        with pytest.raises(Cancelled, match="cancelled before it was dispatched"):
            last.result(NET_S)
        assert last.cancelled()
        assert last.cancel(), "again, and it has"
    for submitted in first:
        assert submitted.result(NET_S).outputs["total"] == 4
        assert not submitted.cancel(), "too late"
        assert not submitted.cancelled()
        submitted.release()
    last.release()
    assert states(client) == ALL_FREE


def test_cancelling_what_runs_changes_nothing(pool, client):
    with pool.held():
        submitted = submit(client, 2)
        until(client, lambda now: now.running == 1)
        assert not submitted.cancel()
    assert submitted.result(NET_S).outputs["total"] == 8
    submitted.release()


def test_a_deadline_that_passes_in_the_queue(pool, client):
    with pool.held():
        running = [submit(client) for _ in range(2)]
        until(client, lambda now: now.running == 2)
        late = submit(client, deadline_s=0.001)
        with pytest.raises(DeadlineExceeded, match="its deadline passed after"):
            late.result(NET_S)
    for submitted in (*running, late):
        submitted.release()
    until(client, lambda now: now.free == 16)


def test_awaiting_a_hundred(client):
    async def lease_soon() -> Any:
        while True:
            try:
                return client.lease(timeout_s=0)
            except PoolBusy:
                await asyncio.sleep(0)

    async def one(value: int) -> float:
        with await lease_soon() as lease:
            lease.inputs["x"][...] = value
            return float((await lease.submit()).outputs["total"])

    async def all_of_them() -> list[float]:
        return await asyncio.wait_for(asyncio.gather(*map(one, range(100))), NET_S)

    assert asyncio.run(all_of_them()) == [4.0 * value for value in range(100)]
    assert states(client) == ALL_FREE


def test_awaiting_what_fails(client):
    async def main() -> None:
        with client.lease() as lease:
            lease.inputs["x"][...] = BAD
            await lease.submit()

    with pytest.raises(EngineFailed):
        asyncio.run(main())


def test_awaiting_what_is_over(client):
    async def main() -> float:
        with client.lease() as lease:
            lease.inputs["x"][...] = 1
            submitted = lease.submit()
            submitted.result(NET_S)
            return float((await submitted).outputs["total"])

    assert asyncio.run(main()) == 4


def test_a_task_that_is_cancelled_cancels_its_work(pool, client):
    async def main() -> Submitted:
        task = asyncio.ensure_future(last)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return last

    with pool.held():
        running = [submit(client) for _ in range(8)]
        until(client, lambda now: now.running >= 2 and now.queued > 0)
        last = submit(client)
        assert isinstance(asyncio.run(main()).exception(NET_S), Cancelled)
    for submitted in (*running, last):
        submitted.release()
    until(client, lambda now: now.free == 16)


def test_the_background_thread_is_there_only_when_it_is_needed(client):
    submit(client).result(NET_S).release()
    client.infer(x=np.ones((20, 4), np.float32))
    assert client_threads() == []
    event = threading.Event()
    submitted = submit(client)
    submitted.add_done_callback(lambda _: event.set())
    assert len(client_threads()) == 1
    assert event.wait(NET_S)
    concurrent.futures.wait([submitted], NET_S)
    assert len(client_threads()) == 1
    submitted.release()
    client.close()
    assert client_threads() == []


def test_a_future_that_is_over_needs_no_background_thread(client):
    submitted = submit(client)
    submitted.result(NET_S)
    concurrent.futures.wait([submitted], NET_S)
    submitted.add_done_callback(lambda _: None)
    assert client_threads() == []
    submitted.release()


# --- Threads -------------------------------------------------------------------------------------


def test_threads_share_a_client(client):
    def work(thread: int) -> None:
        for turn in range(25):
            value = float(thread * 1000 + turn)
            with client.lease(timeout_s=NET_S) as lease:
                lease.inputs["x"][...] = value
                result = lease.submit().result(NET_S)
                assert (result.outputs["y"] == -value).all()
                assert result.outputs["total"] == 4 * value

    Threads(*(partial(work, thread) for thread in range(16))).join()
    assert states(client) == ALL_FREE


def test_threads_of_several_clients_with_runs_and_single_slots(pool):
    clients = [pool.connect() for _ in range(3)]

    def singles(client: Client, value: float) -> None:
        for _ in range(20):
            with client.lease(timeout_s=NET_S) as lease:
                lease.inputs["x"][...] = value
                assert lease.submit().result(NET_S).outputs["total"] == 4 * value

    def runs(client: Client, value: float) -> None:
        for count in (1, 7, 12, 3, 5):
            with client.lease_many(count, timeout_s=NET_S) as leases:
                for lease in leases:
                    lease.inputs["x"][...] = value
                for submitted in leases.submit():
                    assert (submitted.result(NET_S).outputs["total"] == 4 * value).all()

    calls = [(call, client) for client in clients for call in (singles, runs, singles)]
    Threads(*(partial(call, client, float(value)) for value, (call, client) in enumerate(calls))).join()
    pool.wait_all_free()


def test_a_thread_that_waits_for_a_lease_gets_what_another_releases(client):
    held = [client.lease() for _ in range(CAP)]
    waiting = Threads(lambda: client.lease(timeout_s=NET_S))
    until(client, lambda now: now.waiting == 1)
    held.pop().release()
    (lease,) = waiting.join()
    lease.inputs["x"][...] = 1
    for each in (*held, lease):
        each.release()
    assert states(client) == ALL_FREE


def test_close_ends_all_waits(pool, client):
    with pool.held():
        work = [submit(client) for _ in range(CAP)]
        outcomes: list[BaseException] = []

        def wait(call: Callable[[], object]) -> None:
            with pytest.raises(PoolClosed, match="this client is closed") as caught:
                call()
            outcomes.append(caught.value)

        calls: list[Callable[[], object]] = [partial(one.result, NET_S) for one in work[:5]]
        calls.append(partial(client.lease, timeout_s=NET_S))
        threads = Threads(*(partial(wait, call) for call in calls))
        until(pool.connect(), lambda now: now.waiting == 1)
        client.close()
        threads.join()
        assert len(outcomes) == 6
        client.close()


def test_an_interrupt_while_waiting_leaves_the_client_usable(pool, client, monkeypatch):
    wait = Link.wait
    interrupts = iter([KeyboardInterrupt()])

    def interrupted(link: Link, timeout_s: float | None) -> None:
        for error in interrupts:
            raise error
        wait(link, timeout_s)

    with pool.held():
        submitted = submit(client, 2)
        monkeypatch.setattr(Link, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            submitted.result(NET_S)
    assert submitted.result(NET_S).outputs["total"] == 8
    submitted.release()
    assert states(client) == ALL_FREE


def test_an_interrupt_while_leasing_loses_no_slot(pool, client, monkeypatch):
    other = pool.connect()
    with other.lease_many(CAP):
        wait = Link.wait

        def interrupted(link: Link, timeout_s: float | None) -> None:
            if link is client.session.link:
                raise KeyboardInterrupt
            wait(link, timeout_s)

        with monkeypatch.context() as patch:
            patch.setattr(Link, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                client.lease_many(CAP)
    until(client, lambda now: now.free == 16 and not now.waiting)


# --- Limits --------------------------------------------------------------------------------------


def test_more_than_the_cap(client):
    with pytest.raises(LeaseTooLarge, match=r"13 slots were asked for and this client may hold 12 of model 'neg'"):
        client.lease_many(13)
    with client.lease_many(CAP) as leases:
        assert sum(lease.count for lease in leases) == CAP


def alone(monkeypatch: pytest.MonkeyPatch, client: Client) -> None:
    """As if the pool's threads were in processes of their own: this one has the client's alone."""
    fakes = [thread for thread in threading.enumerate() if thread.name.startswith("fake-")]
    count = threading.active_count
    monkeypatch.setattr(threading, "active_count", lambda: count() - len(fakes))


def test_a_single_thread_that_holds_all_it_may_hold(client, monkeypatch):
    alone(monkeypatch, client)
    with client.lease_many(CAP):
        for lease in (client.lease, lambda: client.lease_many(2), lambda: client.lease(timeout_s=5)):
            with pytest.raises(LeaseTooLarge, match="holds 12 of the 12 slots that it may hold, and no other thread"):
                lease()
    with client.lease_many(CAP):
        pass


def test_a_background_thread_that_sleeps_can_release_nothing(client, monkeypatch):
    alone(monkeypatch, client)
    submitted = submit(client)
    concurrent.futures.wait([submitted], NET_S)
    submitted.release()
    with client.lease_many(CAP), pytest.raises(LeaseTooLarge, match="no other thread"):
        client.lease()


def test_released_work_comes_back_without_a_thread(pool, client, monkeypatch):
    alone(monkeypatch, client)
    for value in range(100):
        with client.lease(timeout_s=NET_S) as lease:
            lease.inputs["x"][...] = value
            lease.submit()
    until(client, lambda now: now.free == 16)


@pytest.mark.parametrize("timeout_s", [0, 0.001, -5])
def test_a_pool_that_stays_full(pool, client, timeout_s):
    other = pool.connect()
    with other.lease_many(CAP):
        with pytest.raises(PoolBusy, match="5 slots of model 'neg' did not come free in time: 4 of 16 are free"):
            client.lease_many(5, timeout_s=timeout_s)
        with client.lease_many(4, timeout_s=timeout_s):
            pass
    until(client, lambda now: now.free == 16)  # what different clients send is not ordered


def test_leases_are_granted_in_the_order_they_came(pool, client):
    """A large one is not starved by small ones behind it."""
    other, third = pool.connect(), pool.connect()
    held = client.lease_many(CAP)
    order: list[int] = []

    def take(who: Client, count: int) -> None:
        with who.lease_many(count, timeout_s=NET_S):
            order.append(count)

    large = Threads(lambda: take(other, 10))
    until(client, lambda now: now.waiting == 1)
    small = Threads(lambda: take(third, 3))
    until(client, lambda now: now.waiting == 2)
    held.release()
    large.join()
    small.join()
    assert sorted(order) == [3, 10]
    assert figures(client).free == 16


def rhythm(client: Client, turns: int = 5) -> None:
    """Use slots one at a time, after which one is granted in advance."""
    for value in range(turns):
        with client.lease(timeout_s=NET_S) as lease:
            lease.inputs["x"][...] = value
            assert lease.submit().result(NET_S).outputs["total"] == 4 * value


def test_one_at_a_time_needs_one_message_each_way(client, monkeypatch):
    rhythm(client)
    assert len(client.session.models[0].spares) == 1
    sent: list[list[m.Message]] = []
    link = client.session.link
    monkeypatch.setattr(link, "send", in_turn(lambda messages: sent.append(list(messages)), link.send))
    rhythm(client)
    assert [[type(message) for message in frame] for frame in sent] == 5 * [[m.Release, m.Submit]]


def send(client: Client, value: int) -> tuple[Lease, Submitted]:
    lease = client.lease(timeout_s=NET_S)
    lease.inputs["x"][...] = value
    return lease, lease.submit()


def in_step(pool: FakePool, client: Client, turns: int = 5) -> None:
    """Keep two slots in flight, neither of which ends before the other is sent; each is released before the next."""
    in_flight = [send(client, 0) for _ in range(2)]
    for value in range(1, turns + 1):
        for _, submitted in in_flight:
            assert submitted.result(NET_S).outputs["total"] == 4 * (value - 1)
        with pool.held():
            for place, (lease, _) in enumerate(in_flight):
                lease.release()
                in_flight[place] = send(client, value)
    for lease, submitted in in_flight:
        submitted.result(NET_S)
        lease.release()


def test_several_in_flight_are_all_granted_their_next_slots_with_their_results(pool, client, monkeypatch):
    in_step(pool, client)
    assert len(client.session.models[0].spares) == 2
    sent: list[m.Message] = []
    link = client.session.link
    monkeypatch.setattr(link, "send", in_turn(sent.extend, link.send))
    in_step(pool, client)
    assert {type(message) for message in sent} == {m.Release, m.Submit}


def test_spares_that_are_no_longer_used_are_asked_for_no_more(pool, client):
    in_step(pool, client)
    rhythm(client, turns=8)
    assert len(client.session.models[0].spares) == 1


@pytest.mark.parametrize(
    ("slot_kib", "count", "in_flight", "wanted"),
    [
        (1, 1, 0, True),
        (1, 15, 3, True),
        (1, 16, 3, False),
        (16, 1, 0, False),
        (600, 8, 3, False),
    ],
)
def test_nothing_is_asked_for_in_advance_in_place_of_what_is_used_again(slot_kib, count, in_flight, wanted):
    spec = ModelSpec("m", "/m", (TensorSpec("x", "uint8", (1024 * slot_kib - 4,)),), (TensorSpec("y", "int32", ()),))
    state = ModelState(plan([ModelPlan(spec, 64, 1, 8)]).models[0], 48)
    assert state.wants_spare(count, in_flight) == wanted


def test_a_recall_returns_what_was_granted_in_advance(pool, client):
    """At its next look at the socket, for nobody takes messages in for an idle client."""
    others = [pool.connect() for _ in range(2)]
    rhythm(client)
    held = others[0].lease_many(CAP)
    waiting = Threads(lambda: others[1].lease_many(4, timeout_s=NET_S))
    while waiting.answers == [None]:
        client.status()  # any call that waits takes the recall in
    (leases,) = waiting.join()
    assert not client.session.models[0].spares
    leases.release()
    held.release()
    until(others[0], lambda now: now.free == 16)


def test_an_idle_clients_spare_does_not_keep_another_from_its_cap(pool, client):
    rhythm(client)
    other = pool.connect()
    with other.lease_many(CAP, timeout_s=NET_S) as leases:
        assert sum(lease.count for lease in leases) == CAP


def test_spares_go_back_before_another_count_is_asked_for(client):
    rhythm(client)
    with client.lease_many(CAP, timeout_s=NET_S):
        assert states(client) == (4, CAP, 0, 0, 0)


def test_many_releases_are_sent_in_frames_that_the_broker_takes(make_pool):
    """`MAX_FRAME_BYTES` would end the connection."""
    slots = 8 * MAX_SENT
    pool = make_pool(slots=slots, cap=slots)
    client = pool.connect()
    with client.lease_many(slots) as leases:
        every = leases.slots()
    with client.session.wire.driver:
        client.session.returns.dropped.extend(map(_held, every))
    assert client.status().models[0].free == slots


def _held(lease: Lease) -> Any:
    from trtpool.ipc.returns import Held

    lease._claim.released = True
    return Held(lease._claim)


def test_models_are_apart(make_pool):
    client = make_pool(MODEL, SUM).connect()
    with client.lease_many(CAP, model="neg"), client.lease(model="add") as lease:
        lease.inputs["a"][...] = 1
        lease.inputs["b"][...] = 2
        assert (lease.submit().result(NET_S).outputs["sum"] == 3).all()


def test_waiting_and_leasing_leak_no_memory(client):
    rhythm(client, 300)
    gc.collect()
    tracemalloc.start()
    try:
        rhythm(client, 50)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        rhythm(client, 500)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 500 * 32, f"{grown} bytes after 500 slots: some of each stays"


# --- Everything in any order ---------------------------------------------------------------------


class Interleavings(RuleBasedStateMachine):
    """Two clients and a worker that is held now and then; every submission ends once, and all slots come back.

    Bundles hold keys of `things`, so that hypothesis keeps no handle alive.
    """

    leased = StateBundle("leased")
    submitted = StateBundle("submitted")
    kept = StateBundle("kept")

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.pool = FakePool(Path(self.folder.name), items_per_slot=2, max_batch=4, slots=10)
        self.clients = [self.pool.connect(), self.pool.connect()]
        self.things: dict[int, list[Any]] = {}
        self.number = 0
        self.held = False
        self.submissions = 0
        self.ends: list[int] = []

    def put(self, things: list[Any]) -> int:
        self.number += 1
        self.things[self.number] = things
        return self.number

    who = st.integers(0, 1)

    @rule(target=leased, who=who, count=st.integers(1, 5))
    def lease(self, who: int, count: int) -> int:
        try:
            leases = self.clients[who].lease_many(count, timeout_s=0)
        except PoolBusy:
            return self.put([])
        for lease in leases:
            lease.inputs["x"][...] = self.number
        return self.put([(lease, self.number) for lease in leases])

    @rule(target=leased, who=who)
    def lease_one(self, who: int) -> int:
        try:
            lease = self.clients[who].lease(timeout_s=0)
        except PoolBusy:
            return self.put([])
        lease.inputs["x"][...] = self.number
        return self.put([(lease, self.number)])

    @rule(target=submitted, key=consumes(leased), bad=st.booleans(), watch=st.booleans(), short=st.booleans())
    def submit(self, key: int, bad: bool, watch: bool, short: bool) -> int:
        work = []
        for lease, number in self.things.pop(key):
            if bad:
                lease.inputs["x"][...] = BAD
            one = lease.submit(items=2 * lease.count - short)
            if watch:
                seq = self.submissions = self.submissions + 1
                one.add_done_callback(lambda _, seq=seq: self.ends.append(seq))
            work.append((one, BAD if bad else number))
        return self.put(work)

    @rule(key=consumes(leased), split=st.booleans(), drop=st.booleans())
    def give_up(self, key: int, split: bool, drop: bool) -> None:
        for lease, _ in self.things.pop(key):
            for part in lease.slots() if split else [lease]:
                if not drop:
                    part.release()

    @rule(key=consumes(submitted), drop=st.booleans())
    def forget(self, key: int, drop: bool) -> None:
        for one, _ in self.things.pop(key):
            if not drop:
                one.release()

    @rule(key=submitted)
    def cancel(self, key: int) -> None:
        for one, _ in self.things[key]:
            one.cancel()

    @precondition(lambda self: not self.held)
    @rule(target=kept, key=consumes(submitted), keep=st.booleans())
    def read(self, key: int, keep: bool) -> int:
        found = []
        for one, number in self.things.pop(key):
            try:
                with one.result(NET_S) as result:
                    y = result.outputs["y"]
                    assert (y.reshape(-1, 4)[0] == -number).all()  # the last slot may be half full
                    if keep:
                        found.append((y.reshape(-1, 4)[0], number))
                    del y
            except Cancelled:
                pass
            except EngineFailed:
                assert number == BAD
        return self.put(found)

    @rule(key=consumes(kept))
    def look_at_kept(self, key: int) -> None:
        for array, number in self.things.pop(key):
            assert (array == -number).all(), "it shows somebody else's data"

    @rule(key=submitted)
    def look(self, key: int) -> None:
        for one, _ in self.things[key]:
            one.done()

    @rule(who=who, items=st.integers(0, 13))
    @precondition(lambda self: not self.held)
    def infer(self, who: int, items: int) -> None:
        x = np.arange(items * 4, dtype=np.float32).reshape(items, 4)
        with contextlib.suppress(TimeoutError, LeaseTooLarge):  # what this test holds is not there for it
            np.testing.assert_array_equal(self.clients[who].infer(x=x, timeout_s=0.001)["y"], -x)

    @rule(batches=st.integers(0, 2))
    def hold(self, batches: int) -> None:
        self.held = True
        self.pool.hold()
        self.pool.go(batches)

    @rule()
    def go(self) -> None:
        self.held = False
        self.pool.go()

    @invariant()
    def no_violation(self) -> None:
        assert not self.pool._loop._core.violations

    def teardown(self) -> None:
        try:
            self.pool.go()
            self.things.clear()
            self.pool.wait_all_free()
            for client in self.clients:
                client.close()
            assert sorted(self.ends) == list(range(1, self.submissions + 1))
        finally:
            self.pool.__exit__(None, None, None)
            self.folder.cleanup()


class InterleavingsOfLargeRuns(Interleavings):
    """The same where all that is released in a rhythm is kept, and used again."""

    def __init__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(claims, "REUSED_BYTES", 0)
        super().__init__()

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self.patch.undo()


for machine in (Interleavings, InterleavingsOfLargeRuns):
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=30)
test_interleavings = pytest.mark.filterwarnings("ignore::ResourceWarning")(Interleavings.TestCase)
test_interleavings_of_large_runs = pytest.mark.filterwarnings("ignore::ResourceWarning")(
    InterleavingsOfLargeRuns.TestCase
)
