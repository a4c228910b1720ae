"""What the core is told, and what it answers.  Peers are numbers, never reused; times are `monotonic_ns`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from trtpool.ipc.messages import FromBroker, ToBroker


class ProducerJoined(NamedTuple):
    """A client proved who it is; `pid` 0: its process cannot be told."""

    peer: int
    pid: int = 0


class WorkerJoined(NamedTuple):
    """A worker proved who it is; it is not ready yet.  `generation` is that of its engines; see `Switch`."""

    peer: int
    pid: int
    generation: int = 0


class Received(NamedTuple):
    """One message from a peer that has joined."""

    peer: int
    message: ToBroker


class ProducerClosed(NamedTuple):
    """Its lifeline ended while its process lives: what it holds is quarantined until that ends too."""

    peer: int


class ProducerEnded(NamedTuple):
    """Its process has ended."""

    peer: int


class WorkerEnded(NamedTuple):
    """Its process has ended and was reaped; no device writes for it any more."""

    peer: int
    reason: str


class Drain(NamedTuple):
    """Grant nothing new and say when all work is done."""


class Switch(NamedTuple):
    """Workers of this generation serve from now on, and older ones finish what they have; `paths` are their models'.

    The same generation again changes nothing.
    """

    generation: int
    paths: Sequence[str]


class TurnEnded(NamedTuple):
    """Every socket has been read: serve who waits, make batches, look at the clock."""


Event: TypeAlias = (
    ProducerJoined | WorkerJoined | Received | ProducerClosed | ProducerEnded | WorkerEnded | Drain | Switch | TurnEnded
)


class Send(NamedTuple):
    """Send a message to a peer."""

    peer: int
    message: FromBroker


class Forget(NamedTuple):
    """The peer is gone and nothing of it is left."""

    peer: int


class WorkerReady(NamedTuple):
    """A worker has loaded its models."""

    peer: int


class Switched(NamedTuple):
    """Workers of this generation, and no others, are sent work."""

    generation: int


class Leaves(NamedTuple):
    """A worker of an older generation has finished what it had, and was told Bye."""

    peer: int


class Hung(NamedTuple):
    """A worker's oldest batch runs for too long: its process must end, or the batch never does."""

    peer: int
    text: str


class Overdue(NamedTuple):
    """A client holds slots that it does nothing with, and others have waited for them too long; said once a recall."""

    peer: int
    text: str


class Evict(NamedTuple):
    """The process of a client must end, so that others get its slots."""

    peer: int
    text: str


class Slow(NamedTuple):
    """Work of a client took longer than the pool's limit; see `slow`."""

    peer: int
    text: str


class Drained(NamedTuple):
    """No work is left; said once, after Drain."""


Action: TypeAlias = Send | Forget | WorkerReady | Switched | Leaves | Hung | Overdue | Evict | Slow | Drained
