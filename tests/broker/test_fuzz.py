"""A hostile client on a real broker, over real sockets, while others work: everything the grammar of messages can say.

A mind of chance draws from what a client can know (leases it has, had, or that are somebody else's; old numbers, huge
ones, broken frames) and says it.  After every event of the core all invariants are checked, in the broker's thread;
an honest client and its worker do their work beside it and look at every byte of their rows; at the end nothing that
the hostile one held is left.

``TRTPOOL_FUZZ_INPUTS`` says how many messages and frames each run tries.  How many it tried is printed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import socket
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.broker.test_loop import SEGMENT_BYTES, Broker, Worker
from tests.system.rig import wait_until
from trtpool.broker import events as e
from trtpool.broker.core import Core
from trtpool.broker.invariants import validate
from trtpool.ipc import messages as m
from trtpool.ipc.arena import map_segment
from trtpool.ipc.errors import ProtocolError
from trtpool.ipc.pipe import FRAME_BYTES
from trtpool.ipc.report import ModelReport, PoolReport
from trtpool.ipc.settings import MAX_FRAME_BYTES, PROTOCOL_VERSION

INPUTS = int(os.environ.get("TRTPOOL_FUZZ_INPUTS", "1500"))
ROW_BYTES = 8
ROW = b"honestly"

encode = msgspec.msgpack.encode

HUGE = (2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
SMALL = (0, 1, 1, 2, 3, 4, 5, 8, 12, 13, 16, 17)

HEARD = 987_654_321

tried: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def count_of_inputs(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tried.items()))
        reporter.write_line(f"\nhostile inputs tried: {sum(tried.values())} ({kinds})")


class Watched:
    """A broker whose core is checked after every event; `failures` is what was found."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures: list[BaseException] = []
        self.events = 0
        receive, tell, end_turn = Core.receive, Core.tell, Core.end_turn

        def check(core: Core) -> None:
            self.events += 1
            try:
                validate(core)
            except BaseException as error:
                self.failures.append(error)
                raise

        def receive_one_by_one(core: Core, peer: int, messages: Iterable[m.ToBroker], now_ns: int) -> None:
            for message in messages:
                receive(core, peer, [message], now_ns)
                check(core)

        def tell_and_check(core: Core, event: e.Event, now_ns: int) -> None:
            tell(core, event, now_ns)
            check(core)

        def end_and_check(core: Core, now_ns: int) -> None:
            end_turn(core, now_ns)
            check(core)

        monkeypatch.setattr(Core, "receive", receive_one_by_one)
        monkeypatch.setattr(Core, "tell", tell_and_check)
        monkeypatch.setattr(Core, "end_turn", end_and_check)
        self.broker = Broker(run_dir)

    def check(self) -> None:
        assert not self.failures
        assert self.broker.thread.is_alive()


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    one = Watched(tmp_path / "run", monkeypatch)
    yield one
    one.broker.close()
    assert not one.failures


class Honest:
    """A client that works, and keeps a lease whose bytes nobody else may change."""

    def __init__(self, broker: Broker, transport: str) -> None:
        self.client = broker.client(transport)
        self.arena = map_segment(self.client.arena_fd, SEGMENT_BYTES)
        self.arena[:ROW_BYTES] = ROW
        self.lease = self.new_lease()
        self.done = 0

    def ask(self, message: m.ToBroker) -> m.FromBroker:
        self.client.send(message)
        while True:
            answers = [answer for answer in self.client.receive() if not isinstance(answer, m.Recall)]
            if answers:
                (answer,) = answers
                return answer

    def new_lease(self) -> int:
        grant = self.ask(m.Lease(1, 0, 1, None))
        assert isinstance(grant, m.Grant)
        return grant.leases[0][0]

    def work(self) -> None:
        """From lease to release; and what it wrote elsewhere before is still there."""
        lease_id = self.new_lease()
        done = self.ask(m.Submit(lease_id, 0, 1, 0, 1))
        assert isinstance(done, m.Done)
        assert (done.lease, done.count, done.seq, done.status) == (lease_id, 1, 0, m.OK)
        self.client.send(m.Release(lease_id, 0, 1))
        assert self.arena[:ROW_BYTES] == ROW
        self.done += 1

    def figures(self) -> ModelReport:
        answer = self.ask(m.Status(1))
        assert isinstance(answer, m.Report)
        return msgspec.json.decode(answer.body, type=PoolReport).models[0]

    def violations(self) -> int:
        answer = self.ask(m.Status(1))
        assert isinstance(answer, m.Report)
        return msgspec.json.decode(answer.body, type=PoolReport).violations


class Hostile:
    """Says what comes to mind; `others` are leases of somebody else."""

    def __init__(self, broker: Broker, transport: str, chance: random.Random, others: list[int]) -> None:
        self.broker, self.transport, self.chance, self.others = broker, transport, chance, others
        self.raw = broker.client(transport)
        if not self.raw.dealer:
            self.raw.lifeline.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * FRAME_BYTES)
        self.leases: dict[int, int] = {}  # all it ever had, with their sizes
        self.errors = 0
        self.done: Counter[int] = Counter()

    # --- What it says ---

    def number(self) -> int:
        return self.chance.choice(SMALL if self.chance.random() < 0.8 else HUGE)

    def lease(self) -> int:
        known = [*self.held(), *[*self.leases][-2:]]
        return self.chance.choice([*known, *known, *[*self.leases][:3], *self.others, self.number()])

    def fields(self) -> list[object]:
        """A message as an array, perhaps with numbers beyond what its type allows."""
        n, pick = self.number, self.chance.choice
        lease, first = self.lease(), pick((0, 0, 0, 1, n()))
        count = pick((1, 1, self.leases.get(lease, 1), n()))
        seq, items, again = pick((0, 1, 2, 3, n())), pick((count, count, n())), pick((0, 2, n()))
        wait, deadline = pick((0, 1, 1000, None, n())), pick((None, None, 1, n()))
        messages: list[list[object]] = [
            [3, pick((1, 2, n())), pick((0, 0, 0, 1, n())), pick((1, 1, 2, 3, n())), wait],
            [3, n(), 0, n(), wait],
            [5, lease, first, count, seq, items, deadline, again],
            [5, lease, first, count, n(), count, deadline, 0, pick((None, 0, n()))],
            [7, lease, first, count],
            [7, lease, first, count],
            [8, lease, first, count],
            [14, n()],
            [12, n(), n(), n(), n(), n(), n()],
            [13, n(), n(), "no"],
            [10, "cpu", n(), pick((None, n()))],
            [1, PROTOCOL_VERSION, self.raw.description.token],
            [1, PROTOCOL_VERSION, self.chance.randbytes(40)],
            [pick((0, 2, 4, 6, 9, 11, 15, 16, 18, n())), n(), n(), n()],
        ]
        return pick(messages)

    def message(self) -> bytes:
        return encode([self.fields()])

    def sense(self) -> bytes:
        """What goes on from where it is, so that the rest meets every state."""
        held = self.held()
        if not held or self.chance.random() < 0.2:
            return encode([[3, 9, 0, self.chance.randint(1, 4), 0]])
        lease = self.chance.choice(held)
        count = self.leases[lease]
        return encode(
            [self.chance.choice(([5, lease, 0, count, 0, count], [7, lease, 0, count], [8, lease, 0, count]))]
        )

    def twice(self) -> bytes:
        """Double submits, double releases."""
        fields = self.fields()
        return encode([fields, fields])

    def several(self) -> bytes:
        return encode([self.fields() for _ in range(self.chance.randint(2, 30))])

    def cut(self) -> bytes:
        frame = self.several()
        return frame[: self.chance.randint(1, len(frame))]

    def changed(self) -> bytes:
        frame = bytearray(self.several())
        for _ in range(self.chance.randint(1, 4)):
            frame[self.chance.randrange(len(frame))] = self.chance.randrange(256)
        return bytes(frame)

    def noise(self) -> bytes:
        return self.chance.randbytes(self.chance.randint(1, 300))

    def flood(self) -> bytes:
        wait = self.chance.choice((None, 1, 10**9))
        many = [[3, 1, 0, self.chance.randint(1, 4), wait]] * m.MAX_MESSAGES
        return encode(self.chance.choice((many, [[14, 1]] * 200, [[7, self.lease(), 0, 1]] * 2000)))

    def too_large(self) -> bytes:
        """As large as the transport lets through, and on a lifeline larger."""
        return self.several() + bytes(MAX_FRAME_BYTES - 4096 if self.raw.dealer else FRAME_BYTES)

    def try_something(self) -> None:
        kinds = (
            self.message,
            self.sense,
            self.twice,
            self.several,
            self.cut,
            self.changed,
            self.noise,
            self.flood,
            self.too_large,
        )
        weights = (50, 30, 10, 10, 10, 15, 5, 0.3, 0.5)
        (make,) = self.chance.choices(kinds, weights)
        self.raw.send_frame(make())
        tried[make.__name__] += 1
        self.read()

    def settle(self) -> None:
        """Wait until all that it said was heard."""
        self.raw.send(m.Status(HEARD))
        while not any(isinstance(answer, m.Report) and answer.request == HEARD for answer in self.learn()):
            pass

    def read(self) -> None:
        """Take in what has come."""
        source = self.raw.dealer or self.raw.lifeline
        while select.select([source], [], [], 0)[0] if not self.raw.dealer else self.raw.dealer.poll(0):
            self.learn()

    def learn(self) -> list[m.FromBroker]:
        """Wait for a frame; learn which leases it has been granted, and how work ended."""
        answers = self.raw.receive()
        for answer in answers:
            if isinstance(answer, m.Grant):
                self.leases.update((lease_id, run.count) for lease_id, run in answer.leases)
            elif isinstance(answer, m.Done):
                self.done[answer.status] += 1
            self.errors += isinstance(answer, m.Error)
        return answers

    def give_all_back(self) -> None:
        """Release what it holds, slot by slot; what is queued or running is refused, and goes with a later call."""
        self.read()
        for lease_id in self.held():
            self.raw.send(*(m.Release(lease_id, at, 1) for at in range(self.leases[lease_id])))

    def held(self) -> list[int]:
        """Its leases that the core still has."""
        every = [lease for producer in list(self.broker.loop._core.producers.values()) for lease in [*producer.leases]]
        return [lease for lease in every if lease in self.leases]

    # --- As somebody else ---

    def come_as_a_stranger(self) -> None:
        """Another connection, that ends: with a wrong or a used token, no Hello, or too large a frame."""
        stranger = self.broker.client(self.transport, greet=False)
        tokens = (
            self.chance.randbytes(40),
            self.raw.description.token,
            bytes(40),
            stranger.description.token[:39] + b"!",
        )
        frames = (self.message(), self.noise(), *(encode([[1, PROTOCOL_VERSION, token]]) for token in tokens))
        stranger.send_frame(self.chance.choice(frames))
        if stranger.dealer:
            tried["chosen routing id"] += 1
            with contextlib.closing(stranger.context.socket(zmq.DEALER)) as second:
                second.setsockopt(zmq.LINGER, 0)
                names = (b"worker", self.chance.randbytes(5), b"0" * 255)
                second.setsockopt(zmq.ROUTING_ID, self.chance.choice(names))
                second.connect(stranger.description.endpoint)
                second.send_multipart(
                    self.chance.choice(([self.message()], [self.noise(), self.message()], [b"", b""]))
                )
            stranger.dealer.send(bytes(MAX_FRAME_BYTES + 1))
        stranger.close()
        self.broker.peers.remove(stranger)
        tried["stranger"] += 1


def answer_batches(worker: Worker) -> None:
    """Until the lifeline ends, finish each batch; every tenth fails first."""
    with contextlib.suppress(OSError, ProtocolError):
        for number in itertools.count():
            for run in worker.receive():
                if isinstance(run, m.Run) and number % 10 == 9 and run.attempt == 0:
                    worker.send(m.Failed(run.batch, run.attempt, "no"))
                elif isinstance(run, m.Run):
                    worker.finish(run)


@pytest.mark.parametrize("transport", ["lifeline", "zmq"])
@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_a_client_says_others_are_served_and_all_invariants_hold(seed, transport, watched):
    broker, chance = watched.broker, random.Random(seed)
    worker = broker.worker()
    answering = threading.Thread(target=answer_batches, args=[worker])
    answering.start()
    try:
        honest = Honest(broker, transport)
        hostile = Hostile(broker, transport, chance, [honest.lease])
        for number in itertools.count():
            # How much of it is legal in its turn, and goes deep, depends on the time; no less than this is enough.
            if number >= INPUTS and (hostile.done[m.OK] > INPUTS // 50 or number >= 4 * INPUTS):
                break
            hostile.try_something()
            if number % 20 == 0:
                honest.work()
                watched.check()
            if number % 100 == 0:
                hostile.give_all_back()
            if number % 25 == 0:
                hostile.come_as_a_stranger()

        def all_back() -> bool:
            hostile.give_all_back()
            # First: what waits may be granted meanwhile, and is then seen in the figures.
            waiting = any(producer.waiting for producer in list(broker.loop._core.producers.values()))
            now = honest.figures()
            return (now.free, now.leased, waiting) == (now.slots - 1, 1, False)

        hostile.settle()
        wait_until(all_back, "all slots but the honest one's are free", honest.figures)
        honest.client.send(m.Release(honest.lease, 0, 1))
        assert honest.figures().free == 16
        watched.check()
        assert honest.done >= INPUTS // 20
        assert honest.violations() > INPUTS // 10, "too little of it was hostile"
        assert hostile.errors > INPUTS // 10
        assert len(hostile.leases) > INPUTS // 20, "too little of it was legal, and went deep"
        assert hostile.done[m.OK] > INPUTS // 50
        assert watched.events > INPUTS
    finally:
        with contextlib.suppress(OSError):
            worker.sock.shutdown(socket.SHUT_RDWR)
        answering.join()
