"""What a broker does first when it takes over from one that ended.

::

    inherit: lifelines and pidfds --> the ledger handles again what is written --> peers are watched
        --> the last turn ends, and a snapshot is written --> each peer is told where its messages go on
        --> workers that came or went meanwhile, and clients that were lost

Who dies in this leaves all as it was, until the ledger is compact: the next broker does the same.
"""

from __future__ import annotations

import logging
import os
import time

from trtpool.ipc import messages as m

from . import events as e
from .admission import Admission
from .doorman import Doorman
from .inheritance import Inheritance, Kept
from .ledger import Ledger
from .mail import Mail
from .outboxes import Outboxes
from .peers import Peer, Peers, shut
from .turn_end import TurnEnd

log = logging.getLogger("trtpool.broker")


class TakeOver:
    """See the module.

    Args:
        ledger: a new one, over the journal of the broker that ended.
        peers, outboxes, admission, turn_end: of the broker that takes over.
        doorman: who makes tokens for clients over ZeroMQ, which must connect again.
        endpoint: where these find us.
        epoch: ours.
    """

    def __init__(
        self,
        ledger: Ledger,
        peers: Peers,
        outboxes: Outboxes,
        admission: Admission,
        turn_end: TurnEnd,
        doorman: Doorman,
        endpoint: str,
        epoch: int,
    ) -> None:
        self._ledger = ledger
        self._peers = peers
        self._outboxes = outboxes
        self._admission = admission
        self._turn_end = turn_end
        self._doorman = doorman
        self._endpoint = endpoint
        self._epoch = epoch

    def run(self, kept: Inheritance) -> None:
        """Go on where a broker ended, with what the supervisor kept of it."""
        ledger, now = self._ledger, time.monotonic_ns()
        rest = ledger.recover(now)
        ledger.next_peer = max(ledger.next_peer, *(number + 1 for number in kept.peers), 1)
        numbers = {mail.worker: peer for peer, mail in ledger.mail.items() if mail.worker is not None}
        for worker, one in kept.workers.items():
            if worker in numbers:
                self._peers.watch(Peer(numbers[worker], one.sock, one.pidfd, one.pid, worker))
        for number, one in kept.peers.items():
            self._keep_or_drop(number, one)
        self._end_last_turn(rest, now)
        self._tell_where_to_go_on()
        for worker, one in kept.workers.items():
            if worker not in numbers:  # the last broker never heard of it
                self._admission.start_worker(worker, one)
        for worker in numbers.keys() - kept.workers.keys():
            ledger.decide(e.WorkerEnded(numbers[worker], "it ended while the broker did"), now)
        for number in [one for one in ledger.core.producers if one not in self._peers.of]:
            log.warning(
                "peer %d was lost: what it holds stays taken; raise the limit on open files (ulimit -n)", number
            )
            ledger.decide(e.ProducerClosed(number), now)
        log.warning("this broker has taken over: epoch %d, %d peers", self._epoch, len(self._peers.of))

    def _keep_or_drop(self, number: int, kept: Kept) -> None:
        if number not in self._ledger.core.producers:  # it was not welcomed yet, and connects again
            shut(kept.sock)
            os.close(kept.pidfd)
            self._peers.forget_kept(number)
            self._ledger.forget(number)
            return
        peer = Peer(number, kept.sock, kept.pidfd, kept.pid, None)
        peer.joined = True
        peer.direct = not self._ledger.mail.get(number, Mail()).zmq
        self._peers.watch(peer)
        if self._ledger.core.producers[number].closed:
            self._peers.close_lifeline(peer)

    def _end_last_turn(self, rest: list[e.Action], now: int) -> None:
        end = self._turn_end
        end.see_to(rest)
        end.compact(lambda: end.forget_all(end.see_to(self._ledger.end_turn(now)[1])))

    def _tell_where_to_go_on(self) -> None:
        for peer in list(self._peers.of.values()):
            if peer.sock.fileno() >= 0:
                peer.resume = m.encode([self._resume(peer)])
                self._outboxes.send(peer)
        self._ledger.sent([peer.number for peer in self._peers.slow])

    def _resume(self, peer: Peer) -> m.Resume | m.Reconnect:
        """What a peer of the last broker is told first."""
        post = peer.mail.post
        if post is None:
            return m.Resume(self._epoch, peer.mail.said)
        token = self._doorman.issue(peer.number)
        return m.Reconnect(self._epoch, post.heard, self._endpoint, token)
