"""Real memory limits: a cgroup below the one that these tests run in, whose limits so hold on."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.system.rig import wait_until
from trtpool.ipc.memory import PROC, _cgroups


class Group(NamedTuple):
    """A cgroup with a limit on memory.

    Attributes:
        folder: where it is.
        limit: its file with the limit.
        used: its file with what is used of it.
    """

    folder: Path
    limit: Path
    used: Path

    @property
    def through(self) -> tuple[str, ...]:
        """A command that runs what follows inside."""
        return ("sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', str(self.folder))

    @property
    def killed(self) -> int:
        """Processes that the kernel killed since the limit was reached."""
        return read_killed(self.folder)


def read_killed(folder: Path) -> int:
    for name in ("memory.events", "memory.oom_control"):  # version 2, 1
        if (folder / name).exists():
            fields = dict(line.split() for line in (folder / name).read_text().splitlines())
            return int(fields["oom_kill"])
    raise AssertionError(f"{folder} counts no kills")


@contextlib.contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Group]:
    """A cgroup with a limit; skips where none can be made."""
    for own, files in _cgroups(PROC):
        folder = own / f"trtpool-test-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir()
        except OSError:
            continue
        group = Group(folder, folder / files.limit, folder / files.used)
        try:
            try:
                group.limit.write_text(str(limit_bytes))
            except OSError:  # version 2 limits nothing where the cgroup above has not given it the right to
                continue
            yield group
            return
        finally:
            wait_until(lambda: not (folder / "cgroup.procs").read_text(), "the cgroup is empty")  # noqa: B023
            folder.rmdir()
    pytest.skip("making a cgroup with a memory limit needs a privileged user")
