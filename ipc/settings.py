"""Settings: what can be chosen, with defaults and bounds, in the units their names give.

`PoolSettings` is what `trtpool start` and `trtpool.Pool` take; it is checked here, before
any process starts.  `EngineSettings` is the part that a worker needs.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from .errors import ConfigError
from .layout import Layout
from .normalization import Normalization

PROTOCOL_VERSION: Final = 7
"""Rises with every change to a message, to the description or to the order they come in."""

TOKEN_BYTES: Final = 40
"""A peer's number, 8 bytes, and a secret of 32."""

MAX_FRAME_BYTES: Final = 64 * 1024
"""Largest frame a broker takes from anyone."""

DEFAULT_TRANSPORT: Final = "lifeline"
"""What carries a client's messages: "lifeline" or "zmq", see `trtpool.ipc.link`."""

Priority: TypeAlias = Literal["bulk", "interactive"]
"""A class of requests.  Interactive ones go first, and bulk ones never starve; see docs/architecture.md."""

BULK: Final = 0
INTERACTIVE: Final = 1
PRIORITIES: Final[dict[str, int]] = {"bulk": BULK, "interactive": INTERACTIVE}
"""How messages say it."""

DEFAULT_MAX_BATCH: Final = 8
DEFAULT_LANES: Final = 3
DEFAULT_BUILD_BATCH: Final = 64
"""Largest batch of a plan that is built without being told."""

FLAVOURS: Final = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx", "lean": "tensorrt_lean"}
"""What users call each TensorRT, and the module that is imported."""

DEFAULT_BATCH_TIMEOUT_S: Final = 300.0
DEFAULT_START_TIMEOUT_S: Final = 900.0
DEFAULT_RECALL_TIMEOUT_S: Final = 30.0

MAX_ATTEMPTS: Final = 3
"""Times an item may end a worker, or fail in one, while it runs alone."""

MAX_WAITING_REQUESTS: Final = 1024
"""Lease requests of one client that may wait at once; one more is refused."""

Uid = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 2)]
Gpu = Annotated[str, msgspec.Meta(pattern=r"^([0-9]{1,3}|(GPU|MIG)-[A-Za-z0-9/-]{1,100})\Z")]
_Axis = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Shape = Annotated[tuple[_Axis, ...], msgspec.Meta(max_length=16)]
# A `tuple[_Axis, _Axis]` in a union with an int ends the process in msgspec 0.22.
_Range = Annotated[tuple[_Axis, ...], msgspec.Meta(min_length=2, max_length=2)]
ShapeRange = Annotated[tuple[_Axis | _Range, ...], msgspec.Meta(max_length=16)]
"""An item shape, with a smallest and a largest size where items differ: ``(3, (32, 128), (320, 2560))``."""


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a worker loads a model.

    Attributes:
        device: "cpu" (ONNX files on onnxruntime) or "gpu" (TensorRT plans, and ONNX files that are built into one).
        threads: threads inside one engine call (onnxruntime's intra-op threads); 0 shares the
            machine's CPUs out among the workers.  CPU only.
        shapes: item shapes, by input name, for models that leave them open; by output name, the largest item of an
            output that only a run tells the shape of.
        no_batch: names of models whose tensors have no batch axis, or not in front: each item is a call of its own.
        partial: what becomes of batches smaller than the only one that a model takes: "pad" fills them up, "refuse"
            makes slots of whole batches, which must be submitted full.
        flavour: the TensorRT to use: a key of `FLAVOURS`; empty: the plan's header says, else what is installed.
        lanes: batches that a GPU worker has in flight at once.
        graphs: capture the engine's work into CUDA graphs.
        host_code: let a plan run code of its own on the host (version-compatible plans with a lean runtime inside);
            only for plans from a source you trust like a program.
    """

    device: Annotated[str, msgspec.Meta(pattern=r"^(cpu|gpu)\Z")] = "cpu"
    threads: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    shapes: dict[str, ShapeRange] = {}
    no_batch: tuple[str, ...] = ()
    partial: Annotated[str, msgspec.Meta(pattern=r"^(pad|refuse)\Z")] = "pad"
    flavour: Annotated[str, msgspec.Meta(pattern=r"^(|tensorrt|rtx|lean)\Z")] = ""
    lanes: Annotated[int, msgspec.Meta(ge=1, le=16)] = DEFAULT_LANES
    graphs: bool = True
    host_code: bool = False


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The range of shapes of one input that a plan is built for, batch axis first: smallest, best, largest."""

    min: Shape
    opt: Shape
    max: Shape


class BuildSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an ONNX file is built into a TensorRT plan; see `trtpool build --help`.

    Attributes:
        fp16: let layers run in float16.
        io: dtype of inputs and outputs, by tensor name, such as "fp16", with a key of `trtpool.ipc.building.IO_FORMATS`
            behind it as "fp16:chw16"; ``""`` stands for all of them.
        normalize: by input name, what is done to pixels inside the network; ``""`` stands for its only image.
        profiles: shapes by input name; by default the model's own, with batches of 1 to `DEFAULT_BUILD_BATCH`.
        more: further optimization profiles; inputs that are not in one have there what `profiles` says.
        workspace_bytes: the most scratch memory a layer may take; 0: TensorRT's own limit.
        optimization_level: how long TensorRT looks for faster kernels, 0 to 5; -1: its own default.
        compute_capability: target GPU, such as "8.9", of a build with no GPU ("rtx" only); empty: the GPU in use.
    """

    fp16: bool = False
    io: dict[str, str] = {}
    normalize: dict[str, Normalization] = {}
    profiles: dict[str, Profile] = {}
    more: tuple[dict[str, Profile], ...] = ()
    workspace_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**50)] = 0
    optimization_level: Annotated[int, msgspec.Meta(ge=-1, le=5)] = -1
    compute_capability: Annotated[str, msgspec.Meta(pattern=r"^(|[0-9]{1,2}\.[0-9])\Z")] = ""


class ModelSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model file and the name that clients use for it; the file's stem by default."""

    path: str
    name: str


class InspectRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Standard input of `python -m trtpool.workers.inspect`, as JSON."""

    source: ModelSource
    engine: EngineSettings


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An error on its way between our own processes: a class name of `trtpool.ipc.errors`, and its text."""

    kind: str
    text: str


class GpuInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One GPU, as `python -m trtpool.workers.devices` sees it.

    Attributes:
        name: such as "NVIDIA H100 80GB HBM3".
        uuid, pci_bus_id: as NVIDIA's tools write them; `uuid` begins with "GPU-" or "MIG-".
        compute_capability: such as "9.0".
        memory_bytes: its memory.
        driver: the newest CUDA that the driver runs, as ``(major, minor)``.
    """

    name: str
    uuid: str
    pci_bus_id: str
    compute_capability: str
    memory_bytes: int
    driver: tuple[int, int]


class ModelOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one model of several has otherwise than the rest of its pool; None: as the pool, see `PoolSettings`.

    Attributes:
        weight: the model's share of the workers' time while others have work too, beside theirs; None: 1.
    """

    slots: Annotated[int, msgspec.Meta(ge=1, le=2**24)] | None = None
    items_per_slot: Annotated[int, msgspec.Meta(ge=1, le=2**20)] | None = None
    max_batch: Annotated[int, msgspec.Meta(ge=1, le=2**24)] | None = None
    max_delay_us: Annotated[int, msgspec.Meta(ge=0, le=60_000_000)] | None = None
    max_slots_per_producer: Annotated[int, msgspec.Meta(ge=1, le=2**24)] | None = None
    weight: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None


class PoolSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that `trtpool start` can be told.

    Attributes:
        models: the model files to serve; at least one.
        name: the pool's name, which clients connect to.
        run_dir: the pool's run directory, absolute; holds its sockets and its lock.
        engine: how workers load the models.
        gpus: the GPUs to use, numbered from 0 in this order: indices in PCI order, "GPU-..." UUIDs or "MIG-..."
            ids; empty for a pool on the CPU.
        workers_per_gpu: worker processes on each GPU.
        workers: worker processes of a pool on the CPU.
        build: how ONNX files are built for the GPU.
        huge_pages: put the arena on huge pages, if the host has enough of them.
        slots: slots for each model; 0 means ``(lanes + 1) * max_batch`` items for each worker and two
            batches more for producers, or if that is more as many as 16 MiB hold, up to 4096.
        items_per_slot: items in each slot.
        max_batch: largest batch in items; at least `items_per_slot`; 0 means 8, or as many as one slot
            holds if that is more, or fewer if the engine takes no more.
        max_delay_us: how long the oldest item may wait for its batch to fill.  0 never waits: a
            free worker takes what there is, and batches grow by themselves while all are busy.
        max_slots_per_producer: slots of one model that one client may hold; 0 means three quarters, and all but a
            batch at most (but half at least).
        drain_timeout_s: how long a stopping pool waits for work in flight.
        allow_users: numbers of the users who may attach besides the pool's own.
        batch_timeout_s: how long one batch may run before its worker is taken for hung and killed, and the batch is
            run again on another; 0: for ever.  The default is far above what a batch takes, a first one that
            compiles kernels included, and short enough for a job that runs unattended.
        start_timeout_s: how long a worker may take to load its models and register the arena before it is killed:
            a start then fails, and a pool that serves starts it again; 0: for ever.
        recall_timeout_s: how long a client may hold slots and do nothing with them while others wait for slots, until
            it is reported; 0: for ever.
        evict: kill the process of such a client, if those who wait need its slots: nothing else can get them back.
        busy_poll: have broker, workers and clients spin while they wait, which saves the time that it takes to be woken
            and keeps a whole CPU for each of them busy.
        spin_us: how long at most they look for what comes next before they sleep; see `trtpool.ipc.spinning`.  None:
            200 where the pool may use 8 CPUs or more, else 0.
        slow_ms: log requests that take longer than this, at most one a second, with where their time went, in the
            broker and in the client; 0: none.
        metrics: serve figures for Prometheus, and /healthz and /readyz, on this ``HOST:PORT``; empty: do not.
        per_model: what single models have otherwise, by name.
    """

    models: tuple[ModelSource, ...]
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")] = "default"
    run_dir: str
    engine: EngineSettings = EngineSettings()
    gpus: Annotated[tuple[Gpu, ...], msgspec.Meta(max_length=64)] = ()
    workers_per_gpu: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    workers: Annotated[int, msgspec.Meta(ge=1, le=256)] = 1
    build: BuildSettings = BuildSettings()
    huge_pages: bool = False
    slots: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 0
    items_per_slot: Annotated[int, msgspec.Meta(ge=1, le=2**20)] = 1
    max_batch: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 0
    max_delay_us: Annotated[int, msgspec.Meta(ge=0, le=60_000_000)] = 0
    max_slots_per_producer: Annotated[int, msgspec.Meta(ge=0, le=2**24)] = 0
    drain_timeout_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 30.0
    allow_users: Annotated[tuple[Uid, ...], msgspec.Meta(max_length=256)] = ()
    batch_timeout_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = DEFAULT_BATCH_TIMEOUT_S
    start_timeout_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = DEFAULT_START_TIMEOUT_S
    recall_timeout_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = DEFAULT_RECALL_TIMEOUT_S
    evict: bool = False
    busy_poll: bool = False
    spin_us: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    per_model: dict[str, ModelOptions] = {}
    slow_ms: Annotated[float, msgspec.Meta(ge=0, le=86_400_000)] = 0.0
    metrics: Annotated[str, msgspec.Meta(max_length=300)] = ""

    def __post_init__(self) -> None:
        if self.evict and not self.recall_timeout_s:
            raise ConfigError(
                "--evict with --recall-timeout-s 0 would never evict anybody; give a time, or leave --evict out"
            )
        if not self.models:
            raise ConfigError("no model given; name at least one .onnx file")
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            files = " and ".join(model.path for model in self.models if model.name == twice)
            raise ConfigError(
                f"two models are called {twice!r}, {files}; name them with NAME=FILE, such as det=model.onnx"
            )
        if self.max_batch and self.max_batch < self.items_per_slot:
            raise ConfigError(
                f"--max-batch {self.max_batch} is smaller than --items-per-slot {self.items_per_slot}; "
                "a slot is never split, so raise the first or lower the second"
            )
        for name in self.per_model:
            if name not in names:
                raise ConfigError(
                    f"no model is called {name!r}, for which settings are given; there are {', '.join(names)}"
                )
            try:
                self.for_model(name)
            except ConfigError as error:
                raise ConfigError(f"model {name!r}: {error}") from error

    def for_model(self, name: str) -> PoolSettings:
        """The same with what that model has otherwise in place of what the pool has.

        Raises:
            ConfigError: that is not possible together.
        """
        given = msgspec.structs.asdict(self.per_model.get(name, ModelOptions()))
        given.pop("weight")
        chosen = {key: value for key, value in given.items() if value is not None}
        return msgspec.structs.replace(self, per_model={}, **chosen)

    def terms_of(self, name: str) -> ModelTerms:
        """What the broker is told of a model."""
        own = self.for_model(name)
        weight = self.per_model.get(name, ModelOptions()).weight or 1
        return ModelTerms(own.max_delay_us, own.max_slots_per_producer, weight)


class ModelTerms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the broker is told of one model besides its layout; see `PoolSettings` and `ModelOptions`."""

    max_delay_us: int = 0
    max_slots_per_producer: int = 0
    weight: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1


class WorkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Standard input of `python -m trtpool.workers`, as JSON.

    Attributes:
        parent_pid: the supervisor, with which the worker ends.
        lifeline_fd: its lifeline, connected and inherited.
        models: each model and how to load it, in the order that messages number them.
        cpus: CPUs that are this worker's share.
        name: what to call this worker in logs, such as "worker 1 on GPU 0".
        gpu: the pool's number for its GPU, which is the only one that it sees; None on the CPU.
        busy_poll: spin instead of blocking: latency for a whole CPU, which must be to spare.
        spin_us: else, how long at most to spin before blocking.
    """

    parent_pid: int
    lifeline_fd: int
    models: tuple[InspectRequest, ...]
    cpus: int
    name: str = "worker"
    gpu: int | None = None
    busy_poll: bool = False
    spin_us: int = 0


class BrokerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Standard input of `python -m trtpool.broker`, as JSON; the descriptors are inherited, `gpus` counts the GPUs.

    `terms` are those of each model; empty: the two before it hold for all. `allow_users` are those who may attach
    besides the pool's own; for `batch_timeout_s`, `recall_timeout_s`, `evict`, `busy_poll` and `slow_ms` see
    `PoolSettings`, and for `spin_us` `WorkerConfig`. `owner_pid` is the process that the pool is part of, which is
    never evicted; 0: none. `table_fd` is where a broker writes down what it does; None: nobody takes over from it. With
    `takes_over` it goes on from what another left there, with the peers that the supervisor tells of first.
    """

    parent_pid: int
    name: str
    run_dir: str
    epoch: int
    layout: Layout
    max_slots_per_producer: int
    max_delay_us: int
    gpus: int
    listener_fd: int
    control_fd: int
    arena_fd: int
    terms: tuple[ModelTerms, ...] = ()
    allow_users: tuple[Uid, ...] = ()
    batch_timeout_s: float = 0.0
    recall_timeout_s: float = 0.0
    evict: bool = False
    owner_pid: int = 0
    busy_poll: bool = False
    spin_us: int = 0
    slow_ms: float = 0.0
    table_fd: int | None = None
    takes_over: bool = False
