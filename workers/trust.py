"""Whose word a model file is: who else than its owner could have written it.

A model file is a program of a kind: its loader is native code that was not made for hostile input, and a plan may
carry code to run on the host.  So a file that others than its owner, root and we may write is refused.  The owner may
be anybody: naming a file means trusting who wrote it, and in containers that is often root or the user of a build.
Where the file may run code (``--allow-host-code``), more is asked: it must be our own or root's, and so must every
directory on the way to it, since who may write to one of these could exchange the file.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from trtpool.ipc.errors import ModelError, RunDirError
from trtpool.ipc.rundir import check_way


def check_file(path: Path, info: os.stat_result, *, runs_code: bool = False) -> None:
    """Refuse a model file that somebody else could have written.

    Args:
        path: the file, absolute.
        info: of the file itself, not of a link to it.
        runs_code: whether it may run code in this process.

    Raises:
        ModelError: it could have been; the text says what to do.
    """
    others = 0o002 if info.st_gid == os.getgid() else 0o022  # many systems give each user a group
    if info.st_mode & others:
        raise ModelError(
            f"{path} has mode {stat.S_IMODE(info.st_mode):04o}, so others could have changed it, and a model is "
            f"loaded like a program; if it is what it should be, run: chmod go-w {path}, or serve a copy of your own"
        )
    if not runs_code:
        return
    if info.st_uid not in (0, os.getuid()):
        raise ModelError(
            f"{path} belongs to uid {info.st_uid}, and with --allow-host-code a plan must be yours or root's; "
            "serve a copy of your own, or leave that option out"
        )
    try:
        check_way(Path(os.path.realpath(path)), "plan")
    except RunDirError as error:
        raise ModelError(str(error)) from error
