"""Building a plan with TensorRT, from the request to the file and its record."""

from __future__ import annotations

import hashlib
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec

from trtpool import __version__
from trtpool.ipc.arena import format_bytes
from trtpool.ipc.building import BUILD_FORMAT, Builder, BuildRequest, Line, PlanRecord, PlanTensor, Progress
from trtpool.ipc.errors import ConfigError, ModelError
from trtpool.ipc.settings import BuildSettings

from . import build_onnx
from .build_network import Network, is_strongly_typed
from .build_normalize import resolve
from .build_profiles import make_profiles
from .build_progress import Say
from .build_rewrite import change
from .build_target import find_target
from .build_timings import TimingCache
from .flavours import Flavour, load_flavour


def describe(request: BuildRequest) -> Builder:
    """Who would build `request`, and from what.

    Raises:
        ModelError: the file cannot be read.
        MissingExtra: onnx or TensorRT is not installed.
        ConfigError: the flavour cannot build.
    """
    path = Path(request.source.path)
    flavour = load_flavour(request.flavour, build=True)
    model = build_onnx.load(path, weights=False)
    return Builder(flavour.name, flavour.dotted, build_onnx.digest(path, model))


def build(request: BuildRequest, say: Say) -> PlanRecord:
    """Build `request` into its output, telling `say` what was decided and how far it is.

    Raises:
        ModelError: TensorRT does not take the model; the text has its reason.
        MissingExtra: onnx, TensorRT or cuda-python is not installed.
        DeviceUnavailable: there is no GPU, and the build needs one.
        ConfigError: an option that this flavour does not have.
    """
    started = time.monotonic()
    path, output = Path(request.source.path), Path(request.output)
    say(Line(progress=Progress("reading the model", 0, 0)))
    model = build_onnx.load(path, weights=False)
    digest = build_onnx.digest(path, model)
    given = build_onnx.inputs(model)
    resolved = msgspec.structs.replace(request.build, normalize=resolve(model, request.build.normalize))
    profiles = [
        make_profiles(
            given,
            {**request.build.profiles, **more},
            request.shapes,
            request.max_batch,
            outputs=[tensor.name for tensor in build_onnx.outputs(model)],
            batched=not request.no_batch,
        )
        for more in ({}, *request.build.more)
    ]
    flavour = load_flavour(request.flavour, build=True)
    target = find_target(flavour, request.build.compute_capability)
    place = f"for compute capability {target.compute_capability}" + (f" ({target.gpu})" if target.gpu else "")
    say(Line(said=f"{flavour} {place}"))

    file, model = _prepare(request, flavour, model, say)
    network = Network(flavour, path, fp16=request.build.fp16)
    network.read(file, model)
    network.set_formats(request.build.io)
    del model  # may be gigabytes
    tensors = network.describe(profiles)
    for tensor in tensors:
        say(Line(said=f"{tensor.role} {_show(tensor)}"))
    config = network.configure(request, target, profiles)
    cache = TimingCache(request.timing_cache, flavour, target, config)
    plan = network.build(config, say)
    cache.save()
    plan_bytes, plan_sha256 = _write(output, plan)
    return PlanRecord(
        format=BUILD_FORMAT,
        trtpool=__version__,
        source=str(path),
        source_sha256=digest,
        flavour=flavour.name,
        version=flavour.dotted,
        gpu=target.gpu,
        compute_capability=target.compute_capability,
        options=resolved,
        shapes=request.shapes,
        max_batch=request.max_batch,
        tensors=tensors,
        seconds=round(time.monotonic() - started, 1),
        built=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        plan_bytes=plan_bytes,
        plan_sha256=plan_sha256,
    )


# ---------------------------------------------------------------------------------- before TensorRT


def _prepare(request: BuildRequest, flavour: Flavour, model: Any, say: Say) -> tuple[Path, Any]:
    """The ONNX file to give to TensorRT, the user's own or a changed one beside the output, and what is in it."""
    path, output = Path(request.source.path), Path(request.output)
    options = request.build
    converted = options.fp16 and is_strongly_typed(flavour.module, fp16=True)
    how = "float16 where it pays" if options.fp16 and not converted else "float16" if converted else "as in the file"
    say(Line(said=f"precision: {how}"))
    if not (options.io or options.normalize or converted or build_onnx.has_unnamed_axes(model)):
        return path, model
    model = build_onnx.load(path, types=converted)
    _check_int8(options, flavour, path, model)
    named = build_onnx.name_axes(model)
    if not change(model, options, say, converted=converted) and not named:
        return path, model
    file = output.with_name("changed.onnx")
    build_onnx.save(model, file)
    return file, model


def _check_int8(options: BuildSettings, flavour: Flavour, path: Path, model: Any) -> None:
    """Where types do not come from the file, int8 is a quantized real number (seen in 8.6), and no plain byte.

    Raises:
        ModelError: int8 is asked for, and the model is not quantized.
    """
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    if (
        any(build_onnx.io_dtype(word) == "int8" for word in options.io.values())
        and not quantized
        and not is_strongly_typed(flavour.module, fp16=options.fp16)
    ):
        raise ModelError(
            f"{flavour} takes int8 inputs and outputs of quantized models alone, and {path} has no QuantizeLinear or "
            "DequantizeLinear; choose --io uint8 or --io fp16"
        )


# ---------------------------------------------------------------------------------- after it


def _write(output: Path, plan: Any) -> tuple[int, str]:
    """Write the plan; returns its size in bytes and its SHA-256."""
    data = memoryview(plan)
    try:
        output.write_bytes(data)
    except OSError as error:
        raise ConfigError(
            f"cannot write {format_bytes(data.nbytes)} to {output.parent}: {error.strerror}; choose another place"
        ) from error
    return data.nbytes, hashlib.sha256(data).hexdigest()


def _show(tensor: PlanTensor) -> str:
    dims = ", ".join("?" if dim < 0 else str(dim) for dim in tensor.shape)
    text = f"{tensor.name}: {tensor.dtype} ({dims})"
    if tensor.profile:
        text += ", from {}, best {}, to {}".format(
            *("x".join(map(str, shape)) for shape in (tensor.profile.min, tensor.profile.opt, tensor.profile.max))
        )
    return text
