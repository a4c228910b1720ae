"""Ray actors: one that computes, and producers that are drivers of the same cluster.

Large inputs go into the object store with `ray.put`, from which the actor reads them in place; small ones travel in the
call, as Ray's documentation advises below 100 KB.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scripts.benchlib.crew import STUCK_S, Driver, Stream
from scripts.benchlib.workload import Array, Source, check

from .contestant import Connects, Contestant
from .job import Job
from .ray_cluster import cluster

if TYPE_CHECKING:
    import numpy.typing as npt

ACTOR: Final = "mean"
NAMESPACE: Final = "bench"
INLINE_BYTES: Final = 100 << 10


class Mean:
    def __init__(self, job: Job) -> None:
        self._compute, self._outputs = job.load(), job.workload.outputs

    def compute(self, x: Array) -> Array:
        y = np.empty((len(x), self._outputs), np.float32)
        self._compute(x, y)
        return y


class ActorTransport:
    def __init__(self, address: str) -> None:
        import ray

        self._ray = ray
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
        self._actor = ray.get_actor(ACTOR)
        self._pending: deque[Any] = deque()

    def send(self, items: Array) -> None:
        x = items if items.nbytes < INLINE_BYTES else self._ray.put(items)
        self._pending.append(self._actor.compute.remote(x))

    def collect(self, expected: npt.NDArray[np.float64]) -> None:
        check(self._ray.get(self._pending.popleft(), timeout=STUCK_S), expected)

    def close(self) -> None:
        self._ray.shutdown()


def _connect(job: Job, address: str, window: int) -> Driver:
    return Stream(ActorTransport(address), Source(job.workload, 1), window, 1)


class RayActors(Contestant):
    name = "ray-actors"
    modules = ("ray",)
    copies = 1
    why = "ray.put copies into the object store, where the actor reads; items of 1 KB are pickled into the call: 5"

    @contextlib.contextmanager
    def serve(self, job: Job) -> Iterator[None]:
        with cluster() as self._address:
            import ray

            actor = ray.remote(Mean).options(name=ACTOR, namespace=NAMESPACE, num_cpus=1).remote(job)
            x, _ = Source(job.workload, 1).take(1)
            ray.get(actor.compute.remote(x), timeout=STUCK_S)
            yield
            del actor

    @contextlib.contextmanager
    def producers(self, job: Job, count: int) -> Iterator[Connects]:
        window = job.pick(images=64, small=256) // count or 1
        yield [partial(_connect, job, self._address, window)] * count
