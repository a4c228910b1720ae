"""The supervisor's side of a trace: it passes the command's memory on to the broker, and says when the trace is over.

One at a time.  The supervisor outlives brokers, so a command is told what became of the one that wrote.
"""

from __future__ import annotations

import logging

from trtpool.broker import control as c
from trtpool.broker.broker_link import BrokerLink
from trtpool.broker.desk import Asked, Asker, Desk
from trtpool.ipc import lifeline
from trtpool.ipc.errors import PoolBusy, ProtocolError

from .requests import TraceEnd, TraceOver, TraceRequest, Tracing

log = logging.getLogger("trtpool.supervisor")


class Traces:
    """See the module.

    Args:
        link: the broker.
        desk: where commands ask.
    """

    def __init__(self, link: BrokerLink, desk: Desk) -> None:
        self._link = link
        self._desk = desk
        self._asker: Asker | None = None
        self._number = 0

    def hear(self, asked: Asked, *, ready: bool) -> None:
        """A command said something, or is gone; `ready`: there is a broker that can be asked."""
        asker, request = asked.asker, asked.request
        if isinstance(request, TraceRequest):
            self._begin(asker, asked.fds, ready=ready)
        elif asker is self._asker:  # it has enough, or is gone
            self._link.tell(c.StopTrace(self._number))
            if request is None:
                self._asker = None
        elif isinstance(request, TraceEnd):
            self._refuse(asker, ProtocolError("no trace of yours is under way"))

    def _begin(self, asker: Asker, fds: list[int], *, ready: bool) -> None:
        try:
            if self._asker is not None:
                raise PoolBusy("another trace of this pool is under way; wait until it has ended, or end it")
            if not ready:
                raise PoolBusy("the pool's broker ended and another is taking over; ask again in a moment")
            if len(fds) != 1:
                raise ProtocolError("a trace is asked for with the one descriptor of what it is written to")
            self._asker = asker
            self._number += 1
            self._link.tell(c.StartTrace(self._number), fds)
            log.info("trace %d begins", self._number)
        except (PoolBusy, ProtocolError) as error:
            self._refuse(asker, error)
        finally:
            lifeline.close_all(fds)

    def _refuse(self, asker: Asker, error: PoolBusy | ProtocolError) -> None:
        asker.refuse(error)
        self._desk.dismiss(asker)

    def broker_said(self, message: c.TraceStarted | c.TraceStopped) -> None:
        """How it goes."""
        asker = self._asker
        if asker is None or message.trace != self._number:  # that of a command that is gone
            return
        if isinstance(message, c.TraceStarted):
            asker.tell(Tracing())
            return
        self._asker = None
        if message.text:
            self._refuse(asker, ProtocolError(message.text))
            return
        asker.tell(TraceOver())
        self._desk.dismiss(asker)

    def broker_ended(self) -> None:
        """Who wrote is gone; what it wrote is with the command."""
        asker, self._asker = self._asker, None
        if asker is not None:
            asker.tell(TraceOver("the pool's broker ended and another took over, which ends a trace; ask for another"))
            self._desk.dismiss(asker)
