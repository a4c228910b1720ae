"""A core whose every event is written down before anything that follows from it is sent.

::

    frame received into the journal --> core --> turn ends --> TURN written --> frames sent --> SENT noted
                                                                      |
    a broker that dies anywhere: the next handles the same events again, `recover`, makes the same frames, and sends
    again those of a turn that has no SENT

Frames to a peer are counted.  Who takes over says how many had certainly been sent (`messages.Resume`) and sends the
others again, and the peer, which counts too, skips those that it has had (`pipe.Hearing`).

What was handed to ZeroMQ may be lost with this process, both ways.  So frames to a client over ZeroMQ are kept until it
has said that it had them, and it keeps its own until it is told so (`pipe.Post`).  Who takes over tells it how many of
its frames are written down (`messages.Reconnect`), it answers how many it had, and each sends the rest again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import Any, Final, Protocol, TypeAlias

import msgspec

from trtpool.ipc import messages as m
from trtpool.ipc.errors import ProtocolError
from trtpool.ipc.pipe import FRAME_BYTES, HEARD_ALONE, HEARD_WITH, Post

from . import events as e
from .core import Core
from .journal import MAX_LOST_ZEROS, REQUEST_BYTES, Journal, Kind
from .mail import Mail, SavedMail, frames_of
from .snapshot import restore, save

Told: TypeAlias = (
    e.ProducerJoined | e.WorkerJoined | e.ProducerClosed | e.ProducerEnded | e.WorkerEnded | e.Drain | e.Switch
)
"""Events that are written as they are; frames are written as they came, and turns have a record of their own."""

_TOLD: Final[tuple[type[Told], ...]] = (
    e.ProducerJoined,
    e.WorkerJoined,
    e.ProducerClosed,
    e.ProducerEnded,
    e.WorkerEnded,
    e.Drain,
    e.Switch,
)
_TURN: Final = int(Kind.TURN)
_NUMBERS: Final[dict[type[Any], int]] = {kind: number for number, kind in enumerate(_TOLD)}


class _Saved(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    next_peer: int
    core: bytes
    mail: dict[int, SavedMail]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Saved).decode
_decode_waiting = msgspec.msgpack.Decoder(dict[int, int]).decode


class Decider(Protocol):
    """The core, or who stands before it; see `Core` for what these do."""

    def receive(self, peer: int, messages: Iterable[m.ToBroker], now_ns: int) -> None: ...

    def tell(self, event: e.Event, now_ns: int) -> None: ...

    def take(self) -> tuple[dict[int, list[m.FromBroker]], list[e.Action]]: ...


class Ledger:
    """See the module.

    Args:
        core: a new one.
        journal: what is written down; `recover` if a broker wrote there before.

    Attributes:
        mail: of each peer that the core knows.
        next_peer: a number that no peer has had.
    """

    def __init__(self, core: Core, journal: Journal) -> None:
        self.core = core
        self.journal = journal
        self._decider: Decider = core
        self.mail: dict[int, Mail] = {}
        self.next_peer = 1
        self._greetings: dict[int, bytes] = {}
        self._writing = True
        self._owed: set[int] = set()  # peers over ZeroMQ that must be told what was heard of them

    def follow(self, decider: Decider | None) -> None:
        """Have all go through `decider`, which passes it on to the core; None: to the core itself, as at first."""
        self._decider = self.core if decider is None else decider

    # ------------------------------------------------------------------ what comes in

    def join_worker(self, peer: int, pid: int, worker: int, now_ns: int, generation: int = 0) -> None:
        """A worker joined; `worker` is the supervisor's number for it."""
        self.journal.write(Kind.WORKER, peer, worker)
        self.next_peer = max(self.next_peer, peer + 1)
        self.mail[peer] = Mail(worker=worker)
        self.decide(e.WorkerJoined(peer, pid, generation), now_ns)

    def join_over_zmq(self, peer: int, greeting: bytes, now_ns: int, pid: int = 0) -> None:
        """A producer joined by a frame over ZeroMQ."""
        self.journal.write(Kind.ZMQ, peer)
        self.mail[peer] = Mail(post=Post())
        self.journal.write(Kind.FRAME, peer, now_ns, greeting)
        self.join(peer, greeting, now_ns, pid)

    def join(self, peer: int, greeting: bytes | memoryview, now_ns: int, pid: int = 0) -> None:
        """A producer joined by a frame, written already, that begins with a good Hello; what follows counts too."""
        self.decide(e.ProducerJoined(peer, pid), now_ns)
        self._take_greeting(peer, greeting, now_ns)

    def reconnect(self, peer: int, frame: bytes) -> None:
        """A client of the last broker said Hello, and how many frames it has had.

        Not written down: it says so to the next broker too.

        Raises:
            ProtocolError: it said something else.
        """
        mail = self.mail[peer]
        _, *rest = m.decode_to_broker(frame)
        assert mail.post is not None
        if len(rest) != 1 or not isinstance(rest[0], m.Heard) or rest[0].frames < mail.post.dropped:
            raise ProtocolError("after Hello, Heard must say how many frames it has had, and nothing more")
        mail.hear_of(rest[0].frames)

    def decide(self, event: Told, now_ns: int) -> None:
        """The core is told something."""
        if self._writing:
            self.journal.write(Kind.EVENT, 0, now_ns, _encode((_NUMBERS[type(event)], *event)))
        self._decider.tell(event, now_ns)

    def take(self, peer: int, frame: bytes, now_ns: int) -> None:
        """A frame of a peer came that is not written yet."""
        self.journal.write(Kind.FRAME, peer, now_ns, frame)
        self.receive(peer, frame, now_ns)

    def receive(self, peer: int, frame: bytes | memoryview, now_ns: int) -> None:
        """A frame of a peer came, and is written."""
        mail = self.mail.get(peer)
        post = None if mail is None else mail.post
        if post is not None:
            self._count(peer, post)
        try:
            messages = m.decode_to_broker(frame)
            if mail is not None and post is not None and type(messages[0]) is m.Heard:
                mail.hear_of(messages[0].frames)
                del messages[0]
        except ProtocolError as error:
            self.core.refuse(peer, str(error))
        else:
            self._decider.receive(peer, messages, now_ns)

    def _take_greeting(self, peer: int, greeting: bytes | memoryview, now_ns: int) -> None:
        mail = self.mail.get(peer)
        if mail is not None and mail.post is not None:
            self._count(peer, mail.post)
        self._decider.receive(peer, m.decode_to_broker(greeting)[1:], now_ns)

    def _count(self, peer: int, post: Post) -> None:
        post.heard += 1
        if post.owes >= HEARD_ALONE:
            self._owed.add(peer)

    # ------------------------------------------------------------------ what follows from it

    def end_turn(self, now_ns: int) -> tuple[list[int], list[e.Action]]:
        """Put what the core decided into the mail; returns the peers that got some, and what else is to be done."""
        if self._writing:
            self.journal.write(_TURN, 0, now_ns)
        return self._end_turn(now_ns)

    def sent(self, slow: Collection[int]) -> None:
        """All that was in the mail went out, but that of a few peers; call it if `end_turn` or a later try had some.

        Whoever died right after it sends the last turn's mail again, which peers then skip.
        """
        if not self._writing:
            return
        waiting = {peer: len(self.mail[peer].unsent) for peer in slow if peer in self.mail} if slow else None
        if waiting:
            self.journal.write(Kind.SENT, 0, 0, _encode(waiting))
        else:
            self.journal.settled = True

    def compact(self) -> None:
        """At the end of a turn: forget how it came to what is.

        Raises:
            JournalFull: that is too much, and nothing changed; see `weight`.
        """
        saved = {peer: one.save() for peer, one in self.mail.items()}
        self.journal.replace(_encode(_Saved(self.next_peer, save(self.core), saved)))
        self._writing = True

    def weight(self, peer: int) -> int:
        """About how many bytes less there would be to write if a producer was cut off."""
        mail, producer = self.mail.get(peer, Mail()), self.core.producers.get(peer)
        return sum(map(len, mail.kept)) + (0 if producer is None else REQUEST_BYTES * producer.waiting)

    def _end_turn(self, now_ns: int) -> tuple[list[int], list[e.Action]]:
        self.core.end_turn(now_ns)
        messages, rest = self._decider.take()
        for peer in self._owed:
            messages.setdefault(peer, [])
        for peer, some in messages.items():
            mail = self.mail.get(peer)
            if mail is None:
                mail = self.mail[peer] = Mail()
            if mail.post is not None and mail.post.owes >= HEARD_WITH:
                some.insert(0, mail.post.say_heard())
            frame = m.encode(some)
            if mail.post is None and len(frame) <= FRAME_BYTES:  # as nearly always
                mail.made += 1
                mail.unsent.append(frame)
            else:
                mail.add(frames_of(some))
        self._owed.clear()
        return list(messages), rest

    def forget(self, peer: int) -> None:
        """Nothing of the peer is left."""
        self.mail.pop(peer, None)
        self._owed.discard(peer)

    # ------------------------------------------------------------------ taking over

    def recover(self, now_ns: int) -> list[e.Action]:
        """Go on from where the journal ends, and end the turn.

        Nothing is written until `compact`: who dies before it leaves the journal as it was.

        Returns:
            What else the last broker should have done, and perhaps has.

        Raises:
            msgspec.MsgspecError: the journal holds something else.
        """
        self._writing = False
        if len(self.journal.snapshot):
            saved = _decode(self.journal.snapshot)
            restore(self.core, saved.core)
            self.next_peer = saved.next_peer
            for peer, one in saved.mail.items():
                self.mail[peer] = Mail.restore(one)
        rest: list[e.Action] = []
        for record in self.journal.records():
            if record.kind == Kind.TURN:
                rest += self._end_turn(record.now_ns)[1]
            elif record.kind == Kind.SENT:
                self._settle(_decode_waiting(record.body) if record.body else {})
                self._forget_all(rest)
                rest = []
            elif record.kind == Kind.FRAME:
                self._again(record.peer, record.body if record.whole else _trim(record.body), record.now_ns or now_ns)
            elif record.kind == Kind.EVENT:
                self._retell(record.body, record.now_ns)
            else:
                worker = record.now_ns if record.kind == Kind.WORKER else None
                self.mail[record.peer] = Mail(worker=worker, post=Post() if record.kind == Kind.ZMQ else None)
                self.next_peer = max(self.next_peer, record.peer + 1)
        now_ns = max(now_ns, self.core.now_ns)
        self.core.excuse_peers(now_ns)
        rest += self._end_turn(now_ns)[1]
        self._forget_all(rest)
        for mail in self.mail.values():
            if mail.post is not None:
                mail.unsent = deque(mail.post.unheard)
        return rest

    def _again(self, peer: int, frame: bytes, now_ns: int) -> None:
        if peer in self.core.producers or peer in self.core.workers:
            self.receive(peer, frame, now_ns)
        else:
            self._greetings[peer] = frame  # if its token was good, ProducerJoined follows

    def _retell(self, body: bytes, now_ns: int) -> None:
        number, *values = msgspec.msgpack.decode(body)
        event = _TOLD[number](*values)
        self.core.tell(event, now_ns)
        if isinstance(event, e.ProducerJoined):
            self._take_greeting(event.peer, self._greetings.pop(event.peer), now_ns)
        if not isinstance(event, (e.Drain, e.Switch)):
            self.next_peer = max(self.next_peer, event.peer + 1)

    def _settle(self, waiting: dict[int, int]) -> None:
        """All was sent but the last few frames of those that are slow."""
        for peer, mail in self.mail.items():
            for _ in range(len(mail.unsent) - waiting.get(peer, 0)):
                mail.unsent.popleft()

    def _forget_all(self, actions: list[e.Action]) -> None:
        for action in actions:
            if isinstance(action, e.Forget):
                self.forget(action.peer)


def _trim(torn: bytes) -> bytes:
    """A frame whose length was lost, without the zeros after it: no message is the beginning of another."""
    shortest = len(torn) - MAX_LOST_ZEROS
    for end in range(shortest, len(torn) + 1):
        try:
            m.decode_to_broker(torn[:end])
        except ProtocolError:
            continue
        return torn[:end]
    return torn[:shortest]
