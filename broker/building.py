"""Plans that a pool builds for itself: ONNX files become TensorRT plans on first use, and are kept.

::

    $XDG_CACHE_HOME/trtpool/        else ~/.cache/trtpool
        plans/det-KEY.plan          KEY: digest of everything that the plan depends on
              det-KEY.plan.json     how it was built, with size and digest of the plan
              det-KEY.lock          held by whoever builds it, so that two pools build it once
              .det-KEY/             where it is built; what a killed build left there goes with the next
        timing/                     what TensorRT measured, by version and GPU

A plan counts when its record is there and describes it: the plan is renamed into its place first.  Nothing that says
what a model is or which TensorRT there is gets loaded into this process: a child is asked.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from trtpool.ipc.arena import format_bytes
from trtpool.ipc.building import BUILD_FORMAT, RECORD_SUFFIX, WEIGHTS_SUFFIX, Builder, BuildRequest, Line, PlanRecord
from trtpool.ipc.errors import ConfigError
from trtpool.ipc.settings import DEFAULT_BUILD_BATCH, BuildSettings, GpuInfo, InspectRequest, ModelSource, PoolSettings

from .child_lines import last_line
from .modules import child_environment
from .planning import Waiting, error_of, is_plan, requests

TELL_EVERY: Final = 0.25
"""A pool that builds a plan says how far it is each time that this much more is done."""

Show = Callable[[Line], None]
T = TypeVar("T")


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/trtpool``, else ``~/.cache/trtpool``.

    Raises:
        ConfigError: this user has no home.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if chosen.is_absolute():  # a relative one is to be ignored: XDG Base Directory Specification
        return chosen / "trtpool"
    try:
        return Path.home() / ".cache" / "trtpool"
    except RuntimeError as error:
        raise ConfigError(f"there is no place for plans ({error}); set XDG_CACHE_HOME to a folder") from error


# ---------------------------------------------------------------------------------- the builder


def describe(request: BuildRequest, env: Mapping[str, str], waiting: Waiting = nullcontext) -> Builder:
    """Who would build `request`, and from what.

    Args:
        request: its output is left out of account.
        env: the environment of the child, which shows it its GPU.
        waiting: entered while the child is waited for; it may raise, and the child is ended.

    Raises:
        ModelError: the file cannot be read.
        MissingExtra: onnx or TensorRT is not installed.
    """
    last = _run(msgspec.structs.replace(request, output=""), env, lambda _: None, waiting)
    assert last.builder is not None
    return last.builder


def build_plan(
    request: BuildRequest, work: Path, env: Mapping[str, str], show: Show, waiting: Waiting = nullcontext
) -> PlanRecord:
    """Build `request` and put plan and record in their places, or leave nothing.

    Args:
        request: its output is where the plan goes, replacing one that is there; absolute.
        work: a folder in the same one, which is nobody else's; it is made, and removed at the end.
        env, waiting: see `describe`.
        show: called with what the builder says while it works.

    Raises:
        ModelError: TensorRT does not take the model, or crashed on it.
        MissingExtra, DeviceUnavailable, ConfigError: see `trtpool.workers.builder.build`.
    """
    output = Path(request.output)
    made = work / (output.name if request.onnx else "model.plan")  # an ONNX file names the one that has its weights
    with _written(work.parent):
        shutil.rmtree(work, ignore_errors=True)  # a killed build's
        work.mkdir(mode=0o700)
    try:
        record = _run(msgspec.structs.replace(request, output=os.fspath(made)), env, show, waiting).built
        assert record is not None
        made_record = work / f"{made.name}{RECORD_SUFFIX}"
        made_weights = work / f"{made.name}{WEIGHTS_SUFFIX}"
        with _written(output.parent):
            if made_weights.exists():
                made_weights.replace(output.with_name(made_weights.name))
            made_record.write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
            made.replace(output)
            made_record.replace(record_of(output))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return record


def record_of(plan: Path) -> Path:
    """The record that lies beside `plan`."""
    return plan.with_name(plan.name + RECORD_SUFFIX)


def _run(request: BuildRequest, env: Mapping[str, str], show: Show, waiting: Waiting) -> Line:
    """Have a child do it; returns its last line."""
    last = last_line(
        "trtpool.workers.build",
        request,
        Line,
        env,
        _is_outcome,
        show,
        f"{request.source.path}: building a plan",
        waiting,
    )
    if last.refusal:
        raise error_of(last.refusal)
    return last


def _is_outcome(line: Line) -> bool:
    return bool(line.built or line.builder or line.refusal)


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Say of an error what it means for `folder`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror}; make room there or allow it, or choose another folder: "
            "`trtpool build -o FILE`, and for pools XDG_CACHE_HOME"
        ) from error


# ---------------------------------------------------------------------------------- the cache


def ensure_plans(
    settings: PoolSettings, gpus: Sequence[GpuInfo], say: Callable[[str], None], waiting: Waiting = nullcontext
) -> PoolSettings:
    """`settings` with a plan for each ONNX file: one that is kept from before, or a new one.

    Args:
        settings: of a pool on GPUs.
        gpus: what these are, in the same order.
        say: called with a line for the user.
        waiting: see `describe`.

    Raises:
        ConfigError: the GPUs are of different kinds, or the cache cannot be written.
        ModelError: TensorRT does not take a model.
        MissingExtra: onnx or TensorRT is not installed.
    """
    wanted = requests(settings)
    if all(is_plan(request.source.path) for request in wanted):
        return settings
    kinds = {(gpu.name, gpu.compute_capability) for gpu in gpus}
    if len(kinds) > 1:
        raise ConfigError(
            f"the GPUs are of different kinds ({', '.join(sorted(name for name, _ in kinds))}), and a plan is built "
            "for one; start one pool for each kind"
        )
    builds = split_by_model(settings.build, [model.name for model in settings.models])
    env = child_environment(settings.gpus[0])
    models = tuple(
        request.source
        if is_plan(request.source.path)
        else _ensure_plan(_request(settings, request, build), gpus[0], env, say, waiting)
        for request, build in zip(wanted, builds, strict=True)
    )
    return msgspec.structs.replace(settings, models=models)


def _request(settings: PoolSettings, wanted: InspectRequest, build: BuildSettings) -> BuildRequest:
    return BuildRequest(
        source=ModelSource(os.path.abspath(wanted.source.path), wanted.source.name),
        flavour=wanted.engine.flavour,
        build=build,
        shapes=wanted.engine.shapes,
        max_batch=max(settings.for_model(wanted.source.name).max_batch, DEFAULT_BUILD_BATCH),
        no_batch=wanted.source.name in wanted.engine.no_batch,
        timing_cache=os.fspath(cache_root() / "timing"),
    )


def _ensure_plan(
    request: BuildRequest, gpu: GpuInfo, env: Mapping[str, str], say: Callable[[str], None], waiting: Waiting
) -> ModelSource:
    source = request.source
    builder = describe(request, env, waiting)
    name = f"{Path(source.path).stem}-{_key(request, builder, gpu)}"
    folder = cache_root() / "plans"
    plan = folder / f"{name}.plan"
    found = ModelSource(os.fspath(plan), source.name)
    if is_intact(plan):  # without the lock, so that a cache that is only read serves too
        say(f"model {source.name}: the plan for {gpu.name} was found in the cache, {plan}")
        return found
    with _locked(folder, name, source, say, waiting):
        if is_intact(plan):
            say(f"model {source.name}: another pool built the plan for {gpu.name}, {plan}")
            return found
        if plan.exists():
            say(f"model {source.name}: the plan in the cache is damaged, and is built again")
        say(
            f"model {source.name}: building a plan of {Path(source.path).name} for {gpu.name} with {builder.flavour} "
            f"{builder.version}, which can take minutes; it is kept for the next start"
        )
        show = _Teller(source.name, say)
        request = msgspec.structs.replace(request, output=os.fspath(plan))
        record = build_plan(request, folder / f".{name}", env, show, waiting)
    size = format_bytes(record.plan_bytes)
    say(f"model {source.name}: built in {record.seconds:.0f} s, {size}, kept in {plan}")
    return found


def _key(request: BuildRequest, builder: Builder, gpu: GpuInfo) -> str:
    """Digest of everything that a plan depends on."""
    parts = {
        "format": BUILD_FORMAT,
        "builder": builder,
        "gpu": [gpu.name, gpu.compute_capability, gpu.driver[0]],
        "build": request.build,
        "shapes": request.shapes,
        "max_batch": request.max_batch,
        "no_batch": request.no_batch,
    }
    return hashlib.sha256(json.dumps(msgspec.to_builtins(parts), sort_keys=True).encode()).hexdigest()[:20]


def is_intact(plan: Path) -> bool:
    """Whether `plan` is there as its record says."""
    try:
        record = msgspec.json.decode(record_of(plan).read_bytes(), type=PlanRecord)
        if plan.stat().st_size != record.plan_bytes:
            return False
        digest = hashlib.sha256()
        with plan.open("rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    except (OSError, msgspec.DecodeError):
        return False
    return digest.hexdigest() == record.plan_sha256


@contextlib.contextmanager
def _locked(
    folder: Path, name: str, source: ModelSource, say: Callable[[str], None], waiting: Waiting
) -> Iterator[None]:
    with _written(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"model {source.name}: another pool builds this plan now; waiting for it")
            with waiting():
                fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class _Teller:
    """Passes a builder's decisions on, and its progress now and then."""

    def __init__(self, model: str, say: Callable[[str], None]) -> None:
        self._model = model
        self._say = say
        self._next = TELL_EVERY

    def __call__(self, line: Line) -> None:
        if line.said:
            self._say(f"model {self._model}: {line.said}")
        elif line.progress and line.progress.of:
            done = line.progress.done / line.progress.of
            if done >= self._next:
                self._say(f"model {self._model}: {done:.0%} built ({line.progress.phase})")
                self._next = (done // TELL_EVERY + 1) * TELL_EVERY


# ---------------------------------------------------------------------------------- several models


def split_by_model(build: BuildSettings, models: Sequence[str]) -> list[BuildSettings]:
    """What of `build` is for each of `models`: a tensor named ``MODEL:TENSOR`` is that model's, ``""`` everybody's.

    With one model a name without that is its own.

    Raises:
        ConfigError: a tensor of no model, or of which one is not said.
    """
    ios = _split("--io", build.io, models)
    normalize = _split("--normalize", build.normalize, models)
    profiles = _split("--shapes", build.profiles, models)
    more = [_split("--shapes", each, models) for each in build.more]
    return [
        msgspec.structs.replace(
            build, io=io, normalize=pixels, profiles=own, more=tuple(filter(None, (each[at] for each in more)))
        )
        for at, (io, pixels, own) in enumerate(zip(ios, normalize, profiles, strict=True))
    ]


def _split(option: str, named: Mapping[str, T], models: Sequence[str]) -> list[dict[str, T]]:
    parts: dict[str, dict[str, T]] = {model: {} for model in models}
    for key, value in named.items():
        model, _, tensor = key.partition(":")
        if not key:
            for part in parts.values():
                part[""] = value
        elif tensor and model in parts:
            parts[model][tensor] = value
        elif len(models) == 1:
            parts[models[0]][key] = value
        else:
            raise ConfigError(f"{option} {key}: say of which model, such as {models[0]}:{tensor or key}")
    return [parts[model] for model in models]
