"""A worker's process: `python -m trtpool.workers`, started by the supervisor."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys

import msgspec

from trtpool.ipc import messages as m
from trtpool.ipc.errors import TrtpoolError
from trtpool.ipc.logs import set_up_logging
from trtpool.ipc.process import tie_to_parent
from trtpool.ipc.settings import WorkerConfig

from .joining import MAX_TEXT, Joined, join
from .lane_loop import LaneLoop
from .loading import load
from .loop import WorkerLoop

log = logging.getLogger("trtpool.worker")


def make_loop(joined: Joined, config: WorkerConfig) -> WorkerLoop | LaneLoop:
    """Load the models on the device that the configuration names, and say that we are ready."""
    if config.gpu is None:
        return WorkerLoop(joined, config, load)
    from .gpu import GpuWorker  # with what only GPUs need
    from .nvtx_ranges import loop_type

    gpu = GpuWorker(joined, config)
    return loop_type(LaneLoop)(joined, config, gpu.engines, gpu.device)


def main() -> int:
    """Serve until the broker ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerConfig)
    set_up_logging(config.name)
    tie_to_parent(config.parent_pid)
    joined = join(config)
    try:
        loop = make_loop(joined, config)
    except TrtpoolError as error:
        log.error("%s", error)  # noqa: TRY400  # its text says it all
        with contextlib.suppress(OSError):
            joined.pipe.send([m.Bye(str(error)[:MAX_TEXT])])
        return error.exit_code
    loop.run()
    loop.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
