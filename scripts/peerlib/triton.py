"""Triton through nvidia-pytriton: the server, and a Python function of this process as its model.

Producers use gRPC with the inputs in system shared memory, one region of slots each, and send without waiting
(`async_infer`); batches form by themselves, with no delay.  That is Triton's documented fast way for a client on the
same machine.  Answers are a few numbers and come back in the messages.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sysconfig
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scripts.benchlib.crew import STUCK_S, Driver, Stream
from scripts.benchlib.workload import Array, Source, check

from .contestant import Connects, Contestant
from .http import free_port
from .job import Job

if TYPE_CHECKING:
    import numpy.typing as npt

MODEL: Final = "mean"
TOKEN: Final = "peers"
TOKEN_HEADER: Final = {"triton-grpc-protocol-triton-access-token": TOKEN}
"""PyTriton lets only those who know its token register shared memory."""
BATCH_IMAGES: Final = 8
BATCH_SMALL: Final = 64


class TritonTransport:
    def __init__(self, job: Job, port: int, window: int) -> None:
        import tritonclient.grpc as client
        import tritonclient.utils.shared_memory as shared

        self._client_module, self._shared = client, shared
        self._item_bytes = job.workload.item_bytes
        self._shape = [1, *job.workload.shape]
        self._client = client.InferenceServerClient(f"127.0.0.1:{port}")
        self._name = f"bench-{os.getpid()}"
        size = window * self._item_bytes
        self._region = shared.create_shared_memory_region(self._name, f"/{self._name}", size)
        self._client.register_system_shared_memory(self._name, f"/{self._name}", size, headers=TOKEN_HEADER)
        rows = shared.get_contents_as_numpy(self._region, np.float32, [window, *job.workload.shape])
        self._rows: Array = rows
        self._inputs = [self._input(slot) for slot in range(window)]
        self._outputs = [client.InferRequestedOutput("y")]
        self._free = deque(range(window))
        self._used: deque[tuple[int, queue.SimpleQueue[tuple[Any, Any]]]] = deque()

    def _input(self, slot: int) -> Any:
        one = self._client_module.InferInput("x", self._shape, "FP32")
        one.set_shared_memory(self._name, self._item_bytes, slot * self._item_bytes)
        return one

    def send(self, items: Array) -> None:
        slot = self._free.popleft()
        np.copyto(self._rows[slot : slot + 1], items)
        answered: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._client.async_infer(
            MODEL, [self._inputs[slot]], lambda result, error: answered.put((result, error)), outputs=self._outputs
        )
        self._used.append((slot, answered))

    def collect(self, expected: npt.NDArray[np.float64]) -> None:
        slot, answered = self._used.popleft()
        result, error = answered.get(timeout=STUCK_S)
        if error is not None:
            raise RuntimeError(f"Triton answered: {error}")
        check(result.as_numpy("y"), expected)
        self._free.append(slot)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # the server may have gone already
            self._client.unregister_system_shared_memory(self._name, headers=TOKEN_HEADER)
        self._client.close()
        del self._rows
        self._shared.destroy_shared_memory_region(self._region)


def _connect(job: Job, port: int, window: int) -> Driver:
    return Stream(TritonTransport(job, port, window), Source(job.workload, 1), window, 1)


def _same_python() -> None:
    """Let the server's Python backend find this interpreter's library, as PyTriton's installation guide asks.

    It looks for a library of this minor version, and finds the system's where Python came from elsewhere.
    """
    folders = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))


class Triton(Contestant):
    name = "triton"
    modules = ("pytriton", "tritonclient")
    copies = 3
    why = "into the Python backend's memory, into its proxy's, and with others to the array of a batch"
    note = (
        "three of its four copies, the producer's write being the first, are its Python backend's; a backend in C++ "
        "would read the shared memory itself"
    )

    @contextlib.contextmanager
    def serve(self, job: Job) -> Iterator[None]:
        from pytriton.decorators import batch
        from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
        from pytriton.triton import Triton as Server
        from pytriton.triton import TritonConfig, TritonSecurityConfig

        _same_python()
        self._port = free_port()
        compute = job.load()

        @batch  # type: ignore[untyped-decorator,unused-ignore]
        def infer(x: Array) -> dict[str, Array]:
            y = np.empty((len(x), job.workload.outputs), np.float32)
            compute(x, y)
            return {"y": y}

        config = TritonConfig(
            http_address="127.0.0.1", http_port=free_port(), grpc_address="127.0.0.1", grpc_port=self._port,
            allow_metrics=False, log_verbose=0,
        )  # fmt: skip
        model = ModelConfig(
            max_batch_size=job.pick(BATCH_IMAGES, BATCH_SMALL), batcher=DynamicBatcher(max_queue_delay_microseconds=0)
        )
        security = TritonSecurityConfig(access_token=TOKEN)
        with Server(config=config, security_config=security, workspace=job.folder / "triton") as server:
            server.bind(
                model_name=MODEL, infer_func=infer, config=model,
                inputs=[Tensor(name="x", dtype=np.float32, shape=job.workload.shape)],
                outputs=[Tensor(name="y", dtype=np.float32, shape=(job.workload.outputs,))],
            )  # fmt: skip
            server.run()
            yield

    @contextlib.contextmanager
    def producers(self, job: Job, count: int) -> Iterator[Connects]:
        window = job.pick(images=16, small=64) // count or 1
        yield [partial(_connect, job, self._port, window)] * count
