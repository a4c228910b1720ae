"""A client's connection to the pool: what it knows, and the parts that see to it.

::

    Session     connects, waits, ends
      .requests   asks for slots and figures          requests.py
      .work       submits, and hears of the end       inflight.py
      .returns    gives slots back                    returns.py
      .wire       messages out and in, and the lock   wire.py

All state is under one lock (`Wire.driver`), which is never held while user code runs: futures are announced after it
is released.
"""

from __future__ import annotations

import atexit
import contextlib
import operator
import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from . import messages as m
from .arena import Residence, map_segment
from .claims import ModelState
from .errors import InvalidInput, PoolClosed
from .inflight import InFlight
from .keeping import Keeper
from .layout import Layout
from .lifeline import Unwelcome, receive_description
from .lifeline import connect as connect_lifeline
from .link import LINGER_MS, TRANSPORTS, Attendant, Link
from .requests import Requests
from .returns import Returns
from .submitted import Submitted
from .waiting import AnyOf, Background, Target, Waitable
from .wire import Wire

CONNECT_TRIES: Final = 3
"""How often to connect: a broker that ends loses who it has not welcomed yet, and another takes over."""

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _forget_in_child() -> None:
    Keeper.forget_in_child()
    for session in _sessions:
        session.wire.forked = True
        session.link.abandon_in_child()


def _close_at_exit() -> None:
    """Close what was never closed while threads still run: in a finalizer at the very end, a join would not return."""
    for session in list(_sessions):
        session.close()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_close_at_exit)


class Session:
    """A connection to the pool in `run_dir`, over a `transport` that is a key of `link.TRANSPORTS`.

    For `busy_poll` see `Link`.

    Attributes:
        pool: its name.
        layout: its models and their planes.
        gpus: how many GPUs it has; 0 on the CPU.
        segment, residence: the mapped arena.
        models: what is kept of each model.
        wire, requests, work, returns: see the module.

    Raises:
        PoolNotFound, AccessDenied, PoolClosed, ProtocolError: see `trtpool.connect`.
    """

    def __init__(self, run_dir: Path, transport: str, busy_poll: bool | None = None) -> None:
        if transport not in TRANSPORTS:
            raise InvalidInput(f"there is no transport {transport!r}; there are {', '.join(TRANSPORTS)}")
        link = self._connect(run_dir, transport, busy_poll)
        self.models = [
            ModelState(layout, cap) for layout, cap in zip(self.layout.models, link.welcome.caps, strict=True)
        ]
        self.wire = Wire(link, self._has_afterwork, self._unlocked)
        self._driver = self.wire.driver
        self._background = Background(self._driver)
        self.requests = Requests(self, self.wire, self._is_only_thread)
        self.work = InFlight(self, self.wire, self._background, self._slow_ns)
        self.returns = Returns(self.wire, self.models)
        _sessions.add(self)
        with self._driver:
            self.wire.serve(
                {
                    m.Grant: self.requests.granted,
                    m.Done: self.work.done,
                    m.Error: self._error,
                    m.Recall: self.requests.recalled,
                    m.Report: self.requests.reported,
                    m.Bye: lambda bye: self._end(bye.text),
                },
                self._end,
            )
        link.attend(self.wire.attend)

    def _connect(self, run_dir: Path, transport: str, busy_poll: bool | None) -> Link:
        for _ in range(CONNECT_TRIES - 1):
            with contextlib.suppress(Unwelcome, PoolClosed):
                return self._connect_once(run_dir, transport, busy_poll)
        return self._connect_once(run_dir, transport, busy_poll)

    def _connect_once(self, run_dir: Path, transport: str, busy_poll: bool | None) -> Link:
        lifeline = connect_lifeline(run_dir)
        try:
            description, fd = receive_description(lifeline)
            try:
                self.segment = map_segment(fd, description.layout.segment_bytes)
            finally:
                os.close(fd)
        except BaseException:
            lifeline.close()
            raise
        self.residence = Residence(self.segment)
        self.pool = description.pool
        self.layout: Layout = description.layout
        self.gpus = description.gpus
        self._slow_ns = int(description.slow_ms * 1e6)
        return TRANSPORTS[transport](lifeline, description, busy_poll)

    @property
    def link(self) -> Link:
        """What carries the messages."""
        return self.wire.link

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.wire.closed

    @property
    def forked(self) -> bool:
        """Whether this process is a child of the one that connected."""
        return self.wire.forked

    def check_process(self) -> None:
        """Raise `ForkedClient` in a child of the process that connected."""
        self.wire.check_process()

    def check_gpu(self, gpu: int | None) -> int | None:
        """`gpu` as an int, or None.

        Raises:
            InvalidInput: the pool has no such GPU.
        """
        if gpu is None:
            return None
        number = operator.index(gpu)
        if not 0 <= number < self.gpus:
            if not self.gpus:
                has = "the pool runs on the CPU, so gpu= must be left out"
            else:
                has = f"the pool has GPU{'s 0 to' if self.gpus > 1 else ''} {self.gpus - 1}"
            raise InvalidInput(f"there is no GPU {number}: {has}")
        return number

    def _is_only_thread(self) -> bool:
        return threading.active_count() - self._background.idle - Attendant.count() - Keeper.count() == 1

    # ------------------------------------------------------------------ waiting

    def wait(self, submitted: Submitted, timeout_s: float | None) -> bool:
        """Wait for the end of some work; False when `timeout_s` passed first."""
        self.check_process()
        return self._driver.wait(submitted, timeout_s)

    def wait_any(self, targets: Sequence[Waitable], timeout_s: float | None) -> bool:
        """Wait for one of several; False when `timeout_s` passed first."""
        self.check_process()
        return self._driver.wait(AnyOf(targets), timeout_s)

    def finish(self, target: Target) -> None:
        """Mark something that no message ends, such as a wish to stop, as over."""
        with self._driver:
            self._driver.finish(target)

    def poll(self) -> None:
        """Take in what has arrived, unless another thread is at it."""
        self.check_process()
        self._driver.try_visit()

    def watch(self, submitted: Submitted) -> None:
        """Have a background thread drive the socket until `submitted` is over."""
        self.check_process()
        if not submitted.over:
            self._background.watch(submitted)

    # ------------------------------------------------------------------ after the lock was held

    def _has_afterwork(self) -> bool:
        return bool(self.work.ended or self.returns.dropped)

    def _unlocked(self) -> None:
        """Announce what has ended, and see to what finalizers left."""
        ended, returns = self.work.ended, self.returns
        while True:
            while ended:
                try:
                    submitted = ended.popleft()
                except IndexError:  # another thread was faster
                    break
                submitted.announce()
            if not (returns.dropped and self._driver.try_acquire()):
                break
            try:
                returns.settle_dropped()
            finally:
                self._driver.release()
        if returns.held:
            returns.warn_of_held()

    # ------------------------------------------------------------------ the end

    def _error(self, error: m.Error) -> None:
        if not self.requests.refused(error):
            self._end(f"the broker refused a message: {error.text}")

    def _end(self, reason: str) -> None:
        """Nothing more will come: fail all that is waited for; under the lock."""
        self.wire.over = reason
        self.work.end(reason)
        self.requests.end(reason)

    def close(self) -> None:
        """Give back what can be, and leave.  Again: nothing."""
        wire = self.wire
        if wire.gone:
            wire.closed = True
            return
        with self._driver:
            self.requests.close()
            linger_ms = LINGER_MS if wire.over is None else 0
            if wire.over is None:
                wire.send(m.Bye("closed"))
                self._end("this client is closed")
            wire.closed = True
            self._background.stop()
        self._driver.quiesce()
        self._background.join()
        self.returns.close()
        wire.link.close(linger_ms)
