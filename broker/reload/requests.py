"""What `trtpool reload` and the supervisor say to each other; see `broker.requests`.

::

    command                        supervisor
      | --- ReloadRequest ----------> |
      | <-- Progress ---------------- |  any number
      | <-- Reloaded or Refusal ----- |  last
      x --- end of file ------------> |  before the switch: it is called off
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

from trtpool.broker.planning import error_of
from trtpool.broker.requests import PACKET_BYTES, Refused, connect, encode
from trtpool.ipc.errors import PoolBusy, PoolClosed, ProtocolError
from trtpool.ipc.settings import ModelSource


class ReloadRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="reload"):
    """Load these files in place of what models of these names have; the name ``""``: the pool's only model."""

    models: Annotated[tuple[ModelSource, ...], msgspec.Meta(min_length=1, max_length=1024)]


class Progress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="progress"):
    """What is being done, for the user; `switched`: the new engines answer."""

    text: str
    switched: bool = False


class Reloaded(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="reloaded"):
    """The new engines, of this generation, answer all, and the old ones have ended."""

    generation: int


Answer: TypeAlias = Progress | Reloaded | Refused

_decode_answer = msgspec.json.Decoder(Answer).decode


def reload(
    run_dir: Path,
    models: Sequence[ModelSource],
    *,
    timeout_s: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Have the pool in `run_dir` exchange engines; returns the new generation, when no old engine runs any more.

    Args:
        run_dir: the pool's.
        models: new files, by absolute path as the pool sees them, and the names of the models that they are for.
        timeout_s: seconds until it is called off, if the new engines do not answer yet; None: none.
        say: called with a line on each step.

    Raises:
        PoolNotFound: no pool runs there.
        RunDirError: it is another user's.
        ConfigError, ModelError, DeviceUnavailable, StartFailed: the files cannot take the place of what is served, and
            why; nothing has changed.
        PoolBusy: another reload is under way, or the time is over.
        PoolClosed: the pool ended meanwhile, or is being stopped.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    switched = False
    with connect(run_dir) as sock:
        with contextlib.suppress(ConnectionError):  # it ended, as `_receive` finds
            sock.send(encode(ReloadRequest(tuple(models))))
        while True:
            sock.settimeout(None if deadline is None else max(1e-3, deadline - time.monotonic()))
            answer = _receive(sock, switched=switched)
            if isinstance(answer, Reloaded):
                return answer.generation
            if isinstance(answer, Refused):
                raise error_of(answer.refusal)
            switched = switched or answer.switched
            say(answer.text)


def _receive(sock: socket.socket, *, switched: bool) -> Answer:
    data = b""
    try:
        with contextlib.suppress(ConnectionError):
            data = sock.recv(PACKET_BYTES)
        if not data:
            raise PoolClosed("the pool ended while it was to load other engines; start it again")
        answer: Answer = _decode_answer(data)
    except TimeoutError:
        if switched:
            raise PoolBusy("the new engines answer, and old ones still finish what they had; wait") from None
        raise PoolBusy("the new engines were not ready in time, so it was called off; give a longer time-out") from None
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"the pool's answer cannot be read ({error}); is it of another version?") from error
    return answer
