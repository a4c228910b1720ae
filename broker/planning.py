"""From settings, GPUs and models to a layout: how many slots, how large a batch, and whether they fit.

GPUs and models are looked at by children, so that neither CUDA nor an engine is ever loaded into the supervisor.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

import msgspec

from trtpool.ipc import errors
from trtpool.ipc.arena import HUGE_PAGE_BYTES
from trtpool.ipc.errors import ConfigError, DeviceUnavailable, ModelError, StartFailed, TrtpoolError
from trtpool.ipc.layout import Layout, ModelPlan, plan
from trtpool.ipc.process import describe_exit
from trtpool.ipc.settings import DEFAULT_MAX_BATCH, GpuInfo, InspectRequest, PoolSettings, Refusal, ShapeRange
from trtpool.ipc.tensors import ModelSpec

from .modules import child_environment, start_module

CPU_LANES: Final = 1
"""Batches that a worker on the CPU runs at once."""

PLAN_HEADERS: Final = (b"ftrt", b"vtrt")
"""How TensorRT plans begin, as seen in every version; undocumented."""

PLAN_SUFFIXES: Final = (".plan", ".engine", ".trt")

Waiting = Callable[[], AbstractContextManager[None]]
"""Entered while a child is waited for; it may raise, and the child is ended."""


SMALL_BYTES: Final = 16 << 20
SMALL_SLOTS: Final = 4096
"""Models of small items have so many slots by default, within so many bytes: then several producers can keep runs of
many items in flight, and be granted the next in advance, of which the broker gives out an eighth of the slots."""


def error_of(refusal: Refusal) -> TrtpoolError:
    """The error that another of our processes reports."""
    kind = getattr(errors, refusal.kind, None)
    if isinstance(kind, type) and issubclass(kind, TrtpoolError):
        return kind(refusal.text)
    return StartFailed(refusal.text)


def is_plan(path: str | os.PathLike[str]) -> bool:
    """Whether a model file is a TensorRT plan, by its first bytes or else its name; others are ONNX files."""
    if Path(path).suffix in PLAN_SUFFIXES:
        return True
    try:
        with Path(path).open("rb") as file:
            return file.read(4) in PLAN_HEADERS
    except OSError:  # whoever loads it says what is wrong
        return False


def requests(settings: PoolSettings) -> tuple[InspectRequest, ...]:
    """How each model is to be loaded.  A shape named ``MODEL:INPUT`` goes to that model, others to the only one.

    Raises:
        ConfigError: a shape for no model, or for which one is not said; a TensorRT plan without a GPU.
    """
    if not settings.gpus:
        plans = [Path(model.path).name for model in settings.models if is_plan(model.path)]
        if plans:
            raise ConfigError(
                f"{plans[0]} is a TensorRT plan, which needs a GPU: name the GPUs to use, such as --gpus 0"
            )
    names = [model.name for model in settings.models]
    if unknown := set(settings.engine.no_batch) - set(names):
        raise ConfigError(f"--no-batch {min(unknown)}: no model is called that; there are {', '.join(names)}")
    shapes: dict[str, dict[str, ShapeRange]] = {name: {} for name in names}
    for key, shape in settings.engine.shapes.items():
        model, colon, tensor = key.partition(":")
        if not colon:
            model, tensor = names[0], key
            if len(names) > 1:
                raise ConfigError(f"which model's input is {key!r}? With several models say --shape MODEL:{key}=...")
        if model not in shapes:
            raise ConfigError(f"--shape {key}: no model is called {model!r}; there are {', '.join(names)}")
        shapes[model][tensor] = shape
    return tuple(
        InspectRequest(model, msgspec.structs.replace(settings.engine, shapes=shapes[model.name]))
        for model in settings.models
    )


def probe(gpus: Sequence[str], waiting: Waiting = nullcontext) -> list[GpuInfo]:
    """Have each of the GPUs that the user names looked at by a child that sees it alone.

    Args:
        gpus: such as "0" or "GPU-<uuid>".
        waiting: see `Waiting`.

    Raises:
        DeviceUnavailable: one cannot be used, and why.
        MissingExtra: cuda-python is not installed.
        ConfigError: two are the same GPU.
    """
    answers = _ask("trtpool.workers.devices", [(b"", child_environment(gpu)) for gpu in gpus], waiting)
    infos: list[GpuInfo] = []
    for gpu, (answer, returncode) in zip(gpus, answers, strict=True):
        if returncode or not answer:
            raise DeviceUnavailable(f"--gpus {gpu}: looking at it ended with {describe_exit(returncode)}")
        info = msgspec.convert(_read(answer, f"--gpus {gpu}: ")["gpu"], GpuInfo)
        for other, known in zip(gpus, infos, strict=False):
            if known.uuid == info.uuid:
                raise ConfigError(
                    f"--gpus {other},{gpu}: both are {info.uuid}; name each GPU once, and say --workers-per-gpu for "
                    "more workers on it"
                )
        infos.append(info)
    return infos


def inspect(
    wanted: Sequence[InspectRequest], waiting: Waiting = nullcontext, gpu: str | None = None
) -> list[ModelSpec]:
    """Have each model looked at by a child.

    Args:
        wanted: the models.
        waiting: see `Waiting`.
        gpu: the GPU that the children see, as the user names it; None without one.

    Raises:
        ModelError: it cannot be served.
        MissingExtra: its engine is not installed.
    """
    environment = child_environment(gpu)
    questions = [(msgspec.json.encode(request), environment) for request in wanted]
    answers = _ask("trtpool.workers.inspect", questions, waiting)
    specs = []
    for request, (answer, returncode) in zip(wanted, answers, strict=True):
        if returncode or not answer:
            raise ModelError(f"{request.source.path}: looking at it ended with {describe_exit(returncode)}")
        specs.append(msgspec.convert(_read(answer)["spec"], ModelSpec))
    return specs


def _ask(module: str, questions: Sequence[tuple[bytes, dict[str, str]]], waiting: Waiting) -> list[tuple[bytes, int]]:
    """Run a child for each question, its standard input and environment; returns their answers and exit codes."""
    children: list[subprocess.Popen[bytes]] = []
    try:
        for _, environment in questions:
            children.append(start_module(module, environment))
        with waiting():
            answers = [child.communicate(question)[0] for child, (question, _) in zip(children, questions, strict=True)]
    finally:
        for child in children:
            with child:  # closes its pipes and waits for its end
                child.kill()
    return [(answer, child.returncode) for answer, child in zip(answers, children, strict=True)]


def _read(answer: bytes, prefix: str = "") -> dict[str, Any]:
    """A child's answer; `prefix` goes before the text of a refusal, which is raised."""
    outcome: dict[str, Any] = json.loads(answer)
    if "refusal" in outcome:
        refusal = msgspec.convert(outcome["refusal"], Refusal)
        raise error_of(Refusal(refusal.kind, prefix + refusal.text))
    return outcome


def worker_count(settings: PoolSettings) -> int:
    """Worker processes, over all GPUs."""
    return len(settings.gpus) * settings.workers_per_gpu or settings.workers


def lay_out(settings: PoolSettings, specs: Sequence[ModelSpec]) -> Layout:
    """The arena for `specs`; for huge pages, a whole number of them.

    Raises:
        ConfigError: a batch larger than a model takes.
    """
    layout = plan([_plan_model(settings.for_model(spec.name), spec) for spec in specs])
    if not settings.huge_pages:
        return layout
    pages = -(-layout.segment_bytes // HUGE_PAGE_BYTES)
    return msgspec.structs.replace(layout, segment_bytes=pages * HUGE_PAGE_BYTES)


def _plan_model(settings: PoolSettings, spec: ModelSpec) -> ModelPlan:
    per_slot, limit = settings.items_per_slot, spec.batch_limit
    if spec.whole_slots:
        if per_slot not in (1, limit):
            raise ConfigError(
                f"model {spec.name!r} takes batches of {limit} only, and --partial-batches refuse makes each slot one, "
                f"so --items-per-slot {per_slot} is not possible; leave it out"
            )
        per_slot = limit
    remedy = (
        "lower it, or build the plan for larger batches"
        if settings.gpus
        else ("lower it, or export the model with a larger or open batch axis")
    )
    for option, value in (("items-per-slot", per_slot), ("max-batch", settings.max_batch)):
        if limit and value > limit:
            raise ConfigError(
                f"model {spec.name!r} takes batches of at most {limit}, so --{option} {value} is too large; {remedy}"
            )
    max_batch = settings.max_batch or max(DEFAULT_MAX_BATCH, per_slot, spec.batch_least)
    if max_batch < per_slot:
        raise ConfigError(
            f"--max-batch {max_batch} is smaller than the batches of {per_slot} that model {spec.name!r} takes; "
            "leave it out"
        )
    if limit and not settings.max_batch:
        # A plan was built for its largest batch; a CPU gains little beyond the default.
        max_batch = limit if settings.gpus else min(max_batch, limit)
    lanes = settings.engine.lanes if settings.gpus else CPU_LANES
    items = ((lanes + 1) * worker_count(settings) + 2) * max_batch
    many = min(SMALL_SLOTS, SMALL_BYTES // (per_slot * spec.item_bytes))
    return ModelPlan(spec, settings.slots or max(-(-items // per_slot), many), per_slot, max_batch)
