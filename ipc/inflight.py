"""What a client has submitted and has not seen the end of."""

from __future__ import annotations

import logging
import operator
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from . import messages as m
from .claims import DONE, LEASED, SUBMITTED, Claim
from .errors import InvalidInput, PoolClosed, ProtocolError
from .settings import PRIORITIES
from .submitted import Submitted
from .waiting import Background
from .wire import Wire, wire_ns

if TYPE_CHECKING:
    from .session import Session

log = logging.getLogger("trtpool.client")

SLOW_EVERY_NS: Final = 1_000_000_000
"""Between two lines about slow requests, at least."""


def check_priority(priority: object) -> int:
    """A class as messages say it.

    Raises:
        InvalidInput: there is no such class.
    """
    number = PRIORITIES.get(priority) if isinstance(priority, str) else None
    if number is None:
        raise InvalidInput(f"priority={priority!r} is none of {', '.join(map(repr, PRIORITIES))}")
    return number


class InFlight:
    """See the module.

    Args:
        session: whose work it is.
        wire: its messages.
        background: the thread that drives them for who waits and does not.
        slow_ns: work that took longer is logged; 0: none is.

    Attributes:
        ended: work that is to be announced, without the lock.
    """

    def __init__(self, session: Session, wire: Wire, background: Background, slow_ns: int) -> None:
        self._session = session
        self._wire = wire
        self._background = background
        self._slow_ns = slow_ns
        self._slow_told_ns = self._slow_untold = 0
        self._next_seq = 0
        self._pending: dict[int, Submitted] = {}
        self.ended: deque[Submitted] = deque()

    def submit(
        self,
        claim: Claim,
        row: int | None,
        items: int | None,
        deadline_s: float | None,
        gpu: int | None,
        priority: object = None,
    ) -> Submitted:
        """Queue a claim; see `Lease.submit`.  One in a rhythm with small runs is granted the next with the result."""
        state = self._session.models[claim.model_index]
        in_rhythm = state.steps > 1 and state.step == claim.count
        again = claim.count if in_rhythm and state.wants_spare(claim.count, len(self._pending)) else 0
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
        self._wire.check_process()
        gpu = self._session.check_gpu(gpu)
        number = claim.priority if priority is None else check_priority(priority)
        per_slot = claim.model.items_per_slot
        full = claim.count * per_slot
        given = full if items is None else operator.index(items)
        deadline_ns = wire_ns(deadline_s)
        with self._wire.driver:
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
            state = self._session.models[claim.model_index]
            shapes, shared = state.variation.variant(claim) if state.varies else ((), b"")
            self._wire.require_open()
            seq = self._next_seq
            self._next_seq += 1
            submitted = Submitted(claim, row, seq, given)
            claim.state = SUBMITTED
            claim.submitted_ns = time.monotonic_ns()
            self._pending[seq] = submitted
            leased_ns = 0 if claim.lease_ns else claim.leased_ns  # of what was not asked for nobody else knows it
            self._wire.send(
                m.Submit(
                    *(claim.lease_id, claim.at, claim.count, seq, given, deadline_ns, again, gpu, number),
                    *(shapes, shared, leased_ns),
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
        self._wire.check_process()
        with self._wire.driver:
            if claim.state == SUBMITTED and self._wire.over is None:
                self._wire.send(m.Cancel(claim.lease_id, claim.at, claim.count))

    # ------------------------------------------------------------------ the rest is under the lock

    def coming(self, model: int) -> int:
        """Slots that come back without anybody's doing: those of work that was released before its end."""
        return sum(
            work.claim.count
            for work in self._pending.values()
            if work.claim.released and work.claim.model_index == model
        )

    def done(self, done: m.Done) -> None:
        """The broker tells of the end of some slots."""
        submitted = self._pending.get(done.seq)
        if submitted is None:
            raise ProtocolError(f"the broker ended work {done.seq}, which is not in flight")
        if submitted.take(done, time.monotonic_ns()):
            self._finish(submitted)

    def end(self, reason: str) -> None:
        """No more ends are told."""
        for submitted in list(self._pending.values()):
            submitted.failure = PoolClosed(reason)
            self._finish(submitted)

    def _finish(self, submitted: Submitted) -> None:
        claim = submitted.claim
        if log.isEnabledFor(logging.DEBUG):
            how = next(iter(submitted.errors.values()), "done")
            log.debug("work %s ended: %s", submitted.work_id, how, extra={"work": submitted.work_id})
        del self._pending[submitted.seq]
        claim.state = DONE
        self._wire.driver.finish(submitted)
        self.ended.append(submitted)
        if self._slow_ns:
            self._tell_if_slow(submitted)
        if submitted.watched:
            self._background.unwatch()
        if claim.released:
            self._session.returns.settle(claim)

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
