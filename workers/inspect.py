"""What is in a model file: ``python -m trtpool.workers.inspect``, asked before the arena is planned.

Standard input is an `InspectRequest` as JSON.  Standard output is one line of JSON, and nothing else::

    {"spec": {...}}                                      a `ModelSpec`
    {"refusal": {"kind": "ModelError", "text": "..."}}   a `Refusal`

The exit code is 0 in both cases.  Anything else (a crash of the library that reads the model, too little
memory) is an exit code or signal, with what the library said on standard error.

This runs in a process of its own, so that neither the supervisor nor the broker ever loads an inference
library, and a model that crashes one takes nothing with it.
"""

from __future__ import annotations

import os
import sys

import msgspec

from trtpool.ipc.errors import ProtocolError, TrtpoolError
from trtpool.ipc.process import only_answer, tie_to_parent
from trtpool.ipc.settings import InspectRequest, Refusal
from trtpool.ipc.tensors import ModelSpec

from .loading import load


def inspect(request: bytes) -> dict[str, ModelSpec | Refusal]:
    """The answer to `request`, the JSON of an `InspectRequest`: one key, "spec" or "refusal"."""
    try:
        return {"spec": _spec(request)}
    except TrtpoolError as error:
        return {"refusal": Refusal(type(error).__name__, str(error))}


def _spec(request: bytes) -> ModelSpec:
    try:
        asked = msgspec.json.decode(request, type=InspectRequest)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not an InspectRequest: {error}") from error
    engine = load(asked)
    try:
        return engine.spec
    finally:
        engine.close()


def main() -> None:
    """Answer the request on standard input."""
    tie_to_parent(os.getppid())
    with only_answer() as out:
        out.write(msgspec.json.encode(inspect(sys.stdin.buffer.read())) + b"\n")


if __name__ == "__main__":
    main()
