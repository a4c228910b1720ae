"""The broker's loop in a thread of this process; the test is supervisor, worker and clients at once."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from tests.broker.core_rig import layouts
from tests.system.raw import Raw
from tests.system.rig import PATIENCE_S
from trtpool.broker import admission, outboxes
from trtpool.broker import control as c
from trtpool.broker import events as e
from trtpool.broker import loop as loop_module
from trtpool.broker.journal import Journal
from trtpool.broker.loop import LOOKS, Loop, configure
from trtpool.ipc import lifeline
from trtpool.ipc import messages as m
from trtpool.ipc.arena import create_segment
from trtpool.ipc.errors import AccessDenied
from trtpool.ipc.layout import Layout
from trtpool.ipc.pipe import FRAME_BYTES
from trtpool.ipc.process import Credentials
from trtpool.ipc.report import PoolReport
from trtpool.ipc.rundir import RunDir
from trtpool.ipc.settings import BrokerConfig

SEGMENT_BYTES = 1 << 16
T = TypeVar("T")


class Worker:
    """The worker's end of a lifeline, as the supervisor makes it."""

    def __init__(self, broker: Broker, number: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pidfd = os.pidfd_open(os.getpid())
        with theirs:
            lifeline.send_packet(broker.control, c.WorkerStarted(number, os.getpid()), [theirs.fileno(), pidfd])
        os.close(pidfd)
        self.number = number
        self.description, arena_fd = lifeline.receive_description(ours)
        os.close(arena_fd)
        ours.settimeout(PATIENCE_S)
        self.sock = ours
        (welcome,) = self.receive()
        assert isinstance(welcome, m.Welcome)

    def send(self, *messages: m.ToBroker) -> None:
        self.sock.send(m.encode(messages))

    def receive(self) -> list[m.FromBroker]:
        return m.decode_from_broker(self.sock.recv(FRAME_BYTES))

    def run(self) -> m.Run:
        """Wait for a batch."""
        (run,) = self.receive()
        assert isinstance(run, m.Run)
        return run

    def finish(self, run: m.Run) -> None:
        self.send(m.Finished(run.batch, run.attempt, 1, 2, 3, 0))

    def close(self) -> None:
        self.sock.close()


class Broker:
    """A loop in a thread, and the supervisor's end of its control socket.

    Args:
        starts: whether it serves at once; else the test makes its turns, and it serves at the end.
    """

    def __init__(
        self,
        run_dir: Path,
        max_delay_us: int = 0,
        gpus: int = 0,
        batch_timeout_s: float = 0.0,
        owner_pid: int = 0,
        *,
        starts: bool = True,
    ) -> None:
        self.run_dir = RunDir.claim(run_dir)
        self._arena_fd = create_segment(SEGMENT_BYTES)
        listener = lifeline.listen(run_dir)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(PATIENCE_S)
        config = BrokerConfig(
            parent_pid=os.getpid(),
            name="test",
            run_dir=str(run_dir),
            epoch=3,
            layout=Layout(layouts((16, 1, 4)), SEGMENT_BYTES),
            max_slots_per_producer=0,
            max_delay_us=max_delay_us,
            gpus=gpus,
            listener_fd=listener.detach(),
            control_fd=theirs.detach(),
            arena_fd=self._arena_fd,
            batch_timeout_s=batch_timeout_s,
            owner_pid=owner_pid,
        )
        self.loop = Loop(configure(msgspec.json.encode(config)))
        self.thread = threading.Thread(target=self._run)
        self.peers: list[Raw | Worker] = []
        if starts:
            self.start()

    def start(self) -> None:
        self.thread.start()
        assert self.hear() == c.BrokerReady()

    def _run(self) -> None:
        with contextlib.suppress(SystemExit):  # the supervisor ended
            self.loop.run()

    def hear(self) -> c.Control:
        message: c.Control = c.decode(lifeline.receive_packet(self.control)[0])
        return message

    def tell(self, message: c.Control) -> None:
        lifeline.send_packet(self.control, message)

    def client(self, transport: str = "lifeline", *, greet: bool = True) -> Raw:
        self.peers.append(client := Raw(lifeline.connect(self.run_dir.path), transport, greet=greet))
        return client

    def worker(self, number: int = 1) -> Worker:
        """A worker that is ready."""
        self.peers.append(worker := Worker(self, number))
        worker.send(m.Ready("cpu", 1))
        assert self.hear() == c.WorkerIsReady(number)
        return worker

    def close(self) -> None:
        if self.thread.ident is None:
            self.start()
        for peer in self.peers:
            peer.close()
            if isinstance(peer, Worker) and self.thread.is_alive():  # what it was sent would keep the broker
                self.tell(c.WorkerGone(peer.number, "closed"))
        if self.thread.is_alive():
            self.tell(c.DrainNow())
            self.thread.join(PATIENCE_S)
        self.control.close()  # its end too, if it did not drain
        self.thread.join(PATIENCE_S)
        alive = self.thread.is_alive()
        for sock in (self.loop._admission.listener, self.loop._control.sock):
            sock.close()
        os.close(self._arena_fd)
        self.run_dir.release()
        assert not alive


def lease(client: Raw, count: int = 1) -> int:
    (grant,) = client.ask(m.Lease(1, 0, count, None))
    assert isinstance(grant, m.Grant)
    ((lease_id, run),) = grant.leases
    assert run.count == count
    return lease_id


def report(client: Raw) -> PoolReport:
    (answer,) = client.ask(m.Status(1))
    assert isinstance(answer, m.Report)
    return msgspec.json.decode(answer.body, type=PoolReport)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    one = Broker(tmp_path / "run")
    yield one
    one.close()


# --- One trip ------------------------------------------------------------------------------------


@pytest.fixture(params=["lifeline", "zmq"])
def transport(request: pytest.FixtureRequest) -> str:
    """What carries a client's messages."""
    return str(request.param)


def test_a_trip_from_lease_to_release(transport, broker):
    worker, client = broker.worker(), broker.client(transport)
    assert (client.description.pool, client.description.epoch) == ("test", 3)
    assert worker.description.layout == client.description.layout
    lease_id = lease(client, 4)
    client.send(m.Submit(lease_id, 0, 4, 0, 4))
    run = worker.run()
    assert [(rows.count, rows.items) for rows in run.rows] == [(4, 4)]
    worker.finish(run)
    (done,) = client.receive()
    assert isinstance(done, m.Done)
    assert (done.lease, done.count, done.status, done.compute_ns) == (lease_id, 4, m.OK, 2)
    client.send(m.Release(lease_id, 0, 4))
    figures = report(client)
    assert (figures.models[0].free, figures.models[0].items, figures.violations) == (16, 4, 0)
    assert [(one.pid, one.device) for one in figures.workers] == [(os.getpid(), "cpu")]


def test_the_answers_of_a_turn_come_in_one_frame(transport, broker):
    client = broker.client(transport)
    answers = client.ask(*(m.Lease(number, 0, 1, None) for number in range(1, 9)), m.Status(9))
    assert [type(answer) for answer in answers] == [m.Report] + 8 * [m.Grant]  # waiting leases at the turn's end
    assert [answer.request for answer in answers[1:]] == list(range(1, 9))


def test_work_that_arrives_together_is_one_batch(broker):
    worker, client = broker.worker(), broker.client()
    leases = [lease(client) for _ in range(4)]
    client.send(*(m.Submit(lease_id, 0, 1, seq, 1) for seq, lease_id in enumerate(leases)))
    run = worker.run()
    assert [(rows.first, rows.count) for rows in run.rows] == [(0, 4)]
    worker.finish(run)
    assert len(client.receive()) == 4


def test_of_a_peer_that_seldom_has_several_frames_one_is_read_a_turn_until_that_is_noticed(tmp_path):
    broker = Broker(tmp_path / "run", starts=False)
    try:
        sock = lifeline.connect(broker.run_dir.path)
        broker.loop.turn()
        client = Raw(sock, greet=False)
        broker.peers.append(client)
        client.send(client.hello)
        broker.loop.turn()
        assert isinstance(client.receive()[0], m.Welcome)
        count = 4 * LOOKS
        for number in range(count):
            client.send(m.Status(number))
        answered: list[int] = []
        turns = 0
        while len(answered) < count:
            broker.loop.turn()
            turns += 1
            answered += [answer.request for answer in client.receive() if isinstance(answer, m.Report)]
        assert answered == list(range(count))
        assert turns <= LOOKS
    finally:
        broker.close()


def test_a_turn_reads_all_that_has_come_and_sends_each_peer_one_frame(tmp_path):
    broker = Broker(tmp_path / "run", starts=False)
    try:
        clients = []
        for _ in range(2):
            sock = lifeline.connect(broker.run_dir.path)
            broker.loop.turn()
            clients.append(client := Raw(sock, greet=False))
            broker.peers.append(client)
            client.send(client.hello)
            broker.loop.turn()
            assert isinstance(client.receive()[0], m.Welcome)
        for peer in broker.loop._peers.of.values():
            peer.had_more = True  # as after a turn in which it had several frames
        for number in range(3):
            for client in clients:
                client.send(m.Status(number))
        broker.loop.turn()
        for client in clients:
            assert [answer.request for answer in client.receive() if isinstance(answer, m.Report)] == [0, 1, 2]
    finally:
        broker.close()


# --- Users ---------------------------------------------------------------------------------------


def test_root_too_must_be_allowed(broker, monkeypatch):
    """It could become any user; but root of a container may have no right except its number."""
    broker.loop._admission._allowed = {os.getuid() + 1}
    with contextlib.closing(lifeline.connect(broker.run_dir.path)) as sock:
        with pytest.raises(AccessDenied, match=rf"user {os.getuid()} may not attach .* --allow-user {os.getuid()}"):
            lifeline.receive_description(sock)
        assert sock.recv(1) == b""
    broker.loop._admission._allowed = {os.getuid()}
    assert broker.client().alive()


def test_so_many_users_are_logged(broker, monkeypatch, caplog):
    monkeypatch.setattr(admission, "MAX_DENIED_LOGGED", 2)
    for uid in (7, 8, 7, 9, 10):
        monkeypatch.setattr(admission, "peer_credentials", lambda _, uid=uid: Credentials(1, uid, 1))
        with contextlib.closing(lifeline.connect(broker.run_dir.path)) as sock, pytest.raises(AccessDenied):
            lifeline.receive_description(sock)
    assert [record.getMessage()[:18] for record in caplog.records] == ["user 7 was refused", "user 8 was refused"]


# --- Time ----------------------------------------------------------------------------------------


def test_a_lease_that_waits_in_vain_is_answered_when_its_time_is_up(broker):
    client, other = broker.client(), broker.client()
    lease(client, 12)
    (error,) = other.ask(m.Lease(5, 0, 8, 3_000_000))
    assert isinstance(error, m.Error)
    assert (error.code, error.request) == (m.BUSY, 5)


@pytest.mark.parametrize("delay_us", [500, 15_000], ids=["below epoll's millisecond", "above"])
def test_a_delay_ends_by_itself(delay_us, tmp_path):
    broker = Broker(tmp_path / "run", max_delay_us=delay_us)
    try:
        worker, client = broker.worker(), broker.client()
        client.send(m.Submit(lease(client), 0, 1, 0, 1))
        worker.finish(worker.run())
        (done,) = client.receive()
        assert isinstance(done, m.Done)
        assert done.queue_ns >= delay_us * 1000
    finally:
        broker.close()


def test_a_deadline_passes_without_anything_else_happening(broker):
    client = broker.client()
    (done,) = client.ask(m.Submit(lease(client), 0, 1, 0, 1, 2_000_000))
    assert isinstance(done, m.Done)
    assert done.status == m.DEADLINE


# --- Ends ----------------------------------------------------------------------------------------


def test_what_a_worker_had_is_run_by_another(broker):
    first, client = broker.worker(1), broker.client()
    client.send(m.Submit(lease(client), 0, 1, 0, 1))
    run = first.run()
    second = broker.worker(2)
    first.sock.close()
    assert report(client).models[0].running == 1  # until the supervisor says that it has ended, it may still write
    broker.tell(c.WorkerGone(1, "SIGKILL"))
    again = second.run()
    assert (again.rows, again.attempt) == (run.rows, 1)
    second.finish(again)
    (done,) = client.receive()
    assert isinstance(done, m.Done)
    assert done.status == m.OK


def test_what_a_worker_finished_before_it_ended_counts(broker):
    worker, client = broker.worker(), broker.client()
    client.send(m.Submit(lease(client), 0, 1, 0, 1))
    worker.finish(worker.run())
    worker.sock.close()
    broker.tell(c.WorkerGone(1, "SIGKILL"))
    (done,) = client.receive()
    assert isinstance(done, m.Done)
    assert done.status == m.OK
    assert report(client).models[0].retries == 0


def test_what_comes_in_over_zeromq_from_one_who_left_is_no_violation(broker):
    """Its end is seen on its lifeline, which its last messages may be slower than."""
    gone, other = broker.client("zmq"), broker.client("zmq")
    gone.lifeline.close()
    while report(other).producers > 1:
        pass
    gone.send(m.Status(1))
    for _ in range(50):  # trips that begin after it
        assert report(other).violations == 0


def test_a_worker_that_does_not_answer_is_to_be_killed(tmp_path):
    broker = Broker(tmp_path / "run", batch_timeout_s=0.01)
    try:
        worker, client = broker.worker(), broker.client()
        client.send(m.Submit(lease(client), 0, 1, 0, 1))
        worker.run()
        hangs = broker.hear()
        assert isinstance(hangs, c.WorkerHangs)
        assert hangs.worker == 1
        assert hangs.text.startswith("it hung: a batch ran for more than 0.01 s")
    finally:
        broker.close()


def test_a_worker_that_ended_before_it_was_told_of_is_nothing(broker):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    pidfd = os.pidfd_open(os.getpid())
    with theirs:
        lifeline.send_packet(broker.control, c.WorkerStarted(1, os.getpid()), [theirs.fileno(), pidfd])
    os.close(pidfd)
    broker.tell(c.WorkerGone(1, "exit code 1"))
    client = broker.client()
    assert report(client).workers == ()


def test_why_a_worker_must_end_is_passed_on_at_once_and_once(broker):
    """Also before it is ready, and before its end is known."""
    broker.peers.append(worker := Worker(broker, 1))
    worker.send(m.Bye("the GPU has no memory left"))
    assert broker.hear() == c.WorkerSaid(1, "the GPU has no memory left")
    worker.send(m.Bye("the engine failed"))
    worker.close()
    broker.tell(c.WorkerGone(1, "exit code 9"))
    broker.worker(2)  # which hears of nothing else


def test_what_a_worker_said_last_is_passed_on_after_its_end(broker):
    worker = broker.worker()
    worker.send(m.Bye("the GPU is lost"))
    worker.close()
    broker.tell(c.WorkerGone(1, "exit code 9"))
    assert broker.hear() == c.WorkerSaid(1, "the GPU is lost")


def test_a_worker_that_says_nothing_of_why_it_ends_is_not_passed_on(broker):
    worker = broker.worker()
    worker.send(m.Bye(""))
    worker.close()
    broker.tell(c.WorkerGone(1, "exit code 0"))
    broker.worker(2)


def test_gpus_are_known_to_all(tmp_path):
    broker = Broker(tmp_path / "run", gpus=2)
    try:
        client = broker.client()
        assert client.description.gpus == 2
        (error,) = client.ask(m.Submit(lease(client), 0, 1, 0, 1, gpu=2))
        assert isinstance(error, m.Error)
        assert "GPU 2 of a pool with 2 GPUs" in error.text
        broker.peers.append(worker := Worker(broker, 1))
        worker.send(m.Ready("a GPU", 3, 1))
        assert broker.hear() == c.WorkerIsReady(1)
        assert [(one.device, one.lanes, one.gpu) for one in report(client).workers] == [("a GPU", 3, 1)]
    finally:
        broker.close()


def test_a_worker_that_breaks_the_protocol_is_answered(broker):
    worker, client = broker.worker(), broker.client()
    worker.send(m.Finished(99, 0, 0, 0, 0, 0))
    (error,) = worker.receive()
    assert isinstance(error, m.Error)
    worker.sock.send(b"garbage")
    (error,) = worker.receive()
    assert isinstance(error, m.Error)
    assert report(client).violations == 2


def test_a_drain_says_bye_to_all(broker):
    worker, client, idle = broker.worker(), broker.client(), broker.client("zmq")
    stranger = broker.client(greet=False)
    client.send(m.Submit(lease(client), 0, 1, 0, 1))
    run = worker.run()
    broker.tell(c.DrainNow())
    (error,) = idle.ask(m.Lease(1, 0, 1, None))
    assert isinstance(error, m.Error)
    assert error.code == m.CLOSING
    assert client.receive() == [m.Recall(0)]  # of slots that it might use again
    worker.finish(run)
    done, bye = client.receive() + client.receive()
    assert isinstance(done, m.Done)
    for last in ([bye], idle.receive(), worker.receive()):
        assert last == [m.Bye("pool 'test' was stopped")]
    assert broker.hear() == c.IsDrained()
    stranger.wait_cut_off()
    broker.thread.join(PATIENCE_S)
    assert not broker.thread.is_alive()


def test_without_its_supervisor_the_loop_ends(tmp_path):
    broker = Broker(tmp_path / "run")
    broker.control.shutdown(socket.SHUT_RDWR)
    broker.thread.join(PATIENCE_S)
    assert not broker.thread.is_alive()
    broker.close()
    broker.loop._say_bye()  # which frees what its process's end would have freed


# --- Who reads too slowly ------------------------------------------------------------------------


def test_who_does_not_read_is_cut_off_and_others_are_served(transport, broker, monkeypatch, caplog):
    monkeypatch.setattr(outboxes, "MAX_OUTBOX_FRAMES", 20)
    slow, other = broker.client(transport), broker.client()
    status = [m.Status(1)] * 16
    for _ in range(100_000):
        if "reads too slowly, and is cut off" in caplog.text:
            break
        with contextlib.suppress(BrokenPipeError):  # it is
            slow.send(*status)
        assert other.alive()  # a turn of its own for each
    slow.wait_cut_off()
    assert report(other).producers == 1


def test_if_all_that_waits_is_too_much_to_write_down_the_heaviest_goes(transport, tmp_path, monkeypatch, caplog):
    small = functools.partial(Journal, log_bytes=4 * FRAME_BYTES, reserve_bytes=2 * FRAME_BYTES)
    monkeypatch.setattr(loop_module, "Journal", small)
    monkeypatch.setattr(loop_module, "journal_bytes", lambda layout: 2 << 20)
    broker = Broker(tmp_path / "run")
    try:
        slow, other = broker.client(transport), broker.client(transport)
        status = [m.Status(1)] * 400
        kept = lease(other)
        fills_the_log = [m.Cancel(2**62, 0, 1)] * 1000  # of a lease that there is not, which is no error
        for _ in range(1000):
            if "lets too much wait for it, and is cut off" in caplog.text:
                break
            with contextlib.suppress(BrokenPipeError):  # it is
                slow.send(*status)
            other.send(*fills_the_log)
            assert other.alive()
        slow.wait_cut_off()
        assert "peer 1 " in caplog.text
        assert "peer 2 " not in caplog.text
        other.send(m.Release(kept, 0, 1))
        assert report(other).models[0].free == 16
    finally:
        broker.close()


def test_who_reads_late_gets_everything(transport, broker):
    """What the transport has no room for waits, and goes out as soon as there is some."""
    slow, other = broker.client(transport), broker.client()
    asked: list[int] = []
    peers = broker.loop._peers
    # How much there is room for depends on how frames fall together.
    while not (peers.slow or peers.stalled) and len(asked) < 20_000:
        asked.append(len(asked))
        slow.send(m.Status(asked[-1]))
        assert other.alive()
    assert peers.slow or peers.stalled  # it has no room
    got: list[int] = []
    while len(got) < len(asked):
        got += [answer.request for answer in slow.receive() if isinstance(answer, m.Report)]
    assert got == asked


# --- Evicting ------------------------------------------------------------------------------------


class _Kills:
    """In place of `signal.pidfd_send_signal`, since the client of these tests is the tests themselves."""

    def __init__(self, error: OSError | None = None) -> None:
        self.signals: list[int] = []
        self.error = error

    def __call__(self, _pidfd: int, number: int) -> None:
        self.signals.append(number)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, "was killed (--evict): it is idle"),
        (PermissionError(1, "no"), "is another user's and cannot be killed; end it: it is idle"),
        (ProcessLookupError(3, "gone"), "had ended before it was evicted"),
    ],
)
def test_who_is_evicted_is_killed_and_what_comes_of_it_is_logged(error, said, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "trtpool.broker")
    kills = _Kills(error)
    monkeypatch.setattr(signal, "pidfd_send_signal", kills)
    broker = Broker(tmp_path / "run")
    try:
        broker.client().ask(m.Status(1))
        (number,) = broker.loop._peers.of
        broker.loop._turn_end._evict(e.Evict(number, "it is idle"))
        assert kills.signals == [signal.SIGKILL]
        assert f"process {os.getpid()} {said}" in caplog.text
        broker.loop._turn_end._evict(e.Evict(number + 1, "it left before"))
        assert len(kills.signals) == 1
    finally:
        broker.close()


def test_the_process_that_the_pool_is_part_of_is_not_killed_whatever_was_decided(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "pidfd_send_signal", kills := _Kills())
    broker = Broker(tmp_path / "run", owner_pid=os.getpid())
    try:
        broker.client().ask(m.Status(1))
        (number,) = broker.loop._peers.of
        broker.loop._turn_end._evict(e.Evict(number, "it is idle"))
        assert kills.signals == []
    finally:
        broker.close()
