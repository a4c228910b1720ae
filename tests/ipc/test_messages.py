from __future__ import annotations

import inspect
import re
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtpool.ipc import messages as m
from trtpool.ipc.errors import ProtocolError

TO_BROKER: tuple[type[m._Message], ...] = typing.get_args(m.ToBroker)
FROM_BROKER: tuple[type[m._Message], ...] = typing.get_args(m.FromBroker)
TAGGED = [
    kind
    for _, kind in inspect.getmembers(m, inspect.isclass)
    if issubclass(kind, m._Message) and kind.__struct_config__.tag is not None
]

u31, u63 = st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1)
count = st.integers(1, 2**31 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
FIELDS = {
    "token": st.binary(min_size=40, max_size=40),
    "caps": st.lists(u31, max_size=20),
    "request": st.integers(1, 2**63 - 1),
    "wait_ns": st.none() | u63,
    "deadline_ns": st.none() | u63,
    "leases": st.lists(st.tuples(u63, st.builds(m.SlotRun, u31, u31, count)), min_size=1, max_size=20),
    "rows": st.lists(st.builds(m.Rows, u31, u31, count, count), min_size=1, max_size=20),
    "works": st.lists(text, max_size=20),
    "lanes": st.integers(1, 64),
    "batches": count,
    "count": count,
    "items": count,
    "body": st.binary(max_size=200),
    "text": text,
    "device": text,
    "endpoint": text,
    "gpu": st.none() | u31,
    "priority": st.integers(0, 1),
    "shapes": st.lists(st.lists(st.integers(0, 2**40), max_size=4).map(tuple), max_size=3).map(tuple),
    "shared": st.binary(max_size=16),
    **dict.fromkeys(("lease", "seq", "epoch", "peer", "batch", "gathered_items", "filled_items", "said"), u63),
    **dict.fromkeys(("heard", "frames"), u63),
    **dict.fromkeys(("queue_ns", "copy_in_ns", "compute_ns", "copy_out_ns", "ended_ns", "leased_ns"), u63),
    **dict.fromkeys(("version", "model", "first", "status", "attempt", "code", "again"), u31),
}


def any_of(kinds: tuple[type[m._Message], ...]) -> st.SearchStrategy[m._Message]:
    return st.one_of(*(st.builds(kind, **{name: FIELDS[name] for name in kind.__struct_fields__}) for kind in kinds))


def refused(decode: typing.Callable[[bytes], object], frame: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode(frame)
    return str(caught.value)


@pytest.mark.parametrize("kind", TO_BROKER + FROM_BROKER, ids=lambda kind: kind.__name__)
def test_every_message_survives_the_way(kind):
    decode = m.decode_to_broker if kind in TO_BROKER else m.decode_from_broker

    @given(st.lists(any_of((kind,)), min_size=1, max_size=5))
    def check(messages):
        assert decode(m.encode(messages)) == messages

    check()


def test_every_message_goes_some_way_has_its_own_tag_and_stands_in_the_table():
    assert set(TAGGED) == set(TO_BROKER) | set(FROM_BROKER)
    tags = [kind.__struct_config__.tag for kind in TAGGED]
    assert len(set(tags)) == len(tags)
    table = inspect.cleandoc(m.__doc__ or "").split("::", 1)[1].split("A producer names")[0]
    first_column = [line[4:23] for line in table.splitlines() if line.startswith("    ")]
    in_table = set(re.findall(r"\b[A-Z]\w+", "\n".join(first_column)))
    assert in_table == {kind.__name__ for kind in TAGGED}


def test_every_message_is_frozen_strict_and_an_array():
    kinds: list[type[m._Message]] = [*TAGGED, m.SlotRun, m.Rows]
    for kind in kinds:
        config = kind.__struct_config__
        assert (config.frozen, config.array_like, config.forbid_unknown_fields) == (True, True, True), kind


def test_no_list_in_what_a_broker_reads_is_unbounded():
    """Only the frame itself has a length; the messages are flat."""
    for kind in TO_BROKER:
        for info in msgspec.structs.fields(kind):
            assert "list" not in str(info.type), f"{kind.__name__}.{info.name}"


@given(st.binary(max_size=400))
def test_random_bytes_are_refused_or_are_messages(frame):
    for decode in (m.decode_to_broker, m.decode_from_broker):
        try:
            messages = decode(frame)
        except ProtocolError:
            continue
        assert all(isinstance(message, m._Message) for message in messages)


@given(
    st.lists(any_of(TO_BROKER + FROM_BROKER), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(-20, 20),
)
def test_mutated_frames_are_refused_or_are_messages(messages, changes, length):
    frame = bytearray(m.encode(messages))
    for at, value in changes:
        frame[at % len(frame)] = value
    frame = frame + bytes(length) if length > 0 else frame[: len(frame) + length]
    for decode, kinds in ((m.decode_to_broker, TO_BROKER), (m.decode_from_broker, FROM_BROKER)):
        try:
            decoded = decode(bytes(frame))
        except ProtocolError:
            continue
        assert all(type(message) in kinds for message in decoded)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "truncated"),
        (b"\x91\x92\x11\xa1\xff", "utf-8"),  # Python's own error, not msgspec's
        (b"\xdd\xff\xff\xff\xff", "length <= 4096"),
        (b"\x91" * 5000, "Expected"),
        (b"\x91\x92\x11\xdb\xff\xff\xff\xff", "truncated"),
        (m.encode([]), "length >= 1"),
        (m.encode([m.Status(1)]) + b"\x00", "trailing"),
        (m.encode([m.Status(1)] * (m.MAX_MESSAGES + 1)), "length <= 4096"),
        (m.encode(m.Status(1)), "Expected"),
        (m.encode({"Status": 1}), "Expected `array`"),
        (m.encode([[14, 1, 2]]), "at most length 1, got 2"),
        (m.encode([[14]]), "length 2"),
        (m.encode([[99, 1]]), "Invalid value 99"),
        (m.encode([["Status", 1]]), "Expected `int`"),
        (m.encode([[14, -1]]), "int` >= 0"),
        (m.encode([[14, 2**63]]), "int` <= "),
        (m.encode([[14, 1.0]]), "Expected `int`"),
        (m.encode([[14, True]]), "Expected `int`"),
        (m.encode([[14, "1"]]), "Expected `int`"),
        (m.encode([[1, 1, b"short"]]), "length >= 40"),
        (m.encode([[1, 1, bytes(41)]]), "length <= 40"),
        (m.encode([[3, 0, 0, 1, None]]), "int` >= 1"),
        (m.encode([[3, 1, 0, 0, None]]), "int` >= 1"),
        (m.encode([[3, 1, 0, 2**31, None]]), "int` <= "),
        (m.encode([[10, "cpu", 0]]), "int` >= 1"),
        (m.encode([[10, "cpu", 65]]), "int` <= 64"),
        (m.encode([m.Bye("x" * 4097)]), "length <= 4096"),
    ],
)
def test_a_broker_refuses(frame, reason):
    text = refused(m.decode_to_broker, frame)
    assert reason in text
    assert text.startswith(f"a frame of {len(frame)} bytes")


@pytest.mark.parametrize(
    "frame",
    [
        m.encode([m.Grant(1, 0, [])]), m.encode([m.Run(1, 0, 0, [])]), m.encode([m.Welcome(1, 1, [0] * 1025)]),
        b"\xdd\xff\xff\xff\xff", b"\x91\x94\x04\x00\x00\xdd\xff\xff\xff\xff", b"\x91\x92\x11\xa1\xff",
    ],
)  # fmt: skip
def test_a_client_refuses(frame):
    assert refused(m.decode_from_broker, frame).startswith(f"the broker sent {len(frame)} bytes")


@pytest.mark.parametrize("kind", [kind for kind in TO_BROKER + FROM_BROKER if kind not in (m.Bye, m.Heard)])
def test_messages_go_one_way(kind):
    other_way = m.decode_from_broker if kind in TO_BROKER else m.decode_to_broker

    @given(any_of((kind,)))
    def check(message):
        refused(other_way, m.encode([message]))

    check()


def test_a_grant_of_very_many_runs_arrives():
    """A ring in pieces makes one run of each slot; the answer is still one Grant."""
    grant = m.Grant(1, 0, [(n, m.SlotRun(0, 2 * n, 1)) for n in range(2 * m.MAX_MESSAGES)])
    assert m.decode_from_broker(m.encode([grant])) == [grant]


def test_bodies_are_copied_out_of_the_frame():
    """A message outlives the receive buffer it was read from."""
    frame = bytearray(m.encode([m.Report(1, b"body"), m.Bye("text")]))
    messages = m.decode_from_broker(bytes(frame))
    frame[:] = bytes(len(frame))
    assert messages == [m.Report(1, b"body"), m.Bye("text")]
