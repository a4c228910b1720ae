"""Changes to an ONNX model before it is built, or instead: dtypes at the borders, normalisation, float16 inside.

The changed file can be written out too, with a record beside it like a plan's.  onnxruntime serves it on the CPU, so a
pool without a GPU takes the same inputs as one with the plan, and `trtpool check` can measure what the change costs.
"""

from __future__ import annotations

import hashlib
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec

from trtpool import __version__
from trtpool.ipc.building import BUILD_FORMAT, ONNX, BuildRequest, Line, PlanRecord, PlanTensor, Progress
from trtpool.ipc.errors import ConfigError, ModelError
from trtpool.ipc.settings import BuildSettings

from . import build_onnx
from .build_normalize import normalize_inputs, resolve
from .build_progress import Say


def change(model: Any, options: BuildSettings, say: Say, *, converted: bool) -> bool:
    """Change `model` in place as `options` ask for, saying what; returns whether anything was.

    Args:
        model: as `build_onnx.load` reads it, with its types if `converted`.
        options: how the model is built.
        say: told what was decided.
        converted: put float16 inside it.

    Raises:
        ConfigError, ModelError: the model does not have what is to be changed.
    """
    pixels = resolve(model, options.normalize)
    changed = build_onnx.change_io(model, options.io, skip=pixels)
    if converted:
        say(Line(progress=Progress("converting to float16", 0, 0)))
        build_onnx.convert_to_float16(model)
    own = {name: build_onnx.io_dtype(word) for name, word in options.io.items() if name in pixels}
    changed |= normalize_inputs(model, pixels, own)
    for name, (old, new) in changed.items():
        inside = f", normalised inside: {pixels[name]}" if name in pixels else ""
        say(Line(said=f"{name}: {new} for {old}{inside}"))
    return bool(changed) or converted


def rewrite(request: BuildRequest, say: Say) -> PlanRecord:
    """Write the changed model of `request` as an ONNX file into its output; no TensorRT is needed.

    Raises:
        ModelError: the file cannot be read, or nothing in it would change.
        ConfigError: an option that the model does not have, or no room.
        MissingExtra: onnx is not installed.
    """
    started = time.monotonic()
    path, output = Path(request.source.path), Path(request.output)
    options = request.build
    if formats := [word for word in options.io.values() if ":" in word]:
        raise ConfigError(f"--io {formats[0]}: a format is for a plan, and {output.name} is an ONNX file; leave it out")
    say(Line(progress=Progress("reading the model", 0, 0)))
    model = build_onnx.load(path, types=options.fp16)
    digest = build_onnx.digest(path, build_onnx.load(path, weights=False))
    resolved = msgspec.structs.replace(options, normalize=resolve(model, options.normalize))
    if not change(model, options, say, converted=options.fp16):
        raise ModelError(f"{path} would stay as it is; say what to change: --normalize, --io or --fp16")
    try:
        build_onnx.save(model, output)
        data = output.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot write to {output.parent}: {error.strerror}; choose another place") from error
    return PlanRecord(
        format=BUILD_FORMAT,
        trtpool=__version__,
        source=str(path),
        source_sha256=digest,
        flavour=ONNX,
        version=build_onnx.import_onnx().__version__,
        gpu="",
        compute_capability="",
        options=resolved,
        shapes={},
        max_batch=request.max_batch,
        tensors=tuple(
            PlanTensor(tensor.name, role, tensor.dtype, tuple(-1 if dim is None else dim for dim in tensor.dims))
            for role, tensors in (("input", build_onnx.inputs(model)), ("output", build_onnx.outputs(model)))
            for tensor in tensors
        ),
        seconds=round(time.monotonic() - started, 1),
        built=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        plan_bytes=len(data),
        plan_sha256=hashlib.sha256(data).hexdigest(),
    )
