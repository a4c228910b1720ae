"""The supervisor of an embedded pool: `python -m trtpool.broker.supervise`, started by `trtpool.Pool`."""

from __future__ import annotations

import logging
import os
import signal
import sys

import msgspec

from trtpool.ipc.errors import TrtpoolError
from trtpool.ipc.logs import set_up_logging
from trtpool.ipc.process import tie_to_parent
from trtpool.ipc.settings import Refusal

from . import supervisor
from .control import SuperviseConfig

log = logging.getLogger("trtpool.supervisor")


def main() -> int:
    """Run the pool until it is stopped, or the embedding process ends."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=SuperviseConfig)
    set_up_logging("supervisor")
    tie_to_parent(config.parent_pid, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with os.fdopen(config.answer_fd, "wb", buffering=0) as answer:

        def announce(_: supervisor.Started) -> None:
            answer.write(b"\n")
            answer.close()

        try:
            return supervisor.run(config.settings, announce, say=log.warning, owner_pid=config.parent_pid)
        except TrtpoolError as error:
            if not answer.closed:
                refusal = Refusal(type(error).__name__, str(error))
                answer.write(msgspec.json.encode(refusal) + b"\n")
            else:
                log.error("%s", error)  # noqa: TRY400  # its text says it all
            return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
