"""What a worker sets up on its GPU before it serves: near CPUs, pinned arena, engines on their lanes."""

from __future__ import annotations

import logging
import time

import numpy as np

from trtpool.ipc.arena import format_bytes
from trtpool.ipc.errors import DeviceUnavailable
from trtpool.ipc.settings import WorkerConfig

from .cuda import Cuda, CudaError
from .engine import LaneEngine
from .joining import Joined
from .registration import Registration
from .tensorrt_engine import TensorrtEngine
from .topology import bind_to_gpu
from .warming import warm_up

log = logging.getLogger("trtpool.worker")


class GpuWorker:
    """The engines of a worker, bound to a pinned arena.

    Args:
        joined: the worker's place in the pool.
        config: what to load.

    Attributes:
        engines: one for each model.
        device: the GPU, for reports.

    Raises:
        DeviceUnavailable: the GPU cannot be used, or it or the host has too little memory.
        ModelError, MissingExtra: a model cannot be loaded.
    """

    def __init__(self, joined: Joined, config: WorkerConfig) -> None:
        started_s = time.monotonic()
        try:
            cuda = Cuda()
            self.device = cuda.device_name()
            cpus = bind_to_gpu(cuda.pci_bus_id())
            if cpus is not None:
                log.info("bound to the %d CPUs near %s", len(cpus), self.device)
            segment = np.frombuffer(joined.segment, np.uint8)
            self._registration = Registration(cuda, segment.ctypes.data, segment.nbytes, joined.arena_fd)
            pinned_s = time.monotonic()
            self.engines: list[LaneEngine] = []
            for number, (request, layout) in enumerate(zip(config.models, joined.models, strict=True)):
                engine = TensorrtEngine(request.source, request.engine, cuda, busy_poll=config.busy_poll)
                inputs, outputs = joined.planes(number, engine.spec)
                engine.bind(inputs, outputs, layout.max_batch, self._registration.bounds)
                self.engines.append(engine)
            warm_up([(engine, layout.max_batch) for engine, layout in zip(self.engines, joined.models, strict=True)])
        except CudaError as error:
            raise DeviceUnavailable(f"the GPU cannot be used: {error}") from error
        log.info(
            "%s: %s pinned in %.1f s, %d models loaded in %.1f s", self.device, format_bytes(segment.nbytes),
            pinned_s - started_s, len(self.engines), time.monotonic() - pinned_s,
        )  # fmt: skip
