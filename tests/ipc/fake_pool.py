"""A pool inside the test's process: the real broker loop in one thread, a worker that computes with NumPy in another.

It may say that it has GPUs, with a worker on each.  No process is started, so a pool takes milliseconds.  The workers
can be held, which makes every order of events
reproducible, and at the end the core's invariants are checked, and that no client broke the protocol.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy.typing as npt

from trtpool.broker import control as c
from trtpool.broker.invariants import validate
from trtpool.broker.loop import Loop
from trtpool.ipc import lifeline
from trtpool.ipc import messages as m
from trtpool.ipc.arena import create_segment, map_segment
from trtpool.ipc.client import Client
from trtpool.ipc.layout import Layout, ModelPlan, plan, plane_array
from trtpool.ipc.pipe import Pipe
from trtpool.ipc.report import ModelReport
from trtpool.ipc.settings import DEFAULT_TRANSPORT, BrokerConfig
from trtpool.ipc.tensors import ModelSpec, TensorSpec

NET_S: Final = 60.0
"""Far more than anything takes; a wait that reaches it has failed."""

BAD: Final = -999.0
"""An item whose first number is this fails, in whatever batch it is."""

Arrays = Mapping[str, npt.NDArray[Any]]


def neg(given: Arrays, out: Arrays) -> None:
    """`MODEL`'s answer: `y` is ``-x``, `total` the sum of an item's `x`."""
    out["y"][...] = -given["x"]
    out["total"][...] = given["x"].sum(axis=1)


def add(given: Arrays, out: Arrays) -> None:
    """`SUM`'s answer."""
    out["sum"][...] = given["a"] + given["b"]


MODEL: Final = ModelSpec(
    "neg",
    "/neg.onnx",
    (TensorSpec("x", "float32", (4,)),),
    (TensorSpec("y", "float32", (4,)), TensorSpec("total", "float64", ())),
)
SUM: Final = ModelSpec(
    "add",
    "/add.onnx",
    (TensorSpec("a", "int32", (2, 3)), TensorSpec("b", "int32", (2, 3))),
    (TensorSpec("sum", "int32", (2, 3)),),
)
ANSWERS: Final[dict[str, Callable[[Arrays, Arrays], None]]] = {"neg": neg, "add": add}


class FakePool:
    """A context manager; see the module.

    Args:
        run_dir: an empty directory with a short path.
        models: any of `MODEL` and `SUM`.
        slots, items_per_slot, max_batch: of each model.
        cap: slots that a client may hold; 0 is the default of a real pool.
        transport: what clients talk over; see `trtpool.connect`.
        gpus: how many GPUs the pool says that it has.
        slow_ms: see `PoolSettings`.

    Attributes:
        ran: slots that ended on each GPU, or on the CPU.
    """

    def __init__(
        self,
        run_dir: Path,
        *models: ModelSpec,
        slots: int = 16,
        items_per_slot: int = 1,
        max_batch: int = 4,
        cap: int = 0,
        transport: str = DEFAULT_TRANSPORT,
        gpus: int = 0,
        slow_ms: float = 0.0,
    ) -> None:
        self.transport = transport
        self.run_dir = run_dir
        self.slots = slots
        self.layout: Layout = plan([ModelPlan(spec, slots, items_per_slot, max_batch) for spec in models or (MODEL,)])
        self.clients: list[Client] = []
        self.ran: Counter[int | None] = Counter()
        self._allowed: float = float("inf")  # batches that the worker may still run
        self._changed = threading.Condition()
        self._broke: list[BaseException] = []
        self._alive = True
        listener = lifeline.listen(run_dir)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        self._arena = create_segment(self.layout.segment_bytes)
        config = BrokerConfig(
            parent_pid=os.getpid(),
            name="fake",
            run_dir=os.fspath(run_dir),
            epoch=1,
            layout=self.layout,
            max_slots_per_producer=cap,
            max_delay_us=0,
            gpus=gpus,
            slow_ms=slow_ms,
            listener_fd=listener.detach(),
            control_fd=theirs.detach(),
            arena_fd=self._arena,
        )
        self._loop = Loop(config)
        self._threads = [threading.Thread(target=self._serve, name="fake-broker")]
        self._threads[0].start()
        self._expect(c.BrokerReady)
        for gpu in range(gpus) if gpus else [None]:
            self._start_worker(gpu)
            self._expect(c.WorkerIsReady)

    # ------------------------------------------------------------------ for tests

    def connect(self) -> Client:
        """A client, which is closed at the end if the test does not."""
        client = Client(self.run_dir, self.transport)
        self.clients.append(client)
        return client

    def hold(self) -> None:
        """The worker finishes nothing more: what is submitted is queued, or, for two batches, runs."""
        with self._changed:
            self._allowed = 0

    def go(self, batches: float = float("inf")) -> None:
        """The worker may run so many batches more."""
        with self._changed:
            self._allowed += batches
            self._changed.notify_all()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """`hold`, and `go` at the end."""
        self.hold()
        try:
            yield
        finally:
            self.go()

    def wait_all_free(self) -> None:
        """Until every slot is free, for which idle clients give back what they were granted in advance."""
        clients = [client for client in self.clients if not client.session.closed]
        until(clients[0], lambda _: [figures(client).free for client in clients] == len(clients) * [self.slots])

    def stop(self) -> None:
        """Drain, say Bye and end, as when `trtpool stop` is called."""
        if self._alive:
            self._alive = False
            self.go()
            lifeline.send_packet(self._control, c.DrainNow())
            self._join()

    def kill(self) -> None:
        """End the broker without a word, as `kill -9` would.  The worker stays held, if it is."""
        if self._alive:
            self._alive = False
            self._control.shutdown(socket.SHUT_RDWR)
            self._threads[0].join(NET_S)
            self.go()
            self._join()

    def __enter__(self) -> FakePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.go()
            for client in self.clients:
                client.close()
            was_alive = self._alive
            self.stop()
        finally:
            self._control.close()
            os.close(self._arena)
        assert not self._broke, f"a thread of the pool broke: {self._broke}"
        if kind is None and was_alive:
            validate(self._loop._core)
            assert not self._loop._core.violations, "a client broke the protocol"

    # ------------------------------------------------------------------ inside

    def _expect(self, kind: type[c.Control]) -> None:
        self._control.settimeout(NET_S)
        message = c.decode(self._control.recv(4096))
        assert isinstance(message, kind), f"the broker said {message}"

    def _join(self) -> None:
        for thread in self._threads:
            thread.join(NET_S)
            assert not thread.is_alive(), f"{thread.name} did not end"

    def _serve(self) -> None:
        loop = self._loop
        try:
            loop.run()
        except SystemExit:  # the control socket ended
            self._end_abruptly()
        except BaseException as error:  # noqa: BLE001  # raised by `__exit__`
            self._broke.append(error)
            self._end_abruptly()
        finally:
            loop._admission.listener.close()
            loop._control.sock.close()

    def _end_abruptly(self) -> None:
        """What the kernel does for a process."""
        loop = self._loop
        loop._router.close(linger_ms=0)
        for peer in list(loop._peers.of.values()):
            loop._peers.forget(peer)
        loop._epoll.close()

    def _start_worker(self, gpu: int | None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pidfd = os.pidfd_open(os.getpid())
        try:
            started = c.WorkerStarted(len(self._threads), os.getpid())
            lifeline.send_packet(self._control, started, [theirs.fileno(), pidfd])
        finally:
            theirs.close()
            os.close(pidfd)
        self._threads.append(threading.Thread(target=self._work, args=(ours, gpu), name="fake-worker"))
        self._threads[-1].start()

    def _work(self, sock: socket.socket, gpu: int | None) -> None:
        try:
            description, fd = lifeline.receive_description(sock)
            segment = map_segment(fd, description.layout.segment_bytes)
            os.close(fd)
            planes = [
                [{p.spec.name: plane_array(segment, model, p) for p in side} for side in (model.inputs, model.outputs)]
                for model in self.layout.models
            ]
            pipe = Pipe(sock)
            pipe.send([m.Ready("fake", 1, gpu)])
            messages = pipe.receive()
            while messages and not any(isinstance(message, m.Bye) for message in messages):
                for message in messages:
                    if not isinstance(message, m.Welcome):
                        assert isinstance(message, m.Run), f"a worker was sent {message}"
                        self._wait_for_permission()
                        answer = self._run(message, *planes[message.model])
                        with self._changed:
                            self.ran[gpu] += sum(rows.count for rows in message.rows)
                        pipe.send([answer])
                messages = pipe.receive()
        except ConnectionError:
            pass  # the broker was killed
        except BaseException as error:  # noqa: BLE001  # raised by `__exit__`
            self._broke.append(error)
        finally:
            sock.close()

    def _wait_for_permission(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._allowed > 0, NET_S)
            self._allowed -= 1

    def _run(self, run: m.Run, inputs: Arrays, outputs: Arrays) -> m.Finished | m.Failed:
        answer = ANSWERS[self.layout.models[run.model].spec.name]
        for rows in run.rows:
            given, out = (
                {
                    name: plane[rows.first : rows.first + rows.count].reshape(-1, *plane.shape[2:])[: rows.items]
                    for name, plane in side.items()
                }
                for side in (inputs, outputs)
            )
            if "x" in given and (given["x"][:, 0] == BAD).any():
                return m.Failed(run.batch, run.attempt, "a bad item")
            answer(given, out)
        return m.Finished(run.batch, run.attempt, 1, 2, 3, 0, 1, time.monotonic_ns())


class Threads:
    """Runs calls in threads; `join` raises what any of them raised."""

    def __init__(self, *calls: Callable[[], object]) -> None:
        self.answers: list[Any] = [None] * len(calls)
        self._errors: list[BaseException] = []

        def run(index: int, call: Callable[[], object]) -> None:
            try:
                self.answers[index] = call()
            except BaseException as error:  # noqa: BLE001  # raised by `join`
                self._errors.append(error)

        self._threads = [threading.Thread(target=run, args=each) for each in enumerate(calls)]
        for thread in self._threads:
            thread.start()

    def join(self) -> list[Any]:
        for thread in self._threads:
            thread.join(NET_S)
            assert not thread.is_alive(), "threads wait for each other"
        if self._errors:
            raise self._errors[0]
        return self.answers


def in_turn(*calls: Callable[..., object]) -> Callable[..., None]:
    """One callable, which makes all `calls` with what it is given."""

    def call_all(*given: Any) -> None:
        for call in calls:
            call(*given)

    return call_all


def figures(client: Client, model: int = 0) -> ModelReport:
    """The pool's figures of a model after all that `client` has sent, with nothing granted to it in advance."""
    gc.collect()
    for index in range(len(client.models)):
        client.session.requests.return_spares(index)
    return client.status().models[model]


def states(client: Client, model: int = 0) -> tuple[int, int, int, int, int]:
    """Slots that are free, leased, queued, running and done; see `figures`."""
    now = figures(client, model)
    return now.free, now.leased, now.queued, now.running, now.done


def until(client: Client, true: Callable[[ModelReport], bool]) -> ModelReport:
    """Ask `client` for the pool's figures until they are `true`."""
    deadline = time.monotonic() + NET_S
    while True:
        now = figures(client)
        if true(now):
            return now
        assert time.monotonic() < deadline, f"never came true; at last: {now}"
