"""What can run models here: ``python -m trtpool.workers.probe``, which `trtpool doctor` asks.

It imports each optional package, lists the GPUs that CUDA can use, and pins a little shared memory for each.  All of
that may crash or hang, and CUDA never goes away again: so this is a process of its own.  See `trtpool.ipc.probing`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import mmap
import os
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import numpy as np

from trtpool.ipc.arena import create_segment, map_segment
from trtpool.ipc.errors import TrtpoolError
from trtpool.ipc.probing import PACKAGES, GpuFound, GpusRefused, PackageFound, Probed, Probing
from trtpool.ipc.process import only_answer, tie_to_parent

from . import devices
from .cuda import load_bindings

NOT_IMPORTED: Final = ("ray",)
"""What is only looked up, since its import takes seconds or starts something."""

PIN_BYTES: Final = 16 << 20


def main() -> None:
    """Answer, line by line."""
    tie_to_parent(os.getppid())
    with only_answer() as out:
        for said in look():
            out.write(msgspec.json.encode(said) + b"\n")
            out.flush()


def look() -> Iterator[Probed]:
    """All there is to say."""
    for name in PACKAGES:
        yield Probing(name)
        yield package(name)
    yield Probing("gpus")
    yield from gpus()


def package(name: str) -> PackageFound:
    """Import a module, and see what version it is."""
    top = name.partition(".")[0]
    try:
        if name in NOT_IMPORTED:
            found = importlib.util.find_spec(name) is not None
            return PackageFound(name, importlib.metadata.version(name)) if found else PackageFound(name)
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name is not None and name.startswith(error.name)
        return PackageFound(name, error="" if missing else _line(error))
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever a broken package raises
        return PackageFound(name, error=_line(error))
    if top == "cuda":
        return PackageFound(name, _version_of_cuda_python(module))
    version = getattr(module, "__version__", None)
    if not version:  # a folder of that name somewhere on the path
        return PackageFound(name, error=f"{name} on the path is not the package of that name")
    return PackageFound(name, str(version))


def _version_of_cuda_python(runtime: Any) -> str:
    for distribution in ("cuda-bindings", "cuda-python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return str(runtime.cudaRuntimeGetVersion()[1])


def gpus() -> Iterator[GpuFound | GpusRefused]:
    """Each GPU that CUDA shows this process, or why it shows none."""
    try:
        runtime = load_bindings("runtime")
        error, count = runtime.cudaGetDeviceCount()
    except TrtpoolError as missing:
        yield GpusRefused(type(missing).__name__, str(missing))
        return
    for number in range(1 if int(error) else max(1, count)):  # `look` says why there is none
        try:
            gpu = devices.look(number)
            yield GpuFound(gpu, *_try_to_use(runtime, number))
        except TrtpoolError as refused:
            yield GpusRefused(type(refused).__name__, str(refused))


def _try_to_use(runtime: Any, number: int) -> tuple[int, str]:
    """Free bytes of a GPU's memory, and why nothing can be pinned for it, if so."""
    devices.check(runtime, runtime.cudaSetDevice(number)[0])
    error, free, _ = runtime.cudaMemGetInfo()
    devices.check(runtime, error)
    fd = create_segment(PIN_BYTES)
    try:
        mapping: mmap.mmap = map_segment(fd, PIN_BYTES)
    finally:
        os.close(fd)
    view = np.frombuffer(mapping, np.uint8)
    flags = runtime.cudaHostRegisterPortable | runtime.cudaHostRegisterMapped
    (error,) = runtime.cudaHostRegister(view.ctypes.data, PIN_BYTES, flags)
    if int(error):
        runtime.cudaGetLastError()
        text = runtime.cudaGetErrorString(error)[1]
        return int(free), text.decode() if isinstance(text, bytes) else str(text)
    runtime.cudaHostUnregister(view.ctypes.data)
    return int(free), ""


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


if __name__ == "__main__":
    main()
