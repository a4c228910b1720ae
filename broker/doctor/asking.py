"""Asking a child what is installed and which GPUs CUDA shows; it may crash or hang, and is then reported too."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final, NamedTuple

import msgspec

from trtpool.broker.gpus import ORDER
from trtpool.broker.modules import child_environment
from trtpool.ipc.probing import GpuFound, GpusRefused, PackageFound, Probed, Probing
from trtpool.ipc.process import describe_exit

PATIENCE_S: Final = 120.0
"""How long the child may take: a first import from a cold disk takes many seconds."""


class Answer(NamedTuple):
    """What the child said.

    Attributes:
        packages: by module; those that were not come to are missing.
        gpus: those that can be used.
        refusals: why others, or all, cannot.
        died: what was looked at when the child ended early, and how it ended; both empty if it did not.
    """

    packages: dict[str, PackageFound]
    gpus: list[GpuFound]
    refusals: list[GpusRefused]
    died: tuple[str, str] = ("", "")


def ask() -> Answer:
    """Run the child, and sort what it says."""
    command = [sys.executable, "-m", "trtpool.workers.probe"]
    environment = {**child_environment(), ORDER: os.environ.get(ORDER, "PCI_BUS_ID")}
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, cwd="/", timeout=PATIENCE_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        return sort(late.stdout or b"", f"it hung for {PATIENCE_S:.0f} s")
    return sort(ended.stdout, describe_exit(ended.returncode) if ended.returncode else "")


def sort(said: bytes, ended: str = "") -> Answer:
    """What the child's lines say; `ended` is how it ended, if badly."""
    packages: dict[str, PackageFound] = {}
    gpus: list[GpuFound] = []
    refusals: list[GpusRefused] = []
    at = "the first package"
    decoder = msgspec.json.Decoder(Probed)
    for line in said.splitlines(keepends=True):
        if not line.endswith(b"\n"):  # it ended within it
            break
        found = decoder.decode(line)
        if isinstance(found, Probing):
            at = found.what
        elif isinstance(found, PackageFound):
            packages[found.name] = found
        elif isinstance(found, GpuFound):
            gpus.append(found)
        else:
            refusals.append(found)
    return Answer(packages, gpus, refusals, (at, ended) if ended else ("", ""))
