"""A core that is saved and restored again and again answers as one that was left alone."""

from __future__ import annotations

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import initialize, rule

from tests.broker.core_rig import MS, Rig, everything, layouts, variant
from tests.broker.test_core_machine import RECALL_NS, CoreMachine, VaryingMachine
from trtpool.broker import events as e
from trtpool.broker.batching import UNIFORM
from trtpool.broker.core import Core
from trtpool.broker.invariants import validate
from trtpool.broker.journal import REQUEST_BYTES, slot_bytes
from trtpool.broker.reporting import report
from trtpool.broker.snapshot import restore, save
from trtpool.ipc import messages as m
from trtpool.ipc.settings import INTERACTIVE

SIZES = ((12, 1, 4), (7, 3, 7))
TIMEOUT_S = 0.02  # so short that batches hang in these tests
MAX_WAITING = 3


def fresh(delay_us: int = 0, cap: int = 0, gpus: int = 0, *, varies: bool = False) -> Core:
    core = Core(
        layouts(*SIZES, varies=varies),
        max_delay_us=delay_us,
        max_slots_per_producer=cap,
        batch_timeout_s=TIMEOUT_S,
        recall_timeout_s=RECALL_NS / 1e9,
        evict=True,
        gpus=gpus,
        started_ns=MS,
    )
    core.leasing.max_waiting = MAX_WAITING
    return core


class TwinRig(Rig):
    """A rig whose every event also goes to a second core, which is replaced by its own copy at times."""

    def __init__(self, delay_us: int, cap: int, gpus: int, *, varies: bool = False) -> None:
        super().__init__(
            *SIZES,
            max_delay_us=delay_us,
            cap=cap,
            gpus=gpus,
            batch_timeout_s=TIMEOUT_S,
            recall_timeout_s=RECALL_NS / 1e9,
            evict=True,
            varies=varies,
        )
        self.core.leasing.max_waiting = MAX_WAITING
        self.settings = (delay_us, cap, gpus)
        self.varies = varies
        self.twin = fresh(*self.settings, varies=varies)

    def do(self, event: e.Event) -> list[e.Action]:
        actions = super().do(event)
        assert self.twin.handle(event, self.now_ns) == actions
        return actions

    def die(self) -> None:
        saved = save(self.twin)
        self.twin = fresh(*self.settings, varies=self.varies)
        restore(self.twin, saved)
        validate(self.twin)
        assert save(self.twin) == saved


class TwinMachine(CoreMachine):
    @initialize(delay_us=st.sampled_from([0, 0, 2000]), cap=st.sampled_from([0, 0, 4]), gpus=st.sampled_from([0, 2, 3]))
    def start(self, delay_us, cap, gpus):
        super().start(delay_us, cap, gpus)

    def make_rig(self, delay_us, cap, gpus):
        return TwinRig(delay_us, cap, gpus, varies=self.varies)

    @rule()
    def the_twin_dies(self):
        self.rig.die()


class VaryingTwinMachine(TwinMachine):
    varies = VaryingMachine.varies
    variants = VaryingMachine.variants
    wrong_variants = VaryingMachine.wrong_variants


TestVaryingTwins = VaryingTwinMachine.TestCase
TestVaryingTwins.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)


TestTwins = TwinMachine.TestCase
TestTwins.settings = settings(max_examples=150, stateful_step_count=100, deadline=None)


def test_a_restored_core_goes_on_with_what_waited() -> None:
    rig = TwinRig(0, 0, 0)
    rig.join(1, 2)
    rig.submit(1, 5, deadline_ns=5 * MS)
    rig.say(2, m.Lease(9, 0, 8, 2 * MS))  # more than is free now
    rig.say(2, m.Lease(10, 0, 8, 7 * MS))
    rig.turn()
    rig.die()
    assert rig.twin.next_timer_ns() == rig.core.next_timer_ns()
    late = [action.message for action in rig.turn(20 * MS) if isinstance(action, e.Send)]
    assert {type(message) for message in late} == {m.Error, m.Done}
    assert everything(rig.core) == everything(rig.twin)


def test_a_worker_is_still_watched_after_its_oldest_batch_was_sent_long_ago() -> None:
    rig = TwinRig(0, 0, 0)
    rig.join(1)
    rig.worker()
    rig.submit(1)
    rig.turn()
    rig.turn(10 * MS)
    rig.die()
    rig.turn(5 * MS)
    (hung,) = [action for action in rig.turn(10 * MS) if isinstance(action, e.Hung)]
    rig.die()
    assert rig.twin.workers[hung.peer].said == hung.text
    assert not [action for action in rig.turn(100 * MS) if isinstance(action, e.Hung)], "it is killed once"


def test_requests_that_wait_are_still_counted() -> None:
    rig = TwinRig(0, 0, 0)
    rig.join(1)
    for request in range(1, 2 + MAX_WAITING):  # the first is granted
        rig.say(1, m.Lease(request, 0, 6, None))
    rig.turn()
    for request in range(10, 12):
        rig.say(1, m.Lease(request, 0, 6, None))
        rig.die()
    assert rig.twin.producers[1].waiting == MAX_WAITING


def test_a_recall_is_still_looked_after_and_classes_are_kept() -> None:
    rig = TwinRig(0, 0, 0)
    rig.join(1, 2, 3)
    rig.lease(1, 8)
    rig.say(2, m.Lease(21, 0, 6, None), m.Lease(22, 0, 6, None, INTERACTIVE))
    rig.submit(3, 1, priority=INTERACTIVE, model=1)
    rig.turn()
    rig.die()
    assert rig.twin.books.urgent == 1
    (overdue, evict) = rig.turn(RECALL_NS)
    assert isinstance(overdue, e.Overdue)
    assert isinstance(evict, e.Evict)
    rig.die()
    assert rig.twin.producers[1].evicted_ns == rig.now_ns
    rig.do(e.ProducerEnded(1))
    assert [grant.request for grant in [a.message for a in rig.turn() if isinstance(a, e.Send)]] == [22]


def test_ids_are_not_used_again() -> None:
    rig = TwinRig(0, 0, 0)
    rig.join(1)
    rig.worker()
    before = rig.submit(1)
    rig.turn()
    rig.die()
    after = rig.lease(1)
    assert after > before


@pytest.mark.parametrize("varies", [False, True])
def test_no_state_of_slots_and_requests_is_larger_than_reckoned_with(varies: bool) -> None:
    """Each slot a lease and a work of its own, the others running, all numbers as large as they get."""
    slots, large = 512, 2**62
    core = Core(layouts((slots, 1, 1), varies=varies), gpus=64, batch_timeout_s=60, started_ns=large)
    shape = variant(9, 255) if varies else UNIFORM
    core.leasing.next_lease = core.dispatch.next_batch = core.timers.started = large
    now, peers, workers = large, range(2**40, 2**40 + 4), range(2**41, 2**41 + 2)
    sent = 0
    for worker in workers:
        core.handle(e.WorkerJoined(worker, 2**22), now)
        core.handle(e.Received(worker, m.Ready("x" * 4096, 64, 63)), now)
    for peer in peers:
        core.handle(e.ProducerJoined(peer), now)
    for peer in peers:
        for request in range(slots // len(peers)):
            core.handle(e.Received(peer, m.Lease(large + request, 0, 1, large)), now)
    core.handle(e.TurnEnded(), now)
    for peer in peers:
        for lease in list(core.producers[peer].leases):
            core.handle(e.Received(peer, m.Submit(lease, 0, 1, 2**63 - 1, 1, large, 1, None, 0, *shape)), now)
        for request in range(core.leasing.max_waiting):
            core.handle(e.Received(peer, m.Lease(large + slots + request, 0, 1, large)), now)
    for action in core.handle(e.TurnEnded(), now):
        if isinstance(action, e.Send) and isinstance(action.message, m.Run):
            sent += len(m.encode([action.message]))
    validate(core)
    assert report(core).models[0].queued + report(core).models[0].running == slots
    assert all(producer.waiting == core.leasing.max_waiting for producer in core.producers.values())
    requests, others = len(peers) * core.leasing.max_waiting, 8192 * (len(peers) + len(workers))
    assert sent > 0
    assert len(save(core)) + sent <= slot_bytes(core.models[0].layout.spec) * slots + REQUEST_BYTES * requests + others


def test_bytes_that_are_no_snapshot_are_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        restore(fresh(), b"\x93\x01\x02\x03")
