"""One item at a time: the pool beside a bare relay, in turns within one producer process.

The relay is what any broker on ZeroMQ costs at least: producer DEALER -> broker ROUTER ->
worker DEALER and back, ipc://, three processes, one empty frame of payload, nothing else.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import zmq

from .crew import CONTEXT, STUCK_S, Exchanger, end, end_with_parent
from .workload import Array, Source, Workload

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    import numpy as np
    import numpy.typing as npt

BLOCK: Final = 25
SETTLE: Final = 5
"""The first exchanges of a block are not counted: the processes wake from the others' block."""


def _relay_broker(address: str, ready: Event) -> None:
    end_with_parent()
    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(address)
    worker, _ = router.recv_multipart()  # the worker's greeting: producers start after `ready`
    ready.set()
    while True:
        frames = router.recv_multipart()
        router.send_multipart(frames[1:] if frames[0] == worker else [worker, *frames])


def _relay_worker(address: str) -> None:
    end_with_parent()
    dealer = zmq.Context().socket(zmq.DEALER)
    dealer.connect(address)
    dealer.send(b"")
    while True:
        dealer.send_multipart(dealer.recv_multipart())


class RelayDriver:
    """The relay's producer; what it sends is an empty frame, whatever the items."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.rcvtimeo = int(STUCK_S * 1e3)
        self._dealer.connect(address)

    def exchange(self, items: Array, expected: npt.NDArray[np.float64]) -> None:  # noqa: ARG002  # a relay's are empty
        self._dealer.send(b"")
        self._dealer.recv()

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextlib.contextmanager
def relay() -> Iterator[Callable[[], RelayDriver]]:
    """Start the relay's broker and worker; yields what connects a producer."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        address = f"ipc://{folder}/relay"
        ready = CONTEXT.Event()
        broker = CONTEXT.Process(target=_relay_broker, args=(address, ready))
        worker = CONTEXT.Process(target=_relay_worker, args=(address,))
        broker.start()
        worker.start()
        try:
            if not ready.wait(STUCK_S):
                raise RuntimeError("the relay did not start")
            yield partial(RelayDriver, address)
        finally:
            end(worker)
            end(broker)


@dataclass
class Samples:
    """What one contender did in one window, seen by the producer.

    Attributes:
        took_ns: each counted exchange.
        exchanges: all of them.
        cpu_s: the producer's own CPU time.
    """

    took_ns: list[int] = field(default_factory=list)
    exchanges: int = 0
    cpu_s: float = 0.0


class Alternating:
    """Drives several contenders in short blocks, in turns; reports `Samples` by name."""

    def __init__(self, connects: Mapping[str, Callable[[], Exchanger]], workload: Workload) -> None:
        self._source = Source(workload, 1)
        self._drivers: dict[str, Exchanger] = {}
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for name, connect in connects.items():
                self._drivers[name] = connect()
            undo.pop_all()

    def run(self, until_s: float) -> dict[str, Samples]:
        samples = {name: Samples() for name in self._drivers}
        while time.monotonic() < until_s:
            for name, driver in self._drivers.items():
                self._block(driver, samples[name])
        return samples

    def _block(self, driver: Exchanger, samples: Samples) -> None:
        cpu_s = time.process_time()
        for turn in range(BLOCK):
            items, expected = self._source.take(1)
            started_ns = time.perf_counter_ns()
            driver.exchange(items, expected)
            if turn >= SETTLE:
                samples.took_ns.append(time.perf_counter_ns() - started_ns)
        samples.exchanges += BLOCK
        samples.cpu_s += time.process_time() - cpu_s

    def close(self) -> None:
        for driver in self._drivers.values():
            driver.close()
