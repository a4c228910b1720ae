"""A core that says what becomes of each work and batch: on the level "debug" the broker has this one.

It decides nothing.  Runs get the names of the works in them, so that the worker's lines have these too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from trtpool.ipc import messages as m
from trtpool.ipc.logs import work_id

from . import events as e
from .core import Core

log = logging.getLogger("trtpool.broker")

_ENDS: Final = {
    m.OK: "done", m.DEADLINE: "deadline passed", m.CANCELLED: "cancelled", m.ENGINE_FAILED: "engine failed",
    m.WORKER_DIED: "worker died",
}  # fmt: skip


class FollowedCore(Core):
    """See the module.

    Attributes:
        silent: what happens is said already, by the broker that this one takes over from.
    """

    silent = False

    def receive(self, peer: int, messages: Iterable[m.ToBroker], now_ns: int) -> None:
        """See `Core.receive`."""
        said = list(messages)
        super().receive(peer, said, now_ns)
        if not self.silent:
            for message in said:
                self._note(peer, message)

    def take(self) -> tuple[dict[int, list[m.FromBroker]], list[e.Action]]:
        """See `Core.take`."""
        mail, actions = super().take()
        for peer, messages in mail.items():
            messages[:] = [self._name(peer, message) if type(message) is m.Run else message for message in messages]
            if not self.silent:
                for message in messages:
                    self._tell(peer, message)
        return mail, actions

    def _note(self, peer: int, message: m.ToBroker) -> None:
        """What a peer said."""
        if isinstance(message, m.Submit):
            work = work_id(message.lease, message.seq)
            log.debug(
                "work %s of peer %d queued: %d items in %d slots", work, peer, message.items, message.count,
                extra={"work": work, "peer": peer},
            )  # fmt: skip
        elif isinstance(message, m.Finished):
            took_ms = (message.copy_in_ns + message.compute_ns + message.copy_out_ns) / 1e6
            log.debug(
                "batch %d, attempt %d, ended after %.3f ms", message.batch, message.attempt, took_ms,
                extra={"batch": message.batch, "attempt": message.attempt, "peer": peer},
            )  # fmt: skip
        elif isinstance(message, m.Failed):
            log.debug(
                "batch %d, attempt %d, failed: %s", message.batch, message.attempt, message.text,
                extra={"batch": message.batch, "attempt": message.attempt, "peer": peer},
            )  # fmt: skip

    def _tell(self, peer: int, message: m.FromBroker) -> None:
        """What is said to a peer."""
        extra: dict[str, Any]
        if isinstance(message, m.Run):
            extra = {"batch": message.batch, "attempt": message.attempt, "works": message.works, "peer": peer}
            log.debug(
                "batch %d, attempt %d, sent to peer %d: work %s", message.batch, message.attempt, peer,
                ", ".join(message.works), extra=extra,
            )  # fmt: skip
        elif isinstance(message, m.Done):
            work = work_id(message.lease, message.seq)
            extra = {"work": work, "peer": peer, "status": message.status}
            log.debug("work %s ended: %s", work, message.text or _ENDS[message.status], extra=extra)
        elif isinstance(message, m.Error):
            log.debug("peer %d was refused something: %s", peer, message.text, extra={"peer": peer})

    def _name(self, peer: int, run: m.Run) -> m.Run:
        """A Run with the names of its works."""
        worker = self.workers.get(peer)
        batch = None if worker is None else worker.batches.get(run.batch)
        if batch is None:
            return run
        names = dict.fromkeys(work_id(work.lease.id, work.seq) for work in batch.works)
        return msgspec.structs.replace(run, works=[*names][: m.MAX_NAMED])
