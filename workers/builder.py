"""Building a plan with TensorRT: network, profile, precision, progress.

What versions do differently is asked of the module by name, never by version or by the number of an enum:

==========================  =====================  ================  =================  ================
                            8.6                    10                11                 RTX
==========================  =====================  ================  =================  ================
types of the network        weak                   weak or strong    strong             strong
float16                     ``BuilderFlag.FP16``   the same          in the ONNX file   in the ONNX file
several contexts a profile  ``PROFILE_SHARING``    always            always             always
progress                    -                      yes               yes                yes
timing cache                yes                    yes               yes                does nothing
GPU                         needed                 needed            needed             or its number
==========================  =====================  ================  =================  ================
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from trtpool import __version__
from trtpool.ipc.arena import format_bytes
from trtpool.ipc.building import BUILD_FORMAT, IO_FORMATS, Builder, BuildRequest, Line, PlanRecord, PlanTensor, Progress
from trtpool.ipc.errors import ConfigError, DeviceUnavailable, MissingExtra, ModelError
from trtpool.ipc.settings import BuildSettings, Profile

from . import build_onnx
from .build_normalize import resolve
from .build_rewrite import Say, change
from .devices import look
from .flavours import Flavour, load_flavour, logger, take_errors

PROGRESS_STEPS: Final = 1000

IMAGE_AXES: Final = 4
"""Of a batch of images; formats are about their channels."""

DTYPES: Final = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool",
}  # fmt: skip
"""TensorRT's names of dtypes, and NumPy's."""


class Target(NamedTuple):
    """The GPU to build for: its name, "" if it is not here, and its compute capability, such as "8.9"."""

    gpu: str
    compute_capability: str


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
    return Builder(flavour.name, _dotted(flavour), build_onnx.digest(path, model))


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
        build_onnx.make_profiles(
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
    target = _find_target(flavour, request.build.compute_capability)
    place = f"for compute capability {target.compute_capability}" + (f" ({target.gpu})" if target.gpu else "")
    say(Line(said=f"{flavour} {place}"))

    file, model = _prepare(request, flavour, model, say)
    network = _Network(flavour, path, fp16=request.build.fp16)
    network.read(file, model)
    network.set_formats(request.build.io)
    del model  # may be gigabytes
    tensors = network.describe(profiles)
    for tensor in tensors:
        say(Line(said=f"{tensor.role} {_show(tensor)}"))
    config = network.configure(request, target, profiles)
    cache = _TimingCache(request.timing_cache, flavour, target, config)
    plan = network.build(config, say)
    cache.save()
    plan_bytes, plan_sha256 = _write(output, plan)
    return PlanRecord(
        format=BUILD_FORMAT,
        trtpool=__version__,
        source=str(path),
        source_sha256=digest,
        flavour=flavour.name,
        version=_dotted(flavour),
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


def _find_target(flavour: Flavour, wanted: str) -> Target:
    """The GPU to build for.  Asking for it also makes sure of a driver, without which TensorRT 8.6 crashes."""
    if wanted:
        if flavour.name != "rtx":
            raise ConfigError(
                f"--compute-capability builds for a GPU that need not be here, which {flavour} cannot; "
                "leave it out, or add --flavour rtx"
            )
        return Target("", wanted)
    try:
        gpu = look()
    except (DeviceUnavailable, MissingExtra) as error:
        hint = "; or build for another GPU: --compute-capability 8.9" if flavour.name == "rtx" else ""
        raise type(error)(f"{error}{hint}") from error
    return Target(gpu.name, gpu.compute_capability)


def _prepare(request: BuildRequest, flavour: Flavour, model: Any, say: Say) -> tuple[Path, Any]:
    """The ONNX file to give to TensorRT, the user's own or a changed one beside the output, and what is in it."""
    path, output = Path(request.source.path), Path(request.output)
    options = request.build
    converted = options.fp16 and _is_strongly_typed(flavour.module, fp16=True)
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
        and not _is_strongly_typed(flavour.module, fp16=options.fp16)
    ):
        raise ModelError(
            f"{flavour} takes int8 inputs and outputs of quantized models alone, and {path} has no QuantizeLinear or "
            "DequantizeLinear; choose --io uint8 or --io fp16"
        )


def _is_strongly_typed(trt: Any, *, fp16: bool) -> bool:
    """Whether all types come from the file: without float16 where the version can, with it only where it must."""
    if hasattr(trt.BuilderFlag, "FP16"):
        return not fp16 and hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    return True


# ---------------------------------------------------------------------------------- TensorRT


class _Network:
    """TensorRT's builder, and the network in it.

    Args:
        flavour: the TensorRT.
        path: the user's file, for errors.
        fp16: let layers run in float16, where that is not said by the file.
    """

    def __init__(self, flavour: Flavour, path: Path, *, fp16: bool) -> None:
        self._flavour = flavour
        self._path = path
        self._trt = trt = flavour.module
        take_errors()
        try:
            self._builder = trt.Builder(logger(flavour))
        except TypeError as error:  # pybind11's word for a null pointer
            raise DeviceUnavailable(f"{flavour} cannot build here: {take_errors() or error}; see nvidia-smi") from error
        if flavour.name == "tensorrt":
            trt.init_libnvinfer_plugins(logger(flavour), "")
        wanted = ["EXPLICIT_BATCH"]  # 8.6 needs it, newer ones know nothing else
        if _is_strongly_typed(trt, fp16=fp16):
            wanted.append("STRONGLY_TYPED")
        self._fp16 = fp16 and hasattr(trt.BuilderFlag, "FP16")
        self._formats: list[str] = []
        self._network = self._builder.create_network(_bits(trt.NetworkDefinitionCreationFlag, wanted))

    def read(self, file: Path, model: Any) -> None:
        """Parse `file`, which holds `model`."""
        parser = self._trt.OnnxParser(self._network, logger(self._flavour))
        if not parser.parse_from_file(os.fspath(file)):
            errors = [parser.get_error(number) for number in range(parser.num_errors)]
            what = "; ".join(dict.fromkeys(_describe_error(error, model) for error in errors)) or take_errors()
            raise self._refusal(f"{what}; export it with standard operators, or change that part of it")
        for tensor in self._inputs():
            if tensor.is_shape_tensor:
                raise self._refusal(f"input {tensor.name!r} decides about shapes; make it a constant of the model")

    def set_formats(self, io: Mapping[str, str]) -> None:
        """Let inputs and outputs lie in memory as `BuildSettings.io` says; what is for all, those with four axes."""
        for tensor in [*self._inputs(), *self._outputs()]:
            word = io.get(tensor.name) or io.get("", "")
            dtype, _, wanted = word.partition(":")
            if not wanted:
                continue
            fits = DTYPES.get(tensor.dtype.name) == build_onnx.io_dtype(word) and len(tensor.shape) == IMAGE_AXES
            if not fits and tensor.name not in io:
                continue
            formats = self._trt.TensorFormat
            known = [name for name in IO_FORMATS if hasattr(formats, name.upper())]
            if wanted not in known:
                raise ConfigError(f"--io {word}: {self._flavour} has no such format; it has {', '.join(known)}")
            if len(tensor.shape) < IMAGE_AXES or tensor.shape[1] < 0:
                raise ModelError(
                    f"--io {tensor.name}={word}: its shape is {tuple(tensor.shape)}, and formats are for a batch, a "
                    f"fixed number of channels, and two axes or more; choose --io {tensor.name}={dtype}"
                )
            tensor.allowed_formats = 1 << int(getattr(formats, wanted.upper()))
            self._formats.append(f"{tensor.name}={word}")

    def describe(self, profiles: Sequence[Mapping[str, Profile]]) -> tuple[PlanTensor, ...]:
        """The inputs and outputs that the plan will have."""
        return tuple(
            PlanTensor(
                tensor.name,
                role,
                DTYPES.get(tensor.dtype.name, tensor.dtype.name.lower()),
                tuple(tensor.shape),
                profiles[0].get(tensor.name) if role == "input" else None,
                tuple(more[tensor.name] for more in profiles[1:] if role == "input" and tensor.name in more),
            )
            for role, tensors in (("input", self._inputs()), ("output", self._outputs()))
            for tensor in tensors
        )

    def configure(self, request: BuildRequest, target: Target, profiles: Sequence[Mapping[str, Profile]]) -> Any:
        """A builder configuration for this network."""
        trt, config = self._trt, self._builder.create_builder_config()
        if request.build.workspace_bytes:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.build.workspace_bytes)
        if request.build.optimization_level >= 0:
            if not hasattr(config, "builder_optimization_level"):
                raise ConfigError(f"{self._flavour} has no --optimization-level; leave it out")
            config.builder_optimization_level = request.build.optimization_level
        if self._fp16:
            config.set_flag(trt.BuilderFlag.FP16)
        # Every lane has an execution context of its own, on one profile.
        if hasattr(trt, "PreviewFeature") and hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
            config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
        # A plan that was built without them runs where they are not installed.
        libraries = _bits(trt.TacticSource, ("CUBLAS", "CUBLAS_LT", "CUDNN"))
        if config.get_tactic_sources() & libraries:
            config.set_tactic_sources(config.get_tactic_sources() & ~libraries)
        if self._flavour.name == "rtx":
            config.num_compute_capabilities = 1
            config.set_compute_capability(self._compute_capability(target), 0)
        for given in profiles if profiles[0] else ():  # nothing is open, or the same inputs are in each
            profile = self._builder.create_optimization_profile()
            for name, shapes in given.items():
                profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
            if config.add_optimization_profile(profile) < 0:
                raise self._refusal(f"{take_errors() or 'the shapes do not fit'}; change --shapes")
        return config

    def build(self, config: Any, say: Say) -> Any:
        """The plan, as an ``IHostMemory``."""
        trt = self._trt
        say(Line(progress=Progress("building", 0, 0)))
        monitor = _make_monitor(trt, say) if hasattr(trt, "IProgressMonitor") else None
        if monitor is not None:
            config.progress_monitor = monitor
        take_errors()
        plan = self._builder.build_serialized_network(self._network, config)
        if plan is None:
            text = take_errors() or "it does not say why"
            remedy = f"; leave out the format of --io {self._formats[-1]}, or choose another" if self._formats else ""
            raise self._refusal(f"{text}; change --shapes or the model{remedy}")
        return plan

    def _inputs(self) -> list[Any]:
        return [self._network.get_input(number) for number in range(self._network.num_inputs)]

    def _outputs(self) -> list[Any]:
        return [self._network.get_output(number) for number in range(self._network.num_outputs)]

    def _compute_capability(self, target: Target) -> Any:
        known = self._trt.ComputeCapability
        found = getattr(known, "SM" + target.compute_capability.replace(".", ""), None)
        if found is None:
            numbers = sorted(int(name[2:]) for name in dir(known) if re.fullmatch(r"SM\d+", name))
            raise ConfigError(
                f"{self._flavour} builds for compute capability {', '.join(f'{n // 10}.{n % 10}' for n in numbers)}, "
                f"and not for {target.compute_capability}{f' ({target.gpu})' if target.gpu else ''}; "
                "use --flavour tensorrt on such a GPU"
            )
        return found

    def _refusal(self, text: str) -> ModelError:
        return ModelError(f"{self._flavour} does not take {self._path}: {text}")


def _describe_error(error: Any, model: Any) -> str:
    """What the parser did not like, in one sentence."""
    text = " ".join(error.desc().split())
    usage = re.search(r"API Usage Error \((.*?) In \w+ at ", text)
    quoted = re.search(r'&& "(.+?)"', text)
    text = usage[1] if usage else quoted[1] if quoted else re.sub(r"^Assertion failed: .*?: ", "", text)
    number = error.node()
    if not 0 <= number < len(model.graph.node):
        return text.rstrip(".")
    node = model.graph.node[number]
    if re.search(r"Plugin not found|[Pp]lugin creator|No importer|^false$", text):
        text = "TensorRT does not have it"
    return f"operator {node.op_type} (node {number}{f', {node.name}' if node.name else ''}): {text.rstrip('.')}"


def _bits(enum: Any, names: Sequence[str]) -> int:
    """A mask of those of `names` that this version has."""
    return sum(1 << int(getattr(enum, name)) for name in names if hasattr(enum, name))


# ---------------------------------------------------------------------------------- progress


class Phases:
    """One figure out of TensorRT's nested phases.

    A phase has a known number of steps, and a step any number of phases inside, which nobody announces: each takes
    half of what is left of the step.  So the figure always moves, never falls, and is exact where a step ends.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._open: dict[str, _Phase] = {}
        self._told = 0
        self._lock = threading.Lock()  # TensorRT may call from any of its threads

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._open[name] = _Phase(parent, max(1, steps))
            self._tell(name, force=True)

    def step(self, name: str, step: int) -> None:
        with self._lock:
            if phase := self._open.get(name):
                phase.done, phase.inside = min(step + 1, phase.steps), 0.0
                self._tell(name)

    def finish(self, name: str) -> None:
        with self._lock:
            phase = self._open.pop(name, None)
            if phase is None:
                return
            if parent := self._open.get(phase.parent or ""):
                parent.inside += (1 - parent.inside) / 2
            self._tell(phase.parent or name)

    def _tell(self, name: str, *, force: bool = False) -> None:
        roots = [key for key, phase in self._open.items() if phase.parent not in self._open]
        done = int(PROGRESS_STEPS * max(map(self._fraction, roots), default=1.0))
        if done > self._told or force:
            self._told = max(done, self._told)
            self._say(Line(progress=Progress(name, self._told, PROGRESS_STEPS)))

    def _fraction(self, name: str) -> float:
        phase = self._open[name]
        current = max((self._fraction(key) for key, inner in self._open.items() if inner.parent == name), default=0.0)
        return min(1.0, (phase.done + phase.inside + (1 - phase.inside) / 2 * current) / phase.steps)


class _Phase:
    """`done` of `steps`, and how much of the next one; `parent` is the phase around it."""

    def __init__(self, parent: str | None, steps: int) -> None:
        self.parent = parent
        self.steps = steps
        self.done = 0
        self.inside = 0.0


def _make_monitor(trt: Any, say: Say) -> Any:
    phases = Phases(say)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # of a module that is chosen at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        # An exception that went back into TensorRT would end the process.
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with contextlib.suppress(Exception):
                phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with contextlib.suppress(Exception):
                phases.step(phase_name, step)
            return True

        def phase_finish(self, phase_name: str) -> None:
            with contextlib.suppress(Exception):
                phases.finish(phase_name)

    return Monitor()


# ---------------------------------------------------------------------------------- files


class _TimingCache:
    """What TensorRT measured in earlier builds on this GPU; a file that does not fit or cannot be used is left out."""

    def __init__(self, folder: str, flavour: Flavour, target: Target, config: Any) -> None:
        self._config = config
        self._file: Path | None = None
        if not folder or flavour.name == "rtx":
            return
        words = f"{flavour.name} {_dotted(flavour)} {target.gpu} {target.compute_capability}"
        self._file = Path(folder) / (re.sub(r"[^\w.]+", "-", words) + ".timing")
        known = b""
        with contextlib.suppress(OSError):
            known = self._file.read_bytes()
        for data in dict.fromkeys((known, b"")):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                break

    def save(self) -> None:
        """Keep what this build measured, for the next."""
        cache = self._config.get_timing_cache() if self._file else None
        if self._file is None or cache is None:
            return
        new = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(cache.serialize())
            new.replace(self._file)


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


def _dotted(flavour: Flavour) -> str:
    return ".".join(map(str, flavour.version))


def _show(tensor: PlanTensor) -> str:
    dims = ", ".join("?" if dim < 0 else str(dim) for dim in tensor.shape)
    text = f"{tensor.name}: {tensor.dtype} ({dims})"
    if tensor.profile:
        text += ", from {}, best {}, to {}".format(
            *("x".join(map(str, shape)) for shape in (tensor.profile.min, tensor.profile.opt, tensor.profile.max))
        )
    return text
