"""The first frame of a client: it must begin with Hello and the token that the client was given on its lifeline.

::

    lifeline: Hello(token) --> redeemed: it talks over the lifeline              anything else: it is cut off
    identity: Hello(token) --> bound to the lifeline that had the token, once    anything else: Error, once for each
                                '-- from a client of the last broker: it says how many frames it had, and hears the rest
"""

from __future__ import annotations

from trtpool.ipc import messages as m
from trtpool.ipc.errors import ProtocolError

from .doorman import Doorman
from .ledger import Ledger
from .peers import Peer, Peers
from .router import Router


class Greeting:
    """See the module.

    Args:
        ledger: where clients are noted.
        peers: who was let in.
        doorman: who knows the tokens.
        router: how to answer those that are bound to no lifeline.
    """

    def __init__(self, ledger: Ledger, peers: Peers, doorman: Doorman, router: Router) -> None:
        self._ledger = ledger
        self._peers = peers
        self._doorman = doorman
        self._router = router

    def on_lifeline(self, peer: Peer, frame: memoryview, now: int) -> None:
        """A frame came over the lifeline of a peer that has not chosen to talk there, or has chosen ZeroMQ."""
        hello = _hello(frame)
        if peer.joined or hello is None or not self._doorman.redeem(peer.number, hello):
            self._peers.cut_off_for_violation(peer)
            return
        peer.direct = peer.joined = True
        self._ledger.join(peer.number, frame, now, peer.pid)

    def of_identity(self, identity: bytes, frame: bytes, now: int) -> None:
        """A frame came over ZeroMQ from an identity that is bound to nobody."""
        if self._doorman.has_left(identity):
            return
        hello = _hello(frame)
        number = None if hello is None else self._doorman.bind(identity, hello)
        if number is None:
            if not self._doorman.has_left(identity, hello):
                self._ledger.core.violations += 1
                self._turn_away(identity)
            return
        peer = self._peers.of[number]
        if peer.joined:
            self._reconnected(peer, frame)
            return
        peer.joined = True
        self._ledger.join_over_zmq(number, frame, now, peer.pid)
        peer.mail = self._ledger.mail[number]

    def _turn_away(self, identity: bytes) -> None:
        if self._doorman.turn_away(identity):
            denial = m.Error(m.DENIED, "the first message must be Hello with a token of this pool")
            self._router.answer(identity, m.encode([denial]))

    def _reconnected(self, peer: Peer, frame: bytes) -> None:
        """A client of the last broker said Hello, and how many frames it has had: send what it has not."""
        try:
            self._ledger.reconnect(peer.number, frame)
        except ProtocolError:
            self._peers.cut_off_for_violation(peer)
            return
        self._peers.heard_from(peer)


def _hello(frame: bytes | memoryview) -> m.Hello | None:
    """What a frame begins with, if it is a good one that begins with Hello."""
    try:
        first = m.decode_to_broker(frame)[0]
    except ProtocolError:
        return None
    return first if isinstance(first, m.Hello) else None
