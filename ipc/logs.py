"""Logging of trtpool's own processes: one line each on standard error, with who says it; and the ids in these lines.

One id, the work's, is in what client, broker and worker say of a submission, from its Submit to its result::

    client              trtpool.client   work 12.3 submitted: ...
    broker              trtpool.broker   work 12.3 queued    batch 7 sent to worker 1: work 12.3, 14.0
    worker              trtpool.worker   batch 7 received: work 12.3, 14.0   batch 7 ended: work 12.3, 14.0, ...
    broker              trtpool.broker   batch 7 ended      work 12.3 ended: done
    client              trtpool.client   work 12.3 ended: done

As JSON each line is an object, in which ids are fields of their own: see `JsonLines`.  What is said of each work and
batch is on the level "debug", and costs nothing but a comparison otherwise.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
import threading
from types import TracebackType
from typing import Final

import msgspec

LEVEL: Final = "TRTPOOL_LOG"
"""The environment variable that names the level; children inherit it."""

FORMAT: Final = "TRTPOOL_LOG_FORMAT"
"""The one that names the format."""

LEVELS: Final = ("debug", "info", "warning", "error", "critical")
FORMATS: Final = ("text", "json")

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def work_id(lease: int, seq: int) -> str:
    """What logs call one submission, such as "12.3"; a pool never uses one again."""
    return f"{lease}.{seq}"


def set_up_logging(who: str) -> None:
    """Log to standard error, at the level of `$TRTPOOL_LOG` ("warning") and in the format of `$TRTPOOL_LOG_FORMAT`.

    Args:
        who: what each line names as its source, beside the pid, such as "worker 1 on GPU 0".
    """
    level, wanted = (os.environ.get(name, "").lower() for name in (LEVEL, FORMAT))
    as_json = wanted == "json"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines(who)
        if as_json
        else logging.Formatter(f"%(asctime)s trtpool {who}[{os.getpid()}] %(levelname)s: %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=level.upper() if level in LEVELS else "WARNING")
    if as_json:
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda args: _log_uncaught(
            args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback
        )


class JsonLines(logging.Formatter):
    """A line of JSON for each record.

    ::

        {"time": "2026-01-31T12:00:00.123456Z", "level": "warning", "who": "worker 1", "pid": 42,
         "logger": "trtpool.worker", "message": "batch 7, attempt 0, failed: ...",
         "batch": 7, "attempt": 0, "works": ["12.3"]}

    What a call gives as `extra` comes after these; "exception" has a traceback.

    Args:
        who: see `set_up_logging`.
    """

    def __init__(self, who: str) -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        """See the class."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line = {
            "time": f"{when:%Y-%m-%dT%H:%M:%S.%f}Z",
            "level": record.levelname.lower(),
            "who": self._who,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _STANDARD},
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of the traceback that Python prints, so that all of standard error is JSON."""
    logging.getLogger("trtpool").critical("this process fails: %r", error, exc_info=(kind, error, trace))
