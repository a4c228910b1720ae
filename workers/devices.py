"""What a GPU is: ``python -m trtpool.workers.devices``, asked before anything else of a pool on GPUs starts.

It sees one GPU, by `CUDA_VISIBLE_DEVICES`.  Standard output is one line of JSON, and nothing else::

    {"gpu": {...}}                                              a `GpuInfo`
    {"refusal": {"kind": "DeviceUnavailable", "text": "..."}}   a `Refusal`

The exit code is 0 in both cases.  This runs in a process of its own, so that the supervisor never starts CUDA.
"""

from __future__ import annotations

import os
import uuid
from typing import Any, Final

import msgspec

from trtpool.ipc.errors import DeviceUnavailable, TrtpoolError
from trtpool.ipc.process import only_answer, tie_to_parent
from trtpool.ipc.settings import GpuInfo, Refusal

from .cuda import ERROR_DEVICES_UNAVAILABLE, ERROR_INSUFFICIENT_DRIVER, ERROR_NO_DEVICE, load_bindings

_REMEDIES: Final = {
    ERROR_DEVICES_UNAVAILABLE: "its memory is full, or another process has it for itself (nvidia-smi shows which)",
    802: "on a host with NVSwitch start nvidia-fabricmanager",
    803: "the driver was updated under a running kernel module, so reboot",
    804: "remove the CUDA compatibility package (cuda-compat), or update the driver",
}
"""What to do about an error of CUDA's, by its code, where that is not plain from CUDA's own words."""


def describe() -> dict[str, GpuInfo | Refusal]:
    """The answer: one key, "gpu" or "refusal"."""
    try:
        return {"gpu": look()}
    except TrtpoolError as error:
        return {"refusal": Refusal(type(error).__name__, str(error))}


def look(number: int = 0) -> GpuInfo:
    """A GPU that this process sees; mostly there is one.

    Args:
        number: as CUDA counts those that the process sees.

    Raises:
        MissingExtra: cuda-python is not installed.
        DeviceUnavailable: no driver, one that is too old, or no such GPU.
    """
    runtime, driver = load_bindings("runtime"), load_bindings("driver")
    _, version = runtime.cudaDriverGetVersion()  # 0 without a driver, and then no error
    error, count = runtime.cudaGetDeviceCount()
    if int(error) == ERROR_INSUFFICIENT_DRIVER:
        raise DeviceUnavailable(_insufficient(runtime, version))
    if int(error) == ERROR_NO_DEVICE or (not int(error) and not count):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise DeviceUnavailable(
            f"CUDA finds no GPU {visible} here; `nvidia-smi -L` lists those there are, by index and by UUID"
            if visible
            else "CUDA finds no GPU here; `nvidia-smi -L` lists those there are"
        )
    check(runtime, error)
    properties = _value(runtime, runtime.cudaGetDeviceProperties(number))
    name = _text(properties.name)
    # Its own words for it: a MIG instance's name is "NVIDIA A100-SXM4-40GB MIG 1g.5gb".
    kind = "MIG" if " MIG " in name else "GPU"
    return GpuInfo(
        name=name,
        uuid=f"{kind}-{_uuid(runtime, driver, number)}",
        pci_bus_id=_text(_value(runtime, runtime.cudaDeviceGetPCIBusId(32, number))),
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=int(properties.totalGlobalMem),
        driver=_version(version),
    )


def _insufficient(runtime: Any, version: int) -> str:
    if not version:
        return (
            "there is no NVIDIA driver here (libcuda.so.1); install one, give the container its GPUs "
            "(docker run --gpus all), or leave out --gpus to run models on the CPU"
        )
    needed = _version(int(runtime.cudaRuntimeGetVersion()[1]))
    extra = f" or pip install 'trtpool[cu{version // 1000}]'" if 12 <= version // 1000 < needed[0] else ""
    return (
        f"the NVIDIA driver runs CUDA {_dotted(_version(version))} at most, and the cuda-python installed here needs "
        f"{_dotted(needed)}; update the driver{extra}"
    )


def _uuid(runtime: Any, driver: Any, number: int) -> uuid.UUID:
    """That of the GPU, or of the MIG instance, for which the older call gives that of the whole GPU."""
    ask = getattr(driver, "cuDeviceGetUuid_v2", None) or driver.cuDeviceGetUuid  # one call from CUDA 13 on
    return uuid.UUID(bytes=bytes(_value(runtime, ask(_value(runtime, driver.cuDeviceGet(number)))).bytes))


def _value(runtime: Any, answer: tuple[Any, Any]) -> Any:
    """The value of a call that succeeded, ``(error, value)``; driver and runtime have the same codes."""
    error, value = answer
    check(runtime, error)
    return value


def check(runtime: Any, error: Any) -> None:
    """Raise what a call of the runtime's or the driver's answered, with what to do.

    Raises:
        DeviceUnavailable: it was an error.
    """
    if int(error):
        what = _text(runtime.cudaGetErrorString(runtime.cudaError_t(int(error)))[1])
        remedy = _REMEDIES.get(int(error), "see nvidia-smi, and dmesg for lines with NVRM")
        raise DeviceUnavailable(f"CUDA cannot use the GPU ({what}, error {int(error)}); {remedy}")


def _text(raw: bytes | str) -> str:
    text = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
    return text.partition("\0")[0].strip()


def _version(number: int) -> tuple[int, int]:
    """12090 is ``(12, 9)``."""
    return number // 1000, number % 1000 // 10


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def main() -> None:
    """Answer."""
    tie_to_parent(os.getppid())
    with only_answer() as out:
        out.write(msgspec.json.encode(describe()) + b"\n")


if __name__ == "__main__":
    main()
