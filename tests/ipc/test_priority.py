"""`priority=`: whatever a client asks for carries its class to the broker, which is told apart by its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest

from tests.ipc.fake_pool import NET_S, FakePool, figures, until
from trtpool.ipc.client import Client
from trtpool.ipc.errors import InvalidInput
from trtpool.ipc.remote import PoolHandle
from trtpool.ipc.settings import Priority

ITEMS = 12
X = np.ones((ITEMS, 4), np.float32)


def write(item: int, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
    inputs["x"][...] = item


def by_lease(client: Client | PoolHandle, priority: Priority) -> None:
    for _ in range(ITEMS):  # after the second, slots are granted in advance
        with client.lease(timeout_s=NET_S, priority=priority) as lease:
            write(1, lease.inputs)
            lease.submit().result(NET_S)


def by_run(client: Client | PoolHandle, priority: Priority) -> None:
    with client.lease_many(ITEMS, timeout_s=NET_S, priority=priority) as leases:
        for work in leases.submit():
            work.result(NET_S)


def by_slot(client: Client | PoolHandle, priority: Priority) -> None:
    with client.lease_many(ITEMS, priority=priority) as leases:
        for work in [slot.submit() for slot in leases.slots()]:
            work.result(NET_S)
            work.release()


def by_infer(client: Client | PoolHandle, priority: Priority) -> None:
    client.infer(x=X, priority=priority)


def by_map(client: Client | PoolHandle, priority: Priority) -> None:
    assert len(list(client.map(write, range(ITEMS), window=4, priority=priority))) == ITEMS


def by_await(client: Client | PoolHandle, priority: Priority) -> None:
    import asyncio

    async def one() -> None:
        with client.lease(priority=priority) as lease:
            await lease.submit()

    async def go() -> None:
        for _ in range(ITEMS):
            await one()

    asyncio.run(go())


WAYS = [by_lease, by_run, by_slot, by_infer, by_map, by_await]


@pytest.mark.parametrize("priority", ["bulk", "interactive"])
@pytest.mark.parametrize("through_handle", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_it_comes_with_whatever_is_asked_for(
    client: Client, way: Callable[[Client | PoolHandle, Priority], None], through_handle: bool, priority: Priority
) -> None:
    handle = client.handle()
    try:
        way(handle if through_handle else client, priority)
    finally:
        if through_handle:
            handle.client.close()
    now = until(client, lambda now: now.items == ITEMS)
    interactive = ITEMS if priority == "interactive" else 0
    assert (now.interactive.items, now.bulk.items) == (interactive, ITEMS - interactive)


def test_without_it_all_is_bulk(client: Client) -> None:
    client.infer(x=X)
    client.lease().release()
    assert figures(client).interactive.items == 0


@pytest.mark.parametrize(
    ("leased", "submitted", "interactive"),
    [("bulk", "interactive", 1), ("interactive", "bulk", 0), ("interactive", None, 1), ("bulk", None, 0)],
)
def test_a_submit_may_say_otherwise(
    client: Client, leased: Priority, submitted: Priority | None, interactive: int
) -> None:
    with client.lease(priority=leased) as lease:
        lease.submit(priority=submitted).result(NET_S)
    assert figures(client).interactive.items == interactive
    with client.lease_many(2, priority=leased) as leases:
        for work in leases.submit(priority=submitted):
            work.result(NET_S)
    assert figures(client).interactive.items == 3 * interactive


def test_a_slot_granted_in_advance_takes_the_class_of_who_uses_it(client: Client) -> None:
    for _ in range(4):
        by_one(client, "bulk")
    before = figures(client).interactive.items
    for _ in range(4):
        by_one(client, "bulk")
    assert client.session.models[0].spares, "the next lease asks nobody"
    by_one(client, "interactive")
    assert client.status().models[0].interactive.items == before + 1


def by_one(client: Client, priority: Priority) -> None:
    with client.lease(timeout_s=NET_S, priority=priority) as lease:
        lease.submit().result(NET_S)


def test_requests_that_wait_are_told_apart(pool: FakePool, client: Client) -> None:
    other = pool.connect()
    with client.lease_many(12), other.lease_many(4):
        asked = pool.connect().session.requests
        for priority in (0, 1, 1):
            asked.ask(0, 1, None, priority=priority)
        now = until(client, lambda now: now.waiting == 3)
        assert (now.interactive.waiting, now.bulk.waiting) == (2, 1)


@pytest.mark.parametrize("wrong", ["urgent", "", None, 1, b"bulk", ["bulk"]])
@pytest.mark.parametrize("way", WAYS)
def test_a_class_that_there_is_not_is_refused_before_anything_is_asked(
    client: Client, way: Callable[[Client | PoolHandle, Any], None], wrong: Literal["urgent"]
) -> None:
    with pytest.raises(InvalidInput, match="is none of 'bulk', 'interactive'"):
        way(client, wrong)
    now = figures(client)
    assert (now.free, now.items) == (now.slots, 0)


def test_a_refused_submit_leaves_the_slot_leased(client: Client) -> None:
    with client.lease() as lease:
        with pytest.raises(InvalidInput, match="priority='now' is none of"):
            lease.submit(priority="now")  # type: ignore[arg-type]
        write(2, lease.inputs)
        assert lease.submit().result(NET_S).outputs["total"] == 8


def test_what_is_released_and_not_said_is_never_more_than_what_was_granted_in_advance(client: Client) -> None:
    """The broker allows an idle client for as much, and takes it for one that holds slots beyond that."""
    for _ in range(4):
        by_one(client, "bulk")
    leases = client.lease_many(6)
    for _ in range(4):
        by_one(client, "bulk")
    session = client.session
    assert sum(spare.count for spare in session.models[0].spares) == 1
    for slot in leases.slots():
        slot.release()
    waiting = sum(message.count for message in session.wire._outgoing if hasattr(message, "count"))
    assert waiting <= 1
