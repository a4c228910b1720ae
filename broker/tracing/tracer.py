"""The broker's side of a trace: one at a time, begun and ended by the supervisor."""

from __future__ import annotations

from trtpool.broker import control as c
from trtpool.broker.control_socket import ControlSocket
from trtpool.broker.ledger import Ledger
from trtpool.ipc.errors import ProtocolError

from .records import Writer
from .tap import Tap


class Tracer:
    """See the module.

    Args:
        ledger: what is followed.
        control: whom to tell what becomes of it.
    """

    def __init__(self, ledger: Ledger, control: ControlSocket) -> None:
        self._ledger = ledger
        self._control = control
        self._number = 0
        self._writer: Writer | None = None

    def start(self, number: int, fd: int, now_ns: int) -> None:
        """Begin the supervisor's trace `number` at the end of the turn, in the memory of `fd`, which is ours now."""
        self.stop(self._number, now_ns)
        try:
            writer = Writer(fd)
        except ProtocolError as error:
            self._control.tell(c.TraceStopped(number, str(error)))
            return
        self._number, self._writer = number, writer
        self._ledger.follow(Tap(self._ledger.core, writer, lambda: self._control.tell(c.TraceStarted(number))))

    def stop(self, number: int, now_ns: int) -> None:
        """End it, and say so; nothing, if it has ended."""
        if self._writer is None or number != self._number:
            return
        self._ledger.follow(None)
        self._writer.close(now_ns)
        self._writer = None
        self._control.tell(c.TraceStopped(number))
