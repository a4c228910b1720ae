"""`trtpool.Pool`: a pool that belongs to the process which made it."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from trtpool.ipc.client import Client
from trtpool.ipc.errors import ConfigError, DeviceUnavailable, PoolClosed, StartFailed
from trtpool.ipc.process import describe_exit
from trtpool.ipc.rundir import default_root
from trtpool.ipc.settings import (
    DEFAULT_BATCH_TIMEOUT_S,
    DEFAULT_LANES,
    DEFAULT_RECALL_TIMEOUT_S,
    DEFAULT_START_TIMEOUT_S,
    DEFAULT_TRANSPORT,
    BuildSettings,
    EngineSettings,
    PoolSettings,
    Refusal,
)

from .control import SuperviseConfig
from .gpus import gpu_list
from .models import AnyModel, Model, new_source, read_models
from .modules import child_environment, start_module
from .planning import error_of
from .reload.requests import reload
from .tracing.asking import DEFAULT_BUFFER_MIB, Recording
from .users import user_ids

_numbers = itertools.count(1)

STOP_GRACE_S: Final = 15.0


def make_settings(
    models: Sequence[AnyModel],
    run_dir: Path,
    *,
    device: str | None = None,
    gpus: tuple[str, ...] = (),
    workers: int | None = None,
    engine: EngineSettings | None = None,
    build: BuildSettings | None = None,
    per_model: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    **options: object,
) -> PoolSettings:
    """Checked settings.

    Args:
        models: see `trtpool.broker.models`.
        run_dir: the pool's run directory.
        device: "cpu" or "gpu"; by default what `gpus` says.
        gpus: see `gpu_list`; empty for a pool on the CPU.
        workers: processes of a pool on the CPU; one by default.
        engine: how to load the models; its `device` is set here.
        build: how to build ONNX files for a GPU.
        per_model: by model name, fields of `ModelOptions`; they go before what `models` have.
        options: other fields of `PoolSettings`.

    Raises:
        ConfigError: an option is out of bounds, or is not for that device; the text says which.
        DeviceUnavailable: there is no such device.
    """
    if gpus:
        _refuse_on_gpus(device, workers)
    elif device == "gpu":
        raise ConfigError("--device gpu: name the GPUs to use, such as --gpus 0")
    elif device not in (None, "cpu"):
        raise DeviceUnavailable(f"there is no device {device!r}; use --device cpu, or name GPUs, such as --gpus 0")
    engine = msgspec.structs.replace(engine or EngineSettings(), device="gpu" if gpus else "cpu")
    sources, own, shapes = read_models(models)
    engine = msgspec.structs.replace(engine, shapes={**shapes, **engine.shapes})
    for name, more in per_model.items():
        own[name] = {**own.get(name, {}), **more}
    given = {
        "models": sources,
        "run_dir": os.fspath(run_dir),
        "engine": engine,
        "gpus": gpus,
        "workers": 1 if workers is None else workers,
        "build": build or BuildSettings(),
        "per_model": own,
        **options,
    }
    try:
        settings = msgspec.convert(msgspec.to_builtins(given), PoolSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"a setting is not possible: {error}") from error
    _refuse_other_devices_options(settings)
    return settings


def _refuse_on_gpus(device: str | None, workers: int | None) -> None:
    if device not in (None, "gpu"):
        raise ConfigError(f"--device {device} and --gpus contradict each other; leave one of them out")
    if workers is not None:
        raise ConfigError(
            f"--workers {workers} is for the CPU; with --gpus there is one worker on each GPU, "
            "or as many as --workers-per-gpu says"
        )


def _refuse_other_devices_options(settings: PoolSettings) -> None:
    """An option that would do nothing is refused, not ignored."""
    engine, default = settings.engine, EngineSettings()
    if settings.gpus:
        if engine.threads:
            raise ConfigError(f"--threads {engine.threads} is for the CPU; leave it out with --gpus")
        return
    for option, is_given in (
        ("--workers-per-gpu", settings.workers_per_gpu != 1),
        ("--lanes", engine.lanes != default.lanes),
        ("--flavour", engine.flavour != default.flavour),
        ("--no-graphs", not engine.graphs),
        ("--allow-host-code", engine.host_code),
    ):
        if is_given:
            raise ConfigError(f"{option} is for GPUs: name those to use, such as --gpus 0, or leave it out")
    if settings.build != BuildSettings():
        raise ConfigError(
            "building a plan is for GPUs: name those to use, such as --gpus 0; for the CPU, change the ONNX file, with "
            "trtpool build MODEL.onnx -o NEW.onnx and --normalize, --io or --fp16"
        )


class Pool(Client):
    """Start a pool of this process's own and connect to it: ``with trtpool.Pool(model="det.onnx") as pool: ...``.

    The pool runs in processes of its own and ends with this one, however this one ends.  Other processes attach
    with ``pool.handle()``.

    Args:
        model: an ONNX file, or a TensorRT plan for a GPU; ``NAME=FILE``; a `trtpool.Model`, or a dictionary of what
            that takes, for settings of its own; or a list of these.
        device: "cpu" or "gpu"; by default what `gpus` says.
        gpus: the GPUs to use, such as ``0``, ``"0,1"`` or ``[0, "GPU-<uuid>"]``, numbered from 0 in this order; by
            default the models run on the CPU.
        shapes: item shapes, by input name, for models that leave them open; ``(3, (32, 640), (32, 640))`` where items
            differ, from the smallest to the largest.  By output name: the largest item of it, where nothing tells that.
        no_batch: names of models without a batch axis in front: each item is a call of its own.
        partial_batches: for a model that takes batches of one size: "pad" fills smaller ones up, "refuse" takes whole
            ones only, one in each slot.
        threads: threads in one engine call on the CPU; 0 shares the machine's CPUs out among the workers.
        flavour, lanes, graphs, host_code: for workers on GPUs, see `trtpool.ipc.settings.EngineSettings`.
        build: how ONNX files are built into plans for a GPU; see `trtpool.ipc.settings.BuildSettings`.
        name: the pool's name; made up by default.
        run_dir: its run directory; by default one for that name.
        workers: processes of a pool on the CPU; 1 by default.
        workers_per_gpu, huge_pages, slots, items_per_slot, max_batch, max_delay_us, max_slots_per_producer,
            drain_timeout_s, batch_timeout_s, start_timeout_s, recall_timeout_s, evict, busy_poll, spin_us, slow_ms,
            metrics: see
            `trtpool.ipc.settings.PoolSettings`.  This process itself is never evicted.
        allow_users: names or numbers of users who may attach besides this one; `run_dir` must then be in a place
            that they can get to.  See docs/security.md for what that trusts them with.
        transport: what carries this client's messages, see `trtpool.connect`.

    Raises:
        ConfigError: a model, an option or the run directory must change; the kind says which.
        StartFailed: the pool's processes did not become ready.
    """

    def __init__(
        self,
        model: AnyModel | Sequence[AnyModel],
        *,
        device: str | None = None,
        gpus: int | str | Sequence[int | str] | None = None,
        shapes: Mapping[str, Sequence[int | Sequence[int]]] | None = None,
        no_batch: Sequence[str] = (),
        partial_batches: str = "pad",
        threads: int = 0,
        flavour: str = "",
        lanes: int = DEFAULT_LANES,
        graphs: bool = True,
        host_code: bool = False,
        build: BuildSettings | None = None,
        name: str | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        workers: int | None = None,
        workers_per_gpu: int = 1,
        huge_pages: bool = False,
        slots: int = 0,
        items_per_slot: int = 1,
        max_batch: int = 0,
        max_delay_us: int = 0,
        max_slots_per_producer: int = 0,
        drain_timeout_s: float = 30.0,
        allow_users: Sequence[int | str] = (),
        batch_timeout_s: float = DEFAULT_BATCH_TIMEOUT_S,
        start_timeout_s: float = DEFAULT_START_TIMEOUT_S,
        recall_timeout_s: float = DEFAULT_RECALL_TIMEOUT_S,
        evict: bool = False,
        busy_poll: bool = False,
        spin_us: int | None = None,
        slow_ms: float = 0.0,
        metrics: str = "",
        transport: str = DEFAULT_TRANSPORT,
    ) -> None:
        self._session = None
        self._process: subprocess.Popen[bytes] | None = None
        name = name or f"embedded-{os.getpid()}-{next(_numbers)}"
        directory = Path(os.path.abspath(run_dir)) if run_dir else default_root() / name
        models = [model] if isinstance(model, (str, os.PathLike, Model, Mapping)) else list(model)
        settings = make_settings(
            models,
            directory,
            device=device,
            gpus=() if gpus is None else gpu_list(gpus),
            workers=workers,
            engine=EngineSettings(
                threads=threads,
                shapes={
                    key: tuple(axis if isinstance(axis, int) else tuple(axis) for axis in shape)
                    for key, shape in (shapes or {}).items()
                },
                no_batch=tuple(no_batch),
                partial=partial_batches,
                flavour=flavour,
                lanes=lanes,
                graphs=graphs,
                host_code=host_code,
            ),
            build=build,
            name=name,
            workers_per_gpu=workers_per_gpu,
            huge_pages=huge_pages,
            slots=slots,
            items_per_slot=items_per_slot,
            max_batch=max_batch,
            max_delay_us=max_delay_us,
            max_slots_per_producer=max_slots_per_producer,
            drain_timeout_s=drain_timeout_s,
            allow_users=user_ids(allow_users),
            batch_timeout_s=batch_timeout_s,
            start_timeout_s=start_timeout_s,
            recall_timeout_s=recall_timeout_s,
            evict=evict,
            busy_poll=busy_poll,
            spin_us=spin_us,
            slow_ms=slow_ms,
            metrics=metrics,
        )
        self._owner = os.getpid()
        self._directory = directory
        self._drain_timeout_s = drain_timeout_s
        self._process = _start(settings)
        try:
            super().__init__(directory, transport)
        except BaseException:
            self._stop()
            raise

    @property
    def supervisor_pid(self) -> int:
        """The process that runs the pool; 0 when it was closed."""
        return self._process.pid if self._process is not None else 0

    def reload(self, *models: str | os.PathLike[str], timeout_s: float | None = None) -> int:
        """Load other files in place of what the pool serves, without losing a request; see docs/operations.md.

        Args:
            models: ``NAME=FILE``, or a file alone if the pool has one model.  Inputs and outputs must be the same.
            timeout_s: seconds after which it is called off, if the new engines do not answer yet; None: never.

        Returns:
            The generation of the engines that give all answers from now on; see `PoolReport.generation`.

        Raises:
            ConfigError, ModelError, DeviceUnavailable, StartFailed: a file cannot be loaded, or has another signature;
                nothing has changed.
            PoolBusy: another reload is under way, or the time is over.
            PoolClosed: the pool was closed or has ended.
        """
        if self._process is None:
            raise PoolClosed("this pool was closed; make another")
        return reload(self._directory, [new_source(model) for model in models], timeout_s=timeout_s)

    def trace(self, output: str | os.PathLike[str], *, buffer_mib: int = DEFAULT_BUFFER_MIB) -> Recording:
        """Record what the pool does, from here to the end of a ``with``; see docs/tracing.md.

        Args:
            output: the file that is written then, as Chrome's trace events in JSON.
            buffer_mib: MiB for what is recorded; what has no room is dropped, and counted in `Recording.trace`.

        Raises:
            ConfigError: the file cannot be written, or there is no memory for the buffer.
            PoolBusy: another trace is under way.
            PoolClosed: the pool was closed or has ended.
        """
        if self._process is None:
            raise PoolClosed("this pool was closed; make another")
        return Recording(self._directory, output, buffer_mib=buffer_mib)

    def close(self) -> None:
        """Disconnect, let work in flight finish, and end the pool.  Again: nothing."""
        super().close()
        self._stop()

    def __del__(self) -> None:
        super().__del__()
        # When all of Python ends, the supervisor sees it.
        if getattr(self, "_process", None) is not None and not sys.is_finalizing():
            self._stop()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None or os.getpid() != self._owner:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(self._drain_timeout_s + STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its children end with it
            process.wait()


def _start(settings: PoolSettings) -> subprocess.Popen[bytes]:
    """Start the supervisor and wait until the pool serves."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(read_fd, "rb") as answer:
        try:
            process = start_module("trtpool.broker.supervise", child_environment(), stdout=2, pass_fds=[write_fd])
        finally:
            os.close(write_fd)
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(msgspec.json.encode(SuperviseConfig(settings, os.getpid(), write_fd)))
            line = answer.readline()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if line == b"\n":
        return process
    how = describe_exit(process.wait())
    if line:
        raise error_of(msgspec.json.decode(line, type=Refusal))
    raise StartFailed(f"the pool's supervisor ended while it started: {how}; what it said is on standard error")
