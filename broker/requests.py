"""What commands ask of a supervisor, over a socket in the run directory that its user alone can connect to.

A packet is one message as JSON, some with a descriptor.  What can be asked is in `reload.requests` and
`tracing.requests`; `desk` is the other end.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

import msgspec

from trtpool.ipc import rundir
from trtpool.ipc.errors import PoolNotFound, RunDirError
from trtpool.ipc.settings import Refusal

PACKET_BYTES: Final = 160 * 1024
"""Most bytes of one message."""


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused"):
    """Nothing has changed, and why."""

    refusal: Refusal


encode = msgspec.json.Encoder().encode


def connect(run_dir: Path) -> socket.socket:
    """Connect to where the supervisor of the pool in `run_dir` takes requests.

    Raises:
        PoolNotFound: no pool runs there.
        RunDirError: it is another user's.
    """
    if not run_dir.exists():
        raise PoolNotFound(f"no pool runs in {run_dir}; start one with `trtpool start`")
    rundir.check_private(run_dir, entered=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.connect(os.fspath(run_dir / rundir.REQUESTS))
    except PermissionError as error:
        sock.close()
        raise RunDirError(f"the pool in {run_dir} takes requests from the user who started it alone") from error
    except OSError as error:
        sock.close()
        raise PoolNotFound(
            f"no pool answers in {run_dir} ({error.strerror or error}); start one with `trtpool start`"
        ) from error
    return sock
