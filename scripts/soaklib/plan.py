"""What a seed says: the pool, the producers one after another, the faults one after another.

Each of the three has a generator of its own, so that a producer more does not change the faults.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final, NamedTuple

ROLES: Final = {
    "steady": 6,  # one thread, all kinds of calls
    "threads": 3,  # several threads with one client
    "forker": 2,  # forks while it has work in flight
    "leaver": 2,  # submits and exits
    "leaker": 1,  # leases and submits, gives nothing back, reads nothing
    "poisoner": 1,  # sends an input that kills or hangs workers among good ones
}
"""What producers are like, and how often."""

FAULTS: Final = {
    "kill worker": 4,
    "stop worker": 4,  # and let it go on
    "end worker": 2,  # SIGTERM
    "hang worker": 1,  # stop it until the pool kills it
    "kill producer": 4,
    "stop producer": 4,
    "end producer": 2,
    "stop broker": 3,
    "kill broker": 3,
    "kill worker and producer": 1,
    "kill two workers": 1,
    "kill broker and worker": 1,
    "kill broker and producer": 1,
}


class PoolPlan(NamedTuple):
    """Options of `trtpool start`."""

    items_per_slot: int
    max_batch: int
    slots: int
    max_delay_us: int


class ProducerPlan(NamedTuple):
    """One producer: `rounds` of work from a seed of its own."""

    number: int
    role: str
    seed: int
    rounds: int
    transport: str


class Fault(NamedTuple):
    """One fault: after a pause, to the `pick`-th of those that it can hit, for `lasts_s` if it does not last."""

    after_s: float
    kind: str
    pick: int
    lasts_s: float


def _stream(seed: int, what: str) -> random.Random:
    return random.Random(f"{seed} {what}")


def pool_plan(seed: int) -> PoolPlan:
    """The pool."""
    rng = _stream(seed, "pool")
    items_per_slot = rng.choice([1, 1, 3])
    max_batch = items_per_slot * rng.choice([4, 8, 16])
    return PoolPlan(items_per_slot, max_batch, rng.choice([64, 96, 128]), rng.choice([0, 0, 500]))


def producer_plans(seed: int) -> Iterator[ProducerPlan]:
    """The producers, without end."""
    rng = _stream(seed, "producers")
    number = 0
    while True:
        number += 1
        (role,) = rng.choices([*ROLES], [*ROLES.values()])
        yield ProducerPlan(
            number, role, rng.randrange(2**31), rng.randrange(5, 120), rng.choice(["lifeline", "lifeline", "zmq"])
        )


def faults(seed: int, mean_pause_s: float) -> Iterator[Fault]:
    """The faults, without end."""
    rng = _stream(seed, "faults")
    while True:
        (kind,) = rng.choices([*FAULTS], [*FAULTS.values()])
        yield Fault(rng.expovariate(1 / mean_pause_s), kind, rng.randrange(2**31), rng.uniform(0.01, 1.0))
