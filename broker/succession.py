"""The brokers of a pool, one after another, and what outlives each of them.

::

    start --> ready --> drained --> ends
                 '-- ends --> another starts: told of workers, then clients, then TakeOver --> ready
                                   '-- ends as well, three times in a row: the pool ends

What a client holds must not be lost with a broker, so the supervisor keeps the lifeline and the pidfd of each; those of
the workers are kept by the crew.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from trtpool.ipc import lifeline
from trtpool.ipc.errors import PoolClosed, of_exit_code
from trtpool.ipc.process import describe_exit
from trtpool.ipc.settings import BrokerConfig

from . import control as c
from .broker_link import BrokerLink
from .children import Children
from .crew import Crew

if TYPE_CHECKING:
    from .tracing.traces import Traces

log = logging.getLogger("trtpool.supervisor")

BROKER_TRIES: Final = 3
"""How many brokers in a row may end before they are ready."""

HEAR_OUT_S: Final = 1.0
"""How long the broker may take to pass on what a worker said before it ended."""


class Succession:
    """See the module.

    Args:
        config: of each broker, but for its epoch and its end of the link.
        children: how to start one.
        link: how to talk with it.
        crew: the workers, of which it tells, and is told.

    Attributes:
        ready: whether the present broker is.
        generation: of the workers that the brokers certainly send work to.
        drained: whether all work is done, after which no other broker is started.
        traces: what is told of traces, once the pool serves.
    """

    def __init__(self, config: BrokerConfig, children: Children, link: BrokerLink, crew: Crew) -> None:
        self._config = config
        self._children = children
        self._link = link
        self._crew = crew
        self._clients: dict[int, tuple[int, list[int]]] = {}  # pid, lifeline and pidfd of each, for the next broker
        self._epoch = self._tries = 0
        self.ready = self.drained = False
        self.generation = 0
        self.traces: Traces | None = None

    def start(self) -> None:
        """Start the first broker, or one that takes over from it."""
        self._epoch += 1
        self.ready = False
        with self._children.room(), self._link.renew() as theirs:
            config = msgspec.structs.replace(
                self._config, epoch=self._epoch, control_fd=theirs.fileno(), takes_over=self._epoch > 1
            )
            assert config.table_fd is not None
            fds = [config.listener_fd, config.control_fd, config.arena_fd, config.table_fd]
            self._children.spawn("trtpool.broker", config, fds)
        self._link.watch()

    def hear(self) -> None:
        """Take the next thing that the broker says."""
        received = self._link.receive()
        if received is None:
            return
        message, fds = received
        if isinstance(message, c.BrokerReady):
            self.ready = True
        elif isinstance(message, c.PeerAdmitted):
            self._clients[message.peer] = (message.pid, fds)
            self._link.tell(c.PeerIsKept(message.peer))
        elif isinstance(message, c.PeerForgotten):
            lifeline.close_all(self._clients.pop(message.peer, (0, []))[1])
        elif isinstance(message, c.IsDrained):
            self.drained = True
        elif isinstance(message, c.WorkersSwitched):
            self.generation = message.generation
        elif isinstance(message, (c.TraceStarted, c.TraceStopped)):
            if self.traces is not None:
                self.traces.broker_said(message)
        elif isinstance(message, (c.WorkerIsReady, c.WorkerSaid, c.WorkerHangs, c.WorkerLeaves)):
            self._crew.hear(message)

    def hear_out(self, enough: Callable[[], bool]) -> None:
        """Wait for what a worker said before it ended: the broker reads that, at the latest when told of the end."""
        deadline = time.monotonic() + HEAR_OUT_S
        poller = select.poll()
        poller.register(self._link.sock, select.POLLIN)
        while not enough() and self._link.hears and (left := deadline - time.monotonic()) > 0:
            if poller.poll(left * 1000):
                self.hear()

    def ended(self, returncode: int, *, serving: bool, draining: bool) -> None:
        """The broker was reaped: start another, which goes on where this one ended.

        Args:
            returncode: how it ended.
            serving: whether the pool serves already.
            draining: whether it is to end.

        Raises:
            TrtpoolError: the pool does not serve yet, or brokers end before they are ready.
        """
        while self._link.hears:  # what it said last
            self.hear()
        if self.drained:
            return
        how = describe_exit(returncode)
        if not serving:
            raise of_exit_code(returncode)(f"the broker did not become ready: {how}; what it said is above")
        self._tries = 1 if self.ready else self._tries + 1
        if self._tries > BROKER_TRIES:
            raise PoolClosed(
                f"the broker ended: {how}, and so did {BROKER_TRIES} that were to take over; "
                "all that was in flight is lost, start the pool again"
            )
        log.error("the broker ended: %s; another takes over", how)
        if self.traces is not None:
            self.traces.broker_ended()
        self.start()
        self._crew.bequeath()  # first, so that there are descriptors for them
        for peer, (pid, fds) in self._clients.items():
            self._link.bequeath(c.PeerKept(peer, pid), fds)
        self._link.bequeath(c.TakeOver(), [])
        if self._crew.generation:
            self._link.bequeath(self._crew.switched(), [])
        if draining:
            self._link.bequeath(c.DrainNow(), [])

    def close(self) -> None:
        """Close what was kept for another broker."""
        for _, fds in self._clients.values():
            lifeline.close_all(fds)
        self._clients.clear()
