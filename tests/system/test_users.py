"""Who may attach: real processes of other users, and what of a pool can be reached from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import trtpool
from tests.models import save
from tests.system.rig import NEGATE, Process, StartedPool, family, submit
from tests.system.rig import answer as answer_of
from trtpool.ipc import errors, lifeline
from trtpool.ipc.rundir import LIFELINE, LOCK, REQUESTS, ZMQ_PREFIX

ALICE, BOB = 54321, 54322

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be other users too")

# All is imported before, since what Python is made of may lie where only root can read.
BECOME = """
    import os, socket, sys
    import numpy as np
    import trtpool
    from trtpool.ipc import errors, lifeline

    np.full((1, 4), 5, np.float32).max()
    os.setgroups([])
    os.setgid(int(sys.argv[1]))
    os.setuid(int(sys.argv[1]))
"""

CLIENT = """
    try:
        with trtpool.connect(run_dir=sys.argv[2], transport=sys.argv[3]) as pool:
            print(pool.infer(x=np.full((1, 4), 5, np.float32))["y"].max())
    except errors.TrtpoolError as error:
        print(type(error).__name__, error)
"""

# What it is sent when it connects to each socket in the run directory, and whether it can look around there.
STRANGER = """
    for name, kind in (("zmq-1", socket.SOCK_STREAM), ("lifeline", socket.SOCK_SEQPACKET)):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            try:
                sock.connect(sys.argv[2] + "/" + name)
                print(name, sock.recv(65536))
            except OSError as error:
                print(name, type(error).__name__)
    for call in (os.listdir, lambda path: open(path + "/lock"), lambda path: open(path + "/new", "w")):
        try:
            call(sys.argv[2])
        except OSError as error:
            print(type(error).__name__)
"""


def become(uid: int, code: str, *arguments: str | os.PathLike[str]) -> Process:
    """A process of user `uid` that runs `code`."""
    text = textwrap.dedent(BECOME) + textwrap.dedent(code)
    return Process(sys.executable, "-c", text, str(uid), *arguments)


def said_by(uid: int, code: str, *arguments: str | os.PathLike[str]) -> str:
    with become(uid, code, *arguments) as process:
        return process.succeed().strip()


@pytest.fixture
def open_pool(place: Path) -> Iterator[StartedPool]:
    """A pool to which Alice may attach."""
    with StartedPool(save(NEGATE, place, "negate"), run_dir=place / "run", allow_user=ALICE, slots=8) as pool:
        yield pool


def modes(run_dir: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_mode & 0o777 for entry in [run_dir, *run_dir.iterdir()]}


def test_without_other_users_all_is_private(pool):
    private = dict.fromkeys((LOCK, LIFELINE, REQUESTS, f"{ZMQ_PREFIX}1"), 0o600)
    assert modes(pool.run_dir) == {"run": 0o700, **private}


def test_with_other_users_the_sockets_of_clients_are_open_and_nothing_else(open_pool):
    private, shared = dict.fromkeys((LOCK, REQUESTS), 0o600), dict.fromkeys((LIFELINE, f"{ZMQ_PREFIX}1"), 0o666)
    assert modes(open_pool.run_dir) == {"run": 0o711, **private, **shared}


@as_root
@pytest.mark.parametrize("transport", ["lifeline", "zmq"])
def test_a_user_who_is_allowed_works_beside_the_pools_own(transport, open_pool):
    assert said_by(ALICE, CLIENT, open_pool.run_dir, transport) == "-5.0"
    with open_pool.connect(transport) as own:
        assert answer_of(submit(own, 2)) == -2


@as_root
@pytest.mark.parametrize("transport", ["lifeline", "zmq"])
def test_a_user_who_is_not_allowed_is_told_what_to_do_and_logged_once(transport, open_pool):
    for _ in range(3):
        said = said_by(BOB, CLIENT, open_pool.run_dir, transport)
        assert said == (
            f"AccessDenied user {BOB} may not attach to pool 'default': run as user 0, or start the pool with "
            f"--allow-user {BOB}"
        )
    open_pool.kill(signal.SIGTERM)
    assert open_pool.rest(2).count(f"user {BOB} was refused") == 1
    assert open_pool.wait() == 0


@as_root
def test_a_user_who_is_not_allowed_gets_no_byte_over_zeromq_and_changes_nothing(open_pool):
    zmq, lifeline, *rest = said_by(BOB, STRANGER, open_pool.run_dir).splitlines()
    assert zmq in ("zmq-1 b''", "zmq-1 ConnectionResetError")
    assert "denial" in lifeline
    assert "token" not in lifeline
    assert rest == ["PermissionError"] * 3
    # An allowed user's connection is greeted by ZeroMQ, so that the above shows something.
    assert said_by(ALICE, STRANGER, open_pool.run_dir).startswith(r"zmq-1 b'\xff")


@as_root
def test_into_a_private_pool_nobody_else_gets(place):
    with StartedPool(save(NEGATE, place, "negate"), run_dir=place / "run") as pool:
        assert said_by(ALICE, STRANGER, pool.run_dir).split()[1::2][:2] == ["PermissionError"] * 2
        said = said_by(ALICE, CLIENT, pool.run_dir, "lifeline")
        assert said.startswith(f"AccessDenied user {ALICE} may not attach to the pool in {pool.run_dir}: run as")
        pool.stop()


@as_root
def test_a_client_sends_nothing_to_what_somebody_else_put_where_its_own_pools_are(place, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    run_dir = place / "trtpool" / "default"
    run_dir.mkdir(parents=True)
    os.chown(run_dir, ALICE, ALICE)
    listen = """
        from pathlib import Path
        sock = lifeline.listen(Path(sys.argv[2]), shared=True)
        sock.setblocking(True)
        print("listens", flush=True)
        for _ in range(2):
            print(sock.accept()[0].recv(100), flush=True)
    """
    with become(ALICE, listen, run_dir) as server:
        server.wait_for_line("listens")
        with pytest.raises(errors.AccessDenied, match=f"belongs to user {ALICE} and not to you, so nothing was sent"):
            trtpool.connect()
        assert server.line() == "b''"
        # Elsewhere a pool may be anybody's.
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(place / "trtpool"))
        lifeline.connect(run_dir).close()
        assert server.line() == "b''"


def test_a_directory_that_others_cannot_get_to_is_refused_at_the_start(tmp_path, negate):
    tmp_path.chmod(0o700)
    words = ["start", negate, "--run-dir", tmp_path / "run", f"--allow-user={ALICE}"]
    with Process(sys.executable, "-m", "trtpool.broker.cli", *words) as process:
        assert f"{tmp_path} has mode 0700; choose another with --run-dir" in process.rest(2)
        assert process.wait() == errors.RunDirError.exit_code
    assert not (tmp_path / "run").exists()


@as_root
def test_an_embedded_pool_takes_users_too(place):
    model = save(NEGATE, place, "negate")
    with trtpool.Pool(model, run_dir=place / "run", allow_users=[ALICE], slots=8):
        assert said_by(ALICE, CLIENT, place / "run", "lifeline") == "-5.0"


# --- What can be reached from outside ---


def sockets_of(pids: list[int]) -> set[str]:
    """Inodes of all sockets that these processes hold."""
    targets = []
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # of this process, the directory's own
                targets.append(str(link.readlink()))
    return {target[8:-1] for target in targets if target.startswith("socket:[")}


def inodes_in(table: str, column: int) -> set[str]:
    """All inodes in a table of the kernel's, which is empty where the kernel has no such protocol."""
    path = Path("/proc/net") / table
    return {line.split()[column] for line in path.read_text().splitlines()[1:]} if path.exists() else set()


INTERNET = ("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6")


def in_internet() -> set[str]:
    return set().union(*(inodes_in(table, 9) for table in INTERNET))


@pytest.mark.parametrize("transport", ["lifeline", "zmq"])
def test_no_process_has_a_socket_of_the_internet(transport, pool):
    with socket.socket(socket.AF_INET) as known:
        known.bind(("127.0.0.1", 0))
        known.listen()
        assert sockets_of([os.getpid()]) & in_internet(), "or the test would show nothing"
    own = sockets_of([os.getpid()]) & in_internet()
    with pool.connect(transport) as client:
        assert answer_of(submit(client, 3)) == -3
        processes = [pool.pid, *(process.pid for process in family(pool.pid))]
        assert len(processes) == 3
        held = sockets_of(processes)
        assert len(held) > 4
        assert not held & in_internet()
        assert sockets_of([os.getpid()]) & in_internet() == own


def test_what_listens_has_a_path_in_the_run_directory(pool):
    """Abstract sockets have no mode that could keep others out."""
    held = sockets_of([pool.pid, *(process.pid for process in family(pool.pid))])
    listening = []
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, inode, *path = line.split()
        if inode in held and int(flags, 16) & 0x10000:  # __SO_ACCEPTCON
            listening += path or ["no name"]
    assert sorted(listening) == [str(pool.run_dir / name) for name in (LIFELINE, REQUESTS, f"{ZMQ_PREFIX}1")]
