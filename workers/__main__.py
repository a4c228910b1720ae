"""A worker's process: `python -m trtpool.workers`, started by the supervisor."""

from __future__ import annotations

import logging
import signal
import sys

import msgspec

from trtpool.ipc.errors import TrtpoolError
from trtpool.ipc.logs import set_up_logging
from trtpool.ipc.process import tie_to_parent
from trtpool.ipc.settings import InspectRequest, WorkerConfig

from .engine import Engine
from .loop import WorkerLoop

log = logging.getLogger("trtpool.worker")


def load(request: InspectRequest, cpus: int) -> Engine:
    """Load a model on the device that its settings name."""
    from .onnx_engine import OnnxEngine

    return OnnxEngine(request.source, request.engine, cpus)


def main() -> int:
    """Serve until the broker ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerConfig)
    set_up_logging("worker")
    tie_to_parent(config.parent_pid)
    try:
        loop = WorkerLoop(config, load, device="cpu")
    except TrtpoolError as error:
        log.error("%s", error)  # noqa: TRY400  # its text says it all
        return error.exit_code
    loop.run()
    loop.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
