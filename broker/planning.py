"""From settings and models to a layout: how many slots, how large a batch, and whether they fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final

import msgspec

from trtpool.ipc import errors
from trtpool.ipc.errors import ConfigError, ModelError, StartFailed, TrtpoolError
from trtpool.ipc.layout import Layout, ModelPlan, plan
from trtpool.ipc.process import describe_exit
from trtpool.ipc.settings import DEFAULT_MAX_BATCH, InspectRequest, PoolSettings, Refusal
from trtpool.ipc.tensors import ModelSpec

LANES: Final = 1
"""Batches that a CPU worker runs at once."""


def error_of(refusal: Refusal) -> TrtpoolError:
    """The error that another of our processes reports."""
    kind = getattr(errors, refusal.kind, None)
    if isinstance(kind, type) and issubclass(kind, TrtpoolError):
        return kind(refusal.text)
    return StartFailed(refusal.text)


def child_environment() -> dict[str, str]:
    """The environment of our children: they import this very trtpool, and nothing from the current directory."""
    package = os.fspath(Path(os.path.abspath(sys.modules["trtpool"].__file__ or "")).parent.parent)
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": package + (os.pathsep + path if path else ""),
        "PYTHONSAFEPATH": "1",
    }


def requests(settings: PoolSettings) -> tuple[InspectRequest, ...]:
    """How each model is to be loaded.  A shape named ``MODEL:INPUT`` goes to that model, others to the only one.

    Raises:
        ConfigError: a shape for no model, or for which one is not said.
    """
    names = [model.name for model in settings.models]
    shapes: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in names}
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


def inspect(
    wanted: Sequence[InspectRequest], waiting: Callable[[], AbstractContextManager[None]] = nullcontext
) -> list[ModelSpec]:
    """Have each model looked at by a child, so that no engine is ever loaded into the supervisor.

    Args:
        wanted: the models.
        waiting: what is entered while their children are waited for; it may raise, and they are ended.

    Raises:
        ModelError: it cannot be served.
        MissingExtra: its engine is not installed.
    """
    children: list[subprocess.Popen[bytes]] = []
    try:
        for _ in wanted:
            child = subprocess.Popen(
                [sys.executable, "-m", "trtpool.workers.inspect"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=child_environment(),
                cwd="/",  # Python 3.10 looks for modules there first, whatever PYTHONSAFEPATH says
                start_new_session=True,
            )
            children.append(child)
        with waiting():
            answers = [
                child.communicate(msgspec.json.encode(request))[0]
                for child, request in zip(children, wanted, strict=True)
            ]
    finally:
        for child in children:
            with child:  # closes its pipes and waits for its end
                child.kill()
    return [_read(answer, child, request) for answer, child, request in zip(answers, children, wanted, strict=True)]


def _read(answer: bytes, child: subprocess.Popen[bytes], request: InspectRequest) -> ModelSpec:
    if child.returncode or not answer:
        raise ModelError(f"{request.source.path}: looking at it ended with {describe_exit(child.returncode)}")
    outcome = json.loads(answer)
    if "refusal" in outcome:
        raise error_of(msgspec.convert(outcome["refusal"], Refusal))
    return msgspec.convert(outcome["spec"], ModelSpec)


def lay_out(settings: PoolSettings, specs: Sequence[ModelSpec]) -> Layout:
    """The arena for `specs`.

    Raises:
        ConfigError: a batch larger than a model takes.
    """
    return plan([_plan_model(settings, spec) for spec in specs])


def _plan_model(settings: PoolSettings, spec: ModelSpec) -> ModelPlan:
    per_slot, limit = settings.items_per_slot, spec.batch_limit
    if limit and per_slot > limit:
        raise ConfigError(
            f"model {spec.name!r} takes batches of at most {limit}, so --items-per-slot {per_slot} is too many; "
            "lower it, or export the model with a larger or open batch axis"
        )
    if limit and settings.max_batch > limit:
        raise ConfigError(
            f"model {spec.name!r} takes batches of at most {limit}, so --max-batch {settings.max_batch} is too large; "
            "lower it, or export the model with a larger or open batch axis"
        )
    max_batch = settings.max_batch or max(DEFAULT_MAX_BATCH, per_slot)
    if limit:
        max_batch = min(max_batch, limit)
    items = ((LANES + 1) * settings.workers + 2) * max_batch
    return ModelPlan(spec, settings.slots or -(-items // per_slot), per_slot, max_batch)
