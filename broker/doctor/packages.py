"""Which optional packages there are, and whether anything here can run a model."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Final, NamedTuple

from trtpool import __version__
from trtpool.ipc.probing import PackageFound

from .asking import Answer
from .finding import Finding

ENGINES: Final = ("tensorrt", "tensorrt_rtx", "tensorrt_lean")


class _Package(NamedTuple):
    """How a package is called, what it is for, and how to have it."""

    title: str
    purpose: str
    extra: str


_PACKAGES: Final = {
    "onnxruntime": _Package("onnxruntime", "runs models on the CPU", "cpu"),
    "onnx": _Package("onnx", "builds plans from ONNX files", "build"),
    "tensorrt": _Package("TensorRT", "runs and builds plans", "tensorrt"),
    "tensorrt_rtx": _Package("TensorRT for RTX", "runs and builds plans of its own", "rtx"),
    "tensorrt_lean": _Package("TensorRT lean", "runs plans", "lean"),
    "cuda.bindings.runtime": _Package("cuda-python", "calls CUDA", "cu13"),
    "ray": _Package("Ray", "reads data for pools on several hosts", "ray"),
}


def look(answer: Answer) -> Iterator[Finding]:
    """Our own, then each optional one, then whether something can run a model."""
    required = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "msgspec", "pyzmq"))
    yield Finding("python", "ok", f"trtpool {__version__}, Python {platform.python_version()}, {required}")
    for name, package in _PACKAGES.items():
        found = answer.packages.get(name)
        if found is not None:
            yield _judge(package, found)
    what, how = answer.died
    if what and what != "gpus":
        title = _PACKAGES[what].title if what in _PACKAGES else what
        yield Finding(
            "packages", "problem", f"looking at {title} ended the process: {how}",
            f"reinstall {title}, or remove it; what comes after it was not looked at",
        )  # fmt: skip
    yield from _engines(answer)


def _judge(package: _Package, found: PackageFound) -> Finding:
    install = f"pip install 'trtpool[{package.extra}]'"
    if found.version:
        return Finding("packages", "ok", f"{package.title} {found.version} {package.purpose}")
    if found.error:
        return Finding(
            "packages", "warning", f"{package.title} is there and cannot be imported: {found.error}",
            f"{install}, or remove what is there",
        )  # fmt: skip
    return Finding("packages", "ok", f"{package.title} is not installed; it {package.purpose}: {install}")


def _engines(answer: Answer) -> Iterator[Finding]:
    if answer.died[0] in _PACKAGES:  # not all was seen
        return
    there = {name for name, found in answer.packages.items() if found.version}
    on_gpu = there.intersection(ENGINES)
    if answer.gpus and not on_gpu:
        major = answer.gpus[0].gpu.driver[0]
        extra = "tensorrt" if major >= 13 else "tensorrt-cu12"
        yield Finding(
            "engines",
            "warning",
            "there is a GPU, and no TensorRT to run models on it",
            f"pip install 'trtpool[{extra}]'",
        )
    if "onnxruntime" not in there and not (on_gpu and answer.gpus):
        yield Finding("engines", "problem", "nothing here can run a model", "pip install 'trtpool[cpu]'")
