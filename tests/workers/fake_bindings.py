"""A `cuda` package for children: `make(folder)` writes it, and `$FAKE_CUDA` says what machine it shows.

It has the calls that `trtpool.workers.devices` and `probe` make, which answer as those of cuda-python do: a tuple of
the error, an enum, and the value; text as bytes.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUNTIME = """
import enum, json, os
from types import SimpleNamespace

machine = json.loads(os.environ["FAKE_CUDA"])
visible = os.environ.get("CUDA_VISIBLE_DEVICES")
exec(machine["first"])


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorSystemNotReady = 802
    cudaErrorUnknown = 999


def answer(value):
    return cudaError_t(0), value


def cudaDriverGetVersion():
    return answer(machine["driver"])


def cudaRuntimeGetVersion():
    return answer(machine["runtime"])


def cudaGetDeviceCount():
    if machine["error"] is not None:
        return cudaError_t(machine["error"]), None
    if visible not in machine["gpus"]:
        return cudaError_t(100), None
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    return answer(1)


def cudaGetErrorString(error):
    assert isinstance(error, cudaError_t)
    return answer(error.name.encode())


def cudaGetDeviceProperties(device):
    gpu = machine["gpus"][visible]
    if "properties_error" in gpu:
        return cudaError_t(gpu["properties_error"]), None
    major, minor = gpu["capability"]
    return answer(SimpleNamespace(name=gpu["name"].encode(), major=major, minor=minor, totalGlobalMem=gpu["memory"]))


def cudaDeviceGetPCIBusId(length, device):
    return answer(gpu_bus().ljust(length, b"\\0"))


cudaHostRegisterPortable, cudaHostRegisterMapped = 1, 2


def cudaSetDevice(device):
    assert device == 0
    return (cudaError_t(0),)


def cudaMemGetInfo():
    return cudaError_t(0), 7 << 30, 8 << 30


def cudaHostRegister(address, size, flags):
    assert address and size and flags == 3
    return (cudaError_t(machine["gpus"][visible].get("register_error", 0)),)


def cudaHostUnregister(address):
    return (cudaError_t(0),)


def cudaGetLastError():
    return (cudaError_t(0),)


def gpu_bus():
    return machine["gpus"][visible]["bus"].encode()
"""

DRIVER = """
from types import SimpleNamespace
from cuda.bindings.runtime import answer, machine, visible


def cuDeviceGet(ordinal):
    assert ordinal == 0
    return answer("the device")


def {call}(device):
    assert device == "the device"
    return answer(SimpleNamespace(bytes=bytes.fromhex(machine["gpus"][visible]["uuid"])))
"""


def make(folder: Path, *, v2: bool = False) -> None:
    """Write the package into `folder`; with `v2` as cuda-python 12 has it: a MIG instance's id has its own call."""
    bindings = folder / "cuda" / "bindings"
    bindings.mkdir(parents=True)
    for package in (folder / "cuda", bindings):
        (package / "__init__.py").touch()
    (bindings / "runtime.py").write_text(RUNTIME)
    driver = DRIVER.replace("{call}", "cuDeviceGetUuid_v2" if v2 else "cuDeviceGetUuid")
    (bindings / "driver.py").write_text(driver + ("\n\ncuDeviceGetUuid = None\n" if v2 else ""))


def gpu(number: int, name: str = "NVIDIA H100 80GB HBM3", **changed: Any) -> dict[str, Any]:
    """A GPU for `machine`; its UUID is `uuid_of(number)`."""
    return {
        "name": name,
        "uuid": uuid_of(number).hex,
        "bus": f"0000:{number + 0x17:02X}:00.0",
        "capability": [9, 0],
        "memory": 85_000_000_000,
        **changed,
    }


def uuid_of(number: int) -> uuid.UUID:
    return uuid.UUID(int=number + 1)


def machine(
    gpus: Mapping[str, dict[str, Any]],
    *,
    driver: int = 13000,
    runtime: int = 13000,
    error: int | None = None,
    first: str = "",
) -> dict[str, str]:
    """What to set for a child to see a machine.

    Args:
        gpus: what each value of `CUDA_VISIBLE_DEVICES` stands for.
        driver, runtime: versions of CUDA, as CUDA numbers them.
        error: what counting the GPUs answers.
        first: code to run at import.
    """
    shown = {"gpus": dict(gpus), "driver": driver, "runtime": runtime, "error": error, "first": first}
    return {"FAKE_CUDA": json.dumps(shown)}


def on_path(folder: Path) -> dict[str, str]:
    """What to set for a child to import the package of `folder`."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}
