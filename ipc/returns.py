"""Slots on their way back to the pool.

They go when they were released *and* the last array of them has ended; see `claims`.  Finalizers may run in any thread
at any time, even in one that holds the lock, so they only append to a deque and try to take the lock; if it is taken,
its holder sees to it when it lets go.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from . import messages as m
from .claims import SUBMITTED, Claim, ModelState
from .wire import Wire

KEPT_WARNING_S: Final = 10.0
"""After this long, released slots that an array still holds are worth a warning."""


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


class Returns:
    """See the module.

    Args:
        wire: the client's messages.
        models: what it keeps of each model.

    Attributes:
        dropped: slots that finalizers released.
        kept: released slots that an array still holds.
    """

    def __init__(self, wire: Wire, models: Sequence[ModelState]) -> None:
        self._wire = wire
        self._models = models
        self.dropped: deque[Kept] = deque()
        self.kept: set[Kept] = set()

    def release(self, claim: Claim) -> None:
        """Give a claim's slots back: now, or when its work and its last view have ended.  Again: nothing."""
        wire = self._wire
        if wire.gone:
            claim.released = True
            return
        with wire.driver:
            if claim.released:  # another thread was faster
                return
            claim.released = True
            if claim.state != SUBMITTED:
                self.settle(claim)
            elif wire.over is None:  # its Done will find it released
                wire.send(m.Cancel(claim.lease_id, claim.at, claim.count))
            wire.push()

    def drop(self, claim: Claim) -> None:
        """The same from a finalizer."""
        if not self._wire.gone:
            self.dropped.append(Kept(claim))
            self._wire.driver.try_visit()

    def root_ended(self, kept: Kept) -> None:
        """The last array of released slots has ended; called by its finalizer."""
        if not self._wire.gone:
            self.kept.discard(kept)
            self.dropped.append(kept)
            self._wire.driver.try_visit()

    # ------------------------------------------------------------------ under the lock

    def settle(self, claim: Claim) -> None:
        """Give a claim's slots back, or wait for the end of the last array of them."""
        self._settle(Kept(claim))

    def _settle(self, kept: Kept) -> None:
        root = kept.root_ref() if kept.root_ref is not None else None
        if root is None:
            self.give_back(kept.model, kept.lease_id, kept.at, kept.count)
            return
        this = weakref.ref(self)

        def ended(_: weakref.ref[Any]) -> None:
            returns = this()
            if returns is not None:
                returns.root_ended(kept)

        self.kept.add(kept)
        kept.root_ref = weakref.ref(root, ended)

    def give_back(self, model: int, lease_id: int, at: int, count: int) -> None:
        """Slots that nobody looks at."""
        state, wire = self._models[model], self._wire
        state.held -= count
        state.steps = state.steps + 1 if state.step == count else 1
        state.step = count
        wire.enclose(m.Release(lease_id, at, count))
        wire.unsaid += count
        # With a spare in hand the next Submit is near, and takes the Release along.  If none comes after all, the
        # broker allows for as many slots as were granted in advance, and no more: see `trtpool.broker.recall`.
        if not state.spares or wire.unsaid > sum(spare.count for spare in state.spares):
            wire.hurry()

    def settle_dropped(self) -> None:
        """See to what finalizers left."""
        while self.dropped:
            self._settle(self.dropped.popleft())
        self._wire.exchange()  # which may finish more

    # ------------------------------------------------------------------ without it

    def warn_of_kept(self) -> None:
        """Warn of arrays that keep slots from the pool."""
        now = time.monotonic()
        for kept in list(self.kept):
            if now - kept.since > KEPT_WARNING_S:
                kept.since = float("inf")
                warnings.warn(
                    f"{kept.count} slots were released {KEPT_WARNING_S:.0f} s ago and an array of them is still alive, "
                    "which keeps them from the pool; copy what you need",
                    ResourceWarning,
                    stacklevel=2,
                )
