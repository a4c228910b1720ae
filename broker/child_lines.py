"""Children that say what they do, a line of JSON at a time, and at last what came out; they may crash."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TypeVar

import msgspec

from trtpool.ipc.errors import ModelError
from trtpool.ipc.process import describe_exit

from .modules import start_module
from .planning import Waiting

L = TypeVar("L", bound=msgspec.Struct)


def last_line(
    module: str,
    request: msgspec.Struct,
    line: type[L],
    env: Mapping[str, str],
    is_outcome: Callable[[L], bool],
    show: Callable[[L], None],
    failed: str,
    waiting: Waiting = nullcontext,
) -> L:
    """Run a module on `request`, and return the line that says what came out.

    Args:
        module: what `python -m` runs.
        request: its standard input, as JSON.
        line: what each line of its standard output is.
        env: its environment, which shows it its GPU.
        is_outcome: whether a line is the one.
        show: called with each other line.
        failed: what to say of a crash, such as "det.onnx: building a plan".
        waiting: entered while the child is waited for; it may raise, and the child is ended.

    Raises:
        ModelError: it crashed.
    """
    child = start_module(module, env)
    last: L | None = None
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        with waiting():
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(msgspec.json.encode(request))
            for raw in child.stdout:
                said = msgspec.json.decode(raw, type=line)
                if is_outcome(said):
                    last = said
                else:
                    show(said)
            child.wait()
    finally:
        with child:  # closes its pipes and waits for its end
            child.kill()
    if last is None or child.returncode:
        raise ModelError(f"{failed} ended with {describe_exit(child.returncode)}")
    return last
