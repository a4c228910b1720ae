"""Who is who: tokens that let a peer in once, over its lifeline or as a ZeroMQ identity bound to it."""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict
from typing import Final

from trtpool.ipc import messages as m
from trtpool.ipc.settings import PROTOCOL_VERSION, TOKEN_BYTES

SECRET_BYTES: Final = TOKEN_BYTES - 8
MAX_TURNED_AWAY: Final = 4096
MAX_DEPARTED: Final = 4096
"""How many of those who left are remembered: long enough for their last messages to come in."""


class Doorman:
    """Issues tokens and knows which identity is which peer."""

    def __init__(self) -> None:
        self._secrets: dict[int, bytes] = {}
        self._peers: dict[bytes, int] = {}
        self._identities: dict[int, bytes] = {}
        self._turned_away: OrderedDict[bytes, None] = OrderedDict()
        self._departed: OrderedDict[bytes, None] = OrderedDict()

    def issue(self, peer: int) -> bytes:
        """A token for `peer`: its number, to look it up by, and a secret."""
        secret = self._secrets[peer] = secrets.token_bytes(SECRET_BYTES)
        return peer.to_bytes(8, "big") + secret

    def peer_of(self, identity: bytes) -> int | None:
        """The peer that `identity` is bound to."""
        return self._peers.get(identity)

    def identity_of(self, peer: int) -> bytes | None:
        """The identity that `peer` is bound to."""
        return self._identities.get(peer)

    def redeem(self, peer: int, hello: m.Hello) -> bool:
        """Whether `hello` has the token of `peer`, which is used up by it, and its version is ours."""
        secret = self._secrets.get(peer)
        # Compared even when there is none, so that the time says nothing about which peers wait.
        right = hmac.compare_digest(peer.to_bytes(8, "big") + (secret or bytes(SECRET_BYTES)), hello.token)
        if secret is None or not right or hello.version != PROTOCOL_VERSION:
            return False
        del self._secrets[peer]
        return True

    def bind(self, identity: bytes, hello: m.Hello) -> int | None:
        """Bind `identity` to the peer whose token `hello` has; None if that is wrong or used."""
        peer = int.from_bytes(hello.token[:8], "big")
        if not self.redeem(peer, hello) or identity in self._peers:
            return None
        self._peers[identity] = peer
        self._identities[peer] = identity
        return peer

    def turn_away(self, identity: bytes) -> bool:
        """Whether an unbound identity should be answered: the first time only."""
        if identity in self._turned_away:
            return False
        self._turned_away[identity] = None
        if len(self._turned_away) > MAX_TURNED_AWAY:
            self._turned_away.popitem(last=False)
        return True

    def has_left(self, identity: bytes, hello: m.Hello | None = None) -> bool:
        """Whether this is from a peer that is gone: what it sent last may come in after its end was seen.

        Args:
            hello: what it sent, if it is that: one may be gone before it was let in.
        """
        if hello is not None and hello.token[8:] in self._departed:
            self._note_departed(identity)
        return identity in self._departed

    def forget(self, peer: int) -> None:
        """The peer is gone; its token and identity mean nothing any more."""
        secret = self._secrets.pop(peer, None)
        if secret is not None:
            self._note_departed(secret)
        identity = self._identities.pop(peer, None)
        if identity is not None:
            del self._peers[identity]
            self._note_departed(identity)

    def _note_departed(self, name: bytes) -> None:
        self._departed[name] = None
        if len(self._departed) > MAX_DEPARTED:
            self._departed.popitem(last=False)
