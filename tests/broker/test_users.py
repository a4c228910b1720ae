from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from trtpool.broker.pool import make_settings
from trtpool.broker.users import LAST_UID, user_ids
from trtpool.ipc.errors import ConfigError


def test_names_and_numbers_are_users_each_once_and_in_order_without_us():
    daemon = pwd.getpwnam("daemon").pw_uid
    assert user_ids(["4321", "daemon", 4321, str(os.getuid()), daemon, 0]) == tuple(
        uid for uid in (4321, daemon, 0) if uid != os.getuid()
    )
    assert user_ids([]) == ()
    assert user_ids([LAST_UID]) == (LAST_UID,)


@pytest.mark.parametrize(
    ("user", "reason"),
    [
        ("no-such-user", "there is no such user here; say the number"),
        ("", "there is no such user"),
        (str(LAST_UID + 1), "have numbers from 0 to"),
        (-1, "have numbers from 0 to"),
        ("-1", "there is no such user"),
        (int(Path("/proc/sys/kernel/overflowuid").read_text()), "all users that it cannot name"),
    ],
)
def test_what_is_no_user(user, reason):
    with pytest.raises(ConfigError, match=f"--allow-user {user}: .*{reason}"):
        user_ids([user])


def test_one_text_is_no_list():
    with pytest.raises(ConfigError, match=r"write a list, such as \['bob'\]"):
        user_ids("bob")


@pytest.mark.parametrize("uid", [-1, LAST_UID + 1])
def test_settings_take_no_other_numbers(uid, tmp_path):
    with pytest.raises(ConfigError, match="allow_users"):
        make_settings([tmp_path / "x.onnx"], tmp_path, allow_users=(uid,))
