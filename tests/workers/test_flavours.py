"""Which TensorRT is chosen, what its logger keeps, and that the real modules have every name that we use."""

from __future__ import annotations

import logging
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.workers.fake_cuda import FakeRuntime
from tests.workers.fake_tensorrt import make_module
from trtpool.ipc.building import IO_FORMATS
from trtpool.ipc.errors import ConfigError, MissingExtra, ModelError
from trtpool.ipc.settings import FLAVOURS
from trtpool.workers import contexts, flavours
from trtpool.workers.flavours import Flavour, load_flavour, logger, plan_version, record, take_errors

TENSORRT = b"ftrt" + bytes(20) + bytes((8, 6, 0, 12))
RTX = b"vtrt" + bytes(20) + bytes((1, 7, 1, 116))


class ILogger:
    """In place of the native base class, which must be initialised."""

    def __init__(self) -> None:
        self.initialised = True


@pytest.fixture
def install(monkeypatch):
    """Makes modules importable by the names of flavours; those that are not asked for are not installed."""
    for name in FLAVOURS.values():
        monkeypatch.setitem(sys.modules, name, None)

    def install(**versions: str | None) -> None:
        for name, version in versions.items():
            module: Any = ModuleType(FLAVOURS[name])
            if version is not None:
                module.__version__ = version
            module.ILogger = ILogger
            monkeypatch.setitem(sys.modules, FLAVOURS[name], module)

    return install


@pytest.fixture(autouse=True)
def no_errors():
    take_errors()


# --- Choice --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "wanted", "header", "build", "chosen"),
    [
        (("tensorrt", "rtx", "lean"), "", None, False, "tensorrt"),
        (("rtx", "lean"), "", None, False, "rtx"),
        (("lean",), "", None, False, "lean"),
        (("tensorrt", "rtx", "lean"), "lean", None, False, "lean"),
        (("tensorrt", "rtx", "lean"), "", TENSORRT, False, "tensorrt"),
        (("rtx", "lean"), "", TENSORRT, False, "lean"),
        (("tensorrt", "rtx", "lean"), "", RTX, False, "rtx"),
        (("tensorrt", "rtx", "lean"), "lean", TENSORRT, False, "lean"),
        (("tensorrt", "rtx"), "rtx", RTX, False, "rtx"),
        (("lean", "rtx"), "", None, True, "rtx"),
        (("tensorrt", "rtx"), "rtx", None, True, "rtx"),
    ],
)
def test_the_choice(installed, wanted, header, build, chosen, install):
    install(**dict.fromkeys(installed, "10.13.0.35"))
    flavour = load_flavour(wanted, header, build=build)
    assert (flavour.name, flavour.version) == (chosen, (10, 13, 0, 35))
    assert flavour.module is sys.modules[FLAVOURS[chosen]]


def test_a_flavour_as_text(install):
    install(rtx="1.7.1.116")
    assert str(load_flavour("")) == "TensorRT for RTX 1.7.1.116"


@pytest.mark.parametrize(
    ("installed", "wanted", "header", "build", "text"),
    [
        ((), "", None, False, "TensorRT or TensorRT for RTX or TensorRT lean is needed"),
        ((), "", None, True, "TensorRT or TensorRT for RTX is needed"),
        (("tensorrt",), "rtx", None, False, "pip install 'trtpool[rtx]', or 'trtpool[rtx-cu12]' for CUDA 12"),
        (("rtx",), "tensorrt", None, True, "pip install 'trtpool[tensorrt]', or 'trtpool[tensorrt-cu12]' for CUDA 12"),
        (
            ("tensorrt", "lean"),
            "",
            RTX,
            False,
            "built by TensorRT for RTX 1.7.1.116 and needs TensorRT for RTX, which is",
        ),
        (("rtx",), "", TENSORRT, False, "built by TensorRT 8.6.0.12 and needs TensorRT or TensorRT lean"),
        (("lean",), "", None, True, "which is not installed"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(installed, wanted, header, build, text, install):
    install(**dict.fromkeys(installed, "1.0"))
    with pytest.raises(MissingExtra) as raised:
        load_flavour(wanted, header, build=build)
    assert text in str(raised.value)
    assert "pip install 'trtpool[" in str(raised.value)


def test_one_that_cannot_be_imported_says_why(install):
    install(rtx=None)  # a folder of that name
    with pytest.raises(MissingExtra, match=r"cannot be imported \(tensorrt_rtx on the path is not NVIDIA's package\)"):
        load_flavour("rtx")


def test_one_that_is_broken_is_passed_over(install):
    install(tensorrt=None, lean="11.4")
    assert load_flavour("").name == "lean"


@pytest.mark.parametrize(("wanted", "header"), [("rtx", TENSORRT), ("tensorrt", RTX), ("lean", RTX)])
def test_a_plan_of_another_flavour_than_wanted(wanted, header, install):
    install(tensorrt="10.1", rtx="1.7", lean="11.4")
    with pytest.raises(ModelError, match=f"cannot run; leave out --flavour, or build the model again .* {wanted}"):
        load_flavour(wanted, header)


@pytest.mark.parametrize("header", [b"", b"ftr", b"\x08\x07\x12\x00" * 7, b"PK\x03\x04"])
def test_what_is_no_plan(header, install):
    install(tensorrt="10.1")
    with pytest.raises(ModelError, match="not a TensorRT plan"):
        load_flavour("", header)
    assert plan_version(header) is None


def test_lean_cannot_build(install):
    install(lean="11.4")
    with pytest.raises(ConfigError, match="choose --flavour tensorrt or rtx"):
        load_flavour("lean", build=True)


def test_the_version_in_a_header():
    assert plan_version(TENSORRT) == (8, 6, 0, 12)
    assert plan_version(RTX + b"more") == (1, 7, 1, 116)
    assert plan_version(RTX[:-1]) is None


# --- Logger --------------------------------------------------------------------------------------


def test_there_is_one_logger_for_each_flavour(install):
    install(rtx="1.7", lean="11.4")
    rtx, lean = load_flavour("rtx"), load_flavour("lean")
    loggers = []
    threads = [threading.Thread(target=lambda: loggers.append(logger(rtx))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(made) for made in loggers}) == 1
    assert loggers[0] is logger(rtx) is not logger(lean)
    assert loggers[0].initialised


def test_messages_go_to_the_log_and_errors_are_kept(install, caplog):
    install(rtx="1.7")
    made = logger(load_flavour("rtx"))
    with caplog.at_level(logging.DEBUG, "trtpool.tensorrt"):
        for name in ("VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR"):
            made.log(SimpleNamespace(name=name), f"{name.lower()}\n  twice")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("DEBUG", "info twice"),
        ("WARNING", "warning twice"),
        ("ERROR", "error twice"),
        ("ERROR", "internal_error twice"),
    ]
    assert take_errors() == "error twice; internal_error twice"
    assert take_errors() == ""


def test_nothing_that_goes_wrong_in_the_logger_reaches_tensorrt(install, monkeypatch):
    install(rtx="1.7")
    made = logger(load_flavour("rtx"))

    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(flavours, "record", fail)
    made.log(SimpleNamespace(name="ERROR"), "text")


def test_only_the_last_errors_are_kept_and_each_once():
    for number in range(40):
        record("ERROR", f"error {number // 2}")
    assert take_errors() == "; ".join(f"error {number}" for number in range(12, 20))


API_USAGE = "Dynamic input tensor x is missing dimensions in profile 0"
SERIALIZATION = "Error Code 1: Serialization (Serialization assertion failed. Version tag does not match.)"


@pytest.mark.parametrize(
    ("before", "kept", "after"),
    [
        ("IBuilder::build: Error Code 4: API Usage Error (", API_USAGE, ". In validate at /_src/a/network.cpp:4046)"),
        ("3: [context.cpp::setInputShape::2037] Error Code 3: API Usage Error (", API_USAGE, ".)"),
        ("1: [stdArchiveReader.cpp::StdArchiveReader::40] ", SERIALIZATION, ""),
        ("2: [defaultAllocator.cpp::allocate::20] ", "Error Code 2: OutOfMemory ()", ""),
    ],
)
def test_places_in_tensorrts_source_are_left_out(before, kept, after):
    record("ERROR", before + kept + after)
    assert take_errors() == kept


def test_that_there_is_no_driver_is_only_said_when_nothing_else_is():
    noise = (
        "[m.cpp::f::250] Error Code 1: Cuda Runtime (In f at /m.cpp:250 (cudaError 35: CUDA driver version is too old))"
    )
    record("ERROR", noise)
    record("ERROR", "the reason")
    assert take_errors() == "the reason"
    record("ERROR", noise)
    assert "cudaError 35" in take_errors()


# --- The real modules ----------------------------------------------------------------------------

RUNTIME = {
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
    "ICudaEngine": (
        "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_shape", "get_tensor_dtype",
        "get_tensor_location", "get_tensor_format_desc", "get_tensor_profile_shape", "get_tensor_bytes_per_component",
        "get_tensor_components_per_element", "get_tensor_vectorized_dim", "num_optimization_profiles",
        "create_execution_context",
    ),
    "IExecutionContext": (
        "set_tensor_address", "set_input_shape", "get_tensor_shape", "infer_shapes", "set_optimization_profile_async",
        "execute_async_v3", "set_output_allocator", "get_max_output_size", "set_input_consumed_event", "profiler",
        "enqueue_emits_profile", "nvtx_verbosity", "error_recorder",
    ),
    "ILogger": ("Severity", "log"),
    "IOutputAllocator": (),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "TensorLocation": ("HOST", "DEVICE"),
    "DataType": ("FLOAT", "HALF", "INT8", "UINT8", "INT32", "BOOL"),
}  # fmt: skip
"""The part of the API that is the same everywhere, and on which serving relies."""

BUILDER = {
    "Builder": ("build_serialized_network", "create_builder_config", "create_network", "create_optimization_profile"),
    "IBuilderConfig": (
        "add_optimization_profile", "set_flag", "set_memory_pool_limit", "set_preview_feature", "get_tactic_sources",
        "set_tactic_sources", "create_timing_cache", "set_timing_cache", "get_timing_cache", "progress_monitor",
        "num_compute_capabilities", "set_compute_capability",
    ),
    "INetworkDefinition": ("num_inputs", "num_outputs", "get_input", "get_output"),
    "ITensor": ("name", "dtype", "shape", "is_shape_tensor", "allowed_formats"),
    "TensorFormat": ("LINEAR", *(word.upper() for word in IO_FORMATS)),
    "ITimingCache": ("serialize",),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("phase_start", "step_complete", "phase_finish"),
    "MemoryPoolType": ("WORKSPACE",),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("desc", "node"),
    "ComputeCapability": ("SM89",),
    "TacticSource": (),
    "PreviewFeature": (),
    "BuilderFlag": (),
}  # fmt: skip


def missing(module: ModuleType, wanted: dict[str, tuple[str, ...]]) -> list[str]:
    return [
        f"{kind}.{name}" if name else kind
        for kind, names in wanted.items()
        for name in (names if hasattr(module, kind) else ("",))
        if not name or not hasattr(getattr(module, kind), name)
    ]


@pytest.mark.parametrize("name", ["rtx", "lean", "tensorrt"])
def test_the_real_runtime_has_what_serving_uses(name):
    module = pytest.importorskip(FLAVOURS[name], exc_type=ImportError)
    assert missing(module, RUNTIME) == []
    assert {*flavours._LEVELS, "VERBOSE"} == set(module.ILogger.Severity.__members__)


@pytest.mark.parametrize("name", ["rtx", "lean", "tensorrt"])
def test_an_allocator_can_be_made_of_the_real_class(name):
    check_allocator(pytest.importorskip(FLAVOURS[name], exc_type=ImportError))


def test_an_allocator_can_be_made_of_the_fakes():
    check_allocator(make_module("tensorrt", FakeRuntime()))


def check_allocator(module: Any) -> None:
    """TensorRT 10 and newer call `reallocate_output_async`, older ones the other."""
    allocator = contexts._make_allocator(module, 4096, 64)
    assert isinstance(allocator, module.IOutputAllocator)
    assert allocator.reallocate_output("y", 4096, 64, 256) == 4096
    assert allocator.reallocate_output_async("y", 4096, 65, 256, 1) == 0
    allocator.notify_shape("y", (2, 3))
    assert (allocator.refused, allocator.shape) == (65, (2, 3))


def test_the_real_builder_has_what_building_uses():
    module = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    assert missing(module, BUILDER) == []
    assert not hasattr(module.BuilderFlag, "FP16")  # else the table in workers/build_network.py is out of date


def test_a_real_logger_hears_its_library():
    module = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    flavour = load_flavour("rtx")
    assert isinstance(flavour, Flavour)
    assert flavour.module is module
    builder = module.Builder(logger(flavour))
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert not module.OnnxParser(network, logger(flavour)).parse(b"no model")
    assert "Failed to parse the ONNX model" in take_errors()
