"""Processes of ours: each is `python -m MODULE` of this very trtpool, never a fork, with JSON on its standard input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from .gpus import gpu_environment


def child_environment(gpu: str | None = None) -> dict[str, str]:
    """The environment of our children: they import this very trtpool, and nothing from the current directory.

    Args:
        gpu: the one GPU that the child sees, as the user names it; None for a child that needs none.

    Raises:
        DeviceUnavailable: `CUDA_VISIBLE_DEVICES` does not allow that GPU.
    """
    package = os.fspath(Path(os.path.abspath(sys.modules["trtpool"].__file__ or "")).parent.parent)
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": package + (os.pathsep + path if path else ""),
        "PYTHONSAFEPATH": "1",
        **(gpu_environment(gpu) if gpu is not None else {}),
    }


def start_module(
    module: str,
    env: Mapping[str, str],
    stdout: int = subprocess.PIPE,
    pass_fds: Collection[int] = (),
    folder: str = "/",
) -> subprocess.Popen[bytes]:
    """Start a child, whose standard input is a pipe.  A Ctrl-C in the terminal is for us, and does not reach it.

    Args:
        module: what `python -m` runs.
        env: see `child_environment`.
        stdout: its standard output.
        pass_fds: descriptors that it inherits, by the same numbers.
        folder: where it runs; Python 3.10 looks for modules there first, whatever PYTHONSAFEPATH says.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=stdout,
        pass_fds=pass_fds,
        env=env,
        cwd=folder,
        start_new_session=True,
    )
