"""The broker's real loop in this process, driven turn by turn by fake clients, a fake worker and a fake supervisor.

All talk over real sockets, so the broker makes the system calls that it always makes; but nobody else runs while it
does, and nothing else is counted.  What this file needs of the loop's inside is in `turn`, `is_ready`, `core_of`
and `close_sockets`.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

import msgspec

from trtpool.broker import control as c
from trtpool.broker.core import Core
from trtpool.broker.journal import create_table, journal_bytes
from trtpool.broker.loop import Loop, configure
from trtpool.ipc import lifeline
from trtpool.ipc import messages as m
from trtpool.ipc.arena import create_segment
from trtpool.ipc.keeping import REUSED_BYTES
from trtpool.ipc.layout import ModelPlan, plan
from trtpool.ipc.rundir import LIFELINE
from trtpool.ipc.settings import MAX_FRAME_BYTES, PROTOCOL_VERSION, BrokerConfig
from trtpool.ipc.tensors import ModelSpec, TensorSpec

PATIENCE_TURNS: Final = 100
"""Turns that a peer takes to come in, at most."""

BATCH_TIMEOUT_S: Final = 300.0
"""As pools have it, so that its timers are there."""


def is_ready(loop: Loop) -> bool:
    """Whether a turn has something to do, and so does not sleep."""
    return bool(loop._epoll.poll(0))  # noqa: SLF001


def turn(loop: Loop) -> None:
    """One turn; it sleeps if nothing has happened."""
    loop.turn()


def core_of(loop: Loop) -> Core:
    """What decides in a loop."""
    return loop._core  # noqa: SLF001


def close_sockets(loop: Loop) -> None:
    """Close what a loop leaves open when it has ended, since its process ends then."""
    loop._admission.listener.close()  # noqa: SLF001
    loop._control.sock.close()  # noqa: SLF001


@dataclass(frozen=True)
class Case:
    """A steady load.

    Attributes:
        name: for the report.
        title: what it is, in words.
        producers: clients.
        window: runs that each keeps in flight.
        run: slots of each.
        items_per_slot: items in each slot, all of them full.
        lanes, max_batch: the worker's.
        run_us: how long it says that a batch took.
        apart: peers answer one after the other, each before the next turn, and clients say each run in a frame of its
            own, as those do who wait for each of their runs; else all answer before each turn, in a frame each.
    """

    name: str
    title: str
    producers: int
    window: int
    run: int
    items_per_slot: int = 1
    lanes: int = 3
    max_batch: int = 256
    apart: bool = False
    run_us: int = 300

    @property
    def uses_again(self) -> bool:
        """Whether a client with items of 1 KiB would use the slots of a run again."""
        return self.run * self.items_per_slot << 10 >= REUSED_BYTES

    @property
    def slots(self) -> int:
        """Room for four times what is in flight, so that the next can be granted in advance."""
        in_flight = self.producers * self.window * self.run
        return 4 * max(in_flight, -(-self.max_batch // self.items_per_slot))

    @property
    def cap(self) -> int:
        """Slots that a producer may hold; what all of them leave over can be granted in advance."""
        return max(self.slots // (2 * self.producers), 2 * self.window * self.run)


@dataclass
class Traffic:
    """What went to the broker and came from it."""

    items: int = 0
    frames_in: int = 0
    frames_out: int = 0
    messages_in: int = 0
    messages_out: int = 0
    batches: int = 0
    runs: int = 0


class _End:
    """A socket of ours that the broker has the other end of, counted."""

    def __init__(self, sock: socket.socket, traffic: Traffic) -> None:
        sock.setblocking(False)
        self._sock, self._traffic = sock, traffic

    def send(self, messages: list[m.ToBroker]) -> None:
        self._traffic.frames_in += 1
        self._traffic.messages_in += len(messages)
        self._sock.send(m.encode(messages))

    def receive(self) -> list[m.FromBroker]:
        """All that has come."""
        came: list[m.FromBroker] = []
        while True:
            try:
                frame = self._sock.recv(MAX_FRAME_BYTES)
            except BlockingIOError:
                self._traffic.messages_out += len(came)
                return came
            self._traffic.frames_out += 1
            came += m.decode_from_broker(frame)

    def close(self) -> None:
        self._sock.close()


class Client:
    """Keeps runs in flight as the real one does.

    Those that the real one would use again are submitted again; others are released with the next submission, in one
    frame.
    """

    def __init__(self, end: _End, case: Case, traffic: Traffic) -> None:
        self._end, self._case, self._traffic = end, case, traffic
        self._request = self._seq = 0
        self._runs: dict[int, tuple[int, int]] = {}  # slots of a lease that is used again, and those not done
        self._owed = 0  # slots that came back and were not granted anew
        self.stopped = False
        end.send([self._lease() for _ in range(case.window)])

    def _lease(self) -> m.Lease:
        self._request += 1
        return m.Lease(self._request, 0, self._case.run, None)

    def step(self) -> None:
        """Answer what has come; after `stopped`, release what is done and submit nothing."""
        said: list[m.ToBroker] = []
        submissions: list[m.ToBroker] = []
        for message in self._end.receive():
            if type(message) is m.Done:
                if message.status != m.OK:
                    raise RuntimeError(f"the broker ended work with {message}")
                self._traffic.items += message.count * self._case.items_per_slot
                if self._case.uses_again:
                    (said if self.stopped else submissions).extend(self._again(message))
                else:
                    self._owed += message.count
                    said.append(m.Release(message.lease, message.first, message.count))
            elif type(message) is m.Grant:
                for lease_id, run in message.leases:
                    self._owed -= 0 if message.request else run.count
                    submissions.append(self._submit(lease_id, run.count))
            elif type(message) not in (m.Welcome, m.Recall):
                raise RuntimeError(f"the broker said {message}")
        if not self.stopped:
            said += submissions
            while self._owed >= self._case.run:
                self._owed -= self._case.run
                said.append(self._lease())
        if self._case.apart:
            self._send_apart(said)
        elif said:
            self._end.send(said)

    def _again(self, done: m.Done) -> Iterator[m.ToBroker]:
        """What follows when all of a run is done, which may end in parts."""
        count, left = self._runs[done.lease]
        left -= done.count
        self._runs[done.lease] = count, left
        if not left:
            yield m.Release(done.lease, 0, count) if self.stopped else self._submit(done.lease, count)

    def _send_apart(self, said: list[m.ToBroker]) -> None:
        """A result's release and the next submission, or request, in a frame for each of these."""
        releases = [one for one in said if type(one) is m.Release]
        for one in said:
            if type(one) is not m.Release:
                self._end.send([*releases[:1], one])
                del releases[:1]
        if releases:
            self._end.send([*releases])

    def _submit(self, lease_id: int, count: int) -> m.Submit:
        self._seq += 1
        again = count
        if self._case.uses_again:
            self._runs[lease_id], again = (count, count), 0
        return m.Submit(lease_id, 0, count, self._seq, count * self._case.items_per_slot, None, again)

    def close(self) -> None:
        self._end.close()


class Worker:
    """Finishes whatever it is sent."""

    def __init__(self, end: _End, case: Case, traffic: Traffic) -> None:
        self._end, self._traffic, self._run_ns = end, traffic, 1000 * case.run_us
        end.send([m.Ready("a fake", case.lanes)])

    def step(self) -> None:
        """A frame for each batch, as batches end one after the other."""
        for message in self._end.receive():
            if type(message) is m.Run:
                self._traffic.batches += 1
                self._traffic.runs += len(message.rows)
                self._end.send([m.Finished(message.batch, message.attempt, 1_000, self._run_ns, 1_000, 0)])

    def close(self) -> None:
        self._end.close()


class Rig:
    """A loop with its peers, in a steady state when the constructor returns; a context manager.

    Args:
        case: the load.

    Attributes:
        traffic: counted from then on.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.traffic = Traffic()
        self._clients: list[Client] = []
        self._worker: Worker | None = None
        with contextlib.ExitStack() as undo:
            folder = Path(tempfile.mkdtemp(prefix="bench-"))
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            self._start(folder, undo)
            self._add_worker()
            for _ in range(case.producers):
                self._add_client(folder)
            self._undo = undo.pop_all()

    def _start(self, folder: Path, undo: contextlib.ExitStack) -> None:
        case = self.case
        spec = ModelSpec("fake", "/fake.onnx", (TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", ()),))
        layout = plan([ModelPlan(spec, case.slots, case.items_per_slot, case.max_batch)])
        arena = create_segment(layout.segment_bytes)
        undo.callback(os.close, arena)
        table = create_table(journal_bytes(layout))
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(self._control.close)
        self._control.setblocking(False)
        config = BrokerConfig(
            parent_pid=os.getpid(),
            name="bench",
            run_dir=str(folder),
            epoch=1,
            layout=layout,
            max_slots_per_producer=case.cap,
            max_delay_us=0,
            gpus=0,
            listener_fd=lifeline.listen(folder).detach(),
            control_fd=theirs.detach(),
            arena_fd=arena,
            batch_timeout_s=BATCH_TIMEOUT_S,
            table_fd=table,
        )
        undo.callback(os.close, table)  # the loop has a mapping of it
        self.loop = Loop(configure(msgspec.json.encode(config)))

    def _add_worker(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pidfd = os.pidfd_open(os.getpid())
        with theirs:
            lifeline.send_packet(self._control, c.WorkerStarted(1, os.getpid()), [theirs.fileno(), pidfd])
        os.close(pidfd)
        self._admitted(ours)
        self._worker = Worker(_End(ours, self.traffic), self.case, self.traffic)
        self._settle()

    def _add_client(self, folder: Path) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(folder / LIFELINE))
        token = self._admitted(sock).token
        end = _End(sock, self.traffic)
        end.send([m.Hello(PROTOCOL_VERSION, token)])
        self._settle()
        self._clients.append(Client(end, self.case, self.traffic))
        self._settle()

    def _admitted(self, sock: socket.socket) -> lifeline.Description:
        """Let the loop take a peer in; returns what it is told."""
        for _ in range(PATIENCE_TURNS):
            self._settle()
            if select.select([sock], [], [], 0)[0]:
                description, arena = lifeline.receive_description(sock)
                os.close(arena)
                return description
        raise RuntimeError(
            "the broker took no peer in; has what it asks of the supervisor changed? see broker/control.py"
        )

    def _settle(self) -> None:
        while is_ready(self.loop):
            self.loop.turn()
            self._supervise()

    def _supervise(self) -> None:
        """What a supervisor does for the broker: take descriptors, and say that it keeps them."""
        while True:
            try:
                data, fds = lifeline.receive_packet(self._control)
            except BlockingIOError:
                return
            lifeline.close_all(fds)
            message = c.decode(data)
            answer = getattr(c, "PeerIsKept", None)
            if isinstance(message, c.PeerAdmitted) and answer is not None:
                lifeline.send_packet(self._control, answer(message.peer))

    def step(self, run_turn: Callable[[Loop], None] = turn) -> bool:
        """All peers answer what they have got, and the loop has its turn; False if it had nothing to do.

        Those of a case in which they are apart have a turn for each that said something.
        """
        had_turn = False
        peers: list[Client | Worker] = [*self._clients, *([] if self._worker is None else [self._worker])]
        for peer in peers:
            peer.step()
            if (self.case.apart or peer is peers[-1]) and is_ready(self.loop):
                run_turn(self.loop)
                had_turn = True
        return had_turn

    def restart_count(self) -> Traffic:
        """What was counted so far; from now on it is counted from 0."""
        so_far = replace(self.traffic)
        for one in fields(Traffic):
            setattr(self.traffic, one.name, 0)
        return so_far

    def close(self) -> None:
        """Let all work end, and the loop say goodbye."""
        for client in self._clients:
            client.stopped = True
        while self.step():
            self._supervise()
        lifeline.send_packet(self._control, c.DrainNow())
        self.loop.run()
        close_sockets(self.loop)
        for peer in (*self._clients, self._worker):
            if peer is not None:
                peer.close()
        self._undo.close()

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
