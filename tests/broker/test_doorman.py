"""Tokens: each good once, for one identity, of the peer it was issued to."""

from __future__ import annotations

import pytest

from trtpool.broker import doorman
from trtpool.broker.doorman import SECRET_BYTES, Doorman
from trtpool.ipc.messages import Hello
from trtpool.ipc.settings import PROTOCOL_VERSION, TOKEN_BYTES


def hello(token: bytes, version: int = PROTOCOL_VERSION) -> Hello:
    return Hello(version, token)


def test_a_token_binds_an_identity_once():
    door = Doorman()
    token = door.issue(7)
    assert len(token) == TOKEN_BYTES
    assert (door.peer_of(b"a"), door.identity_of(7)) == (None, None)
    assert door.bind(b"a", hello(token)) == 7
    assert (door.peer_of(b"a"), door.identity_of(7)) == (7, b"a")
    assert door.bind(b"b", hello(token)) is None  # it is used
    assert door.bind(b"a", hello(door.issue(8))) is None  # it is somebody already
    assert (door.peer_of(b"a"), door.identity_of(8)) == (7, None)


def test_a_token_lets_its_peer_in_once_over_its_lifeline():
    door = Doorman()
    token, other = door.issue(7), door.issue(8)
    assert not door.redeem(7, hello(other))
    assert not door.redeem(8, hello(token))
    assert not door.redeem(7, hello(token, PROTOCOL_VERSION + 1))
    assert door.redeem(7, hello(token))
    assert not door.redeem(7, hello(token))
    assert door.bind(b"a", hello(token)) is None  # nor as an identity
    assert door.identity_of(7) is None


@pytest.mark.parametrize(
    "forge",
    [
        lambda token: bytes(TOKEN_BYTES),
        lambda token: token[:8] + bytes(SECRET_BYTES),
        lambda token: token[:-1] + bytes([token[-1] ^ 1]),
        lambda token: (2).to_bytes(8, "big") + token[8:],  # for a peer that waits too
        lambda token: (99).to_bytes(8, "big") + bytes(SECRET_BYTES),  # what an absent secret is compared as
        lambda token: token[:8],
        lambda token: b"",
        lambda token: token + b"\0",
    ],
    ids=["zeros", "no secret", "one bit", "another's", "nobody's", "short", "empty", "long"],
)
def test_a_forged_token_is_refused_and_the_true_one_stays_good(forge):
    door = Doorman()
    token, _ = door.issue(1), door.issue(2)
    assert door.bind(b"a", hello(forge(token))) is None
    assert door.peer_of(b"a") is None
    assert door.bind(b"a", hello(token)) == 1


def test_tokens_differ():
    door = Doorman()
    assert len({door.issue(1)[8:] for _ in range(100)}) == 100
    # Only the last one that was issued to a peer is good.
    first, last = door.issue(1), door.issue(1)
    assert door.bind(b"a", hello(first)) is None
    assert door.bind(b"a", hello(last)) == 1


def test_who_is_forgotten_is_a_stranger():
    door = Doorman()
    waiting, bound = door.issue(1), door.issue(2)
    door.bind(b"b", hello(bound))
    door.forget(1)
    door.forget(2)
    door.forget(3)  # was never there
    assert door.bind(b"a", hello(waiting)) is None
    assert (door.peer_of(b"b"), door.identity_of(2)) == (None, None)
    assert door.bind(b"b", hello(door.issue(4))) == 4  # the identity may come again, as another


def test_a_stranger_is_answered_once(monkeypatch):
    monkeypatch.setattr(doorman, "MAX_TURNED_AWAY", 3)
    door = Doorman()
    assert [door.turn_away(name) for name in (b"a", b"b", b"a", b"a", b"b")] == [True, True, False, False, False]
    # Only so many are remembered, the latest.
    for name in (b"c", b"d", b"e"):
        assert door.turn_away(name)
    assert door.turn_away(b"a")
    assert not door.turn_away(b"e")
    assert len(door._turned_away) == 3


def test_who_has_left_is_remembered_by_identity_and_by_the_token_that_was_never_used(monkeypatch):
    monkeypatch.setattr(doorman, "MAX_DEPARTED", 2)
    door = Doorman()
    token, unused = door.issue(7), door.issue(8)
    assert door.bind(b"a", hello(token)) == 7
    assert not door.has_left(b"a")
    assert not door.has_left(b"b", hello(unused))
    door.forget(7)
    door.forget(8)
    assert door.has_left(b"a")
    assert not door.has_left(b"b", hello(token)), "it was used, so that no one leaves by it"
    assert door.has_left(b"b", hello(unused))
    assert door.has_left(b"b"), "nor is what follows its Hello"
    assert not door.has_left(b"a"), "no more are remembered than that"
