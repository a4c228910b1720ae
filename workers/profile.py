"""Where a model's time goes: ``python -m trtpool.workers.profile``, which `trtpool profile` starts.

It runs the engine as a worker does, on planes of an arena of its own, without broker and clients.  See
`trtpool.ipc.profiling` for what is asked and answered; the exit code is 0 for a refusal too.
"""

from __future__ import annotations

import os
import sys

import msgspec

from trtpool.ipc.errors import ProtocolError, TrtpoolError
from trtpool.ipc.process import only_answer, tie_to_parent
from trtpool.ipc.profiling import Measured, ProfileLine, ProfileRequest
from trtpool.ipc.settings import Refusal

from .engine import EngineError
from .profile_planes import Say


def answer(raw: bytes, say: Say) -> ProfileLine:
    """The outcome for `raw`, the JSON of a `ProfileRequest`; `say` is called with what is being done."""
    try:
        return ProfileLine(measured=_measure(raw, say))
    except TrtpoolError as error:
        return ProfileLine(refusal=Refusal(type(error).__name__, str(error)))
    except EngineError as error:
        return ProfileLine(refusal=Refusal("ModelError", f"the engine failed on a batch of the profile: {error}"))


def _measure(raw: bytes, say: Say) -> Measured:
    try:
        request = msgspec.json.decode(raw, type=ProfileRequest)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not a ProfileRequest: {error}") from error
    if request.engine.device == "gpu":
        from .profile_gpu import measure as measure_gpu  # with what only GPUs need

        return measure_gpu(request, say)
    from .profile_cpu import measure as measure_cpu

    return measure_cpu(request, say)


def main() -> None:
    """Answer the request on standard input."""
    tie_to_parent(os.getppid())
    with only_answer() as out:

        def write(line: ProfileLine) -> None:
            out.write(msgspec.json.encode(line) + b"\n")
            out.flush()

        write(answer(sys.stdin.buffer.read(), lambda text: write(ProfileLine(said=text))))


if __name__ == "__main__":
    main()
