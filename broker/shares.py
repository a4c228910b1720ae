"""How the time of workers is shared between models: by start-time fair queueing.

::

    start of a model's next batch = max(its finish, virtual time)      the smallest start goes first
    when a batch goes out:   virtual time = that start;  its finish = start + expected time / weight
    when it has ended:       its finish += (time that it took - expected time) / weight

So while two models have work, each gets time as their weights are to each other, however many batches of which size
that is, and however deep their queues are.  A model that had no work starts at the virtual time: what it did not use
is nobody's debt, and it goes next.  While one alone has work it has all the time there is.

After Goyal, Vin and Cheng, "Start-time Fair Queuing" (IEEE/ACM Transactions on Networking, 1997), whose fairness does
not depend on the speed of the server; with several batches in service at once and the costs known only afterwards, as
in Jin, Chase and Kaur, "Interposed Proportional Sharing for a Storage Service Utility" (SIGMETRICS 2004).
"""

from __future__ import annotations

from typing import Final

from .records import Model

MOST_NS: Final = 3_600_000_000_000
"""A batch counts for no more than an hour: a worker that lies about times must not put its model off for ever."""

SCALE: Final = 1024
"""Virtual time is in units of a nanosecond by this, so that large weights do not round short batches away."""


class Shares:
    """See the module's docstring.

    Attributes:
        virtual: the start of the batch that was sent last.
    """

    __slots__ = ("virtual",)

    def __init__(self) -> None:
        self.virtual = 0

    def start_of(self, model: Model) -> int:
        """Where the model's next batch would start, in virtual time."""
        return max(model.finish, self.virtual)

    def charge(self, model: Model, batches: int) -> int:
        """A message with `batches` batches of the model goes out; returns how long it is expected to take, in ns."""
        expected_ns = min(batches * model.run_ns, MOST_NS)
        self.virtual = self.start_of(model)
        model.finish = self.virtual + expected_ns * SCALE // model.weight
        return expected_ns

    @staticmethod
    def settle(model: Model, expected_ns: int, took_ns: int) -> None:
        """What went out has run."""
        model.finish += (min(took_ns, MOST_NS) - expected_ns) * SCALE // model.weight
