"""Model files whose answers carry the ids of their inputs, and the hook by which an input kills or hangs a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx.parser

HEADER: Final = '<ir_version: 8, opset_import: ["": 17]>\n'

MODELS: Final = {
    # Producer, number, a hash of both, and a mark that a worker may stumble over.
    "negate": "negate (float[N,4] x) => (float[N,4] y) { y = Neg(x) }",
    # Number, and an index that the table has, or has not.
    "picky": (
        "picky (int64[N,2] x) => (int64[N,2] y) <int64[4] table = {0, 0, 0, 0}, int64 one = {1}, int64[1] axis = {1}> "
        "{ i = Gather<axis=1>(x, one) z = Gather(table, i) u = Unsqueeze(z, axis) y = Add(x, u) }"
    ),
    # The same as negate in rows of 16 KiB, which are more than a page.
    "wide": "wide (float[N,4096] x) => (float[N,4096] y) { y = Neg(x) }",
}

WELL, DEADLY, HANGS = 1.0, 13.0, 17.0
"""Marks of inputs of "negate"."""

# Python imports this in each process of the pool; it is for workers alone.
HOOK: Final = """
import sys

if sys.orig_argv[-1] == "trtpool.workers":
    import os, signal
    from trtpool.workers import onnx_engine

    class Engine(onnx_engine.OnnxEngine):
        def run(self, batch, shapes=()):
            if self.spec.name == "negate":
                for rows in batch:
                    x = self._planes.inputs[0][rows.first : rows.first + rows.count].view("f4").reshape(-1, 4)
                    marks = x[: rows.items, 3]
                    if (marks == 13).any():
                        os.kill(os.getpid(), signal.SIGSEGV)
                    if (marks == 17).any():
                        os.kill(os.getpid(), signal.SIGSTOP)
            return super().run(batch, shapes)

    onnx_engine.OnnxEngine = Engine
"""


def write_models(folder: Path, names: list[str]) -> list[str]:
    """Write the models of these names, as ``NAME=FILE`` for each."""
    written = []
    for name in names:
        path = folder / f"{name}.onnx"
        path.write_bytes(onnx.parser.parse_model(HEADER + MODELS[name]).SerializeToString())
        written.append(f"{name}={path}")
    return written


def write_hook(folder: Path) -> Path:
    """Write the hook; returns the folder that must be on the path of the pool's processes."""
    hook = folder / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    return hook
