"""Slots on their way back to the pool.

They go, or are kept to be used again, when they were released *and* the last array of them has ended; see `claims` and
`keeping`.  Finalizers may run in any thread at any time, even in one that holds the lock, so they only append to a
deque and try to take the lock; if it is taken, its holder sees to it when it lets go.
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
from .keeping import Keeper, Kept
from .wire import Wire

HELD_WARNING_S: Final = 10.0
"""After this long, released slots that an array still holds are worth a warning."""


class Held:
    """Released slots that go back when the last array of them has ended."""

    __slots__ = ("__weakref__", "model", "root_ref", "run", "since")

    def __init__(self, claim: Claim) -> None:
        self.model = claim.model_index
        self.run = claim.run
        self.root_ref: weakref.ref[Any] | None = claim.root_ref
        self.since = time.monotonic()


class Returns:
    """See the module.

    Args:
        wire: the client's messages.
        models: what it keeps of each model.

    Attributes:
        dropped: slots that finalizers released.
        held: released slots that an array still holds.
    """

    def __init__(self, wire: Wire, models: Sequence[ModelState]) -> None:
        self._wire = wire
        self._models = models
        self._keeper = Keeper(self._look)
        self.dropped: deque[Held] = deque()
        self.held: set[Held] = set()

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
            self.dropped.append(Held(claim))
            self._wire.driver.try_visit()

    def root_ended(self, held: Held) -> None:
        """The last array of released slots has ended; called by its finalizer."""
        if not self._wire.gone:
            self.held.discard(held)
            self.dropped.append(held)
            self._wire.driver.try_visit()

    # ------------------------------------------------------------------ under the lock

    def settle(self, claim: Claim) -> None:
        """Give a claim's slots back, or keep them, or wait for the end of the last array of them."""
        self._settle(Held(claim))

    def _settle(self, held: Held) -> None:
        root = held.root_ref() if held.root_ref is not None else None
        if root is None:
            state, run = self._models[held.model], held.run
            if state.keep(run):
                self._keeper.call()
            else:
                self.give_back(held.model, run)
            return
        this = weakref.ref(self)

        def ended(_: weakref.ref[Any]) -> None:
            returns = this()
            if returns is not None:
                returns.root_ended(held)

        self.held.add(held)
        held.root_ref = weakref.ref(root, ended)

    def give_back(self, model: int, run: Kept) -> None:
        """Slots that nobody looks at."""
        state, wire = self._models[model], self._wire
        state.held -= run.count
        wire.enclose(m.Release(run.lease_id, run.at, run.count))
        wire.unsaid += run.count
        # With a spare in hand the next Submit is near, and takes the Release along.  If none comes after all, the
        # broker allows for as many slots as were granted in advance, and no more: see `trtpool.broker.recall`.
        if not state.spares or wire.unsaid > sum(spare.count for spare in state.spares):
            wire.hurry()

    def give_kept_back(self, model: int) -> None:
        """All that were kept."""
        for run in self._models[model].take_all():
            self.give_back(model, run)

    def settle_dropped(self) -> None:
        """See to what finalizers left."""
        while self.dropped:
            self._settle(self.dropped.popleft())
        self._wire.exchange()  # which may finish more

    # ------------------------------------------------------------------ without it

    def _look(self) -> None:
        """Give back what was kept and not used for a while."""
        with self._wire.driver:
            if self._wire.gone:
                return
            for model, state in enumerate(self._models):
                for run in state.take_unused():
                    self.give_back(model, run)
                    self._wire.hurry()
            if not any(state.kept for state in self._models):
                self._keeper.rest()
            self._wire.push()

    def close(self) -> None:
        """The client has left: nothing is kept any more."""
        self._keeper.stop()

    def warn_of_held(self) -> None:
        """Warn of arrays that keep slots from the pool."""
        now = time.monotonic()
        for held in list(self.held):
            if now - held.since > HELD_WARNING_S:
                held.since = float("inf")
                warnings.warn(
                    f"{held.run.count} slots were released {HELD_WARNING_S:.0f} s ago and an array of them is still "
                    "alive, which keeps them from the pool; copy what you need",
                    ResourceWarning,
                    stacklevel=2,
                )
