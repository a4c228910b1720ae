"""What a client asks the broker: for slots, and for the pool's figures.

A caller in a rhythm need not ask: what it released is kept, see `keeping`; or, of small runs, its next slots are
granted in advance, with a result: the *spares*.  Both are lent out without a word to the broker, and go back when
something else is asked for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import messages as m
from .claims import Claim
from .errors import LeaseTooLarge, PoolBusy, PoolClosed, ProtocolError, TrtpoolError
from .settings import BULK
from .waiting import AnyOf, Stopped, Target
from .wire import Wire, wire_ns

if TYPE_CHECKING:
    from .session import Session


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


class Requests:
    """See the module.

    Args:
        session: whose requests they are.
        wire: its messages.
        is_only_thread: whether no other thread of the process could release slots.
    """

    def __init__(self, session: Session, wire: Wire, is_only_thread: Callable[[], bool]) -> None:
        self._session = session
        self._wire = wire
        self._is_only_thread = is_only_thread
        self._next = 1
        self._open: dict[int, Request] = {}

    # ------------------------------------------------------------------ asking

    def claim(self, model: int, count: int, timeout_s: float | None, priority: int = BULK) -> list[Claim]:
        """Claims on `count` slots, from the spares if they fit, else by asking; see `Client.lease`."""
        spare = self.take_spare(model, count, priority)
        if spare is not None:
            return [spare]
        return self.answer(self.ask(model, count, timeout_s, at_once=True, priority=priority))

    def take_spare(self, model: int, count: int, priority: int = BULK) -> Claim | None:
        """A claim on exactly `count` slots that were kept, or granted in advance, if there are any."""
        self._wire.check_process()
        state = self._session.models[model]
        with self._wire.driver:
            run = state.take(count) if state.kept else None
            if run is not None:
                claim = Claim(self._session, model, run.lease_id, run.first, run.at, count)
                claim.priority = priority
                claim.leased_ns = time.monotonic_ns()
                return claim
            for spare in state.spares:
                if spare.count == count:
                    state.spares.remove(spare)
                    if not state.spares:
                        state.unspent = 0
                    spare.priority = priority
                    spare.leased_ns = time.monotonic_ns()
                    return spare
        return None

    def ask(
        self, model: int, count: int, timeout_s: float | None, *, at_once: bool = False, priority: int = BULK
    ) -> Request:
        """Ask for slots without waiting for the answer; `at_once` says that the caller will do nothing but wait."""
        self._wire.check_process()
        state = self._session.models[model]
        if count > state.cap:
            raise LeaseTooLarge(
                f"{count} slots were asked for and this client may hold {state.cap} of model "
                f"{self._session.layout.models[model].spec.name!r}; ask for fewer, or start the pool with more --slots"
            )
        request = Request(model, count, priority)
        wait_ns = wire_ns(timeout_s)
        with self._wire.driver:
            self._wire.require_open()
            self._return_spares(model)
            state.unspent = 0
            state.keeps = False
            coming = self._session.work.coming(model)
            if at_once and state.held + count - coming > state.cap and self._is_only_thread():
                raise LeaseTooLarge(
                    f"this client holds {state.held} of the {state.cap} slots that it may hold, and no other thread "
                    "could release one: release results, and drop arrays kept of them, before you lease more"
                )
            self._send(request, lambda number: m.Lease(number, model, count, wait_ns, priority))
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
        if not busy and not self._session.wait_any([request, stop] if stop else [request], timeout_s):
            raise PoolBusy(f"no slots came free within {timeout_s} s; wait longer, or start the pool with more --slots")
        if stop is not None and stop.over:
            raise Stopped
        return request

    def room(self, model: int) -> int:
        """How many slots more this client may hold."""
        state = self._session.models[model]
        return state.cap - state.held + sum(run.count for run in state.kept)

    def answer(self, request: Request, stop: Target | None = None) -> list[Claim]:
        """Wait for the answer to `ask`, or raise `Stopped` when `stop` is over first; the broker keeps the time."""
        try:
            self._wire.flush()  # others, or this very request, may wait for what we have released
            self._wire.driver.wait(request if stop is None else AnyOf([request, stop]), None)
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
        with self._wire.driver:
            request.abandoned = True
            if isinstance(request.answer, list):
                self._return_claims(request.answer)
            self._wire.exchange()

    def return_spares(self, model: int) -> None:
        """Give back what was kept or granted in advance."""
        if self._wire.gone:
            return
        with self._wire.driver:
            self._return_spares(model)
        self._wire.flush()

    def report(self, timeout_s: float) -> bytes:
        """The broker's `PoolReport` as JSON."""
        self._wire.check_process()
        request = Request()
        with self._wire.driver:
            self._wire.require_open()
            self._send(request, m.Status)
        if not self._wire.driver.wait(request, timeout_s):
            raise PoolBusy(f"the pool did not answer within {timeout_s} s")
        if isinstance(request.answer, TrtpoolError):
            raise request.answer
        assert isinstance(request.answer, bytes)
        return request.answer

    # ------------------------------------------------------------------ the rest is under the lock

    def _send(self, request: Request, message: Callable[[int], m.Message]) -> None:
        number = self._next
        self._next += 1
        self._open[number] = request
        self._wire.send(message(number))

    def _return_spares(self, model: int) -> None:
        state = self._session.models[model]
        spares = list(state.spares)
        state.spares.clear()
        self._return_claims(spares)
        self._session.returns.give_kept_back(model)

    def _return_claims(self, claims: Sequence[Claim]) -> None:
        """Give back slots that nobody has seen."""
        for claim in claims:
            claim.released = True
            self._session.returns.give_back(claim.model_index, claim.run)

    # ------------------------------------------------------------------ what the broker says

    def granted(self, grant: m.Grant) -> None:
        """Slots: for a request, or in advance."""
        now = time.monotonic_ns()
        request = self._open.get(grant.request)
        layout = self._session.layout.models[grant.model]
        claims = []
        for lease_id, run in grant.leases:
            if run.segment != layout.segment or run.first + run.count > layout.slots:
                raise ProtocolError(f"granted {run.count} slots from {run.first} of {layout.slots}")
            claim = Claim(self._session, grant.model, lease_id, run.first, 0, run.count)
            claim.leased_ns = now
            claim.lease_ns = now - request.asked_ns if request is not None else 0
            claims.append(claim)
            self._session.models[grant.model].held += run.count
        if request is None:
            self._add_spare(grant.model, claims)
            return
        self._session.models[grant.model].keeps = True
        if request.abandoned:
            del self._open[grant.request]
            self._return_claims(claims)
        else:
            self._answer(grant.request, claims)

    def _add_spare(self, model: int, claims: list[Claim]) -> None:
        """Keep slots granted in advance, unless some are asked for: holding both, we might be above our cap.

        They then serve the request if they fit, whose own grant goes back when it comes, or go back themselves.
        """
        asked = [(n, r) for n, r in self._open.items() if r.count and r.model == model and not r.abandoned]
        if not asked:
            self._session.models[model].spares.extend(claims)
            return
        for number, request in asked:
            if request.count == sum(claim.count for claim in claims):
                for claim in claims:
                    claim.lease_ns = claim.leased_ns - request.asked_ns
                self._answer(number, claims)
                late = self._open[number] = Request(model, request.count, request.priority)
                late.abandoned = True
                return
        self._return_claims(claims)

    def recalled(self, recall: m.Recall) -> None:
        """Others wait for slots."""
        self._session.models[recall.model].keeps = False
        self._return_spares(recall.model)
        self._wire.hurry()

    def reported(self, report: m.Report) -> None:
        """The pool's figures."""
        if report.request in self._open:
            self._answer(report.request, report.body)

    def refused(self, error: m.Error) -> bool:
        """Whether an error is the answer to a request."""
        kinds: dict[int, type[TrtpoolError]] = {m.BUSY: PoolBusy, m.TOO_LARGE: LeaseTooLarge, m.CLOSING: PoolClosed}
        if error.request not in self._open:
            return False
        self._answer(error.request, kinds.get(error.code, ProtocolError)(error.text))
        return True

    def end(self, reason: str) -> None:
        """No more answers come."""
        for state in self._session.models:
            for spare in state.spares:
                spare.released = True
            state.spares.clear()
            state.take_all()
        for number in list(self._open):
            self._answer(number, PoolClosed(reason))

    def close(self) -> None:
        """Give back what was kept or granted in advance."""
        for model in range(len(self._session.models)):
            self._return_spares(model)

    def _answer(self, number: int, answer: list[Claim] | bytes | TrtpoolError) -> None:
        request = self._open.pop(number)
        request.answer = answer
        self._wire.driver.finish(request)
