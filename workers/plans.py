"""TensorRT plans: loading one, and making what runs it.

This and its neighbours (`contexts`, `plan_describe`) are the places that talk to TensorRT's runtime, and they use only
what is the same in TensorRT 8.6, 10 and 11, the lean runtime and TensorRT for RTX; what they do differently on failure
(False, None, an exception) becomes one exception with the logger's last words.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trtpool.ipc.arena import format_bytes
from trtpool.ipc.errors import DeviceUnavailable, ModelError
from trtpool.ipc.settings import EngineSettings, ModelSource
from trtpool.ipc.tensors import ModelSpec

from .contexts import Context
from .cuda import Cuda
from .engine import EngineError
from .flavours import HEADER_BYTES, Flavour, load_flavour, logger, plan_version, take_errors
from .plan_describe import describe
from .trust import check_file


class Plan:
    """A plan on the GPU.

    Args:
        source: the file, and the model's name.
        settings: the flavour, and which of the plan's shapes are to be served.
        cuda: the device, which makes sure that there is a driver: without one some runtimes crash.

    Attributes:
        description: what its tensors look like.

    Raises:
        ModelError: the file cannot be served; the text says what to change.
        MissingExtra: the TensorRT that it needs is not installed.
        DeviceUnavailable: the GPU's memory is too small.
    """

    def __init__(self, source: ModelSource, settings: EngineSettings, cuda: Cuda) -> None:
        self._cuda = cuda
        self._path = Path(os.path.abspath(source.path))
        flavour, self._engine = _load(self._path, settings, cuda)
        self._trt: Any = flavour.module
        self.description = describe(self._engine, self._trt, self._path, source.name, settings, self._ask)

    @property
    def spec(self) -> ModelSpec:
        """The model as it can be served."""
        return self.description.spec

    def close(self) -> None:
        """Let go of the plan; its contexts keep it until they end."""
        self._engine = None

    def new_context(self, stream: Any, profile: int = 0) -> Context:
        """An execution context with memory of its own, for use on `stream` with an optimization profile.

        Raises:
            EngineError: the plan allows no more contexts.
            DeviceUnavailable: the GPU's memory is too small.
        """
        if self._engine is None:
            raise EngineError("the engine was closed")
        take_errors()
        raw = self._engine.create_execution_context()
        if raw is None:
            text = take_errors() or "TensorRT made no execution context"
            if _is_out_of_memory(text):
                raise DeviceUnavailable(_no_memory(self._path, self._cuda))
            raise EngineError(text)
        context = Context(raw, self._trt, profile)
        context.select_profile(stream)
        self._cuda.synchronize(stream)
        return context

    @contextlib.contextmanager
    def _ask(self, profile: int) -> Iterator[Context]:
        """A context for questions."""
        stream = self._cuda.new_stream()
        try:
            with contextlib.closing(self.new_context(stream, profile)) as context:
                yield context
        finally:
            self._cuda.destroy_stream(stream)


def _load(path: Path, settings: EngineSettings, cuda: Cuda) -> tuple[Flavour, Any]:
    """The flavour for a plan, and the plan deserialized."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path} is not a file; name the plan itself")
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
            if not header:
                raise ModelError(f"{path} is empty; build or copy the plan again")
            check_file(path, os.fstat(file.fileno()), runs_code=settings.host_code)
            try:
                flavour = load_flavour(settings.flavour, header)
            except ModelError as error:
                raise ModelError(f"{path}: {error}") from error
            runtime = flavour.module.Runtime(logger(flavour))
            if settings.host_code:
                runtime.engine_host_code_allowed = True
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                take_errors()
                engine = runtime.deserialize_cuda_engine(buffer)
    except OSError as error:
        raise ModelError(f"cannot read the plan {path}: {error.strerror}; check path and permissions") from error
    if engine is None:
        raise _refusal(path, flavour, plan_version(header), take_errors(), cuda)
    return flavour, engine


def _refusal(
    path: Path, flavour: Flavour, version: tuple[int, ...] | None, text: str, cuda: Cuda
) -> ModelError | DeviceUnavailable:
    """Why a plan was not taken, in one sentence; `version` is what its header names, `text` what TensorRT said."""
    again = "build it again on this machine from its ONNX file: trtpool build"
    lower = text.lower()
    if _is_out_of_memory(text):
        return DeviceUnavailable(_no_memory(path, cuda))
    if re.search(r"host code|lean runtime", lower):
        return ModelError(
            f"{path} carries code to run on this host, which must be allowed: if you trust it like a program, start "
            "the pool with --allow-host-code"
        )
    # Of a plan that is cut short, too, TensorRT says that "serialization" failed.
    differs = version is not None and version[:3] != flavour.version[:3]
    if re.search(r"version tag|this version|library version", lower) or (differs and "serialization" in lower):
        builder = f"version {'.'.join(map(str, version))}" if version else "another version"
        return ModelError(f"{path} was built by {builder}, and here is {flavour}; {again} ({text})")
    if re.search(r"incompatible device|compute capability|generated on|sm_|gpu", lower):
        return ModelError(f"{path} was built for another GPU than {cuda.device_name()}; {again} ({text})")
    return ModelError(f"{flavour} cannot load {path}: {text or 'it does not say why'}; copy it again, or {again}")


def _is_out_of_memory(text: str) -> bool:
    return re.search(r"out of ?memory|cudaErrorMemoryAllocation|OutOfMemory", text, re.IGNORECASE) is not None


def _no_memory(path: Path, cuda: Cuda) -> str:
    free, total = cuda.memory()
    return (
        f"the GPU's memory is too small for {path}: {format_bytes(free)} of {format_bytes(total)} are free; lower "
        "--lanes, --max-batch or --workers-per-gpu, or end what else uses the GPU (nvidia-smi shows what)"
    )
