"""What the doctor makes of packages and GPUs, on hosts made of files and from answers made here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.workers import fake_bindings as fake
from trtpool.broker.doctor import asking, gpus, packages
from trtpool.broker.doctor.asking import Answer, ask, sort
from trtpool.broker.doctor.finding import Finding, Host
from trtpool.ipc.probing import PACKAGES, GpuFound, GpusRefused, PackageFound, Probing
from trtpool.ipc.settings import GpuInfo

BUS = "0000:3b:00.0"
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
NO_DRIVER = GpusRefused("DeviceUnavailable", "there is no NVIDIA driver here (libcuda.so.1); install one")

MakeHost = Callable[..., Host]


@pytest.fixture
def host(tmp_path: Path) -> MakeHost:
    """Makes a host with a GPU on the bus, of which files can be changed; None takes one away."""

    def make(**changed: str | None) -> Host:
        device = {
            "vendor": "0x10de", "class": "0x030200", "current_link_width": "16", "max_link_width": "16",
            "current_link_speed": "16.0 GT/s PCIe", "max_link_speed": "16.0 GT/s PCIe", "numa_node": "1",
            "local_cpulist": "4-7",
        }  # fmt: skip
        files: dict[str, str | None] = {f"{gpus.DEVICES}/{BUS}/{name}": text for name, text in device.items()}
        files |= {"proc/driver/nvidia/version": DRIVER, "dev/nvidiactl": "", "sys/devices/system/node/online": "0-1"}
        for name, text in changed.items():
            path = name.replace("__", "/")
            files[path if "/" in path else f"{gpus.DEVICES}/{BUS}/{path}"] = text
        for path, text in files.items():
            if text is not None:
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).write_text(text + "\n")
        return Host(tmp_path)

    return make


def no_gpu(host: MakeHost, **files: str | None) -> Host:
    """A host on which nothing is, but for `files`."""
    gone: dict[str, str | None] = dict.fromkeys(("vendor", "proc__driver__nvidia__version", "dev__nvidiactl"))
    return host(**{**gone, **files})


def a_gpu(**changed: Any) -> GpuFound:
    info = GpuInfo(
        name="NVIDIA H100 80GB HBM3", uuid="GPU-1", pci_bus_id="00000000:3B:00.0", compute_capability="9.0",
        memory_bytes=80 << 30, driver=(12, 4),
    )  # fmt: skip
    return GpuFound(**{"gpu": info, "free_bytes": 79 << 30, **changed})


def answer(*found: str, gpu: GpuFound | None = None, **changed: Any) -> Answer:
    """All packages were looked at, and those that are `found` are there."""
    there = {name: PackageFound(name, "1.2" if name in found else "") for name in PACKAGES}
    return Answer(there, [gpu] if gpu else [], [])._replace(**changed)


def told(findings: Any, check: str) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


# --- GPUs ----------------------------------------------------------------------------------------


def test_a_gpu_in_order_is_all_ok(host):
    found = list(gpus.look(host(), answer(gpu=a_gpu())))
    assert {finding.status for finding in found} == {"ok"}
    assert [finding.text for finding in found] == [
        "NVIDIA 550.54.15, which runs CUDA up to 12.4",
        "GPU 0: NVIDIA H100 80GB HBM3, compute capability 9.0, 79.0 GiB of 80.0 GiB free, GPU-1",
        "GPU 0: PCIe x16 of x16, 16.0 GT/s of 16.0 GT/s a lane",
        "GPU 0: on NUMA node 1, near CPUs 4-7, to which its worker keeps",
        "GPU 0: shared memory can be pinned",
    ]


def test_the_open_kernel_module_has_a_version_too(host):
    found = gpus.look(host(proc__driver__nvidia__version=OPEN), answer(gpu=a_gpu()))
    assert told(found, "driver")[0].text == "NVIDIA 580.65.06, which runs CUDA up to 12.4"


@pytest.mark.parametrize(
    ("files", "status", "words"),
    [
        ({"current_link_width": "8"}, "warning", "PCIe x8 of x16"),
        ({"current_link_speed": "2.5 GT/s PCIe"}, "ok", "an idle GPU lowers its speed"),
        ({"current_link_width": "0"}, "ok", "does not say how it is connected"),
        ({"current_link_width": None}, "ok", "does not say how it is connected"),
    ],
)
def test_the_bus(files, status, words, host):
    (found,) = told(gpus.look(host(**files), answer(gpu=a_gpu())), "bus")
    assert (found.status, words in found.text) == (status, True)


@pytest.mark.parametrize(
    ("files", "statuses"),
    [
        ({"numa_node": "-1"}, ["warning"]),
        ({"numa_node": None}, ["warning"]),
        ({"sys__devices__system__node__online": "0"}, []),
    ],
)
def test_the_numa_node(files, statuses, host):
    assert [one.status for one in told(gpus.look(host(**files), answer(gpu=a_gpu())), "numa")] == statuses


def test_memory_that_cannot_be_pinned_is_a_problem(host):
    (found,) = told(gpus.look(host(), answer(gpu=a_gpu(pin_error="out of memory"))), "pinning")
    assert found.status == "problem"
    assert found.text == "GPU 0: shared memory cannot be pinned: out of memory"
    assert "--ulimit memlock=-1" in found.remedy


def test_a_gpu_without_a_name_on_the_bus_is_described_without_it(host):
    info = msgspec.structs.replace(a_gpu().gpu, pci_bus_id="odd")
    checks = [one.check for one in gpus.look(host(), answer(gpu=a_gpu(gpu=info)))]
    assert checks == ["driver", "gpu", "pinning"]


def test_no_gpu_at_all_is_fine(host):
    found = list(gpus.look(no_gpu(host), answer("onnxruntime", refusals=[NO_DRIVER])))
    assert [(one.check, one.status) for one in found] == [("driver", "ok")]
    assert found[0].text.startswith("there is no NVIDIA GPU here; pools run on the CPU")


def test_a_gpu_without_a_driver(host):
    machine = no_gpu(host, vendor="0x10de")
    driver, cuda = gpus.look(machine, answer(refusals=[NO_DRIVER]))
    assert (driver.status, BUS in driver.text, "no driver is loaded" in driver.text) == ("warning", True, True)
    assert (cuda.status, cuda.remedy) == ("warning", "install one")


def test_other_devices_on_the_bus_are_no_gpus(host):
    assert gpus.hardware(host()) == [BUS]
    assert gpus.hardware(host(**{"class": "0x040300"})) == []  # its sound


def test_a_container_that_was_given_no_gpu(host):
    found = list(gpus.look(host(dev__nvidiactl=None), answer(refusals=[NO_DRIVER])))
    assert found[0].status == "warning"
    assert "the host has NVIDIA's driver 550.54.15, and no GPU was given to this container" in found[0].text
    assert "docker run --gpus all" in found[0].remedy


def test_a_gpu_that_was_given_and_cannot_be_used_is_a_problem(host):
    refused = GpusRefused("DeviceUnavailable", "CUDA cannot use the GPU (error 802); start nvidia-fabricmanager")
    (found,) = told(gpus.look(host(), answer(refusals=[refused])), "cuda")
    assert found == Finding("cuda", "problem", "CUDA cannot use the GPU (error 802)", "start nvidia-fabricmanager")


def test_a_gpu_without_cuda_python_is_a_problem_with_what_to_install(host):
    missing = GpusRefused(
        "MissingExtra", "cuda-python cannot be imported (no); install it: pip install 'trtpool[cu13]'"
    )
    (found,) = told(gpus.look(host(), answer("tensorrt", refusals=[missing])), "cuda")
    assert (found.status, found.remedy) == ("problem", "install it: pip install 'trtpool[cu13]'")


def test_a_crash_in_the_driver_is_told(host):
    (found,) = told(gpus.look(host(), answer(died=("gpus", "SIGSEGV"))), "cuda")
    assert (found.status, "SIGSEGV" in found.text) == ("problem", True)


# --- Packages ------------------------------------------------------------------------------------


def test_packages_that_are_there_and_others():
    found = told(packages.look(answer("onnxruntime")), "packages")
    assert {one.status for one in found} == {"ok"}
    assert found[0].text == "onnxruntime 1.2 runs models on the CPU"
    assert found[1].text == "onnx is not installed; it builds plans from ONNX files: pip install 'trtpool[build]'"
    assert len(found) == len(PACKAGES) == len(packages._PACKAGES)


def test_every_extra_that_is_named_is_one():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for package in packages._PACKAGES.values():
        assert f"\n{package.extra} = [" in text


@pytest.mark.parametrize(
    ("there", "gpu", "status", "remedy"),
    [
        ((), None, "problem", "pip install 'trtpool[cpu]'"),
        (("tensorrt",), None, "problem", "pip install 'trtpool[cpu]'"),
        (("onnxruntime",), a_gpu(), "warning", "pip install 'trtpool[tensorrt-cu12]'"),
        (("onnxruntime",), None, None, ""),
        (("tensorrt_lean",), a_gpu(), None, ""),
    ],
)
def test_whether_anything_can_run_a_model(there, gpu, status, remedy):
    found = told(packages.look(answer(*there, gpu=gpu)), "engines")
    assert [(one.status, one.remedy) for one in found] == ([(status, remedy)] if status else [])


def test_a_package_that_cannot_be_imported_is_told_with_the_reason():
    broken = answer("onnxruntime")
    broken.packages["tensorrt"] = PackageFound("tensorrt", error="libnvinfer.so.10: cannot open shared object file")
    (found,) = [one for one in packages.look(broken) if one.status != "ok"]
    assert (found.status, "libnvinfer.so.10" in found.text) == ("warning", True)


def test_a_package_that_ends_the_process_is_named():
    crashed = Answer({"onnxruntime": PackageFound("onnxruntime", "1.2")}, [], [], ("tensorrt_rtx", "SIGSEGV"))
    (found,) = [one for one in packages.look(crashed) if one.status != "ok"]
    assert (found.status, found.text) == ("problem", "looking at TensorRT for RTX ended the process: SIGSEGV")


# --- Asking --------------------------------------------------------------------------------------


def test_what_a_child_said_before_it_ended_counts():
    lines = [Probing("onnx"), PackageFound("onnx", "1.2"), Probing("gpus"), a_gpu(), NO_DRIVER]
    said = b"".join(msgspec.json.encode(line) + b"\n" for line in lines) + b'{"type":"pack'
    assert sort(said, "SIGKILL") == Answer(
        {"onnx": PackageFound("onnx", "1.2")}, [a_gpu()], [NO_DRIVER], ("gpus", "SIGKILL")
    )
    assert sort(b"", "exit code 1").died == ("the first package", "exit code 1")


@pytest.mark.system
def test_a_real_child_is_asked(tmp_path, monkeypatch):
    """Packages that print, that fail, that are none, and a GPU."""
    fake.make(tmp_path)
    (tmp_path / "onnxruntime.py").write_text("print('printed')\n__version__ = '1.99'\n")
    (tmp_path / "onnx.py").write_text("raise OSError('libfoo.so:\\n not found')\n")
    # A folder is not imported where there is a package of that name, however late on the path.
    absent = next(name for name in ("tensorrt", "tensorrt_lean") if importlib.util.find_spec(name) is None)
    (tmp_path / absent).mkdir()
    (tmp_path / "tensorrt_rtx.py").write_text("import a_module_that_is_missing\n")
    for name, value in {**fake.on_path(tmp_path), **fake.machine({"0": fake.gpu(0)}, driver=12090)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    found = ask()
    assert found.packages["onnxruntime"] == PackageFound("onnxruntime", "1.99")
    assert found.packages["onnx"].error == "libfoo.so: not found"
    assert "a_module_that_is_missing" in found.packages["tensorrt_rtx"].error
    assert found.packages[absent].error == f"{absent} on the path is not the package of that name"
    assert (found.refusals, found.died) == ([], ("", ""))
    (gpu,) = found.gpus
    assert (gpu.gpu.name, gpu.gpu.driver, gpu.free_bytes, gpu.pin_error) == (fake.gpu(0)["name"], (12, 9), 7 << 30, "")


@pytest.mark.gpu
@pytest.mark.system
def test_the_real_gpu(monkeypatch):
    pytest.importorskip("cuda.bindings.runtime")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = ask()
    assert found.gpus
    assert (found.refusals, found.died) == ([], ("", ""))
    told = list(gpus.look(Host(), found))
    assert [one.text for one in told if one.status == "problem"] == []
    assert [one.check for one in told][:2] == ["driver", "gpu"]


@pytest.mark.system
def test_a_child_that_crashes_says_where(tmp_path, monkeypatch):
    (tmp_path / "onnx.py").write_text("import os\nos.abort()\n")
    (tmp_path / "onnxruntime.py").write_text("__version__ = '1.99'\n")
    monkeypatch.setenv("PYTHONPATH", fake.on_path(tmp_path)["PYTHONPATH"])
    found = ask()
    assert found.died[0] == "onnx"
    assert found.died[1].startswith("SIGABRT")
    assert [*found.packages] == ["onnxruntime"]


@pytest.mark.system
def test_a_child_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, signal\nif sys.orig_argv[-1] == 'trtpool.workers.probe':\n    signal.pause()\n"
    )
    monkeypatch.setenv("PYTHONPATH", fake.on_path(tmp_path)["PYTHONPATH"])
    monkeypatch.setattr(asking, "PATIENCE_S", 0.2)
    assert "hung" in ask().died[1]
    assert sys.flags.no_site == 0  # or nothing would have hung
