"""How a worker joins: what it is given over the lifeline, and what it checks before it uses it."""

from __future__ import annotations

import os
import socket

import msgspec
import numpy as np
import pytest

from tests.conftest import memory_held
from trtpool.ipc import messages as m
from trtpool.ipc.arena import create_segment, map_segment
from trtpool.ipc.errors import PoolNotFound, ProtocolError
from trtpool.ipc.layout import Layout, ModelPlan, plan
from trtpool.ipc.lifeline import Description, send_packet
from trtpool.ipc.settings import PROTOCOL_VERSION, WorkerConfig
from trtpool.ipc.tensors import ModelSpec, TensorSpec
from trtpool.workers.engine import Rows
from trtpool.workers.joining import join

X, Y = TensorSpec("x", "float32", (3,)), TensorSpec("y", "int16", ())
SPEC = ModelSpec("a", "/a.onnx", (X,), (Y,))
LAYOUT = plan([ModelPlan(SPEC, 8, 2, 6), ModelPlan(msgspec.structs.replace(SPEC, name="b"), 4, 1, 4)])


@pytest.fixture
def ends():
    """The broker's end of a lifeline, and the descriptor of the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ours, theirs.detach()
    ours.close()


@pytest.fixture
def arena():
    fd = create_segment(LAYOUT.segment_bytes)
    yield fd
    os.close(fd)


def describe(ours: socket.socket, arena: int, layout: Layout = LAYOUT) -> None:
    send_packet(ours, Description(PROTOCOL_VERSION, 1, "pool", "", b"", layout), [arena])


@pytest.fixture
def joined(ends, arena):
    ours, fd = ends
    describe(ours, arena)
    made = join(WorkerConfig(os.getpid(), fd, (), 1))
    yield made
    made.leave()


def test_a_worker_gets_the_arena_and_a_way_to_the_broker(joined, ends, arena):
    ours, _ = ends
    assert joined.models == LAYOUT.models
    assert os.fstat(joined.arena_fd).st_ino == os.fstat(arena).st_ino
    assert not os.get_inheritable(joined.arena_fd)
    joined.pipe.send([m.Ready("device", 3, 1)])
    assert m.decode_to_broker(ours.recv(4096)) == [m.Ready("device", 3, 1)]
    ours.send(m.encode([m.Bye("later")]))
    assert joined.pipe.receive() == [m.Bye("later")]


def test_planes_lie_in_the_arena(joined, arena):
    inputs, outputs = joined.planes(0, SPEC)
    assert {name: (plane.shape, plane.dtype) for name, plane in {**inputs, **outputs}.items()} == {
        "x": ((8, 2, 3), np.float32),
        "y": ((8, 2), np.int16),
    }
    seen = np.frombuffer(map_segment(arena, LAYOUT.segment_bytes), np.uint8)
    for plane, offset in ((inputs["x"], LAYOUT.models[0].inputs[0].offset), (outputs["y"], 4096)):
        plane[0].view(np.uint8)[...] = 0xA7
        assert (seen[offset : offset + plane[0].nbytes] == 0xA7).all()
    second, _ = joined.planes(1, msgspec.structs.replace(SPEC, name="b"))
    assert second["x"].shape == (4, 1, 3)


@pytest.mark.parametrize("changed", [{"name": "c"}, {"inputs": (Y,)}, {"outputs": (X,)}, {"batch_limit": 4}], ids=str)
def test_a_model_that_changed_meanwhile_is_refused(changed, joined):
    with pytest.raises(ProtocolError, match=r"/a.onnx changed while the pool started; start it again"):
        joined.planes(0, msgspec.structs.replace(SPEC, **changed))


def test_the_rows_of_a_batch(joined):
    run = m.Run(5, 0, 0, [m.Rows(0, 6, 2, 3), m.Rows(0, 0, 1, 1)])
    assert joined.rows(run) == [Rows(6, 2, 3), Rows(0, 1, 1)]


@pytest.mark.parametrize("rows", [m.Rows(0, 7, 2, 3), m.Rows(0, 8, 1, 1), m.Rows(1, 0, 1, 1)], ids=str)
def test_rows_outside_of_the_planes_are_refused(rows, joined):
    with pytest.raises(ProtocolError, match="batch 5 names slots"):
        joined.rows(m.Run(5, 0, 0, [m.Rows(0, 0, 1, 1), rows]))


def test_the_slots_of_each_model_count(joined):
    rows = [m.Rows(0, 4, 1, 1)]
    assert joined.rows(m.Run(1, 0, 0, rows))
    with pytest.raises(ProtocolError, match=r"slots 4\+1 of 4"):
        joined.rows(m.Run(1, 0, 1, rows))


def test_a_pool_that_ended_meanwhile_is_no_pool(ends):
    ours, fd = ends
    ours.close()
    with pytest.raises(PoolNotFound, match="start it again"):
        join(WorkerConfig(os.getpid(), fd, (), 1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_an_arena_of_another_size_is_refused(ends):
    ours, fd = ends
    small = create_segment(4096)
    describe(ours, small)
    os.close(small)
    memfds = memory_held()["memfd"]
    with pytest.raises(ProtocolError, match="4096 bytes, expected"):
        join(WorkerConfig(os.getpid(), fd, (), 1))
    assert memory_held()["memfd"] == memfds
