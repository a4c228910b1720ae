"""The command's side of a trace: ask, wait, and read what the broker wrote."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Final, TypeAlias

import msgspec

from trtpool.broker.planning import error_of
from trtpool.broker.requests import PACKET_BYTES, Refused, connect, encode
from trtpool.ipc.errors import ConfigError, PoolBusy, PoolClosed, ProtocolError

from . import records
from .chrome import Trace, write
from .requests import TraceEnd, TraceOver, TraceRequest, Tracing
from .telling import tell

DEFAULT_BUFFER_MIB: Final = 32
MAX_BUFFER_MIB: Final = records.MAX_BYTES >> 20
ANSWER_S: Final = 30.0
"""How long a pool may take to begin or end a trace: it does so at the end of a turn."""

_Answer: TypeAlias = Refused | Tracing | TraceOver
_decode = msgspec.json.Decoder(_Answer).decode


class Recording:
    """A trace that runs from here until `stop`, or the end of the ``with``, which writes it to `output`.

    Args:
        run_dir: the pool's.
        output: the file to write, as Chrome's trace events in JSON.
        buffer_mib: MiB for what is recorded until then; what does not fit is dropped, and counted.

    Attributes:
        trace: what was written, after `stop`.

    Raises:
        ConfigError: the file cannot be written, or there is no memory for the buffer.
        PoolNotFound: no pool runs there.
        RunDirError: it is another user's; only who started a pool may trace it.
        PoolBusy: another trace is under way.
    """

    trace: Trace

    def __init__(self, run_dir: Path, output: str | os.PathLike[str], *, buffer_mib: int = DEFAULT_BUFFER_MIB) -> None:
        if not 1 <= buffer_mib <= MAX_BUFFER_MIB:
            raise ConfigError(f"a buffer of {buffer_mib} MiB for a trace: give 1 to {MAX_BUFFER_MIB}")
        self._output = Path(output)
        self._over = ""
        self._stopped = False
        with contextlib.ExitStack() as stack:
            self._sock = stack.enter_context(connect(run_dir))
            _check_writable(self._output)
            try:
                self._fd = records.create(buffer_mib << 20)
            except OSError as error:
                raise ConfigError(
                    f"there are no {buffer_mib} MiB for the trace ({error.strerror}); give a smaller buffer "
                    "(--buffer-mib)"
                ) from error
            stack.callback(os.close, self._fd)
            with contextlib.suppress(ConnectionError):  # it ended, as `_receive` finds
                # The supervisor reads JSON here, so this is not `lifeline.send_packet`.
                socket.send_fds(self._sock, [encode(TraceRequest())], [self._fd])
            if self._hear(ANSWER_S):  # before anything was written
                raise PoolBusy(self._over)
            self._stack = stack.pop_all()

    def wait(self, seconds: float) -> None:
        """Wait so long, or until the pool ends the trace."""
        deadline = time.monotonic() + seconds
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        while not self._over and (left := deadline - time.monotonic()) > 0:
            if poller.poll(min(left, 3600) * 1000):
                self._hear(ANSWER_S)

    def stop(self) -> Trace:
        """End the trace and write the file, whatever became of the pool; again: nothing.

        Returns:
            What was written; its `ended` says why the trace ended before this, if it did.

        Raises:
            ConfigError: the file cannot be written.
            ProtocolError: the pool is of another version.
        """
        if self._stopped:
            return self.trace
        self._stopped = True
        with self._stack:
            if not self._over:
                self._end()
            written = records.read(self._fd)
            story = tell(written.records, written.closed_ns)
            try:
                self.trace = write(story, self._output, written.dropped, self._over)
            except OSError as error:
                raise ConfigError(f"{self._output} cannot be written: {error.strerror}") from error
        return self.trace

    def _end(self) -> None:
        """Have the pool write no more; one that does not answer has no say in what becomes of what it wrote."""
        try:
            with contextlib.suppress(ConnectionError):
                self._sock.send(encode(TraceEnd()))
            while not self._hear(ANSWER_S):
                pass
        except PoolBusy as error:
            self._over = str(error)

    def _hear(self, timeout_s: float) -> bool:
        """Take what the supervisor says next; whether the trace is over."""
        self._sock.settimeout(timeout_s)
        data = b""
        try:
            with contextlib.suppress(ConnectionError):
                data = self._sock.recv(PACKET_BYTES)
        except TimeoutError:
            raise PoolBusy(f"the pool did not answer within {ANSWER_S:.0f} s; is it stopped?") from None
        if not data:
            if not hasattr(self, "_stack"):
                raise PoolClosed("the pool ended before the trace began; start it again")
            self._over = "the pool ended"
            return True
        try:
            answer: _Answer = _decode(data)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"the pool's answer cannot be read ({error}); is it of another version?") from error
        if isinstance(answer, Refused):
            raise error_of(answer.refusal)
        if isinstance(answer, TraceOver):
            self._over = answer.text
            return True
        return False

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
            return
        with contextlib.suppress(Exception):  # the user's error must not be hidden by one of ours
            self.stop()


def _check_writable(output: Path) -> None:
    """Before anything is recorded for it.

    Raises:
        ConfigError: it is no place for a file.
    """
    folder = output.parent
    if output.is_dir():
        raise ConfigError(f"{output} is a directory; name a file for the trace (-o)")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"no file can be written in {folder}; name another for the trace (-o)")
