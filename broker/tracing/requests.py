"""What a command that traces and the supervisor say to each other, over the socket of `broker.requests`.

::

    command                        supervisor
      | --- TraceRequest + fd ------> |  the memory to write to
      | <-- Tracing or Refused ------ |  it is written from now on
      | --- TraceEnd ---------------> |
      | <-- TraceOver --------------- |  last; also unasked, when the broker ended
      x --- end of file ------------> |  at any time: it is called off
"""

from __future__ import annotations

import msgspec


class TraceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="trace"):
    """Write down what happens; the descriptor of `records.create` comes with it."""


class TraceEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="trace_end"):
    """That is enough."""


class Tracing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tracing"):
    """What happens from now on is written down."""


class TraceOver(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="trace_over"):
    """Nothing more is written; `text`: why it ended before that was asked for."""

    text: str = ""
