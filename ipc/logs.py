"""Logging of trtpool's own processes: one line each on standard error, with who says it."""

from __future__ import annotations

import logging
import os
import sys


def set_up_logging(who: str) -> None:
    """Log to standard error at the level that `$TRTPOOL_LOG` names, by default "warning".

    Args:
        who: what each line names as its source, beside the pid, such as "worker 1 on GPU 0".
    """
    level = os.environ.get("TRTPOOL_LOG", "warning").upper()
    logging.basicConfig(
        stream=sys.stderr,
        level=level if level in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL") else "WARNING",
        format=f"%(asctime)s trtpool {who}[{os.getpid()}] %(levelname)s: %(message)s",
    )
