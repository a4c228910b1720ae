"""Running the child that measures; it may crash, and is then reported."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Mapping

import msgspec

from trtpool.broker.planning import error_of
from trtpool.ipc.errors import ModelError
from trtpool.ipc.process import describe_exit
from trtpool.ipc.profiling import Measured, ProfileLine, ProfileRequest


def ask(request: ProfileRequest, env: Mapping[str, str], say: Callable[[str], None]) -> Measured:
    """Have a child measure `request`.

    Args:
        request: what to measure.
        env: the environment of the child, which shows it its GPU.
        say: called with what is being done.

    Raises:
        ModelError: the model cannot be served, or the child crashed on it.
        ConfigError: a batch size that the model does not take.
        ArenaTooLarge: the batches need more memory than there is.
        DeviceUnavailable, MissingExtra: see `trtpool.workers.loading.load`.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "trtpool.workers.profile"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
        cwd="/",  # Python 3.10 looks for modules there first, whatever PYTHONSAFEPATH says
        start_new_session=True,  # Ctrl-C is for us, and ends it
    )
    last: ProfileLine | None = None
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(msgspec.json.encode(request))
        for raw in child.stdout:
            line = msgspec.json.decode(raw, type=ProfileLine)
            if line.said is not None:
                say(line.said)
            else:
                last = line
        child.wait()
    finally:
        with child:  # closes its pipes and waits for its end
            child.kill()
    if last is None or child.returncode:
        raise ModelError(f"{request.source.path}: profiling it ended with {describe_exit(child.returncode)}")
    if last.refusal is not None:
        raise error_of(last.refusal)
    assert last.measured is not None
    return last.measured
