"""Who is who: tokens that bind a ZeroMQ identity to a lifeline, once."""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict
from typing import Final

SECRET_BYTES: Final = 32
TOKEN_BYTES: Final = 8 + SECRET_BYTES
MAX_TURNED_AWAY: Final = 4096


class Doorman:
    """Issues tokens and knows which identity is which peer."""

    def __init__(self) -> None:
        self._secrets: dict[int, bytes] = {}
        self._peers: dict[bytes, int] = {}
        self._identities: dict[int, bytes] = {}
        self._turned_away: OrderedDict[bytes, None] = OrderedDict()

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

    def bind(self, identity: bytes, token: bytes) -> int | None:
        """Bind `identity` to the peer that `token` was issued to; None if it is wrong or used."""
        peer = int.from_bytes(token[:8], "big")
        secret = self._secrets.get(peer)
        # Compared even when there is none, so that the time says nothing about which peers wait.
        right = hmac.compare_digest(secret or bytes(SECRET_BYTES), token[8:])
        if secret is None or not right or identity in self._peers:
            return None
        del self._secrets[peer]
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

    def forget(self, peer: int) -> None:
        """The peer is gone; its token and identity mean nothing any more."""
        self._secrets.pop(peer, None)
        identity = self._identities.pop(peer, None)
        if identity is not None:
            del self._peers[identity]
