"""Who gets slots, and when: requests, grants and releases.

Slots are granted in order of arrival, all that a request asks for or none.  One that lacks room blocks those behind
it, so that a large one is not starved; one whose producer is at its own cap is passed by.  Interactive requests go
before bulk ones, in turns; see `OVERTAKES`.

*Spares* are slots that a Submit asked for in advance (`again`), granted with its result; see `SURPLUS`.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from trtpool.ipc import messages as m
from trtpool.ipc.settings import MAX_WAITING_REQUESTS

from .batching import Work
from .books import Books, Refused
from .recall import Recalls
from .records import OVERTAKES, LeaseRecord, Model, Producer, Request, first_short
from .slots import RELEASE, Event, move
from .timers import Timers

SURPLUS: Final = 4
"""`again` is granted while a quarter (1 / SURPLUS) of the slots stays free.

An idle client may hold what it was granted in advance, and may not have said yet that it released as much, for
as long as it lives.  So all that is granted in advance, counted twice, is never more than a producer's cap leaves over:
whoever asks for slots gets them in the end.
"""


class Leasing:
    """See the module's docstring.

    Attributes:
        next_lease: the id of the next lease, never reused.
        max_waiting: requests of one client that may wait.
    """

    def __init__(self, books: Books, timers: Timers, recalls: Recalls) -> None:
        self._books = books
        self._timers = timers
        self._recalls = recalls
        self.next_lease = 1
        self.max_waiting = MAX_WAITING_REQUESTS

    # ------------------------------------------------------------------ requests

    def lease(self, producer: Producer, message: m.Lease) -> None:
        """A producer asks for slots: grant, refuse, or have it wait until the turn ends or longer."""
        books, request = self._books, message.request
        if message.model >= len(books.models):
            raise Refused(m.BAD_MESSAGE, f"there is no model {message.model}", request)
        model = books.models[message.model]
        if message.count > model.cap:
            raise Refused(
                m.TOO_LARGE,
                f"{message.count} slots were asked for and one client may hold {model.cap} of model "
                f"{model.layout.spec.name!r}; ask for fewer, or start the pool with more --slots",
                request,
            )
        if books.draining:
            raise Refused(m.CLOSING, "the pool is stopping and grants no more slots", request)
        if message.wait_ns != 0 and producer.waiting >= self.max_waiting:
            raise Refused(
                m.BUSY,
                f"{producer.waiting} requests of this client wait for slots, and more may not: ask for several slots "
                "in one request (lease_many), or release results first",
                request,
            )
        if message.wait_ns == 0:
            self._lease_now(producer, model, message)
            return
        deadline = 0 if message.wait_ns is None else books.now_ns + message.wait_ns
        waiting = Request(producer, model, request, message.count, deadline, message.priority, books.now_ns)
        model.add_request(waiting)
        if deadline:
            self._timers.start(deadline, waiting)

    def _lease_now(self, producer: Producer, model: Model, message: m.Lease) -> None:
        """Grant at once or refuse.  Those who came before go first, unless only their own cap holds them up.

        An interactive one passes by the bulk ones, in its turn.
        """
        may = producer.may_hold(model, message.count)
        if may and (model.waiting or model.urgent):
            self.serve_waiting(model)
            may = self._may_go_first(producer, model, message)
        if not (may and self._grant(producer, model, message.request, message.count)):
            raise Refused(m.BUSY, _busy_text(producer, model, message.count), message.request)
        model.lease_waits[0] += 1

    @staticmethod
    def _may_go_first(producer: Producer, model: Model, message: m.Lease) -> bool:
        """Whether nobody who waits goes before one that asks now."""
        if not producer.may_hold(model, message.count) or first_short(model.urgent) is not None:
            return False
        if first_short(model.waiting) is not None:
            if not message.priority or model.overtaken >= OVERTAKES or model.ring.free < message.count:
                return False
            model.overtaken += 1
        return True

    def serve_waiting(self, model: Model) -> None:
        """Grant in order of arrival, interactive requests first, but see `OVERTAKES`.

        One that is at its own cap is passed by, and parked; one that lacks room blocks the rest, of either class.
        """
        while True:
            request = self._first(model.urgent) if model.urgent else None
            bulk = self._first(model.waiting)
            if bulk is not None and (request is None or model.overtaken >= OVERTAKES):
                request = bulk
            if request is None:
                model.short_ns = 0
                break
            if not self._grant(request.producer, model, request.request, request.count):
                self._recalls.ask(request)
                break
            (model.waiting if request is bulk else model.urgent).popleft()
            request.end()
            waited_ns = self._books.now_ns - request.asked_ns
            model.lease_waits[(waited_ns * waited_ns).bit_length()] += 1
            model.lease_wait_ns += waited_ns
            model.overtaken = 0 if request is bulk else model.overtaken + (bulk is not None)

    @staticmethod
    def _first(waiting: deque[Request]) -> Request | None:
        """The first request that is not at its own cap; those before it are parked."""
        while waiting:
            request = waiting[0]
            if not request.over:
                if request.producer.may_hold(request.model, request.count):
                    return request
                request.model.park(request)
            waiting.popleft()
        return None

    def refuse_late(self, requests: list[Request]) -> None:
        """Answer those who have waited long enough; the text says who holds what they waited for."""
        holders = {model: self._recalls.holders(model) for model in {request.model for request in requests}}
        for one in requests:
            idle = self._recalls.blame(holders[one.model], one.producer)
            text = _busy_text(one.producer, one.model, one.count, idle)
            self._books.send(one.producer.peer, m.Error(m.BUSY, text, one.request))
        for model in holders:  # those behind one that lacks room would else be kept as long as that waits
            model.drop_requests()

    def refuse_all(self) -> None:
        """The pool is stopping: nobody is granted anything, or uses again what was granted."""
        self._recalls.ask_all()
        for model in self._books.models:
            for request in model.requests():
                text = "the pool is stopping and grants no more slots"
                request.end()  # its timer must not answer it again
                self._books.send(request.producer.peer, m.Error(m.CLOSING, text, request.request))
            model.drop_requests()

    def forget_requests(self, producer: Producer) -> None:
        """Nobody waits for the answers any more."""
        for model in self._books.models:
            for request in model.requests():
                if request.producer is producer:
                    request.end()
            model.parked.pop(producer, None)

    # ------------------------------------------------------------------ grants

    def _grant(self, producer: Producer, model: Model, request: int, count: int) -> bool:
        """Grant slots if the ring has them."""
        runs = model.ring.take(count)
        if runs is None:
            return False
        leases = []
        segment, index = model.segment, model.index
        for first, length in runs:
            lease = LeaseRecord(self.next_lease, producer, model, first, length)
            if not request:
                lease.spare = True
                model.spares += length
            self.next_lease += 1
            producer.leases[lease.id] = lease
            leases.append((lease.id, m.SlotRun(segment, first, length)))
        producer.held[index] += count
        model.unasked[producer] = None
        books = self._books
        producer.active_ns[index] = books.now_ns
        books.send(producer.peer, m.Grant(request, index, leases))
        return True

    def grant_again(self, work: Work) -> None:
        """Grant the slots that a Submit asked for in advance, if nobody goes short by it."""
        lease, count = work.lease, work.again
        model, producer = lease.model, lease.producer
        slots, cap = model.ring.slots, model.cap
        if (
            not model.short_ns
            and not self._books.draining
            and not producer.closed
            and model.ring.free - count >= slots // SURPLUS
            and 2 * (model.spares + count) <= slots - cap
            and producer.held[model.index] + count <= cap
        ):
            self._grant(producer, model, 0, count)

    # ------------------------------------------------------------------ what is held, and given back

    @staticmethod
    def find(producer: Producer, message: m.Submit | m.Release | m.Cancel) -> LeaseRecord:
        """The lease that a message is about, whose slots it names rightly."""
        lease = producer.leases.get(message.lease)
        if lease is None:
            raise Refused(m.BAD_MESSAGE, f"lease {message.lease} is not yours, or was released")
        if message.first + message.count > lease.count:
            raise Refused(
                m.BAD_MESSAGE, f"slots {message.first} to {message.first + message.count} of a lease of {lease.count}"
            )
        return lease

    def release(self, producer: Producer, message: m.Release) -> None:
        """A producer gives slots back."""
        lease = self.find(producer, message)
        move(lease.states, RELEASE, message.first, message.count)
        self.free(lease, message.first, message.count)
        producer.active_ns[lease.model.index] = self._books.now_ns
        if producer.closed:
            self._books.forget_if_empty(producer)

    def abandon(self, producer: Producer) -> None:
        """Its process has ended: all comes free at once, but for what runs."""
        for lease in list(producer.leases.values()):
            lease.orphaned = True
            before = bytes(lease.states)
            move(lease.states, Event.ABANDON, 0, lease.count)
            for at, (was, state) in enumerate(zip(before, lease.states, strict=True)):
                if was and not state:
                    self.free(lease, at, 1)

    @staticmethod
    def free(lease: LeaseRecord, at: int, count: int) -> None:
        """Give slots back to the ring; their states are FREE already."""
        model = lease.model
        model.ring.give_back(lease.first + at, count)
        if lease.spare:
            lease.use_spare()
        lease.producer.held[model.index] -= count
        if lease.producer in model.parked:
            model.unpark(lease.producer)
        lease.live -= count
        if not lease.live:
            del lease.producer.leases[lease.id]


def _busy_text(producer: Producer, model: Model, count: int, idle: str = "") -> str:
    held = producer.held[model.index]
    return (
        f"{count} slots of model {model.layout.spec.name!r} did not come free in time: {model.ring.free} of "
        f"{model.layout.slots} are free and this client holds {held} of at most {model.cap}{idle}; "
        "release results sooner (kept arrays keep their slots), wait longer, or start the pool with more --slots"
    )
