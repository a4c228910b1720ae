"""Brokers that die at any point, against one that never dies: each peer hears the same messages, each once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.broker.core_rig import MS, layouts
from trtpool.broker import events as e
from trtpool.broker.core import Core
from trtpool.broker.invariants import validate
from trtpool.broker.journal import Journal, JournalFull, Kind
from trtpool.broker.ledger import Ledger, _trim
from trtpool.broker.mail import Mail
from trtpool.ipc import messages as m
from trtpool.ipc.errors import ProtocolError
from trtpool.ipc.pipe import FRAME_BYTES, HEARD_ALONE, HEARD_WITH, Hearing, Post
from trtpool.ipc.settings import TOKEN_BYTES

LOG_BYTES = 2 * FRAME_BYTES
JOURNAL_BYTES = 1 << 22
HELLO = m.Hello(1, bytes(TOKEN_BYTES))
BEFORE, TORN, AFTER = "before it is received", "before its length is written", "after it was taken in"


def fresh(gpus: int = 0) -> Core:
    return Core(layouts((12, 1, 4), (7, 3, 7)), gpus=gpus, started_ns=MS)


def flat(actions: list[e.Action], heard: dict[int, list[m.FromBroker]]) -> None:
    for action in actions:
        if isinstance(action, e.Send):
            heard.setdefault(action.peer, []).append(action.message)


class Memory:
    """Where journals live; each is one life of a broker."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("journal", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, JOURNAL_BYTES)

    def journal(self) -> Journal:
        return Journal(self.fd, JOURNAL_BYTES, log_bytes=LOG_BYTES, reserve_bytes=FRAME_BYTES + 8192)


class ZmqClient:
    """A client over ZeroMQ, and what is on its way: `up` to the broker, `down` to it.

    Attributes:
        away: it has not connected to the broker that lives now.
        clogged: nothing arrives, in either direction.
    """

    def __init__(self) -> None:
        self.post = Post()
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.away = self.clogged = False

    def send(self, messages: list[m.Message]) -> None:
        if self.post.owes >= HEARD_WITH:
            messages = [self.post.say_heard(), *messages]
        frame = m.encode(messages)
        self.post.keep([frame])
        if not self.away:
            self.up.append(frame)

    def receive(self, frame: bytes) -> list[m.FromBroker]:
        messages = m.decode_from_broker(frame)
        self.post.heard += 1
        if isinstance(messages[0], m.Heard):
            self.post.drop(messages[0].frames)
            del messages[0]
        if self.post.owes >= HEARD_ALONE:
            self.send([])
        return messages


class DyingMachine(RuleBasedStateMachine):
    """What peers over lifelines are sent is in their sockets at once; over ZeroMQ it may be lost with the broker."""

    @initialize()
    def start(self):
        self.memory = Memory()
        self.ledger = Ledger(fresh(), self.memory.journal())
        self.immortal = fresh()
        self.expected: dict[int, list[m.FromBroker]] = {}
        self.heard: dict[int, list[m.FromBroker]] = {}
        self.hearing: dict[int, Hearing] = {}
        self.slow: set[int] = set()
        self.over_zmq: dict[int, ZmqClient] = {}
        self.now_ns = MS
        self.next_peer = 1
        self.producers: list[int] = []
        self.workers: dict[int, list[m.Run]] = {}
        self.leases: dict[int, list[tuple[int, int]]] = {}
        self.request = 0
        self.lives = 1
        self.join_worker()
        self.join_producer(zmq=True)

    def teardown(self):
        if hasattr(self, "memory"):
            for peer in sorted(self.slow):
                self.reads_slowly(peer, slow=False)
            self.turn(None)
            self.die()
            self.come_to_rest()
            self.agree()
            self.ledger.journal.close()
            os.close(self.memory.fd)

    # --- A broker's life ---

    def die(self):
        """What is in this broker's own memory is gone; another takes over, perhaps dying itself once on the way."""
        self.ledger.journal.close()
        self.lives += 1
        for _ in range(1 + self.lives % 2):
            self.ledger = Ledger(fresh(), self.memory.journal())
            self.ledger.recover(self.now_ns)
        flat(self.immortal.handle(e.TurnEnded(), self.now_ns), self.expected)
        validate(self.ledger.core)
        self.ledger.compact()
        for peer, mail in self.ledger.mail.items():
            if peer in self.over_zmq:
                client = self.over_zmq[peer]
                client.away = True
                client.up.clear()
                client.down.clear()
            else:
                self.hearing[peer].take(m.encode([m.Resume(self.lives, mail.said)]))
        for peer in self.ledger.mail:
            self.send(peer)
        self.ledger.sent(self.slow)

    def reconnect(self, peer):
        """A client over ZeroMQ is told of the broker that took over, and comes to it."""
        client = self.over_zmq[peer]
        client.away = False
        client.post.drop(self.ledger.mail[peer].post.heard)
        self.ledger.reconnect(peer, m.encode([HELLO, client.post.say_heard()]))
        client.up.extend(client.post.unheard)
        self.send(peer)

    def deliver(self, peer, frames=None):
        """What is on its way arrives, or only so many frames each way."""
        client = self.over_zmq[peer]
        for _ in range(len(client.up) if frames is None else min(frames, len(client.up))):
            frame = client.up.popleft()
            self.tell_immortal(peer, [one for one in m.decode_to_broker(frame) if not isinstance(one, m.Heard)])
            self.ledger.take(peer, frame, self.now_ns)
        for _ in range(len(client.down) if frames is None else min(frames, len(client.down))):
            self.hear(peer, client.receive(client.down.popleft()))

    def come_to_rest(self):
        """All that is on its way arrives, and what it makes others say."""
        self.turn(None)
        clients = {peer: self.over_zmq[peer] for peer in self.producers if peer in self.over_zmq}
        for peer, client in clients.items():
            if client.away:
                self.reconnect(peer)
            self.turn(None)
        while any(client.up or client.down for client in clients.values()):
            for peer in clients:
                self.deliver(peer)
                self.turn(None)
        for peer, client in clients.items():
            for post in (client.post, self.ledger.mail[peer].post):
                assert len(post.unheard) <= HEARD_ALONE, "what is kept is bounded"

    def send(self, peer, frames=None):
        """Send what waits for a peer, or only so many frames."""
        mail = self.ledger.mail.get(peer, Mail())
        client = self.over_zmq.get(peer)
        if client is not None:
            while mail.unsent and peer not in self.slow and not client.away:
                client.down.append(mail.unsent.popleft())
            if not client.clogged:
                self.deliver(peer)
            return
        while mail.unsent and peer not in self.slow and frames != 0:
            messages = self.hearing[peer].take(mail.unsent[0])
            mail.unsent.popleft()
            self.hear(peer, messages)
            frames = None if frames is None else frames - 1

    def hear(self, peer, messages):
        self.heard.setdefault(peer, []).extend(messages)
        for message in messages:
            if isinstance(message, m.Grant):
                self.leases[peer] += [(lease, run.count) for lease, run in message.leases]
            elif isinstance(message, m.Run):
                self.workers[peer].append(message)

    def frame(self, peer, messages, dies=None):
        """A peer sends a frame, and the broker may die at any point of taking it in."""
        if peer in self.over_zmq:
            client = self.over_zmq[peer]
            client.send(messages)
            if dies != BEFORE and not client.clogged:
                self.deliver(peer)
            if dies:
                self.die()
            return
        frame = m.encode(messages)
        if dies == BEFORE:
            self.ledger.journal.frame(peer)
            self.die()
        view = self.ledger.journal.frame(peer)
        view[: len(frame)] = frame
        self.tell_immortal(peer, messages)
        if dies != TORN:
            self.ledger.receive(peer, self.ledger.journal.commit(len(frame), self.now_ns), self.now_ns)
        view.release()
        if dies in (TORN, AFTER):
            self.die()

    def tell_immortal(self, peer, messages):
        for message in messages:
            flat(self.immortal.handle(e.Received(peer, message), self.now_ns), self.expected)

    def event(self, event, dies):
        flat(self.immortal.handle(event, self.now_ns), self.expected)
        self.ledger.decide(event, self.now_ns)
        if dies:
            self.die()

    def turn(self, dies):
        """The turn ends; the broker may die before TURN is written (None: not at all), or after so many sends."""
        if dies == 0:
            self.die()
            return
        peers, rest = self.ledger.end_turn(self.now_ns)
        flat(self.immortal.handle(e.TurnEnded(), self.now_ns), self.expected)
        for number, peer in enumerate(peers):
            if dies == number + 1:
                self.die()
                return
            self.send(peer)
        if dies is not None:
            self.die()
            return
        for action in rest:
            if isinstance(action, e.Forget):
                self.ledger.forget(action.peer)
        if peers or rest:
            self.ledger.sent([peer for peer in self.slow if peer in self.ledger.mail])
        if not self.ledger.journal.has_room:
            self.ledger.compact()

    # --- What happens ---

    def join_producer(self, *, zmq=False):
        peer, self.next_peer = self.next_peer, self.next_peer + 1
        self.hearing[peer], self.leases[peer] = Hearing(), []
        self.producers.append(peer)
        greeting = m.encode([HELLO])
        if zmq:
            client = self.over_zmq[peer] = ZmqClient()
            client.post.keep([greeting])
            flat(self.immortal.handle(e.ProducerJoined(peer), self.now_ns), self.expected)
            self.ledger.join_over_zmq(peer, greeting, self.now_ns)
            return
        view = self.ledger.journal.frame(peer)
        view[: len(greeting)] = greeting
        view.release()
        flat(self.immortal.handle(e.ProducerJoined(peer), self.now_ns), self.expected)
        self.ledger.join(peer, self.ledger.journal.commit(len(greeting), self.now_ns), self.now_ns)

    def join_worker(self, ahead=0):
        peer, self.next_peer = self.next_peer, self.next_peer + 1
        self.hearing[peer], self.workers[peer] = Hearing(), []
        generation = self.immortal.generation + ahead
        flat(self.immortal.handle(e.WorkerJoined(peer, 7, generation), self.now_ns), self.expected)
        self.ledger.join_worker(peer, 7, peer, self.now_ns, generation)
        self.frame(peer, [m.Ready("cpu", 1)])

    moments = st.sampled_from([None, None, None, BEFORE, TORN, AFTER])

    @precondition(lambda self: len(self.producers) < 4)
    @rule(dies=st.booleans(), zmq=st.booleans())
    def another_producer(self, dies, zmq):
        self.join_producer(zmq=zmq)
        if dies:
            self.die()

    @rule(data=st.data(), count=st.integers(1, 9), model=st.integers(0, 2), wait=st.sampled_from([0, MS, None]),
          dies=moments)  # fmt: skip
    def asks(self, data, count, model, wait, dies):
        self.request += 1
        peer = data.draw(st.sampled_from(self.producers))
        self.frame(peer, [m.Lease(self.request, model, count, wait)], dies)

    @rule(data=st.data(), seq=st.integers(0, 3), again=st.integers(0, 2), deadline=st.sampled_from([None, None, MS]),
          dies=moments)  # fmt: skip
    def submits(self, data, seq, again, deadline, dies):
        peer = data.draw(st.sampled_from(self.producers))
        lease, count = data.draw(st.sampled_from(self.leases[peer] or [(5, 1)]))
        items = count * data.draw(st.sampled_from([1, 3]))
        submit = m.Submit(lease, 0, count, seq, items, deadline, again)
        self.frame(peer, [submit] if data.draw(st.booleans()) else [submit, m.Cancel(lease, 0, 1)], dies)

    @rule(data=st.data(), dies=moments)
    def releases(self, data, dies):
        peer = data.draw(st.sampled_from(self.producers))
        lease, count = data.draw(st.sampled_from(self.leases[peer] or [(5, 1)]))
        self.frame(peer, [m.Release(lease, 0, count)], dies)

    @precondition(lambda self: any(self.workers.values()))
    @rule(data=st.data(), fails=st.booleans(), dies=moments)
    def answers(self, data, fails, dies):
        peer = data.draw(st.sampled_from([peer for peer, runs in self.workers.items() if runs]))
        run = self.workers[peer].pop(0)
        answer = m.Failed(run.batch, run.attempt, "no") if fails else m.Finished(run.batch, run.attempt, 0, 0, 0, 0)
        self.frame(peer, [answer], dies)

    @precondition(lambda self: len(self.producers) > 1)
    @rule(data=st.data(), dies=st.booleans())
    def producer_closes(self, data, dies):
        peer = data.draw(st.sampled_from(self.producers))
        self.event(e.ProducerClosed(peer), dies)
        self.producers.remove(peer)

    @rule(data=st.data(), dies=st.booleans())
    def worker_ends(self, data, dies):
        peer = data.draw(st.sampled_from(sorted(self.workers)))
        del self.workers[peer]
        self.event(e.WorkerEnded(peer, "SIGKILL"), dies)
        self.slow.discard(peer)
        self.join_worker()

    @rule(dies=st.booleans())
    def other_engines_serve(self, dies):
        self.join_worker(ahead=1)
        self.event(e.Switch(self.immortal.generation + 1, ["/new"] * len(self.immortal.models)), dies)
        assert self.ledger.core.generation == self.immortal.generation

    @rule(data=st.data(), clogged=st.booleans())
    def clogs(self, data, clogged):
        client = self.over_zmq.get(data.draw(st.sampled_from(self.producers)))
        if client is not None:
            client.clogged = clogged

    @rule(data=st.data(), frames=st.integers(1, 20))
    def something_arrives(self, data, frames):
        peer = data.draw(st.sampled_from(self.producers))
        if peer in self.over_zmq:
            if self.over_zmq[peer].away:
                self.reconnect(peer)
            self.deliver(peer, frames)

    @rule(peer=st.integers(1, 9), slow=st.booleans())
    def reads_slowly(self, peer, slow):
        if peer in self.ledger.mail and slow:
            self.slow.add(peer)
        elif peer in self.slow:
            self.slow.discard(peer)
            self.send(peer)
            self.ledger.sent(self.slow)

    @rule(after_ns=st.sampled_from([0, 0, MS]), dies=st.sampled_from([None, None, None, 0, 1, 2, 3]))
    def turn_ends(self, after_ns, dies):
        self.now_ns += after_ns
        self.turn(dies)

    @rule()
    def dies_in_its_sleep(self):
        self.die()

    def agree(self):
        for peer in [*self.producers, *self.workers]:  # who left hears no more, or some of it
            assert self.heard[peer] == self.expected[peer]


TestDying = DyingMachine.TestCase
TestDying.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    os.close(memory.fd)


@pytest.mark.parametrize(
    "messages",
    [
        [m.Submit(2**62, 0, 1, 0, 1)],
        [m.Finished(256, 0, 0, 0, 0, 0)],
        [m.Bye("\0" * 4096)],
        [m.Lease(1, 0, 1, 0), m.Finished(2**62, 0, 0, 0, 0, 2**56)],
    ],
)
def test_a_frame_without_its_length_is_whole(memory: Memory, messages: list[m.Message]) -> None:
    frame = m.encode(messages)
    before = memory.journal()
    before.frame(4)[: len(frame)] = frame
    (record,) = memory.journal().records()
    assert (record.kind, record.peer, record.whole) == (Kind.FRAME, 4, False)
    assert _trim(record.body) == frame


def test_no_worker_hung_because_there_was_no_broker(memory: Memory) -> None:
    def life() -> Ledger:
        core = Core(layouts((12, 1, 4)), batch_timeout_s=0.1, started_ns=MS)
        return Ledger(core, memory.journal())

    ledger = life()
    ledger.join_worker(9, 1, 9, MS)
    ledger.take(9, m.encode([m.Ready("cpu", 1)]), MS)
    ledger.end_turn(MS)
    ledger.sent(())
    ledger.join_over_zmq(1, m.encode([HELLO, m.Lease(1, 0, 1, 0)]), MS)
    ledger.take(1, m.encode([m.Submit(1, 0, 1, 0, 1)]), MS)
    assert 9 in ledger.end_turn(MS)[0], "the batch is sent"
    heir = life()
    assert heir.recover(102 * MS) == [], "it may have been finished, and said so to nobody"
    heir.compact()
    assert heir.end_turn(201 * MS) == ([], [])
    _, [hung] = heir.end_turn(202 * MS)
    assert isinstance(hung, e.Hung)
    last = life()
    assert last.recover(203 * MS) == [hung], "perhaps nobody was told"


def test_what_does_not_fit_is_refused_and_changes_nothing(memory: Memory) -> None:
    journal = memory.journal()
    journal.write(Kind.EVENT, 1, 2, b"it happened")
    with pytest.raises(JournalFull, match="does not fit"):
        journal.write(Kind.EVENT, 1, 3, bytes(LOG_BYTES))
    with pytest.raises(JournalFull, match="does not fit"):
        journal.replace(bytes(JOURNAL_BYTES))
    (record,) = memory.journal().records()
    assert record.body == b"it happened"


def test_a_full_log_is_replaced_and_then_empty(memory: Memory) -> None:
    ledger = Ledger(fresh(), memory.journal())
    ledger.join_worker(9, 1, 9, MS)
    turns = 0
    while ledger.journal.has_room:
        ledger.end_turn(MS)
        ledger.sent(())
        turns += 1
    assert turns > 100
    ledger.compact()
    assert ledger.journal.has_room
    heir = Ledger(fresh(), memory.journal())
    assert list(heir.journal.records()) == []
    assert heir.recover(MS) == []
    assert heir.next_peer == ledger.next_peer
    assert heir.mail == ledger.mail


def test_who_took_over_writes_nothing_before_all_is_written_down_anew(memory: Memory) -> None:
    def life() -> Ledger:
        return Ledger(fresh(), memory.journal())

    ledger = life()
    ledger.join_over_zmq(1, m.encode([HELLO]), MS)
    ledger.end_turn(MS)
    ledger.sent(())
    for survives in (False, True):
        heir = life()
        heir.recover(MS)
        assert 1 in heir.core.producers
        heir.decide(e.ProducerClosed(1), MS)
        heir.end_turn(MS)
        heir.sent(())
        if survives:
            heir.compact()
    last = life()
    last.recover(MS)
    assert 1 not in last.core.producers


def over_zmq(memory: Memory) -> Ledger:
    """A ledger with a client over ZeroMQ that was sent two frames, and has said that it heard the first."""
    ledger = Ledger(fresh(), memory.journal())
    ledger.join_over_zmq(1, m.encode([HELLO]), MS)
    ledger.end_turn(MS)
    ledger.take(1, m.encode([m.Heard(1), m.Status(1)]), MS)
    ledger.end_turn(MS)
    ledger.mail[1].unsent.clear()
    ledger.sent(())
    return ledger


@pytest.mark.parametrize("messages", [[m.Heard(3)], [m.Heard(2**63 - 1)], [m.Status(1), m.Heard(1)]])
def test_who_says_to_have_heard_what_was_not_sent_breaks_the_protocol(
    memory: Memory, messages: list[m.Message]
) -> None:
    ledger = over_zmq(memory)
    ledger.take(1, m.encode(messages), MS)
    assert ledger.core.violations == 1
    assert len(ledger.mail[1].post.unheard) == 1


def test_over_a_lifeline_nobody_says_what_was_heard(memory: Memory) -> None:
    ledger = Ledger(fresh(), memory.journal())
    ledger.join(1, m.encode([HELLO]), MS)
    ledger.take(1, m.encode([m.Heard(0)]), MS)
    assert ledger.core.violations == 1


@pytest.mark.parametrize(
    "messages", [[], [m.Heard(0)], [m.Heard(3)], [m.Status(1)], [m.Heard(1), m.Status(1)], [m.Heard(2), m.Heard(2)]]
)
def test_who_reconnects_says_what_was_heard_and_nothing_else(memory: Memory, messages: list[m.Message]) -> None:
    ledger = over_zmq(memory)
    with pytest.raises(ProtocolError):
        ledger.reconnect(1, m.encode([HELLO, *messages]))
    for heard, left in ((1, 1), (2, 0)):
        ledger.reconnect(1, m.encode([HELLO, m.Heard(heard)]))
        assert len(ledger.mail[1].post.unheard) == left
