"""Engines without a pool, and slots of a pool whose outputs are poisoned: what GPU tests look at memory with."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

import trtpool
from tests.gpu.zoo import POISON, Array, Samples
from tests.system.rig import PATIENCE_S, StartedPool, wait_until
from trtpool.ipc.arena import create_segment, map_segment
from trtpool.ipc.layout import ModelPlan, plan, plane_array
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.workers.cuda import Cuda
from trtpool.workers.engine import Rows
from trtpool.workers.registration import CHUNK_BYTES, Registration
from trtpool.workers.tensorrt_engine import TensorrtEngine


def poison(plane: Array, rows: Sequence[int] | slice = slice(None)) -> None:
    """Fill rows of a plane with `POISON`."""
    plane.reshape(len(plane), -1).view(np.uint8)[rows] = POISON


def is_poisoned(plane: Array, row: int) -> bool:
    """Whether a row is as `poison` left it."""
    return bool((plane[row].reshape(-1).view(np.uint8) == POISON).all())


# --- Engines -------------------------------------------------------------------------------------


class Bound:
    """An engine bound to planes in a pinned segment of its own; ended at the end of the ``with``.

    Args:
        cuda: the device.
        path: the plan, of a model with one input and one output.
        slots, items_per_slot: of the planes.
        max_batch: by default as many items as the plan takes.
        chunk_bytes: see `Registration`.
        settings: other fields of `EngineSettings`.

    Attributes:
        x, y: the planes, shape ``(slots, items_per_slot, *item_shape)``.
        address, size: of the segment.
    """

    def __init__(
        self,
        cuda: Cuda,
        path: str | os.PathLike[str],
        slots: int,
        *,
        items_per_slot: int = 1,
        max_batch: int = 0,
        chunk_bytes: int = CHUNK_BYTES,
        **settings: Any,
    ) -> None:
        with contextlib.ExitStack() as stack:
            source = ModelSource(os.fspath(path), "model")
            self.engine = TensorrtEngine(source, EngineSettings(device="gpu", **settings), cuda)
            spec = self.engine.spec
            self.max_batch = max_batch or spec.batch_limit
            layout = plan([ModelPlan(spec, slots, items_per_slot, self.max_batch)])
            fd = create_segment(layout.segment_bytes)
            stack.callback(os.close, fd)
            segment = map_segment(fd, layout.segment_bytes)
            (model,) = layout.models
            self.x, self.y = plane_array(segment, model, *model.inputs), plane_array(segment, model, *model.outputs)
            self.address, self.size = np.frombuffer(segment, np.uint8).ctypes.data, layout.segment_bytes
            self.registration = Registration(cuda, self.address, self.size, fd, chunk_bytes)
            stack.callback(self.registration.close)
            stack.callback(self.engine.close)
            inputs, outputs = {spec.inputs[0].name: self.x}, {spec.outputs[0].name: self.y}
            self.engine.bind(inputs, outputs, self.max_batch, self.registration.bounds)
            self._stack = stack.pop_all()

    def items(self, plane: Array, batch: Iterable[Rows]) -> list[Array]:
        """Views of the items of `batch`, in its order, each of shape ``item_shape``."""
        return [
            item
            for rows in batch
            for item in plane[rows.first : rows.first + rows.count].reshape(-1, *plane.shape[2:])[: rows.items]
        ]

    def write(self, batch: Iterable[Rows], samples: Samples, chosen: Sequence[int]) -> None:
        """Write items of `samples` into the input rows of `batch`."""
        for place, item in zip(self.items(self.x, batch), chosen, strict=True):
            place[...] = samples.inputs[item]

    def check(self, batch: Sequence[Rows], samples: Samples, chosen: Sequence[int]) -> None:
        """Assert that the output rows of `batch` are right, and that all others are poisoned as before."""
        samples.check(chosen, np.stack(self.items(self.y, batch)))
        per_slot = self.y.shape[1]
        left = np.ones(self.y.shape[:2], bool)
        for rows in batch:
            left[rows.first : rows.first + rows.count].reshape(-1)[: rows.items] = False
        assert sum(rows.items for rows in batch) == left.size - left.sum(), f"rows of {per_slot} items are there twice"
        raw = self.y.reshape(*self.y.shape[:2], -1).view(np.uint8)
        written = [(slot, at) for slot, at in np.argwhere(left).tolist() if not (raw[slot, at] == POISON).all()]
        assert not written, f"{batch} was to be written, and these (slot, item) were: {written}"

    def __enter__(self) -> Bound:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class Copy(NamedTuple):
    """A copy that CUDA was asked for: `direction` is "in" or "out", `address` and `size` those of the host's memory."""

    direction: str
    address: int
    size: int


class RecordingRuntime:
    """`cuda.bindings.runtime`, with every call noted; give it to `Cuda`.

    Attributes:
        calls: the names, in order.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._copies: list[tuple[int, int, int]] = []
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._runtime, name)
        if not name.startswith("cuda") or isinstance(value, type) or not callable(value):
            return value

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if name == "cudaMemcpyAsync":
                self._copies.append((int(arguments[0]), int(arguments[1]), int(arguments[2])))
            elif name == "cudaMemcpyBatchAsync":
                self._copies += zip(*(map(int, part) for part in arguments[:3]), strict=True)
            return value(*arguments)

        return call

    def clear(self) -> None:
        """Forget what was noted."""
        self.calls.clear()
        self._copies.clear()

    def copies(self, host: range) -> list[Copy]:
        """The copies, in order, to or from the addresses `host`; others are an error."""
        found = []
        for target, source, size in self._copies:
            assert (target in host) != (source in host), f"{size} bytes from {source:#x} to {target:#x}"
            found.append(Copy("out", target, size) if target in host else Copy("in", source, size))
        return found


# --- Slots of a pool -----------------------------------------------------------------------------


def planes_of(client: trtpool.Client, model: str) -> tuple[Array, Array]:
    """A model's input and output plane, as this process maps them: ``(slots, items_per_slot, *item_shape)``."""
    layout = client.models[client.model_index(model)]
    segment = client.session.segment
    return plane_array(segment, layout, *layout.inputs), plane_array(segment, layout, *layout.outputs)


class Work:
    """Slots of one client, each by itself, with an item in each and their outputs poisoned.

    Args:
        client: whose slots.
        model: name of the engine, of one item a slot.
        samples: its items.
        chosen: the item for each slot.

    Attributes:
        rows: the slots' numbers.
        y: the output plane.
    """

    def __init__(self, client: trtpool.Client, model: str, samples: Samples, chosen: Sequence[int]) -> None:
        self._leases = client.lease_many(len(chosen), model=model, timeout_s=PATIENCE_S).slots()
        self._samples, self._chosen = samples, list(chosen)
        self.rows = [lease._claim.first for lease in self._leases]
        self.y = planes_of(client, model)[1]
        self.submitted: list[trtpool.Submitted] = []
        for lease, item in zip(self._leases, chosen, strict=True):
            (place,) = lease.inputs.values()
            place[...] = samples.inputs[item]
        poison(self.y, self.rows)

    def keep(self, places: Sequence[int]) -> None:
        """Give back all slots but those at `places`, which are then in that order."""
        for place in set(range(len(self._leases))) - set(places):
            self._leases[place].release()
        for name in ("_leases", "_chosen", "rows"):
            values = getattr(self, name)
            setattr(self, name, [values[place] for place in places])

    def submit(self, gpu: int | None = None) -> None:
        self.submitted = [lease.submit(gpu=gpu) for lease in self._leases]

    def check(self) -> None:
        """Wait for all results, and assert that they are right."""
        for item, submitted in zip(self._chosen, self.submitted, strict=True):
            (output,) = submitted.result(timeout_s=PATIENCE_S).outputs.values()
            self._samples.check([item], output[None])

    def release(self) -> None:
        for lease in self._leases:
            lease.release()

    def __enter__(self) -> Work:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@contextlib.contextmanager
def given_back(pool: StartedPool) -> Iterator[None]:
    """As many slots are free afterwards as before: what a failed test left behind fails no other."""
    with pool.connect() as client:
        before = _free(client)
    yield
    with pool.connect() as client:  # another, for one that was in use may keep slots that it was granted in advance
        wait_until(lambda: _free(client) == before, f"{before} slots free", client.status)


def _free(client: trtpool.Client) -> list[int]:
    return [model.free for model in client.status().models]


@contextlib.contextmanager
def standing_still(pids: Iterable[int]) -> Iterator[None]:
    """Processes that stand still meanwhile."""
    with contextlib.ExitStack() as stack:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            stack.callback(_go_on, pid)
        yield


def _go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
