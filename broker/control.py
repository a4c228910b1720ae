"""What supervisor and broker tell each other, over a socket pair that nobody else has.

::

    supervisor                          broker
      | <-- BrokerReady ------------------ |
      | --- WorkerStarted + 2 fds -------> |  the broker's end of its lifeline, and its pidfd
      | <-- WorkerIsReady ---------------- |
      | <-- WorkerSaid ------------------- |  why it must end, in its own words
      | <-- WorkerHangs ------------------ |  it must be killed
      | --- WorkerGone ------------------> |  it ended and was reaped
      | --- SwitchWorkers ---------------> |  those that stood by serve from now on, in place of all others
      | <-- WorkersSwitched -------------- |
      | <-- WorkerLeaves ----------------- |  one that was replaced has finished, and was told to end
      | --- StartTrace + fd -------------> |  write down there what happens
      | <-- TraceStarted ----------------- |
      | --- StopTrace -------------------> |
      | <-- TraceStopped ----------------- |
      | <-- PeerAdmitted + 2 fds --------- |  a client's lifeline and its pidfd, to keep
      | --- PeerIsKept, PeerNotKept -----> |  it is let in, or told why not
      | <-- PeerForgotten ---------------- |
      | --- DrainNow --------------------> |
      | <-- IsDrained -------------------- |  and the broker says Bye to all, and ends

A broker that takes over is told first of all that the supervisor kept::

      | --- WorkerStarted + 2 fds, each -> |  those that live; another that the broker finds in its books has ended
      | --- PeerKept + 2 fds, each ------> |
      | --- TakeOver --------------------> |  then SwitchWorkers and DrainNow once more, if they were told
      | <-- BrokerReady ------------------ |
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from trtpool.ipc.settings import PoolSettings


class BrokerReady(msgspec.Struct, frozen=True, tag=1):
    """The broker listens."""


class WorkerStarted(msgspec.Struct, frozen=True, tag=2):
    """A worker was started; `worker` is the supervisor's number for it, never reused.

    One of a later `generation` than those that serve stands by; see `SwitchWorkers`.
    """

    worker: int
    pid: int
    generation: int = 0


class WorkerIsReady(msgspec.Struct, frozen=True, tag=3):
    """A worker has loaded its models."""

    worker: int


class WorkerGone(msgspec.Struct, frozen=True, tag=4):
    """A worker ended, for `reason`."""

    worker: int
    reason: str


class DrainNow(msgspec.Struct, frozen=True, tag=5):
    """Grant nothing more, finish what there is."""


class IsDrained(msgspec.Struct, frozen=True, tag=6):
    """No work is left."""


class WorkerSaid(msgspec.Struct, frozen=True, tag=7):
    """A worker says why it must end; it may not be ready yet, and its end follows.  Told once for each worker."""

    worker: int
    text: str


class WorkerHangs(msgspec.Struct, frozen=True, tag=8):
    """A worker does not come to the end of a batch: it must be killed, for the reason `text`."""

    worker: int
    text: str


class PeerAdmitted(msgspec.Struct, frozen=True, tag=9):
    """A client connected: keep its lifeline and pidfd for the next broker.  Said before the client is told anything."""

    peer: int
    pid: int


class PeerForgotten(msgspec.Struct, frozen=True, tag=10):
    """Nothing of a client is left; close what was kept."""

    peer: int


class PeerKept(msgspec.Struct, frozen=True, tag=11):
    """A client that the last broker admitted."""

    peer: int
    pid: int


class PeerIsKept(msgspec.Struct, frozen=True, tag=13):
    """A client that was admitted will outlive the broker, and may be let in."""

    peer: int


class PeerNotKept(msgspec.Struct, frozen=True, tag=14):
    """There are no descriptors to keep a client's lifeline and pidfd."""

    peer: int


class TakeOver(msgspec.Struct, frozen=True, tag=12):
    """All has been told."""


class SwitchWorkers(msgspec.Struct, frozen=True, tag=15):
    """Send work to workers of this generation alone; `paths` are the files of their models.  May be told again."""

    generation: int
    paths: tuple[str, ...]


class WorkersSwitched(msgspec.Struct, frozen=True, tag=16):
    """That is so from now on, whatever becomes of this broker."""

    generation: int


class WorkerLeaves(msgspec.Struct, frozen=True, tag=17):
    """A worker that was replaced has nothing more to do, and its end follows."""

    worker: int


class StartTrace(msgspec.Struct, frozen=True, tag=18):
    """Write down what happens in the memory whose descriptor comes with this; see `tracing`.

    `trace` is the supervisor's number for it, never reused.
    """

    trace: int


class TraceStarted(msgspec.Struct, frozen=True, tag=19):
    """What happens from now on is written down."""

    trace: int


class StopTrace(msgspec.Struct, frozen=True, tag=20):
    """Write no more."""

    trace: int


class TraceStopped(msgspec.Struct, frozen=True, tag=21):
    """Nothing more is written; `text`: why nothing was, if it could not."""

    trace: int
    text: str = ""


Control: TypeAlias = (
    BrokerReady
    | WorkerStarted
    | WorkerIsReady
    | WorkerSaid
    | WorkerHangs
    | WorkerGone
    | SwitchWorkers
    | WorkersSwitched
    | WorkerLeaves
    | DrainNow
    | IsDrained
    | PeerAdmitted
    | PeerForgotten
    | PeerKept
    | PeerIsKept
    | PeerNotKept
    | TakeOver
    | StartTrace
    | TraceStarted
    | StopTrace
    | TraceStopped
)

decode = msgspec.msgpack.Decoder(Control).decode


class SuperviseConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Standard input of `python -m trtpool.broker.supervise`, as JSON.

    Attributes:
        settings: the pool.
        parent_pid: the embedding process; when it ends the pool drains and ends.
        answer_fd: an inherited pipe, on which one line says how the start went: empty, or a `Refusal` as JSON.
    """

    settings: PoolSettings
    parent_pid: int
    answer_fd: int


class MetricsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Standard input of `python -m trtpool.broker.metrics`, as JSON.

    Attributes:
        parent_pid: the supervisor, with which it ends.
        listener_fd: an inherited TCP socket that listens.
        run_dir: the pool's.
    """

    parent_pid: int
    listener_fd: int
    run_dir: str
