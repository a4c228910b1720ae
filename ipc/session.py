"""The client's side of the protocol: leases asked for, work in flight, slots to give back.

All state is under one lock (`Driver`), which is never held while user code runs: futures are announced after it
is released.  Finalizers may run in any thread at any time, even in one that holds the lock, so they only append
to a deque and try to take the lock; if it is taken, its holder sees to it when it lets go.
"""

from __future__ import annotations

import atexit
import logging
import operator
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from . import messages as m
from .arena import Residence, map_segment
from .claims import DONE, LEASED, SUBMITTED, Claim
from .errors import ForkedClient, InvalidInput, LeaseTooLarge, PoolBusy, PoolClosed, ProtocolError, TrtpoolError
from .layout import Layout, ModelLayout, Plane
from .lifeline import Unwelcome, receive_description
from .lifeline import connect as connect_lifeline
from .link import LINGER_MS, TRANSPORTS, Attendant
from .settings import BULK, PRIORITIES
from .submitted import Submitted
from .variation import Variation
from .waiting import LONGEST_SLEEP_S, AnyOf, Background, Driver, Stopped, Target, Waitable

log = logging.getLogger("trtpool.client")

KEPT_WARNING_S: Final = 10.0
"""After this long, released slots that an array still holds are worth a warning."""

SLOW_EVERY_NS: Final = 1_000_000_000
"""Between two lines about slow requests, at least."""

CONNECT_TRIES: Final = 3
"""How often to connect: a broker that ends loses who it has not welcomed yet, and another takes over."""

log = logging.getLogger("trtpool.client")

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _wire_ns(seconds: float | None) -> int | None:
    """A span of time as messages carry it: None is no bound, as is more than any clock takes; what is negative is 0."""
    return None if seconds is None or seconds > LONGEST_SLEEP_S else int(max(0.0, seconds) * 1e9)


def check_priority(priority: object) -> int:
    """A class as messages say it.

    Raises:
        InvalidInput: there is no such class.
    """
    number = PRIORITIES.get(priority) if isinstance(priority, str) else None
    if number is None:
        raise InvalidInput(f"priority={priority!r} is none of {', '.join(map(repr, PRIORITIES))}")
    return number


def _forget_in_child() -> None:
    for session in _sessions:
        session.forked = True
        session.link.abandon_in_child()


def _close_at_exit() -> None:
    """Close what was never closed while threads still run: in a finalizer at the very end, a join would not return."""
    for session in list(_sessions):
        session.close()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_close_at_exit)


class Request(Target):
    """A question to the broker; `answer` is there when it is over."""

    def __init__(self, model: int = 0, count: int = 0, priority: int = BULK) -> None:
        super().__init__()
        self.model = model
        self.count = count
        self.priority = priority
        self.asked_ns = time.monotonic_ns()
        self.thread = threading.get_ident()
        self.abandoned = False
        self.answer: list[Claim] | bytes | TrtpoolError | None = None


class Kept:
    """Released slots that go back when the last array of them has ended."""

    __slots__ = ("__weakref__", "at", "count", "lease_id", "model", "root_ref", "since")

    def __init__(self, claim: Claim) -> None:
        self.model = claim.model_index
        self.lease_id = claim.lease_id
        self.at = claim.at
        self.count = claim.count
        self.root_ref: weakref.ref[Any] | None = claim.root_ref
        self.since = time.monotonic()


class ModelState:
    """What the client keeps of one model.

    Attributes:
        inputs, outputs: planes by tensor name.
        cap: slots this client may hold.
        held: slots it holds.
        variation: in what its items differ.
        spares: claims granted in advance, by a Submit's `again`.
        step, steps: how many slots were released last, and how often in a row it was as many: a caller in a rhythm
            will lease as many again.
    """

    __slots__ = ("cap", "held", "inputs", "outputs", "spares", "step", "steps", "variation", "varies")

    def __init__(self, layout: ModelLayout, cap: int) -> None:
        self.inputs: dict[str, Plane] = {plane.spec.name: plane for plane in layout.inputs}
        self.outputs: dict[str, Plane] = {plane.spec.name: plane for plane in layout.outputs}
        self.variation = Variation(layout)
        self.varies = bool(self.variation)
        self.cap = cap
        self.held = 0
        self.step = self.steps = 0
        self.spares: deque[Claim] = deque()


class Session:
    """A connection to the pool in `run_dir`, over a `transport` that is a key of `link.TRANSPORTS`.

    For `busy_poll` see `Link`.

    Attributes:
        pool: its name.
        layout: its models and their planes.
        gpus: how many GPUs it has; 0 on the CPU.
        segment, residence: the mapped arena.
        models: what is kept of each model.
        forked: this process is a child of the one that connected.
        closed: `close` was called.

    Raises:
        PoolNotFound, AccessDenied, PoolClosed, ProtocolError: see `trtpool.connect`.
    """

    def __init__(self, run_dir: Path, transport: str, busy_poll: bool | None = None) -> None:
        if transport not in TRANSPORTS:
            raise InvalidInput(f"there is no transport {transport!r}; there are {', '.join(TRANSPORTS)}")
        for again in reversed(range(CONNECT_TRIES)):
            try:
                self._connect(run_dir, transport, busy_poll)
                break
            except (Unwelcome, PoolClosed):
                if not again:
                    raise
        self.models = [
            ModelState(layout, cap) for layout, cap in zip(self.layout.models, self.link.welcome.caps, strict=True)
        ]
        self.closed = self.forked = False
        self._slow_told_ns = self._slow_untold = 0
        self._pid = os.getpid()
        self._driver = Driver(self.link, self._take_in, self._has_afterwork, self._unlocked)
        self._background = Background(self._driver)
        self._over: str | None = None  # why nothing more can be asked of the pool
        self._next_seq = 0
        self._next_request = 1
        self._requests: dict[int, Request] = {}
        self._pending: dict[int, Submitted] = {}
        self._outgoing: list[m.Message] = []
        self._urgent = False  # whether `_outgoing` must not wait for the next Submit
        self._unsaid = 0  # slots that were released, in `_outgoing`
        self._finished: deque[Submitted] = deque()
        self._dropped: deque[Kept] = deque()
        self._kept: set[Kept] = set()
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            m.Grant: self._granted,
            m.Done: self._done,
            m.Error: self._error,
            m.Recall: self._recalled,
            m.Report: self._reported,
            m.Bye: lambda bye: self._end(bye.text),
        }
        _sessions.add(self)
        with self._driver:
            for message in self.link.early:
                self._handlers[type(message)](message)
        self.link.attend(self._attend)

    def _connect(self, run_dir: Path, transport: str, busy_poll: bool | None) -> None:
        lifeline = connect_lifeline(run_dir)
        try:
            description, fd = receive_description(lifeline)
            try:
                self.segment = map_segment(fd, description.layout.segment_bytes)
            finally:
                os.close(fd)
        except BaseException:
            lifeline.close()
            raise
        self.residence = Residence(self.segment)
        self.pool = description.pool
        self.layout: Layout = description.layout
        self.gpus = description.gpus
        self._slow_ns = int(description.slow_ms * 1e6)
        self.link = TRANSPORTS[transport](lifeline, description, busy_poll)

    def check_process(self) -> None:
        """Raise `ForkedClient` in a child of the process that connected."""
        if self.forked:
            raise ForkedClient(
                f"this client was connected by process {self._pid} and does not work in its child {os.getpid()}: "
                "call trtpool.connect() in the child, or give the child pool.handle(), which connects by itself"
            )

    # ------------------------------------------------------------------ leasing

    def claim(self, model: int, count: int, timeout_s: float | None, priority: int = BULK) -> list[Claim]:
        """Claims on `count` slots, from the spares if they fit, else by asking; see `Client.lease`."""
        spare = self.take_spare(model, count, priority)
        if spare is not None:
            return [spare]
        return self.answer(self.ask(model, count, timeout_s, at_once=True, priority=priority))

    def take_spare(self, model: int, count: int, priority: int = BULK) -> Claim | None:
        """A claim on exactly `count` slots that was granted in advance, if there is one."""
        self.check_process()
        state = self.models[model]
        with self._driver:
            for spare in state.spares:
                if spare.count == count:
                    state.spares.remove(spare)
                    spare.priority = priority
                    spare.leased_ns = time.monotonic_ns()
                    return spare
        return None

    def ask(
        self, model: int, count: int, timeout_s: float | None, *, at_once: bool = False, priority: int = BULK
    ) -> Request:
        """Ask for slots without waiting for the answer; `at_once` says that the caller will do nothing but wait."""
        self.check_process()
        state = self.models[model]
        if count > state.cap:
            raise LeaseTooLarge(
                f"{count} slots were asked for and this client may hold {state.cap} of model "
                f"{self.layout.models[model].spec.name!r}; ask for fewer, or start the pool with more --slots"
            )
        request = Request(model, count, priority)
        wait_ns = _wire_ns(timeout_s)
        with self._driver:
            self._require_open()
            self._return_spares(state)
            if at_once and state.held + count - self._coming(model) > state.cap and self._is_only_thread():
                raise LeaseTooLarge(
                    f"this client holds {state.held} of the {state.cap} slots that it may hold, and no other thread "
                    "could release one: release results, and drop arrays kept of them, before you lease more"
                )
            self._ask(request, lambda number: m.Lease(number, model, count, wait_ns, priority))
        return request

    def ask_amid(
        self,
        request: Request | None,
        model: int,
        count: int,
        timeout_s: float | None,
        busy: bool,
        priority: int = BULK,
        stop: Target | None = None,
    ) -> Request:
        """`request`, or a new one if there is none, for a caller that is `busy`, with work in flight, or can only wait.

        The broker keeps the time only while all that the caller can do is to wait; here it does for one that was
        busy when it asked, and is no more.

        Raises:
            PoolBusy: that one waited for `timeout_s`.
            Stopped: `stop` is over.
        """
        if request is None:
            return self.ask(model, count, None if busy else timeout_s, at_once=not busy, priority=priority)
        if not busy and not self.wait_any([request, stop] if stop else [request], timeout_s):
            raise PoolBusy(f"no slots came free within {timeout_s} s; wait longer, or start the pool with more --slots")
        if stop is not None and stop.over:
            raise Stopped
        return request

    def room(self, model: int) -> int:
        """How many slots more this client may hold."""
        return self.models[model].cap - self.models[model].held

    def _coming(self, model: int) -> int:
        """Slots that come back without anybody's doing: those of work that was released before its end."""
        return sum(
            work.claim.count
            for work in self._pending.values()
            if work.claim.released and work.claim.model_index == model
        )

    def _is_only_thread(self) -> bool:
        return threading.active_count() - self._background.idle - Attendant.count() == 1

    def answer(self, request: Request, stop: Target | None = None) -> list[Claim]:
        """Wait for the answer to `ask`, or raise `Stopped` when `stop` is over first; the broker keeps the time."""
        try:
            self._flush()  # others, or this very request, may wait for what we have released
            self._driver.wait(request if stop is None else AnyOf([request, stop]), None)
            if not request.over:
                raise Stopped
        except BaseException:
            self.abandon(request)
            raise
        if isinstance(request.answer, list):
            for claim in request.answer:
                claim.priority = request.priority
            return request.answer
        if isinstance(request.answer, TrtpoolError):
            raise request.answer
        raise ProtocolError("a lease was answered with a report")

    def abandon(self, request: Request) -> None:
        """Give back what an unwanted request is granted, now or later."""
        with self._driver:
            request.abandoned = True
            if isinstance(request.answer, list):
                self._return_claims(request.answer)
            self._exchange()

    def return_spares(self, model: int) -> None:
        """Give back what was granted in advance."""
        if self.closed or self.forked:
            return
        with self._driver:
            self._return_spares(self.models[model])
        self._flush()

    def _flush(self) -> None:
        """Send what would wait for the next Submit."""
        with self._driver:
            self._urgent = bool(self._outgoing)
            self._exchange()

    def _return_spares(self, state: ModelState) -> None:
        self._return_claims(list(state.spares))
        state.spares.clear()

    def _return_claims(self, claims: list[Claim]) -> None:
        """Give back slots that nobody has seen."""
        for claim in claims:
            claim.released = True
            self._give_back(claim.model_index, claim.lease_id, claim.at, claim.count)

    def report(self, timeout_s: float) -> bytes:
        """The broker's `PoolReport` as JSON."""
        self.check_process()
        request = Request()
        with self._driver:
            self._require_open()
            self._ask(request, m.Status)
        if not self._driver.wait(request, timeout_s):
            raise PoolBusy(f"the pool did not answer within {timeout_s} s")
        if isinstance(request.answer, TrtpoolError):
            raise request.answer
        assert isinstance(request.answer, bytes)
        return request.answer

    def _ask(self, request: Request, message: Callable[[int], m.Message]) -> None:
        number = self._next_request
        self._next_request += 1
        self._requests[number] = request
        self._send(message(number))

    # ------------------------------------------------------------------ work

    def check_gpu(self, gpu: int | None) -> int | None:
        """`gpu` as an int, or None.

        Raises:
            InvalidInput: the pool has no such GPU.
        """
        if gpu is None:
            return None
        number = operator.index(gpu)
        if not 0 <= number < self.gpus:
            if not self.gpus:
                has = "the pool runs on the CPU, so gpu= must be left out"
            else:
                has = f"the pool has GPU{'s 0 to' if self.gpus > 1 else ''} {self.gpus - 1}"
            raise InvalidInput(f"there is no GPU {number}: {has}")
        return number

    def submit(
        self,
        claim: Claim,
        row: int | None,
        items: int | None,
        deadline_s: float | None,
        gpu: int | None,
        priority: object = None,
    ) -> Submitted:
        """Queue a claim; see `Lease.submit`.  A caller in a rhythm is granted its next slot with the result."""
        state = self.models[claim.model_index]
        again = claim.count if state.steps > 1 and state.step == claim.count and not state.spares else 0
        return self.submit_again(claim, row, items, deadline_s, again, gpu, priority)

    def submit_again(
        self,
        claim: Claim,
        row: int | None,
        items: int | None,
        deadline_s: float | None,
        again: int,
        gpu: int | None,
        priority: object = None,
    ) -> Submitted:
        """Queue a claim and ask for `again` slots to be granted with the result."""
        self.check_process()
        gpu = self.check_gpu(gpu)
        number = claim.priority if priority is None else check_priority(priority)
        per_slot = claim.model.items_per_slot
        full = claim.count * per_slot
        given = full if items is None else operator.index(items)
        deadline_ns = _wire_ns(deadline_s)
        with self._driver:
            claim.require(LEASED)
            if not full - per_slot < given <= full:
                raise InvalidInput(
                    f"{given} items in {claim.count} slots of {per_slot}: all but the last must be full; "
                    "submit slots by themselves with .slots()"
                )
            if given != full and claim.model.spec.whole_slots:
                raise InvalidInput(
                    f"{given} items in {claim.count} slots of {per_slot}: the model takes batches of {per_slot} only, "
                    "and the pool was started so that it fills none up (--partial-batches refuse)"
                )
            state = self.models[claim.model_index]
            shapes, shared = state.variation.variant(claim) if state.varies else ((), b"")
            self._require_open()
            seq = self._next_seq
            self._next_seq += 1
            submitted = Submitted(claim, row, seq, given)
            claim.state = SUBMITTED
            claim.submitted_ns = time.monotonic_ns()
            self._pending[seq] = submitted
            self._send(
                m.Submit(
                    *(claim.lease_id, claim.at, claim.count, seq, given, deadline_ns, again, gpu, number),
                    *(shapes, shared),
                )
            )
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "work %s submitted: %d items in %d slots", submitted.work_id, given, claim.count,
                extra={"work": submitted.work_id},
            )  # fmt: skip
        return submitted

    def cancel(self, claim: Claim) -> None:
        """Ask the broker to drop a claim's work if it is still queued."""
        self.check_process()
        with self._driver:
            if claim.state == SUBMITTED and self._over is None:
                self._send(m.Cancel(claim.lease_id, claim.at, claim.count))

    # ------------------------------------------------------------------ waiting

    def wait(self, submitted: Submitted, timeout_s: float | None) -> bool:
        """Wait for the end of some work; False when `timeout_s` passed first."""
        self.check_process()
        return self._driver.wait(submitted, timeout_s)

    def wait_any(self, targets: Sequence[Waitable], timeout_s: float | None) -> bool:
        """Wait for one of several; False when `timeout_s` passed first."""
        self.check_process()
        return self._driver.wait(AnyOf(targets), timeout_s)

    def finish(self, target: Target) -> None:
        """Mark something that no message ends, such as a wish to stop, as over."""
        with self._driver:
            self._driver.finish(target)

    def poll(self) -> None:
        """Take in what has arrived, unless another thread is at it."""
        self.check_process()
        self._driver.try_visit()

    def watch(self, submitted: Submitted) -> None:
        """Have a background thread drive the socket until `submitted` is over."""
        self.check_process()
        if not submitted.over:
            self._background.watch(submitted)

    # ------------------------------------------------------------------ giving back

    def release(self, claim: Claim) -> None:
        """Give a claim's slots back: now, or when its work and its last view have ended.  Again: nothing."""
        if self.closed or self.forked:
            claim.released = True
            return
        with self._driver:
            if claim.released:  # another thread was faster
                return
            claim.released = True
            if claim.state != SUBMITTED:
                self._settle(Kept(claim))
            elif self._over is None:  # its Done will find it released
                self._send(m.Cancel(claim.lease_id, claim.at, claim.count))
            self._push()

    def release_dropped(self, claim: Claim) -> None:
        """The same from a finalizer."""
        if not (self.closed or self.forked):
            self._dropped.append(Kept(claim))
            self._driver.try_visit()

    def _settle(self, kept: Kept) -> None:
        """Give slots back, or wait for the end of the last array of them."""
        root = kept.root_ref() if kept.root_ref is not None else None
        if root is None:
            self._give_back(kept.model, kept.lease_id, kept.at, kept.count)
            return
        this = weakref.ref(self)

        def ended(_: weakref.ref[Any]) -> None:
            session = this()
            if session is not None:
                session.root_ended(kept)

        self._kept.add(kept)
        kept.root_ref = weakref.ref(root, ended)

    def root_ended(self, kept: Kept) -> None:
        """The last array of released slots has ended; called by its finalizer."""
        if not (self.closed or self.forked):
            self._kept.discard(kept)
            self._dropped.append(kept)
            self._driver.try_visit()

    def _give_back(self, model: int, lease_id: int, at: int, count: int) -> None:
        state = self.models[model]
        state.held -= count
        state.steps = state.steps + 1 if state.step == count else 1
        state.step = count
        self._outgoing.append(m.Release(lease_id, at, count))
        self._unsaid += count
        # With a spare in hand the next Submit is near, and takes the Release along.  If none comes after all, the
        # broker allows for as many slots as were granted in advance, and no more: see `trtpool.broker.recall`.
        self._urgent = self._urgent or not state.spares or self._unsaid > sum(spare.count for spare in state.spares)

    def _has_afterwork(self) -> bool:
        return bool(self._finished or self._dropped)

    def _unlocked(self) -> None:
        """What is done after each time the lock was held."""
        while True:
            while self._finished:
                try:
                    submitted = self._finished.popleft()
                except IndexError:  # another thread was faster
                    break
                submitted.announce()
            if not (self._dropped and self._driver.try_acquire()):
                break
            try:
                while self._dropped:
                    self._settle(self._dropped.popleft())
                self._exchange()  # which may finish more
            finally:
                self._driver.release()
        if self._kept:
            self._warn_of_kept()

    def _warn_of_kept(self) -> None:
        now = time.monotonic()
        for kept in list(self._kept):
            if now - kept.since > KEPT_WARNING_S:
                kept.since = float("inf")
                warnings.warn(
                    f"{kept.count} slots were released {KEPT_WARNING_S:.0f} s ago and an array of them is still alive, "
                    "which keeps them from the pool; copy what you need",
                    ResourceWarning,
                    stacklevel=2,
                )

    # ------------------------------------------------------------------ the wire, under the lock

    def _require_open(self) -> None:
        if self.closed:
            raise PoolClosed("this client is closed")
        if self._over is not None:
            raise PoolClosed(self._over)

    def _send(self, message: m.Message) -> None:
        self._outgoing.append(message)
        self._urgent = True
        self._push()

    def _push(self) -> None:
        """Send what must go out; what has arrived is left to the next `wait`, unless somebody sleeps in it."""
        if self._send_urgent() and self._driver.led:
            self._exchange()

    def _send_urgent(self) -> bool:
        """Send what must go out; whether there was anything."""
        if not self._urgent:
            return False
        self._urgent = False
        if self._over is not None or self.closed:
            return False
        outgoing, self._outgoing = self._outgoing, []
        self._unsaid = 0
        self.link.send(outgoing)
        return True

    def _exchange(self) -> None:
        """Send what must go out and take in what has arrived, until neither is left."""
        while self._take_in():
            pass

    def _take_in(self) -> bool:
        """Send what must go out, and take in what has arrived, a frame at a time; whether there was any.

        To look once more after the last one costs a tenth of a round trip, and who waits knows when it has what it
        waits for.
        """
        if self.closed:
            return False
        self._send_urgent()
        received = self.link.receive()
        for message in received:
            handler = self._handlers.get(type(message))
            if handler is None:
                raise ProtocolError(f"the broker sent a client {type(message).__name__}")
            handler(message)
        if received:
            self._send_urgent()
            return True
        if self.link.ended and self._over is None and not self.closed:
            if self._driver.led:
                self.link.wake()  # who sleeps on the link sees to it: two must not
            else:
                self._receive_last()
        return False

    def _attend(self) -> bool:
        """Take in what came though nobody waits; whether more may come.  See `Link.attend`."""
        with self._driver:
            try:
                self._exchange()
            except TrtpoolError as error:
                self._end(str(error))
        return not (self.link.ended or self.closed)

    def _receive_last(self) -> None:
        """The lifeline has ended: take in what the broker sent before, up to its Bye."""
        deadline = time.monotonic() + self.link.late_s
        while self._over is None and time.monotonic() < deadline:
            self.link.wait(deadline - time.monotonic())
            for message in self.link.receive():
                self._handlers[type(message)](message)
        if self._over is None:
            self._end("the pool ended unexpectedly; see its log, and start it again with `trtpool start`")

    def _end(self, reason: str) -> None:
        """Nothing more will come: fail all that is waited for."""
        self._over = reason
        for state in self.models:
            for spare in state.spares:
                spare.released = True
            state.spares.clear()
        for submitted in list(self._pending.values()):
            submitted.failure = PoolClosed(reason)
            self._finish_work(submitted)
        for number in list(self._requests):
            self._answer(number, PoolClosed(reason))

    # ------------------------------------------------------------------ what the broker says, under the lock

    def _granted(self, grant: m.Grant) -> None:
        now = time.monotonic_ns()
        request = self._requests.get(grant.request)
        layout = self.layout.models[grant.model]
        claims = []
        for lease_id, run in grant.leases:
            if run.segment != layout.segment or run.first + run.count > layout.slots:
                raise ProtocolError(f"granted {run.count} slots from {run.first} of {layout.slots}")
            claim = Claim(self, grant.model, lease_id, run.first, 0, run.count)
            claim.leased_ns = now
            claim.lease_ns = now - request.asked_ns if request is not None else 0
            claims.append(claim)
            self.models[grant.model].held += run.count
        if request is None:
            self._add_spare(grant.model, claims)
        elif request.abandoned:
            del self._requests[grant.request]
            self._return_claims(claims)
        else:
            self._answer(grant.request, claims)

    def _add_spare(self, model: int, claims: list[Claim]) -> None:
        """Keep slots granted in advance, unless some are asked for: holding both, we might be above our cap.

        They then serve the request if they fit, whose own grant goes back when it comes, or go back themselves.
        """
        asked = [(n, r) for n, r in self._requests.items() if r.count and r.model == model and not r.abandoned]
        if not asked:
            self.models[model].spares.extend(claims)
            return
        for number, request in asked:
            if request.count == sum(claim.count for claim in claims):
                for claim in claims:
                    claim.lease_ns = claim.leased_ns - request.asked_ns
                self._answer(number, claims)
                late = self._requests[number] = Request(model, request.count, request.priority)
                late.abandoned = True
                return
        self._return_claims(claims)

    def _done(self, done: m.Done) -> None:
        submitted = self._pending.get(done.seq)
        if submitted is None:
            raise ProtocolError(f"the broker ended work {done.seq}, which is not in flight")
        if submitted.take(done, time.monotonic_ns()):
            self._finish_work(submitted)

    def _finish_work(self, submitted: Submitted) -> None:
        claim = submitted.claim
        if log.isEnabledFor(logging.DEBUG):
            how = next(iter(submitted.errors.values()), "done")
            log.debug("work %s ended: %s", submitted.work_id, how, extra={"work": submitted.work_id})
        del self._pending[submitted.seq]
        claim.state = DONE
        self._driver.finish(submitted)
        self._finished.append(submitted)
        if self._slow_ns:
            self._tell_if_slow(submitted)
        if submitted.watched:
            self._background.unwatch()
        if claim.released:
            self._settle(Kept(claim))

    def _tell_if_slow(self, submitted: Submitted) -> None:
        """Log where the time of a request went, if it took long: from `submit`, or with the wait for its slots."""
        claim = submitted.claim
        timings = claim.timings
        if timings is None or timings.latency_ns + timings.lease_ns < self._slow_ns:
            return
        if claim.received_ns < self._slow_told_ns + SLOW_EVERY_NS:
            self._slow_untold += 1
            return
        others = f"; {self._slow_untold} more were slow since the last" if self._slow_untold else ""
        self._slow_told_ns, self._slow_untold = claim.received_ns, 0
        log.warning(
            "slow: work %s, %d slots of %s: %s%s",
            *(submitted.work_id, claim.count, claim.model.spec.name, timings, others),
        )

    def _error(self, error: m.Error) -> None:
        kinds: dict[int, type[TrtpoolError]] = {m.BUSY: PoolBusy, m.TOO_LARGE: LeaseTooLarge, m.CLOSING: PoolClosed}
        kind = kinds.get(error.code, ProtocolError)
        if error.request in self._requests:
            self._answer(error.request, kind(error.text))
        else:
            self._end(f"the broker refused a message: {error.text}")

    def _answer(self, number: int, answer: list[Claim] | bytes | TrtpoolError) -> None:
        request = self._requests.pop(number)
        request.answer = answer
        self._driver.finish(request)

    def _recalled(self, recall: m.Recall) -> None:
        self._return_spares(self.models[recall.model])
        self._urgent = bool(self._outgoing)

    def _reported(self, report: m.Report) -> None:
        if report.request in self._requests:
            self._answer(report.request, report.body)

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Give back what can be, and leave.  Again: nothing."""
        if self.closed or self.forked:
            self.closed = True
            return
        with self._driver:
            for state in self.models:
                self._return_spares(state)
            linger_ms = LINGER_MS if self._over is None else 0
            if self._over is None:
                self._send(m.Bye("closed"))
                self._end("this client is closed")
            self.closed = True
            self._background.stop()
        self._driver.quiesce()
        self._background.join()
        self.link.close(linger_ms)
