"""Released slots that a client keeps for a while, to lend them again without a word to the broker.

A caller in a rhythm leases as many slots as it released, and then gets the same ones: its next Submit says that it uses
them again.  So each piece of work takes one message each way, nothing is granted, an arena whose slots are all in
flight needs no others, and the rows are still in a cache.

But rows that are used again stay where they are, and batches of many such are of many pieces, each a copy of its own.
So runs of less than `REUSED_BYTES` go back, and new ones are granted with the results, side by side; see
`claims.ModelState.wants_spare`.

Nobody reads the messages of an idle client, so nobody could have back what it keeps.  So a thread looks now and then
for what nobody used, and gives it back; it sleeps while nothing is kept.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

REUSED_BYTES: Final = 16 << 10
"""Runs of so many bytes, inputs and outputs, are used again: chosen so that 16 slots of 1 KB are, which gain by it
(docs/performance.md), and single small ones are not."""

LOOK_S: Final = 0.05
"""What was not used from one look to the next goes back."""


@dataclass(slots=True)  # not frozen, which takes six times as long to make, once a release
class Kept:
    """Slots of a lease that its caller released: `count` from `at` in the lease, from `first` in the model."""

    lease_id: int
    first: int
    at: int
    count: int


class Keeper(threading.Thread):
    """The thread; started when something is kept for the first time.

    Args:
        look: a method, not kept alive, that gives back what was not used since it was last called; when nothing is
            left, it calls `rest`.
    """

    _running: Final[set[Keeper]] = set()

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__(name="trtpool-keeper", daemon=True)
        self._called = called = threading.Event()
        self._stopped = threading.Event()
        self._look = weakref.WeakMethod(look, lambda _: called.set())

    def call(self) -> None:
        """Something is kept; under the lock that `look` takes."""
        if not self._called.is_set():
            self._called.set()
            if self.ident is None:
                self._running.add(self)
                self.start()

    def rest(self) -> None:
        """Nothing is kept; under the same lock."""
        self._called.clear()

    def run(self) -> None:
        """Look, until `stop`, or until nobody is there to look for."""
        try:
            while self._called.wait() and not self._stopped.wait(LOOK_S) and (look := self._look()) is not None:
                look()
                del look
        finally:
            self._running.discard(self)

    def stop(self) -> None:
        """End; not under the lock."""
        self._stopped.set()
        self._called.set()
        if self.ident is not None and self is not threading.current_thread():
            self.join()

    @classmethod
    def count(cls) -> int:
        """How many there are in this process."""
        return len(cls._running)

    @classmethod
    def forget_in_child(cls) -> None:
        """A child has none of its parent's threads."""
        cls._running.clear()
