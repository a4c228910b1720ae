"""Building a plan: ``python -m trtpool.workers.build``.

Standard input is a `BuildRequest` as JSON.  Standard output is lines of JSON, and nothing else, see
`trtpool.ipc.building.Line`::

    {"said": "TensorRT for RTX 1.7.1.116 for compute capability 8.9"}
    {"progress": {"phase": "Timing graph nodes", "done": 420, "of": 1000}}
    {"built": {...}}                                     at last; or
    {"refusal": {"kind": "ModelError", "text": "..."}}

The exit code is 0 in both cases.  Anything else (a crash of TensorRT, too little memory) is an exit code or signal,
with what the library said on standard error.

This is a process of its own because it can crash, take gigabytes and minutes, and be stopped only by ending it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

import msgspec

from trtpool.ipc.building import BuildRequest, Line
from trtpool.ipc.errors import ProtocolError, TrtpoolError
from trtpool.ipc.logs import set_up_logging
from trtpool.ipc.process import only_answer, tie_to_parent
from trtpool.ipc.settings import Refusal

from .build_progress import Say
from .build_rewrite import rewrite
from .builder import build, describe


def answer(request: bytes, say: Say) -> Line:
    """Do what `request`, the JSON of a `BuildRequest`, asks for; returns the last line."""
    try:
        try:
            asked = msgspec.json.decode(request, type=BuildRequest)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"not a BuildRequest: {error}") from error
        if not asked.output:
            return Line(builder=describe(asked))
        return Line(built=(rewrite if asked.onnx else build)(asked, say))
    except TrtpoolError as error:
        return Line(refusal=Refusal(type(error).__name__, str(error)))


def main() -> None:
    """Answer the request on standard input."""
    set_up_logging("build")
    if "TRTPOOL_LOG" not in os.environ:  # what matters of it is in the refusal, and the rest would tear a progress bar
        logging.getLogger("trtpool.tensorrt").setLevel(logging.CRITICAL)
    tie_to_parent(os.getppid())
    lock = threading.Lock()
    with only_answer() as out:

        def say(line: Line) -> None:
            with lock:  # TensorRT reports progress from threads of its own
                out.write(msgspec.json.encode(line) + b"\n")
                out.flush()

        say(answer(sys.stdin.buffer.read(), say))


if __name__ == "__main__":
    main()
