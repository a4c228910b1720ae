"""The builder's side of TensorRT 8.6, 10 and 11, as far as we call it: `make_tensorrt("8.6.0")` is a module.

What differs between versions is missing where it is missing in theirs, numbers of enums included, and objects take no
attributes that they do not have.  A plan is JSON that tells what was asked for.
"""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx

DTYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF"}


class ILogger:
    def __init__(self) -> None:
        pass


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class Tensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        kind = value.type.tensor_type
        self.name = value.name
        self.dtype = SimpleNamespace(name=DTYPES[kind.elem_type])
        self.shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
        self.is_shape_tensor = value.name.startswith("shape_")
        self.allowed_formats = 0
        self.axes = [dim.dim_param for dim in kind.shape.dim]


class Network:
    __slots__ = ("file", "flags", "inputs", "outputs")

    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.file = Path()  # ours, for the test
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]


class ParserError:
    def __init__(self, node: int, desc: str) -> None:
        self._node = node
        self._desc = desc

    def node(self) -> int:
        return self._node

    def desc(self) -> str:
        return self._desc


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[Sequence[int]]] = {}

    def set_shape(self, name: str, low: Sequence[int], best: Sequence[int], high: Sequence[int]) -> None:
        self.shapes[name] = [[*low], [*best], [*high]]


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data


def make_tensorrt(version: str) -> Any:
    """A module ``tensorrt`` of that version.

    It has besides: `fails`, a text that the next build fails with; `refuses_profiles`; `without_driver`, with which a
    builder cannot be made (the real 8.6 crashes then).
    """
    major = int(version.partition(".")[0])
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = version
    trt.fails, trt.refuses_profiles, trt.without_driver = "", False, False
    trt.ILogger = ILogger

    def names(name: str, members: Sequence[str]) -> None:
        first = major % 5  # no two versions have the same numbers
        setattr(trt, name, enum.IntEnum(name, [(member, first + number) for number, member in enumerate(members)]))

    names("BuilderFlag", ["DEBUG", "FP16", "INT8"] if major < 11 else ["DEBUG"])
    names("NetworkDefinitionCreationFlag", {8: ["EXPLICIT_BATCH"], 10: ["EXPLICIT_BATCH", "STRONGLY_TYPED"],
                                            11: ["STRONGLY_TYPED"]}[major])  # fmt: skip
    names("PreviewFeature", ["PROFILE_SHARING_0806"] if major < 11 else ["OTHER"])
    names("TacticSource", ["CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]
          if major < 11 else ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"])  # fmt: skip
    names("TensorFormat", ["LINEAR", "CHW2", "HWC8", "CHW4", "CHW16", "CHW32", "HWC"])
    names("MemoryPoolType", ["WORKSPACE", "DLA_MANAGED_SRAM"])
    if major >= 10:
        trt.IProgressMonitor = IProgressMonitor

    class Config:
        __slots__ = (
            "asked",
            "builder_optimization_level",
            "cache",
            "sources",
            *(("progress_monitor",) if major >= 10 else ()),
        )

        def __init__(self) -> None:
            self.asked: dict[str, Any] = {"flags": [], "preview": [], "workspace": 0, "profiles": []}
            self.sources = sum(1 << int(source) for source in trt.TacticSource)
            self.cache: TimingCache | None = None
            self.builder_optimization_level = 3
            if major >= 10:
                self.progress_monitor = None

        def set_flag(self, flag: Any) -> None:
            self.asked["flags"].append(trt.BuilderFlag(flag).name)

        def set_preview_feature(self, feature: Any, on: bool) -> None:
            self.asked["preview"].append((trt.PreviewFeature(feature).name, on))

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            assert pool is trt.MemoryPoolType.WORKSPACE
            self.asked["workspace"] = size

        def get_tactic_sources(self) -> int:
            return self.sources

        def set_tactic_sources(self, sources: int) -> bool:
            self.sources = sources
            return True

        def add_optimization_profile(self, profile: Profile) -> int:
            self.asked["profiles"].append(profile.shapes)
            return -1 if trt.refuses_profiles else 0

        def create_timing_cache(self, data: bytes) -> TimingCache | None:
            return TimingCache(data) if data == b"" or data.startswith(version.encode()) else None

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            self.cache = cache
            return True

        def get_timing_cache(self) -> TimingCache | None:
            return self.cache

    class Builder:
        __slots__ = ("logger",)

        def __init__(self, logger: Any) -> None:
            if trt.without_driver:
                logger.log(SimpleNamespace(name="ERROR"), "CUDA initialization failure with error: 35")
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self.logger = logger

        def create_network(self, flags: int) -> Network:
            known = sum(1 << int(flag) for flag in trt.NetworkDefinitionCreationFlag)
            assert not flags & ~known
            return Network(flags)

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            if trt.fails:
                self.logger.log(SimpleNamespace(name="ERROR"), trt.fails)
                return None
            if major >= 10 and config.progress_monitor is not None:
                report(config.progress_monitor)
            if config.cache is not None:
                config.cache.data = f"{version}{config.cache.data.decode().replace(version, '')}+".encode()
            flags = [flag.name for flag in trt.NetworkDefinitionCreationFlag if network.flags & 1 << int(flag)]
            sources = [source.name for source in trt.TacticSource if config.sources & 1 << int(source)]
            inputs = {tensor.name: tensor.dtype.name for tensor in network.inputs}
            formats = {
                tensor.name: [one.name for one in trt.TensorFormat if tensor.allowed_formats & 1 << int(one)]
                for tensor in [*network.inputs, *network.outputs]
                if tensor.allowed_formats
            }
            axes = {tensor.name: tensor.axes for tensor in network.inputs}
            made = {"axes": axes, "network": flags, "sources": sources, "inputs": inputs, "formats": formats}
            level = config.builder_optimization_level
            return json.dumps({**made, "level": level, **config.asked}).encode()

    class OnnxParser:
        def __init__(self, network: Network, logger: Any) -> None:
            self._network = network
            self._errors: list[ParserError] = []

        num_errors = property(lambda self: len(self._errors))

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

        def parse_from_file(self, path: str) -> bool:
            assert major > 8 or self._network.flags & 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
            model = onnx.load(path)
            assert Path(path).is_absolute()
            self._network.file = Path(path)
            self._network.inputs = [Tensor(value) for value in model.graph.input]
            self._network.outputs = [Tensor(value) for value in model.graph.output]
            for number, node in enumerate(model.graph.node):
                if node.op_type == "NoSuchThing":
                    text = f"No importer registered for op: {node.op_type}. Attempting to import as plugin."
                    self._errors.append(ParserError(number, text))
            return not self._errors

    trt.Builder, trt.OnnxParser = Builder, OnnxParser
    trt.plugins = []
    trt.init_libnvinfer_plugins = lambda logger, namespace: trt.plugins.append(namespace)
    return trt


def report(monitor: Any) -> None:
    """Progress as a real build reports it, in small."""
    monitor.phase_start("Building engine", None, 4)
    monitor.step_complete("Building engine", 0)
    monitor.phase_start("Building engine from subgraph", "Building engine", 1)
    for phase in ("Optimizing graph", "Computing profile costs"):
        monitor.phase_start(phase, "Building engine from subgraph", 5)
        for step in range(5):
            assert monitor.step_complete(phase, step)
        monitor.phase_finish(phase)
    monitor.step_complete("Building engine from subgraph", 0)
    monitor.phase_finish("Building engine from subgraph")
    for step in (1, 2, 3):
        monitor.step_complete("Building engine", step)
    monitor.phase_finish("Building engine")


PACKAGE = """
import json, os, sys
from tests.workers.fake_builder import make_tensorrt

told = json.loads(os.environ["FAKE_TENSORRT"])
trt = sys.modules["tensorrt"] = make_tensorrt(told["version"])
trt.fails = told["fails"]
build = trt.Builder.build_serialized_network


def build_serialized_network(self, network, config):
    with open(told["log"], "a") as log:
        log.write("built\\n")
    exec(told["first"])
    plan = build(self, network, config)
    return plan if plan is None or not told["onnx"] else network.file.read_bytes()


trt.Builder.build_serialized_network = build_serialized_network
"""


def make_package(
    folder: Path, log: Path, *, version: str = "10.13.0.35", fails: str = "", first: str = "", onnx: bool = False
) -> dict[str, str]:
    """Write a package ``tensorrt`` for children into `folder`, and return what to set for it.

    Args:
        folder: to be on the path of the children.
        log: a file that gets a line for each build.
        version, fails: see `make_tensorrt`.
        first: code to run when a build begins.
        onnx: the plan is the ONNX file.
    """
    (folder / "tensorrt").mkdir(parents=True, exist_ok=True)
    (folder / "tensorrt" / "__init__.py").write_text(PACKAGE)
    told = {"log": str(log), "version": version, "fails": fails, "first": first, "onnx": onnx}
    root = Path(__file__).resolve().parent.parent.parent
    path = os.pathsep.join([str(folder), str(root), os.environ["PYTHONPATH"]])
    return {"FAKE_TENSORRT": json.dumps(told), "PYTHONPATH": path}
