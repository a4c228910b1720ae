"""Where the time of one request went.

::

    lease()      granted     submit()       dispatched     on the device                       written     received
       |            |            |               |         |                                      |           |
       '-- lease ---'--- fill ---'---- queue ----'dispatch-'-- copy in --'-- compute --'-copy out-'- delivery-'
          waiting     your writes  in the broker             as the worker measured them

The clock is that of the host, which all its processes share.
"""

from __future__ import annotations

from typing import Final

import msgspec

from . import messages as m

PHASES: Final = ("lease", "fill", "queue", "dispatch", "copy_in", "compute", "copy_out", "delivery")
"""In the order in which a request goes through them."""


class Timings(msgspec.Struct, frozen=True, gc=False):
    """Where the time of one request went, in nanoseconds, without gaps: they add up to `total_ns`.

    Attributes:
        lease_ns: waiting for the slots to be granted.
        fill_ns: from then to `submit()`: writing the inputs.
        queue_ns: waiting in the broker for a worker.
        dispatch_ns: on the way to the device: messages to the broker and to the worker, and the wait there for a lane.
        copy_in_ns: inputs to the GPU; on the CPU, gathering small scattered rows, mostly 0.
        compute_ns: the engine.
        copy_out_ns: outputs from the GPU; on the CPU, scattering what was gathered.
        delivery_ns: from when the outputs were written until this process took in that they are.  One that does not
            read what it is sent makes this long.

    The times on the device are those of the batch that the request was in, a mean where brief batches ran together.
    A request that failed has the times that it got to, and 0 for others.
    """

    lease_ns: int
    fill_ns: int
    queue_ns: int
    dispatch_ns: int
    copy_in_ns: int
    compute_ns: int
    copy_out_ns: int
    delivery_ns: int

    @property
    def latency_ns(self) -> int:
        """From `submit()` until the result was here."""
        return self.total_ns - self.lease_ns - self.fill_ns

    @property
    def total_ns(self) -> int:
        """From `lease()` until the result was here."""
        return sum(msgspec.structs.astuple(self))

    def __str__(self) -> str:
        """All phases in milliseconds."""
        times = zip(PHASES, msgspec.structs.astuple(self), strict=True)
        return ", ".join(f"{name.replace('_', ' ')} {ns / 1e6:.3f}" for name, ns in times) + " ms"


def timings_of(lease_ns: int, leased_ns: int, submitted_ns: int, done: m.Done, received_ns: int) -> Timings:
    """The times of a request that ended.

    Args:
        lease_ns: how long its slots were waited for.
        leased_ns, submitted_ns, received_ns: when they were granted, when it was submitted, and when its end was heard.
        done: what was heard.
    """
    device_ns = done.copy_in_ns + done.compute_ns + done.copy_out_ns
    # What a worker claims of itself is bounded by what passed here: no phase is negative, and they add up.
    left_ns = max(0, received_ns - submitted_ns - done.queue_ns - device_ns)
    delivery_ns = min(left_ns, max(0, received_ns - done.ended_ns)) if done.ended_ns else 0
    return Timings(
        lease_ns,
        max(0, submitted_ns - leased_ns),
        done.queue_ns,
        left_ns - delivery_ns,
        done.copy_in_ns,
        done.compute_ns,
        done.copy_out_ns,
        delivery_ns,
    )
