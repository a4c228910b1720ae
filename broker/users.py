"""Users as people name them."""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from trtpool.ipc.errors import ConfigError

LAST_UID: Final = 2**32 - 2
"""The number after it stands for "no user", chown(2)."""


def user_ids(users: Sequence[int | str]) -> tuple[int, ...]:
    """The numbers of users that are given by name or number, each once and in order; without the pool's own.

    Raises:
        ConfigError: there is no such user, or it stands for users of whom nothing is known.
    """
    if isinstance(users, str):
        raise ConfigError(f"allow_users={users!r} is one text; write a list, such as [{users!r}]")
    return tuple(uid for uid in dict.fromkeys(map(_user_id, users)) if uid != os.getuid())


def _user_id(user: int | str) -> int:
    if isinstance(user, int) or user.isdecimal():
        uid = int(user)
        if not 0 <= uid <= LAST_UID:
            raise ConfigError(f"--allow-user {user}: users have numbers from 0 to {LAST_UID}")
    else:
        try:
            uid = pwd.getpwnam(user).pw_uid
        except KeyError:
            raise ConfigError(f"--allow-user {user}: there is no such user here; say the number of `id -u`") from None
    if uid == _unknown_uid():
        raise ConfigError(
            f"--allow-user {user}: {uid} is also what the kernel calls all users that it cannot name, such as those "
            "of other containers; name a user of its own"
        )
    return uid


def _unknown_uid() -> int:
    """What users look like who have no number in our user namespace, user_namespaces(7)."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return 65534
