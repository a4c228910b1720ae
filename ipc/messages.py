"""Every message between client, broker and worker, and when each is legal.

A frame is one msgpack array of messages, so that a peer is sent at most one frame a turn.
Each message is a frozen, tagged `msgspec.Struct` laid out as an array; decoding checks types,
bounds and list lengths, and refuses unknown fields.  Nothing is pickled, ever.

::

    message            from, to       says                                        legal when
    -----------------  -------------  ------------------------------------------  -----------------------
    Hello / Welcome    all, broker    token, version / epoch, peer, caps          first, once
    Lease / Grant      producer       model, count, wait, class / leases, runs    below its cap
    Submit             producer       (lease, first, count, seq), items, ...      LEASED
    Done               to producer    (lease, first, count, seq), status, times   once for each slot and seq
    Release            producer       (lease, first, count)                       LEASED, DONE
    Cancel             producer       (lease, first, count)                       QUEUED, else ignored
    Recall             to producer    model: give back what you keep unused       others wait
    Ready              worker         device, lanes, gpu                          after loading
    Run                to worker      batch, attempt, model, rows                 a lane, or one more
    Finished, Failed   worker         batch, attempt, times / error               RUNNING
    Status / Report    producer       - / the pool's figures                      any
    Error              to any         code, reason that says what to do           any
    Bye                both           reason                                      last
    Resume             to all         another broker: epoch, frames said so far   alone, any
    Heard              over ZeroMQ    frames of yours that I have had             first in a frame, any
    Reconnect          over ZeroMQ    another broker: frames heard, endpoint, ..  alone, on the lifeline, any

A producer names its work as ``(lease, first_in_lease, count, seq)`` and a worker as
``(batch, attempt)``; slot numbers from peers are never trusted, nor sent by them.
All times are integers: ``_ns`` durations, from `time.monotonic_ns`, which all processes of a host share.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

from .errors import ProtocolError
from .settings import BULK, INTERACTIVE, TOKEN_BYTES
from .tensors import Size

U31 = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Class = Annotated[int, msgspec.Meta(ge=BULK, le=INTERACTIVE)]
Dims = Annotated[tuple[Size, ...], msgspec.Meta(max_length=16)]
Shapes = Annotated[tuple[Dims, ...], msgspec.Meta(max_length=64)]
"""Of one item, for each tensor whose items differ in shape, in the model's order; see `ModelSpec.varying`."""

SHARED_BYTES: Final = 16
"""A digest of what a submission has in its shared inputs."""

MAX_MESSAGES: Final = 4096
"""Most messages in one frame."""

MAX_NAMED: Final = 512
"""Most works that a Run names, so that it fits in a frame."""

# How a slot's work ended.
OK: Final = 0
DEADLINE: Final = 1
CANCELLED: Final = 2
ENGINE_FAILED: Final = 3
WORKER_DIED: Final = 4

# What an Error is about.
BAD_MESSAGE: Final = 0
BUSY: Final = 1
TOO_LARGE: Final = 2
CLOSING: Final = 3
DENIED: Final = 4


class _Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Base of all messages; `gc=False` since none can hold a reference cycle."""


class SlotRun(_Message, frozen=True):
    """Adjacent slots of one model: `count` from `first`, in arena segment `segment`."""

    segment: U31
    first: U31
    count: Count


class Hello(_Message, frozen=True, tag=1):
    """The first message of a client: the token proves that the sender, if it is a ZeroMQ identity, owns a lifeline."""

    version: U31
    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]

    def __repr__(self) -> str:
        """Without the token, which no log shall show."""
        return f"Hello(version={self.version})"


class Welcome(_Message, frozen=True, tag=2):
    """The answer to Hello. `caps` has, for each model, the most slots this peer may hold."""

    epoch: U63
    peer: U63
    caps: Annotated[list[U31], msgspec.Meta(max_length=1024)]


class Lease(_Message, frozen=True, tag=3):
    """Asks for `count` slots of a model, all or none.

    `wait_ns` bounds the wait (None: no bound; 0: now or never); answered by one Grant or one Error that
    carry the same `request`, which the producer chooses and which is not 0.  `priority` is a class of
    `settings.PRIORITIES`.
    """

    request: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    model: U31
    count: Count
    wait_ns: U63 | None
    priority: Class = BULK


class Grant(_Message, frozen=True, tag=4):
    """The right to write: leases as ``(lease_id, run)``.

    `request` is that of the Lease, or 0 for slots granted by a Submit's `again`.
    """

    request: U63
    model: U31
    leases: Annotated[list[tuple[U63, SlotRun]], msgspec.Meta(min_length=1)]


class Submit(_Message, frozen=True, tag=5):
    """Queues `count` slots of a lease from `first` (counted in the lease).

    The slots hold `items` items: all are full but the last, which has at least one.  `seq` rises with
    every Submit of a lease.  The work is dropped when it is still queued `deadline_ns` after it arrived
    (None: never).  `gpu` is the pool's number for the one GPU that may run it (None: any), `priority` a class
    of `settings.PRIORITIES`.  `shapes` are those of all its items, for inputs that vary, and `shared` is a digest of
    the shared inputs, which are the same in all its slots: only what is equal in both goes into a batch together.

    A steady producer needs one message for each piece of work, in one of two ways.  `again` asks for that many new
    slots when the work is done, if nobody lacks room: granted rows then lie side by side with those of the batch-mates.
    And slots whose end was told may be submitted once more in place of being released; `leased_ns` is when their
    caller got them, on the clock of `Finished.ended_ns`, and 0 for slots that it asked for.
    """

    lease: U63
    first: U31
    count: Count
    seq: U63
    items: Count
    deadline_ns: U63 | None = None
    again: U31 = 0
    gpu: U31 | None = None
    priority: Class = BULK
    shapes: Shapes = ()
    shared: Annotated[bytes, msgspec.Meta(max_length=SHARED_BYTES)] = b""
    leased_ns: U63 = 0


class Done(_Message, frozen=True, tag=6):
    """Slots of a submission ended, each exactly once; a large submission may end in parts.

    `status` is `OK` or the reason; `text` says more of it. The times are those of the batch, a mean if a Run was
    cut into several, but for `queue_ns`, from the Submit's arrival until its batch went to a worker.  `ended_ns` is
    that of Finished.  `shapes` are those of outputs that vary.
    """

    lease: U63
    first: U31
    count: Count
    seq: U63
    status: U31
    queue_ns: U63
    copy_in_ns: U63
    compute_ns: U63
    copy_out_ns: U63
    text: Text = ""
    ended_ns: U63 = 0
    shapes: Shapes = ()


class Release(_Message, frozen=True, tag=7):
    """Gives slots back: the producer holds no view of them any more."""

    lease: U63
    first: U31
    count: Count


class Cancel(_Message, frozen=True, tag=8):
    """Ends slots that are still queued with `CANCELLED`; others go on."""

    lease: U63
    first: U31
    count: Count


class Recall(_Message, frozen=True, tag=9):
    """Others wait for slots of this model: release what is leased and idle."""

    model: U31


class Ready(_Message, frozen=True, tag=10):
    """A worker has loaded all models and can run `lanes` batches at once, on the pool's GPU number `gpu` if on one."""

    device: Text
    lanes: Annotated[int, msgspec.Meta(ge=1, le=64)]
    gpu: U31 | None = None


class Rows(_Message, frozen=True):
    """Adjacent slots of a batch: `items` items dense in `count` slots from `first`."""

    segment: U31
    first: U31
    count: Count
    items: Count


class Run(_Message, frozen=True, tag=11):
    """A batch for a worker, or several, which it cuts itself.

    `attempt` counts from 0 over all workers that got these rows.  `shapes` are as in Submit.  `works` names what is in
    it, the first `MAX_NAMED`, if each work is logged; see `logs.work_id`.
    """

    batch: U63
    attempt: U31
    model: U31
    rows: Annotated[list[Rows], msgspec.Meta(min_length=1)]
    shapes: Shapes = ()
    works: Annotated[list[str], msgspec.Meta(max_length=MAX_NAMED)] = []


class Finished(_Message, frozen=True, tag=12):
    """All outputs of a Run are written.  Times are sums over the `batches` that it was cut into.

    `ended_ns` is when the worker found the last of them written, by the host's monotonic clock; 0: not told.
    `shapes` are those of the outputs that vary.  `filled_items` counts the items that were copied to the device again,
    to fill a batch up.
    """

    batch: U63
    attempt: U31
    copy_in_ns: U63
    compute_ns: U63
    copy_out_ns: U63
    gathered_items: U63
    batches: Count = 1
    ended_ns: U63 = 0
    shapes: Shapes = ()
    filled_items: U63 = 0


class Failed(_Message, frozen=True, tag=13):
    """The engine failed on a batch and the worker can go on."""

    batch: U63
    attempt: U31
    text: Text


class Status(_Message, frozen=True, tag=14):
    """Asks for the pool's figures."""

    request: U63


class Report(_Message, frozen=True, tag=15):
    """The answer to Status: a `trtpool.ipc.report.PoolReport` as JSON."""

    request: U63
    body: bytes


class Error(_Message, frozen=True, tag=16):
    """Something was refused and nothing changed. `request` is that of the Lease refused, else 0."""

    code: U31
    text: Text
    request: U63 = 0


class Bye(_Message, frozen=True, tag=17):
    """The sender leaves, and nothing comes after it; a worker says why it must end."""

    text: Text


class Resume(_Message, frozen=True, tag=18):
    """Another broker has taken over; nothing is lost.  Alone in its frame.

    `said` counts the frames that this peer was certainly sent before.  Those after these come now, and the peer skips
    as many of them as it has had: see `pipe.Hearing`.
    """

    epoch: U63
    said: U63


class Heard(_Message, frozen=True, tag=19):
    """How many frames of yours I have had, over ZeroMQ: frames lie in threads there, and are kept until this is said.

    The first of a frame that it is in, or after Hello if `Reconnect` asked for that: it then says where to go on.
    """

    frames: U63


class Reconnect(_Message, frozen=True, tag=20):
    """Another broker has taken over from one that a client talked to over ZeroMQ; said over the lifeline.

    `heard` counts the client's frames that were had.  The client connects to `endpoint`, says Hello with `token` and
    Heard in one frame, which is not counted, and then again all after `heard`; it is then sent what it had not heard.
    """

    epoch: U63
    heard: U63
    endpoint: Text
    token: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]

    def __repr__(self) -> str:
        """Without the token, which no log shall show."""
        return f"Reconnect(epoch={self.epoch}, heard={self.heard})"


ToBroker: TypeAlias = Lease | Submit | Release | Cancel | Status | Hello | Ready | Finished | Failed | Bye | Heard
FromBroker: TypeAlias = Done | Grant | Welcome | Recall | Run | Report | Error | Bye | Resume | Heard | Reconnect
Message: TypeAlias = ToBroker | FromBroker

_encoder = msgspec.msgpack.Encoder()
_to_broker: msgspec.msgpack.Decoder[list[ToBroker]] = msgspec.msgpack.Decoder(
    Annotated[list[ToBroker], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
)
_from_broker = msgspec.msgpack.Decoder(list[FromBroker])

# msgspec lets Python's own error for bytes that are no UTF-8 through.
_DECODE_ERRORS: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

encode = _encoder.encode
"""Encode a list of messages as one frame."""


def decode_to_broker(frame: bytes | memoryview) -> list[ToBroker]:
    """Decode a frame that a broker received; every byte of it may be hostile.

    Raises:
        ProtocolError: not a list of messages that may be sent to a broker.
    """
    try:
        return _to_broker.decode(frame)
    except _DECODE_ERRORS as error:
        raise ProtocolError(f"a frame of {len(frame)} bytes is not a list of messages: {error}") from error


def decode_from_broker(frame: bytes | memoryview) -> list[FromBroker]:
    """Decode a frame that a client or a worker received.

    Raises:
        ProtocolError: not a list of messages that a broker sends.
    """
    try:
        return _from_broker.decode(frame)
    except _DECODE_ERRORS as error:
        raise ProtocolError(f"the broker sent {len(frame)} bytes that are no messages: {error}") from error
