"""The broker's process: `python -m trtpool.broker`, started by the supervisor."""

from __future__ import annotations

import gc
import logging
import signal
import sys

from trtpool.ipc.errors import TrtpoolError
from trtpool.ipc.logs import set_up_logging
from trtpool.ipc.process import tie_to_parent

from .loop import Loop, configure

log = logging.getLogger("trtpool.broker")


def main() -> None:
    """Serve until drained, or until the supervisor ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the supervisor drains us
    config = configure(sys.stdin.buffer.read())
    set_up_logging("broker")
    tie_to_parent(config.parent_pid)
    try:
        loop = Loop(config)
    except TrtpoolError as error:
        log.error("%s", error)  # noqa: TRY400  # its text says it all
        sys.exit(error.exit_code)
    # What exists now lives as long as we do, and what is made later makes no cycles: look for them rarely.
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    loop.run()


if __name__ == "__main__":
    main()
