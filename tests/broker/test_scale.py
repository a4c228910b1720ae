"""What an item costs the broker does not depend on how many slots there are, nor on how many clients are idle.

Time says little about that, so what is counted is what Python does: each call and each line of `broker/`, under a
steady load that repeats itself.  What C code does in one call, such as looking for free slots, is not seen that way;
`test_the_ring_looks_at_few_slots_for_each_that_it_grants` counts the bytes it looks at.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.broker.core_rig import MS, layouts
from trtpool.broker import core as core_module
from trtpool.broker import slots as slots_module
from trtpool.broker.batching import WorkQueue
from trtpool.broker.core import Core
from trtpool.broker.invariants import validate
from trtpool.broker.journal import Journal
from trtpool.broker.ledger import Ledger
from trtpool.broker.slots import Ring
from trtpool.ipc import messages as m
from trtpool.ipc.settings import PROTOCOL_VERSION, TOKEN_BYTES

BROKER = str(Path(core_module.__file__).parent)
JOURNAL_BYTES = 64 << 20
GREETING = m.encode([m.Hello(PROTOCOL_VERSION, bytes(TOKEN_BYTES))])
WORKER = 1_000_000
BATCH = 32
BUSY = 4
CAP = 32
"""Slots that a client may hold."""
WARM_UP, MEASURED = 40, 48
MARGIN = 1.02
"""A pool with few slots goes round its ring more often, and there looks for slots once more."""


class Steps:
    """What Python did in `broker/`: how often it went into a function, by name, and ran a line, by place."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, kind: str, _: Any) -> Any:
        """A generator that goes on counts as a call too."""
        code = frame.f_code
        if not code.co_filename.startswith(BROKER):
            return None
        self.calls[f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_name}"] += 1
        return self._line

    def _line(self, frame: FrameType, kind: str, _: Any) -> Any:
        if kind == "line":
            self.lines[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1
        return self._line

    def __str__(self) -> str:
        return f"{self.calls.total()} calls, {self.lines.total()} lines"

    def grown(self, after: Steps) -> str:
        """Which lines and functions account for the difference, most first."""
        more = (after.lines - self.lines) + (after.calls - self.calls)
        return ", ".join(f"{place}: {count} more" for place, count in more.most_common(8)) or "nothing grew"


class Pool:
    """A ledger whose peers are this test: frames in, turns, frames out.

    Args:
        slots: of its one model.
    """

    def __init__(self, slots: int) -> None:
        core = Core(layouts((slots, 1, BATCH)), max_slots_per_producer=CAP, batch_timeout_s=300.0, started_ns=MS)
        self.ledger = Ledger(core, Journal(-1, JOURNAL_BYTES, log_bytes=JOURNAL_BYTES // 2 - 8192))
        self.now_ns = MS
        self.turns = 0
        self.inbox: dict[int, deque[m.FromBroker]] = {}
        self.ledger.join_worker(WORKER, 1, 1, self.now_ns)
        self.say(WORKER, m.Ready("cpu", 3))
        self.turn()
        self.hear(WORKER)

    def close(self) -> None:
        self.ledger.journal.close()

    def join(self, peer: int) -> None:
        self.ledger.join(peer, GREETING, self.now_ns)

    def say(self, peer: int, *messages: m.ToBroker) -> None:
        self.ledger.take(peer, m.encode(messages), self.now_ns)

    def turn(self) -> None:
        self.now_ns += MS
        self.turns += 1
        ledger = self.ledger
        peers, _ = ledger.end_turn(self.now_ns)
        if not peers:
            return
        for peer in peers:
            unsent = ledger.mail[peer].unsent
            while unsent:
                self.inbox.setdefault(peer, deque()).extend(m.decode_from_broker(unsent.popleft()))
        ledger.sent(())

    def hear(self, peer: int) -> list[m.FromBroker]:
        heard = list(self.inbox.get(peer, ()))
        self.inbox.pop(peer, None)
        return heard

    def idle_clients(self, first: int, count: int, leases: int, *, waiting: bool) -> None:
        """Clients that hold so many leases each and, `waiting`, asked for one more; they say nothing else."""
        for peer in range(first, first + count):
            self.join(peer)
            if leases:
                self.say(peer, *[m.Lease(number + 1, 0, 1, None) for number in range(leases + waiting)])
            self.turn()
            granted = [one for one in self.hear(peer) if isinstance(one, m.Grant)]
            assert len(granted) == leases


class Load:
    """Producers with runs in flight, each of which is released and submitted anew when it is done.

    Args:
        pool: theirs.
        run: slots of each.
        window: how many of these a producer has in flight.
        advance: whether they ask for the next slots with `again`, or by a Lease after each result.
    """

    def __init__(self, pool: Pool, run: int, window: int, *, advance: bool = True) -> None:
        self.pool, self.run, self.advance = pool, run, advance
        self.items = self.seq = self.request = 0
        for peer in range(1, BUSY + 1):
            pool.join(peer)
            pool.say(peer, *[self.lease() for _ in range(window)])
        pool.turn()

    def lease(self) -> m.Lease:
        self.request += 1
        return m.Lease(self.request, 0, self.run, None)

    def step(self, steps: Steps | None = None) -> None:
        """What every peer has heard is answered, and the broker takes that in; only the broker's part is counted."""
        pool, said = self.pool, {}
        for peer in range(1, BUSY + 1):
            if answers := self.answers(peer):
                said[peer] = answers
        runs = [one for one in pool.hear(WORKER) if isinstance(one, m.Run)]
        if runs:
            said[WORKER] = [m.Finished(run.batch, run.attempt, 1, 1_000_000, 1, 0) for run in runs]
        with contextlib.nullcontext() if steps is None else steps.counting():
            for peer, messages in said.items():
                pool.say(peer, *messages)
            pool.turn()

    def answers(self, peer: int) -> list[m.ToBroker]:
        answers: list[m.ToBroker] = []
        heard = self.pool.hear(peer)
        granted = sum(isinstance(one, m.Grant) and not one.request for one in heard)  # they follow their results
        for one in heard:
            if isinstance(one, m.Grant):
                for lease_id, rows in one.leases:
                    self.seq += 1
                    again = rows.count if self.advance else 0
                    answers.append(m.Submit(lease_id, 0, rows.count, self.seq, rows.count, None, again))
            elif isinstance(one, m.Done):
                assert one.status == m.OK
                self.items += one.count
                answers.append(m.Release(one.lease, one.first, one.count))
                if granted:
                    granted -= 1
                else:
                    answers.append(self.lease())
            else:
                assert isinstance(one, (m.Welcome, m.Recall))
        return answers


def cost(
    slots: int,
    *,
    idle: int = 0,
    leases: int = 0,
    waiting: bool = False,
    run: int = 1,
    window: int = 4,
    advance: bool = True,
) -> tuple[Steps, int]:
    """What so many items of a steady load cost, and how many those were."""
    pool = Pool(slots)
    try:
        pool.idle_clients(100, idle, leases, waiting=waiting)
        load = Load(pool, run, window, advance=advance)
        for _ in range(WARM_UP):
            load.step()
        steps, before = Steps(), load.items
        for _ in range(MEASURED):
            load.step(steps)
        validate(pool.ledger.core)
        return steps, load.items - before
    finally:
        pool.close()


def compare(few: tuple[Steps, int], many: tuple[Steps, int]) -> None:
    """The same work took as many calls and lines."""
    (before, items), (after, same) = few, many
    assert items == same > 0, "the loads differ, so their costs tell nothing"
    assert after.calls.total() <= MARGIN * before.calls.total(), before.grown(after)
    assert after.lines.total() <= MARGIN * before.lines.total(), before.grown(after)
    assert before.lines.total() <= MARGIN * after.lines.total(), after.grown(before)


def test_what_grows_is_named():
    few, many = Steps(), Steps()
    queue = WorkQueue(1)
    for steps, times in ((few, 1), (many, 3)):
        with steps.counting():
            for _ in range(times):
                len(queue)
    assert "__len__: 2 more" in few.grown(many)
    with pytest.raises(AssertionError, match=r"batching\.py:\d+ __len__: 2 more"):
        compare((few, 1), (many, 1))


@pytest.mark.parametrize(
    "load",
    [{"run": 1, "window": 4}, {"run": 4, "window": 1}, {"run": 4, "window": 1, "advance": False}],
    ids=["single slots", "runs", "runs that are asked for one by one"],
)
def test_an_item_costs_the_same_with_64_and_with_65536_slots(load):
    compare(cost(64, **load), cost(65_536, **load))


@pytest.mark.parametrize("leases", [0, 8])
def test_an_item_costs_the_same_beside_no_and_beside_256_idle_clients(leases):
    compare(cost(65_536), cost(65_536, idle=256, leases=leases))


def test_an_item_of_a_pool_that_is_full_costs_the_same_beside_256_idle_clients():
    """The busy ones want 32 slots and there are 24, so requests wait; the idle ones hold a slot each."""
    busy = cost(24, window=8, advance=False)
    compare(busy, cost(24 + 256, window=8, advance=False, idle=256, leases=1))


def test_an_item_costs_the_same_beside_256_clients_that_wait_at_their_own_caps():
    compare(cost(65_536), cost(65_536, idle=256, leases=32, waiting=True))


# --- The ring -------------------------------------------------------------------------------------


class Looked(bytearray):
    """A ring's bytes, which count how many of them were looked at."""

    seen = 0

    def startswith(self, prefix: Any, start: Any = 0, *rest: Any) -> bool:
        self.seen += len(prefix)
        return super().startswith(prefix, start, *rest)

    def find(self, sub: Any, start: Any = 0, *rest: Any) -> int:
        first = super().find(sub, start, *rest)
        end = min([len(self), *rest])
        self.seen += (end if first < 0 else first + len(sub)) - start
        return first

    def rfind(self, sub: Any, start: Any = 0, *rest: Any) -> int:
        first = super().rfind(sub, start, *rest)
        self.seen += min([len(self), *rest]) - (start if first < 0 else first)
        return first


class LookedRuns:
    """Stands for the pattern that finds free runs."""

    def finditer(self, used: Looked, *bounds: int) -> Iterator[Any]:
        used.seen += (bounds[1] if len(bounds) > 1 else len(used)) - (bounds[0] if bounds else 0)
        return FREE_RUN.finditer(used, *bounds)


FREE_RUN = slots_module._FREE_RUN


def looked_at(slots: int, spacing: int, run: int = 4, in_flight: int = 8) -> float:
    """Bytes looked at for each slot granted, while every `spacing`-th slot is held by somebody idle."""
    ring = Ring(slots, BATCH)
    ring._used = used = Looked(slots)
    if spacing:
        for first in range(0, slots, spacing):
            used[first] = 1
            ring.free -= 1
    held: deque[list[tuple[int, int]]] = deque()
    granted = 0
    while granted < 2 * slots:  # twice round
        runs = ring.take(run)
        assert runs is not None
        granted += run
        held.append(runs)
        if len(held) == in_flight:
            for first, count in held.popleft():
                ring.give_back(first, count)
    return used.seen / granted


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "_FREE_RUN", LookedRuns())


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("spacing", [0, 2 * BATCH], ids=["none held", "some held, a batch fits between them"])
def test_the_ring_looks_at_few_slots_for_each_that_it_grants(spacing):
    """Slots of a run, and once round the ring for all of them: at most some of each slot's neighbours."""
    assert looked_at(65_536, spacing) <= 1.1 * looked_at(1024, spacing) <= 8


@pytest.mark.usefixtures("counted")
def test_the_ring_looks_at_few_slots_where_no_batch_fits_between_those_held():
    assert looked_at(8192, BATCH // 2) <= 1.1 * looked_at(1024, BATCH // 2)
