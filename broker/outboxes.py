"""What waits to be sent to peers, and the bounds of it.

A frame goes out at once if the peer has room.  Who has none is slow, and tried again soon; who talks over ZeroMQ and
has not said that it heard enough of what it was sent is stalled, until it says something.  What waits is bounded for
each peer, for all of them, and by what the journal has room for; who is beyond a bound is cut off.
"""

from __future__ import annotations

import errno
import logging
import socket
from typing import Final

from .doorman import Doorman
from .journal import JournalFull
from .ledger import Ledger
from .peers import Peer, Peers
from .router import Router

log = logging.getLogger("trtpool.broker")

# A plain integer: enum flags cost 2 us a use.
SEND_FLAGS: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

MAX_OUTBOX_FRAMES: Final = 1024
"""Frames kept for a peer that reads too slowly; one more ends its connection."""

MAX_UNSENT_BYTES: Final = 32 << 20
"""Bytes kept for all peers that read too slowly; more end the connection of the one that has most.  The journal must
have room for them."""

ZMQ_WINDOW: Final = 256
"""Frames that a client over ZeroMQ may be sent without having said that it heard them; a lifeline takes as many."""


class Outboxes:
    """See the module.

    Args:
        ledger: whose mail is sent.
        peers: whom to.
        doorman: who knows which clients over ZeroMQ are there.
        router: how to reach these.
    """

    def __init__(self, ledger: Ledger, peers: Peers, doorman: Doorman, router: Router) -> None:
        self._ledger = ledger
        self._peers = peers
        self._doorman = doorman
        self._router = router

    # ------------------------------------------------------------------ sending

    def send(self, peer: Peer) -> None:
        """Send what waits for a peer, as far as it takes it now."""
        unsent = peer.mail.unsent
        if peer.direct and len(unsent) == 1 and not peer.resume and _try_pipe(peer, unsent[0]):  # as nearly always
            unsent.popleft()
            self._peers.slow.discard(peer)
            return
        if peer.sock.fileno() < 0:
            peer.mail.clear()  # it left, or was cut off
            return
        slow, stalled = self._peers.slow, self._peers.stalled
        if peer.resume:
            if not _try_pipe(peer, peer.resume):
                slow.add(peer)
                return
            peer.resume = b""
        while unsent and self._may_send(peer) and self._try_send(peer, unsent[0]):
            unsent.popleft()
        slow.discard(peer)
        stalled.discard(peer)
        if not unsent:
            return
        (slow if self._may_send(peer) else stalled).add(peer)
        mail = peer.mail
        if len(mail.kept) > MAX_OUTBOX_FRAMES + (ZMQ_WINDOW if mail.zmq else 0):
            self._cut_off_slow(peer)

    def say_last(self, peer: Peer, frame: bytes) -> None:
        """Send what waits for a peer, and then, if all of that went out, `frame`, of which nothing is written down."""
        self.send(peer)
        if not peer.mail.unsent:
            self._try_send(peer, frame)

    def _may_send(self, peer: Peer) -> bool:
        """Whether a peer is there to be sent something; one over ZeroMQ has also heard most of what it was sent."""
        post = peer.mail.post
        if post is None:
            return True
        there = self._doorman.identity_of(peer.number) is not None
        return there and len(post.unheard) - len(peer.mail.unsent) < ZMQ_WINDOW

    def _try_send(self, peer: Peer, frame: bytes) -> bool:
        """Send a frame if it can be sent now; see `Router.send`."""
        return _try_pipe(peer, frame) if peer.direct else self._router.send(peer.number, frame)

    # ------------------------------------------------------------------ bounds

    def bound(self) -> None:
        """Keep what waits for slow readers below `MAX_UNSENT_BYTES`."""
        sizes = {peer: sum(map(len, peer.mail.kept)) for peer in self._peers.slow | self._peers.stalled}
        total = sum(sizes.values())
        for peer, size in sorted(sizes.items(), key=lambda item: -item[1]):
            if total <= MAX_UNSENT_BYTES:
                return
            self._cut_off_slow(peer)
            total -= size

    def _cut_off_slow(self, peer: Peer) -> None:
        log.warning("peer %d (process %d) reads too slowly, and is cut off", peer.number, peer.pid)
        self._peers.cut_off(peer)

    def shed(self, full: JournalFull) -> None:
        """Cut off those clients that most of what does not fit is kept for: frames that wait, and requests.

        Raises:
            JournalFull: it is kept for nobody.
        """
        weights = {
            peer: self._ledger.weight(peer.number)
            for peer in self._peers.of.values()
            if peer.worker is None and peer.sock.fileno() >= 0
        }
        total = too_much = sum(weights.values())
        if not total:
            raise full
        for peer in sorted(weights, key=weights.__getitem__, reverse=True):
            log.warning("peer %d (process %d) lets too much wait for it, and is cut off", peer.number, peer.pid)
            self._peers.cut_off(peer)
            too_much -= weights[peer]
            if 4 * too_much <= 3 * total:
                return


def _try_pipe(peer: Peer, frame: bytes) -> bool:
    try:
        peer.sock.send(frame, SEND_FLAGS)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EBADF, errno.ENOTCONN):
            raise
    return True
