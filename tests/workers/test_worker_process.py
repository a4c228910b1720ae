"""`python -m trtpool.workers`, with the broker's end of its lifeline in the test's hands, mostly on a fake GPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pytest

from tests.models import MODELS, save
from tests.workers.fake_tensorrt import FAULT, make_packages, neg, write_plan
from trtpool.ipc import messages as m
from trtpool.ipc.arena import create_segment, map_segment
from trtpool.ipc.errors import DeviceUnavailable, EngineFailed, MissingExtra, ModelError, ProtocolError, TrtpoolError
from trtpool.ipc.layout import ModelPlan, plan, plane_array
from trtpool.ipc.lifeline import Description, send_packet
from trtpool.ipc.settings import PROTOCOL_VERSION, EngineSettings, InspectRequest, ModelSource, WorkerConfig
from trtpool.ipc.tensors import ModelSpec, TensorSpec

pytestmark = pytest.mark.system

NET_S: Final = 60.0
X, Y = TensorSpec("x", "float32", (4,)), TensorSpec("y", "float32", (4,))


class Worker:
    """A worker's process.

    Args:
        path: the model, which negates items of 4 float32.
        environment: what to set for it.
        gpu: the GPU's number; None: on the CPU.
        max_batch: the largest batch that the pool makes.
        busy_poll: whether it is to spin.
    """

    def __init__(
        self,
        path: Path,
        environment: Mapping[str, str],
        gpu: int | None = None,
        max_batch: int = 8,
        *,
        busy_poll: bool = False,
    ) -> None:
        layout = plan([ModelPlan(ModelSpec("neg", str(path), (X,), (Y,), max(64, max_batch)), 12, 1, max_batch)])
        self._fd = create_segment(layout.segment_bytes)
        segment = map_segment(self._fd, layout.segment_bytes)
        (model,) = layout.models
        self.x, self.y = (plane_array(segment, model, plane) for plane in (*model.inputs, *model.outputs))
        self.broker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.broker.settimeout(NET_S)
        settings = EngineSettings(device="cpu" if gpu is None else "gpu")
        config = WorkerConfig(
            os.getpid(),
            theirs.fileno(),
            (InspectRequest(ModelSource(str(path), "neg"), settings),),
            1,
            name="worker under test",
            gpu=gpu,
            busy_poll=busy_poll,
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trtpool.workers"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env={**os.environ, **environment},
        )
        theirs.close()
        self.process.stdin.write(msgspec.json.encode(config))
        self.process.stdin.close()
        send_packet(self.broker, Description(PROTOCOL_VERSION, 1, "pool", "", b"", layout), [self._fd])

    def send(self, *messages: m.FromBroker) -> None:
        self.broker.send(m.encode(list(messages)))

    def receive(self) -> list[m.ToBroker]:
        """The next frame; empty when the worker has ended."""
        frame = self.broker.recv(1 << 16)
        return m.decode_to_broker(frame) if frame else []

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(NET_S)

    def log(self) -> str:
        return self.process.stderr.read().decode()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.broker.close()
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        os.close(self._fd)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts workers: on a fake GPU, whose `device` is as in `make_packages`, on the plan with `options`."""
    with ExitStack() as stack:

        def start(
            device: Mapping[str, Any] | None = None, max_batch: int = 8, *, busy_poll: bool = False, **options: Any
        ) -> Worker:
            path = write_plan(tmp_path / "neg.plan", *neg(), **options)
            environment = make_packages(tmp_path / "packages", **(device or {}))
            return stack.enter_context(Worker(path, environment, gpu=3, max_batch=max_batch, busy_poll=busy_poll))

        yield start


@pytest.mark.parametrize("busy_poll", [False, True])
def test_a_worker_on_a_gpu_serves_until_it_is_told_to_leave(busy_poll, start):
    worker = start({"threads": True}, busy_poll=busy_poll)
    worker.x[...] = np.arange(48).reshape(12, 1, 4)
    assert worker.receive() == [m.Ready("Fake GPU", 3, 3)]
    for batch in range(8):
        worker.y[...] = 0.5
        rows = [m.Rows(0, batch, 3, 3), m.Rows(0, 11, 1, 1)]
        worker.send(m.Run(batch, 1, 0, rows))
        (finished,) = worker.receive()
        assert (finished.batch, finished.attempt) == (batch, 1)
        assert min(finished.copy_in_ns, finished.compute_ns, finished.copy_out_ns) > 0
        ran = [*range(batch, batch + 3), 11]
        assert (worker.y[ran] == -worker.x[ran]).all()
        assert (np.delete(worker.y, ran, axis=0) == 0.5).all()
    worker.send(m.Bye("the pool stops"))
    assert worker.receive() == []
    assert worker.wait() == 0


@pytest.mark.parametrize("busy_poll", [False, True])
def test_a_worker_on_a_gpu_ends_with_its_broker(busy_poll, start):
    worker = start(busy_poll=busy_poll)
    assert worker.receive()
    worker.broker.shutdown(2)
    assert worker.wait() == 0


@pytest.mark.parametrize("busy_poll", [False, True])
def test_a_fault_of_the_device_ends_the_worker_with_its_reason(busy_poll, start):
    worker = start({"threads": True}, busy_poll=busy_poll, faults=True)
    assert worker.receive()
    worker.x[5] = FAULT
    worker.send(m.Run(1, 0, 0, [m.Rows(0, 5, 1, 1)]))
    (bye,) = worker.receive()
    assert isinstance(bye, m.Bye)
    assert bye.text.startswith("the GPU failed: ")
    assert "700" in bye.text
    assert worker.receive() == []
    assert worker.wait() == EngineFailed.exit_code
    assert bye.text in worker.log()


@pytest.mark.parametrize(
    ("device", "options", "kind", "words"),
    [
        ({"memory_bytes": 200}, {}, DeviceUnavailable, "the GPU's memory is too small for lane 1 of 3"),
        ({}, {"capability": [8, 6]}, ModelError, "was built for another GPU than Fake GPU"),
        ({}, {"max_batch": 65}, ProtocolError, "it takes batches of up to 64, and the pool makes batches of up to 65"),
    ],
    ids=["no memory", "another GPU", "changed"],
)
def test_a_worker_that_cannot_load_says_why_and_exits_with_the_errors_code(device, options, kind, words, start):
    check_refusal(start(device, **options), kind, words)


def test_without_cuda_python_a_worker_says_what_to_install(tmp_path):
    path = write_plan(tmp_path / "neg.plan", *neg())
    (tmp_path / "cuda.py").write_text("raise ImportError('not here')\n")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    with Worker(path, environment, gpu=0) as worker:
        check_refusal(worker, MissingExtra, "pip install 'trtpool[cu13]' or 'trtpool[cu12]'")


def test_a_worker_on_the_cpu_that_cannot_load_says_why(tmp_path):
    pytest.importorskip("onnxruntime")
    with Worker(tmp_path / "missing.onnx", {}) as worker:
        check_refusal(worker, ModelError, "missing.onnx")
    with Worker(save(MODELS["mean"].model, tmp_path), {}) as worker:
        check_refusal(worker, ProtocolError, "changed after the pool had looked at it")


def check_refusal(worker: Worker, kind: type[TrtpoolError], words: str) -> None:
    (bye,) = worker.receive()
    assert isinstance(bye, m.Bye)
    assert words in bye.text
    assert worker.receive() == []
    assert worker.wait() == kind.exit_code
    log = worker.log()
    assert bye.text in log
    assert "worker under test" in log
    assert "Traceback" not in log
