"""Running the child that measures; it may crash, and is then reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trtpool.broker.child_lines import last_line
from trtpool.broker.planning import error_of
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
    last = last_line(
        "trtpool.workers.profile",
        request,
        ProfileLine,
        env,
        lambda line: line.said is None,
        lambda line: say(line.said or ""),
        f"{request.source.path}: profiling it",
    )
    if last.refusal is not None:
        raise error_of(last.refusal)
    assert last.measured is not None
    return last.measured
