"""`trtpool.ray`: a pool on each node of a Ray cluster, for `ray.data.Dataset.map_batches`.

::

    driver --owns--> registry --owns--> keeper of node A: trtpool.Pool  <--attach-- TrtPool actors on node A
                               '------> keeper of node B: trtpool.Pool  <--attach-- TrtPool actors on node B

Memory is shared on a node and not beyond it, so each has a pool, started by the first `TrtPool` there and used by all.
What Ray owns ends with its owner: with the job's driver the registry, with it the keepers, and with a keeper its pool,
by pidfd.  So nobody has to close anything, whoever is killed.  What restarts what:

- an actor of `map_batches`: Ray, by its rules; another attaches, and the slots of the first come back to the pool.
- a worker or the broker of a pool: the pool itself; nobody in Ray notices.
- a whole pool or its keeper: Ray restarts the keeper.  The actors there find their pool closed, attach to what the
  keeper starts next, and run the batch again that they had.
- a node: Ray runs what was there elsewhere, where actors attach to that node's pool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType, TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trtpool.ipc.client import Client
from trtpool.ipc.errors import InvalidInput, PoolClosed, PoolNotFound
from trtpool.ipc.extras import load_extra
from trtpool.ipc.remote import connect
from trtpool.ipc.settings import Priority

from .pool import Pool

CLOSE_GRACE_S: Final = 60.0
"""How long pools may take to end; those of nodes that are lost never answer."""

ATTEMPTS: Final = 5
"""How often a batch is tried when the pool under it ends."""


def _ray() -> ModuleType:
    return load_extra("ray", "trtpool.ray needs Ray", "ray")


class Keeper:
    """The actor that has a node's pool."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._pool: Pool | None = None

    def attach(self) -> str:
        """The run directory of the pool, which is started if there is none, or if it has ended."""
        if self._pool is not None:
            try:
                self._pool.status()
            except PoolClosed:
                self._pool.close()
                self._pool = None
        if self._pool is None:
            self._pool = Pool(**self._options)
        return str(self._pool.run_dir)

    def close(self) -> None:
        """End the pool."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class Registry:
    """The actor that has the keepers of a job; `make` starts one on a node."""

    def __init__(self, options: Mapping[str, Any], resources: Mapping[str, Any]) -> None:
        self._options = options
        self._resources = resources
        self._keepers: dict[str, Any] = {}

    def keeper(self, node_id: str) -> Any:
        """The keeper of a node."""
        if node_id not in self._keepers:
            self._keepers[node_id] = _actor(Keeper, node_id, soft=False, **self._resources).remote(self._options)
        return self._keepers[node_id]

    def close(self) -> None:
        """End all pools that can be reached."""
        ray = _ray()
        closing = [keeper.close.remote() for keeper in self._keepers.values()]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_GRACE_S)
        for keeper in self._keepers.values():
            ray.kill(keeper)
        self._keepers.clear()


def _actor(kind: type, node_id: str, *, soft: bool, **resources: Any) -> Any:
    """An actor class that Ray places on a node and restarts there."""
    ray = _ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node_id, soft=soft)
    return ray.remote(kind).options(max_restarts=-1, max_task_retries=-1, scheduling_strategy=place, **resources)


class NodePools:
    """Pools for a Ray job, one on each node that asks for one; made in the driver, and passed to `TrtPool`.

    ::

        with trtpool.ray.NodePools("det.onnx", num_gpus=1) as pools:
            done = ds.map_batches(trtpool.ray.TrtPool, fn_constructor_args=[pools], compute=ActorPoolStrategy(size=8))
            done.write_parquet(out)

    They end with `close`, or else with the job.  Ray executes lazily: close them when the data was read or written.

    Args:
        model: as `trtpool.Pool` takes it: paths that are there on every node.
        num_cpus: CPUs that Ray sets aside for each pool; also the engines' threads, unless `threads` says otherwise.  0
            sets none aside, so that a pool starts whatever else runs on the node.
        num_gpus: GPUs that Ray sets aside for each pool, which uses these.  `map_batches` has no use for any: let it
            ask for a custom resource of the nodes with GPUs, if there are others.
        resources: custom resources for each pool, as Ray takes them.
        options: for `trtpool.Pool`, such as `shapes`, `workers`, `max_batch`, `slots`.

    Raises:
        MissingExtra: Ray is not installed.
        ConfigError and StartFailed are raised where the data is read, by the first batch.
    """

    def __init__(
        self,
        model: str | Sequence[str],
        *,
        num_cpus: float = 0,
        num_gpus: float = 0,
        resources: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        ray = _ray()
        if not ray.is_initialized():
            ray.init()
        options = {"model": model, **options}
        if num_gpus:
            options.setdefault("gpus", list(range(math.ceil(num_gpus))))  # counted in the GPUs that Ray lets it see
        elif num_cpus and not options.get("gpus"):
            options.setdefault("threads", max(1, int(num_cpus) // (options.get("workers") or 1)))
        own_node = ray.get_runtime_context().get_node_id()
        asked = {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": dict(resources or {})}
        self._registry: Any = _actor(Registry, own_node, soft=True, num_cpus=0).remote(options, asked)

    def attach(self) -> str:
        """The run directory of this node's pool, which is started if need be."""
        ray = _ray()
        node_id = ray.get_runtime_context().get_node_id()
        keeper = ray.get(self._registry.keeper.remote(node_id))
        run_dir: str = ray.get(keeper.attach.remote())
        return run_dir

    def close(self) -> None:
        """End all pools.  Again: nothing."""
        if self._registry is not None:
            ray = _ray()
            ray.get(self._registry.close.remote())
            ray.kill(self._registry)
            self._registry = None

    def __enter__(self) -> NodePools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TrtPool:
    """For `ray.data.Dataset.map_batches`: a callable class whose actors are producers of their node's pool.

    ``batch_format`` may be "numpy" (the default) or "pyarrow".  A batch's rows are written into slots once, out of
    Ray's object store, and its results copied out once.

    Args:
        pools: see `NodePools`.
        model: which of the pools' models; not needed if there is one.
        columns: the column for each input, by the input's name; by default that of the same name.
        keep: columns to pass on; by default all but the inputs.
        on_error: "raise", or with "pyarrow" batches "null": see `trtpool.arrow.infer`.
        timeout_s: seconds for each step: waiting for slots, and for each result.
        priority: see `Client.infer`.

    Raises:
        As `Client.infer` and `trtpool.arrow.infer`; out of Ray as the cause of a `RayTaskError`.
    """

    def __init__(
        self,
        pools: NodePools,
        *,
        model: str | None = None,
        columns: Mapping[str, str] | None = None,
        keep: Sequence[str] | None = None,
        on_error: str = "raise",
        timeout_s: float | None = None,
        priority: Priority = "bulk",
    ) -> None:
        self._pools = pools
        self._model = model
        self._columns = dict(columns or {})
        self._keep = keep
        self._on_error = on_error
        self._timeout_s = timeout_s
        self._priority: Priority = priority
        self._client: Client | None = None

    def __call__(self, batch: Any) -> Any:
        for left in reversed(range(ATTEMPTS)):
            try:
                return self._run(self._attached(), batch)
            except (PoolClosed, PoolNotFound):  # it ended under us; the keeper starts another
                if self._client is not None:
                    self._client.close()
                    self._client = None
                if not left:
                    raise
        raise AssertionError("unreachable")

    @property
    def client(self) -> Client:
        """This actor's client of its node's pool."""
        return self._attached()

    def _attached(self) -> Client:
        if self._client is None:
            self._client = connect(run_dir=self._pools.attach())
        return self._client

    def _run(self, client: Client, batch: Any) -> Any:
        if isinstance(batch, dict):
            return self._run_arrays(client, batch)
        if not hasattr(batch, "to_batches"):
            raise InvalidInput(f"TrtPool takes batch_format 'numpy' or 'pyarrow', got {type(batch).__name__}")
        from trtpool.ipc.arrow import infer

        return infer(
            client,
            batch,
            model=self._model,
            columns=self._columns,
            keep=self._keep,
            on_error=self._on_error,  # type: ignore[arg-type]  # checked there
            timeout_s=self._timeout_s,
            priority=self._priority,
        )

    def _run_arrays(self, client: Client, batch: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        if self._on_error != "raise":
            raise InvalidInput("on_error='null' is for batch_format='pyarrow': NumPy has no nulls")
        spec = client.models[client.model_index(self._model)].spec
        names = {tensor.name: self._columns.get(tensor.name, tensor.name) for tensor in spec.inputs}
        if missing := set(names.values()) - set(batch):
            raise InvalidInput(
                f"there is no column {', '.join(sorted(missing))}; name the inputs' columns with columns=, "
                f"out of {', '.join(batch)}"
            )
        kept = [name for name in batch if name not in names.values()] if self._keep is None else self._keep
        if twice := {tensor.name for tensor in spec.outputs}.intersection(kept):
            raise InvalidInput(f"column {', '.join(sorted(twice))} would come twice; say with keep= which to pass on")
        inputs = {name: np.asarray(batch[column]) for name, column in names.items()}
        outputs = client.infer(inputs, model=self._model, timeout_s=self._timeout_s, priority=self._priority)
        return {**{name: batch[name] for name in kept}, **outputs}
