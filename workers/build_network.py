"""TensorRT's builder and the network in it, made the same way with each version.

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

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from trtpool.ipc.building import IO_FORMATS, BuildRequest, Line, PlanTensor, Progress
from trtpool.ipc.errors import ConfigError, DeviceUnavailable, ModelError
from trtpool.ipc.settings import Profile

from . import build_onnx
from .build_progress import Say, make_monitor
from .build_target import Target
from .flavours import Flavour, logger, take_errors

IMAGE_AXES: Final = 4
"""Of a batch of images; formats are about their channels."""

DTYPES: Final = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool",
}  # fmt: skip
"""TensorRT's names of dtypes, and NumPy's."""


class Network:
    """TensorRT's builder, and the network in it.

    Args:
        flavour: the TensorRT.
        path: the user's file, for errors.
        fp16: let layers run in float16, where that is not said by the file.

    Raises:
        DeviceUnavailable: it cannot build here.
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
        if is_strongly_typed(trt, fp16=fp16):
            wanted.append("STRONGLY_TYPED")
        self._fp16 = fp16 and hasattr(trt.BuilderFlag, "FP16")
        self._formats: list[str] = []
        self._network = self._builder.create_network(_bits(trt.NetworkDefinitionCreationFlag, wanted))

    def read(self, file: Path, model: Any) -> None:
        """Parse `file`, which holds `model`.

        Raises:
            ModelError: TensorRT does not take it.
        """
        parser = self._trt.OnnxParser(self._network, logger(self._flavour))
        if not parser.parse_from_file(os.fspath(file)):
            errors = [parser.get_error(number) for number in range(parser.num_errors)]
            what = "; ".join(dict.fromkeys(_describe_error(error, model) for error in errors)) or take_errors()
            raise self._refusal(f"{what}; export it with standard operators, or change that part of it")
        for tensor in self._inputs():
            if tensor.is_shape_tensor:
                raise self._refusal(f"input {tensor.name!r} decides about shapes; make it a constant of the model")

    def set_formats(self, io: Mapping[str, str]) -> None:
        """Let inputs and outputs lie in memory as `BuildSettings.io` says; what is for all, those with four axes.

        Raises:
            ConfigError: this version does not have a format.
            ModelError: a tensor that has none.
        """
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
        """A builder configuration (a ``trt.IBuilderConfig``) for this network.

        Raises:
            ConfigError: an option or a GPU that this version does not have.
            ModelError: the profiles do not fit.
        """
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
        """The plan, as a ``trt.IHostMemory``.

        Raises:
            ModelError: TensorRT cannot build it.
        """
        trt = self._trt
        say(Line(progress=Progress("building", 0, 0)))
        monitor = make_monitor(trt, say) if hasattr(trt, "IProgressMonitor") else None
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


def is_strongly_typed(trt: Any, *, fp16: bool) -> bool:
    """Whether all types come from the file: without float16 where the version can, with it only where it must."""
    if hasattr(trt.BuilderFlag, "FP16"):
        return not fp16 and hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    return True


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
