"""A core that is saved and restored again and again answers as one that was left alone."""

from __future__ import annotations

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import initialize, rule

from tests.broker.core_rig import MS, Rig, everything, layouts
from tests.broker.test_core_machine import CoreMachine
from trtpool.broker import events as e
from trtpool.broker.core import Core
from trtpool.broker.invariants import validate
from trtpool.broker.snapshot import restore, save
from trtpool.ipc import messages as m

SIZES = ((12, 1, 4), (7, 3, 7))


def fresh(delay_us: int = 0, cap: int = 0, gpus: int = 0) -> Core:
    return Core(layouts(*SIZES), max_delay_us=delay_us, max_slots_per_producer=cap, gpus=gpus, started_ns=MS)


class TwinRig(Rig):
    """A rig whose every event also goes to a second core, which is replaced by its own copy at times."""

    def __init__(self, delay_us: int, cap: int, gpus: int) -> None:
        super().__init__(*SIZES, max_delay_us=delay_us, cap=cap, gpus=gpus)
        self.settings = (delay_us, cap, gpus)
        self.twin = fresh(*self.settings)

    def do(self, event: e.Event) -> list[e.Action]:
        actions = super().do(event)
        assert self.twin.handle(event, self.now_ns) == actions
        return actions

    def die(self) -> None:
        saved = save(self.twin)
        self.twin = fresh(*self.settings)
        restore(self.twin, saved)
        validate(self.twin)
        assert save(self.twin) == saved


class TwinMachine(CoreMachine):
    @initialize(delay_us=st.sampled_from([0, 0, 2000]), cap=st.sampled_from([0, 0, 4]), gpus=st.sampled_from([0, 2, 3]))
    def start(self, delay_us, cap, gpus):
        super().start(delay_us, cap, gpus)

    def make_rig(self, delay_us, cap, gpus):
        return TwinRig(delay_us, cap, gpus)

    @rule()
    def the_twin_dies(self):
        self.rig.die()


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


def test_ids_are_not_used_again() -> None:
    rig = TwinRig(0, 0, 0)
    rig.join(1)
    rig.worker()
    before = rig.submit(1)
    rig.turn()
    rig.die()
    after = rig.lease(1)
    assert after > before


def test_bytes_that_are_no_snapshot_are_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        restore(fresh(), b"\x93\x01\x02\x03")
