"""What is in the files that a pool is to load: `python -m trtpool.broker.reload.examine`, started by the supervisor.

It builds ONNX files for GPUs first, as a start does, and that may take minutes: the supervisor has others to see to.
The answer is one JSON object in the memory file that the configuration names.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

import msgspec

from trtpool.broker.planning import inspect, is_plan, requests
from trtpool.ipc.errors import TrtpoolError
from trtpool.ipc.logs import set_up_logging
from trtpool.ipc.process import tie_to_parent
from trtpool.ipc.settings import GpuInfo, ModelSource, PoolSettings, Refusal
from trtpool.ipc.tensors import ModelSpec

log = logging.getLogger("trtpool.supervisor")


class ExamineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Standard input, as JSON.

    Attributes:
        parent_pid: the supervisor, with which this ends.
        answer_fd: an inherited memory file.
        settings: the pool's, with the new files.
        names: the models that have new ones.
        gpus: what the pool's GPUs are, in its order.
    """

    parent_pid: int
    answer_fd: int
    settings: PoolSettings
    names: tuple[str, ...]
    gpus: tuple[GpuInfo, ...]


class Examined(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer: what is to be loaded, plans on GPUs, and how the new models look; or why that cannot be."""

    models: tuple[ModelSource, ...] = ()
    specs: tuple[ModelSpec, ...] = ()
    refusal: Refusal | None = None


def examine(config: ExamineConfig) -> Examined:
    """Look at the models that have new files."""
    settings = config.settings
    gpu = next(iter(settings.gpus), None)
    try:
        if gpu is not None and not all(is_plan(model.path) for model in settings.models):
            from trtpool.broker.building import ensure_plans

            settings = ensure_plans(settings, config.gpus, log.warning)
        wanted = [request for request in requests(settings) if request.source.name in config.names]
        return Examined(settings.models, tuple(inspect(wanted, gpu=gpu)))
    except TrtpoolError as error:
        return Examined(refusal=Refusal(type(error).__name__, str(error)))


def main() -> None:
    """Answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=ExamineConfig)
    set_up_logging("supervisor")
    tie_to_parent(config.parent_pid)
    with os.fdopen(config.answer_fd, "wb") as answer:
        answer.write(msgspec.json.encode(examine(config)))


if __name__ == "__main__":
    main()
