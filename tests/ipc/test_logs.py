"""What a line of a log looks like, and where levels and formats come from."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import msgspec
import pytest

from trtpool.ipc.logs import JsonLines, set_up_logging, work_id

SAYS = """
import logging, sys, threading, warnings
from trtpool.ipc.logs import set_up_logging
set_up_logging("worker 1")
log = logging.getLogger("trtpool.worker")
log.debug("a detail")
log.info("some news")
log.warning("batch %d failed", 7, extra={"batch": 7, "works": ["12.3"]})
"""


def said(code: str, **env: str) -> list[str]:
    """The lines that a process with these variables puts on standard error."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRTPOOL_LOG")}
    ended = subprocess.run(
        [sys.executable, "-c", SAYS + code], env={**environment, **env}, capture_output=True, text=True, check=False
    )
    return ended.stderr.splitlines()


@pytest.mark.parametrize(
    ("level", "count"), [(None, 1), ("", 1), ("nonsense", 1), ("info", 2), ("DEBUG", 3), ("error", 0)]
)
def test_the_level_comes_from_the_environment_and_is_quiet_by_default(level, count):
    lines = said("", **({} if level is None else {"TRTPOOL_LOG": level}))
    assert len(lines) == count
    assert all("trtpool worker 1[" in line for line in lines)
    assert all(line.endswith("WARNING: batch 7 failed") for line in lines[-1:])


def test_json_has_the_ids_as_fields():
    (line,) = said("", TRTPOOL_LOG_FORMAT="json")
    fields = msgspec.json.decode(line)
    assert fields.pop("time").endswith("Z")
    assert fields.pop("pid") > 0
    assert fields == {
        "level": "warning", "who": "worker 1", "logger": "trtpool.worker", "message": "batch 7 failed",
        "batch": 7, "works": ["12.3"],
    }  # fmt: skip
    assert [*msgspec.json.decode(line)][:2] == ["time", "level"]


@pytest.mark.parametrize(
    "code",
    [
        "raise ValueError('why')",
        "t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join()",
        "log.setLevel('ERROR'); log.exception('it failed', exc_info=ValueError('why'))",
        "warnings.warn('take care')",
    ],
)
def test_whatever_else_a_process_says_is_json_too(code):
    lines = [msgspec.json.decode(line) for line in said(code, TRTPOOL_LOG_FORMAT="json")]
    assert len(lines) == 2
    assert ("exception" in lines[1]) == ("take care" not in lines[1]["message"])


def test_a_field_that_is_no_json_is_shown_as_text():
    record = logging.makeLogRecord({"msg": "x", "levelname": "INFO", "path": object()})
    assert msgspec.json.decode(JsonLines("test").format(record))["path"].startswith("<object object")


def test_an_id_names_one_submission():
    assert work_id(12, 3) == "12.3"
    assert callable(set_up_logging)
