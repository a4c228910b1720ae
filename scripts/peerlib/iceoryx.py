"""iceoryx2: samples that are loaned, written in place and sent, and events that wake who waits for them.

::

    producer i --- "work/i": publish-subscribe, header (i) ---> worker     and one event "work" for all
    producer i <-- "done/i": publish-subscribe ---------------- worker     and event "done/i"

This is the documented way to wait without polling (its example of event-based communication): each port is paired with
an event, the receiver blocks on a listener and, once woken, takes all samples that are there.  Publishers wait rather
than discard, and buffers hold all that is in flight.

Each producer has a service of its own, and the worker takes a few samples of each in turn.  With one service for all
(`SharedService`) a subscriber takes from the first publisher that has something, so a producer that refills what was
taken keeps all others waiting.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scripts.benchlib.crew import CONTEXT, STUCK_S, Driver, Stream, end, end_with_parent
from scripts.benchlib.workload import Array, Source, check

from .contestant import Connects, Contestant
from .job import Job

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

    import numpy.typing as npt

MOST_PRODUCERS: Final = 16
SAMPLES_A_WAKE: Final = 8
SAMPLES_A_TURN: Final = 8
"""Taken of one service before the next has its turn."""
START_S: Final = 20.0


class _Wake:
    """Wakes a receiver once for several samples that were sent, and at the latest before the sender itself waits."""

    def __init__(self, notifier: Any) -> None:
        self._notifier, self._unsaid = notifier, 0

    def sent(self) -> None:
        self._unsaid += 1
        if self._unsaid == SAMPLES_A_WAKE:
            self.flush()

    def flush(self) -> None:
        if self._unsaid:
            self._notifier.notify()
            self._unsaid = 0

    def delete(self) -> None:
        self._notifier.delete()


class _Services:
    """The services of one contest, opened by each process for itself."""

    def __init__(self, name: str, job: Job, in_flight: int) -> None:
        import iceoryx2 as iox2

        iox2.set_log_level(iox2.LogLevel.Error)
        self._iox2, self._name, self._in_flight = iox2, name, in_flight
        self._item_bytes, self._output_bytes = job.workload.item_bytes, 4 * job.workload.outputs
        self.node = iox2.NodeBuilder.new().signal_handling_mode(iox2.SignalHandlingMode.Disabled).create(
            iox2.ServiceType.Ipc
        )  # fmt: skip

    def _data(self, what: str) -> Any:
        iox2 = self._iox2
        builder = (
            self.node.service_builder(iox2.ServiceName.new(f"{self._name}/{what}"))
            .publish_subscribe(iox2.Slice[ctypes.c_uint8])  # of other types 0.10 gives views that are too long
            .user_header(ctypes.c_uint64)
            .enable_safe_overflow(False)
            .max_publishers(MOST_PRODUCERS)
            .max_subscribers(1)
            .max_nodes(MOST_PRODUCERS + 2)
            .subscriber_max_buffer_size(self._in_flight)
            .subscriber_max_borrowed_samples(2)
        )
        return builder.open_or_create()

    def _event(self, what: str) -> Any:
        name = self._iox2.ServiceName.new(f"{self._name}/{what}")
        builder = self.node.service_builder(name).event().max_notifiers(MOST_PRODUCERS).max_listeners(1)
        return builder.max_nodes(MOST_PRODUCERS + 2).open_or_create()

    def sender(self, what: str, wakes: str) -> tuple[Any, _Wake]:
        """A publisher and what wakes its subscriber."""
        most = self._item_bytes if wakes == "work" else self._output_bytes
        builder = self._data(what).publisher_builder().initial_max_slice_len(most).max_loaned_samples(1)
        publisher = builder.backpressure_strategy(self._iox2.BackpressureStrategy.RetryUntilDelivered).create()
        return publisher, _Wake(self._event(wakes).notifier_builder().create())

    def subscriber(self, what: str) -> Any:
        return self._data(what).subscriber_builder().create()

    def listener(self, what: str) -> Any:
        """What the receiver of these can wait on."""
        return self._event(what).listener_builder().create()


def _view(sample: Any, shape: tuple[int, ...]) -> Array:
    view: Array = np.frombuffer(sample.payload().as_memory_view(), np.float32).reshape(shape)
    return view


def _send(publisher: Any, producer: int, items: Array) -> None:
    sample = publisher.loan_slice_uninit(items.nbytes)
    sample.user_header().contents.value = producer
    np.copyto(_view(sample, items.shape), items)
    sample.assume_init().send()


def _in_turn(subscribers: Sequence[Any]) -> Iterator[Any]:
    """All samples that are there, a few of each subscriber in turn."""
    found = True
    while found:
        found = False
        for one in subscribers:
            for _ in range(SAMPLES_A_TURN):
                sample = one.receive()
                if sample is None:
                    break
                found = True
                yield sample


def _worker(name: str, job: Job, in_flight: int, works: Sequence[str], ready: Event) -> None:
    end_with_parent()
    services = _Services(name, job, in_flight)
    subscribers, listener = [services.subscriber(what) for what in works], services.listener("work")
    senders: dict[int, tuple[Any, _Wake]] = {}
    compute = job.load()
    y = np.empty((1, job.workload.outputs), np.float32)
    ready.set()
    while True:
        for sample in _in_turn(subscribers):
            producer = sample.user_header().contents.value
            if producer not in senders:
                senders[producer] = services.sender(f"done/{producer}", f"done/{producer}")
            compute(_view(sample, (1, *job.workload.shape)), y)
            sample.delete()
            publisher, wake = senders[producer]
            _send(publisher, producer, y)
            wake.sent()
        for _, wake in senders.values():
            wake.flush()
        listener.blocking_wait()


class IceoryxTransport:
    def __init__(self, name: str, job: Job, in_flight: int, work: str, producer: int) -> None:
        import iceoryx2 as iox2

        self._services = _Services(name, job, in_flight)
        self._producer, self._shape = producer, (1, job.workload.outputs)
        self._subscriber = self._services.subscriber(f"done/{producer}")
        self._listener = self._services.listener(f"done/{producer}")
        self._publisher, self._wake = self._services.sender(work, "work")
        self._limit = iox2.Duration.from_secs(int(STUCK_S))

    def send(self, items: Array) -> None:
        _send(self._publisher, self._producer, items)
        self._wake.sent()

    def collect(self, expected: npt.NDArray[np.float64]) -> None:
        until_s = time.monotonic() + STUCK_S
        while (sample := self._subscriber.receive()) is None:
            self._wake.flush()
            self._listener.timed_wait(self._limit)
            if time.monotonic() > until_s:
                raise TimeoutError(f"no answer within {STUCK_S:.0f} s")
        check(_view(sample, self._shape), expected)
        sample.delete()

    def close(self) -> None:
        for port in (self._subscriber, self._listener, self._publisher, self._wake):
            port.delete()


def _connect(name: str, job: Job, in_flight: int, work: str, window: int, producer: int) -> Driver:
    transport = IceoryxTransport(name, job, in_flight, work, producer)
    return Stream(transport, Source(job.workload, 1), window, 1)


class Iceoryx(Contestant):
    name = "iceoryx2"
    modules = ("iceoryx2",)
    copies = 0
    why = "the worker reads the loaned sample that the producer wrote"

    @contextlib.contextmanager
    def producers(self, job: Job, count: int) -> Iterator[Connects]:
        name, window = f"bench-{os.getpid()}-{count}", job.pick(images=64, small=256) // count or 1
        in_flight, works = window * count, self.works(count)
        ready = CONTEXT.Event()
        worker = CONTEXT.Process(target=_worker, args=(name, job, in_flight, sorted(set(works)), ready))
        worker.start()
        try:
            if not ready.wait(START_S):
                raise RuntimeError("the worker of iceoryx2 did not start")
            yield [partial(_connect, name, job, in_flight, work, window, i) for i, work in enumerate(works)]
        finally:
            end(worker)
            _clean_up()

    @staticmethod
    def works(producers: int) -> list[str]:
        """The service of each producer."""
        return [f"work/{producer}" for producer in range(producers)]


class SharedService(Iceoryx):
    name = "iceoryx2-shared"
    kinds = ("images", "small")
    note = "one service for all producers, of which the first that has a sample is served first: no bar for several"
    bar = False

    @staticmethod
    def works(producers: int) -> list[str]:
        """The same for all."""
        return ["work"] * producers


def _clean_up() -> None:
    """Remove what the worker, which was killed, left in shared memory; iceoryx2 leaves that to the next node."""
    import iceoryx2 as iox2

    node = iox2.NodeBuilder.new().signal_handling_mode(iox2.SignalHandlingMode.Disabled).create(iox2.ServiceType.Ipc)
    node.try_cleanup_dead_nodes()
