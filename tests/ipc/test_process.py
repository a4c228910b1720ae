from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from trtpool.ipc import process
from trtpool.ipc.process import describe_exit, has_ended, peer_credentials, peer_pidfd, tie_to_parent, wait_ended

NET_S = 60.0
"""Far more than anything here takes; a wait that reaches it has failed."""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A child that lives until its standard input ends."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as found:
        yield found
        found.kill()


@pytest.fixture
def child_pidfd(child: subprocess.Popen[bytes]) -> Iterator[int]:
    pidfd = os.pidfd_open(child.pid)
    yield pidfd
    os.close(pidfd)


def test_a_childs_end_is_seen_before_it_is_reaped(child, child_pidfd):
    assert not has_ended(child_pidfd)
    assert not wait_ended(child_pidfd, 0)
    assert not wait_ended(child_pidfd, -1)
    child.kill()
    assert wait_ended(child_pidfd)
    assert has_ended(child_pidfd)
    assert child.wait() == -signal.SIGKILL
    assert has_ended(child_pidfd), "and after"


def test_waiting_with_a_bound(child, child_pidfd):
    child.stdin.close()
    assert wait_ended(child_pidfd, NET_S)


@pytest.mark.parametrize(
    ("returncode", "text"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-9, "SIGKILL (killed from outside, or by the kernel for want of memory: see dmesg)"),
        (-11, "SIGSEGV (a crash in native code, such as the engine's)"),
        (-7, "SIGBUS (shared memory was lost under it)"),
        (-6, "SIGABRT (native code gave up: see the lines before)"),
        (-4, "SIGILL (a library built for another processor)"),
        (-15, "SIGTERM"),
        (-40, "signal 40"),
        (-999, "signal 999"),
    ],
)
def test_how_a_child_ended(returncode, text):
    assert describe_exit(returncode) == text


def test_a_real_childs_end_is_described(child):
    child.send_signal(signal.SIGSEGV)
    assert describe_exit(child.wait()).startswith("SIGSEGV (")


def test_the_peer_of_a_socket_pair_is_this_process():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert peer_credentials(ours) == (os.getpid(), os.getuid(), os.getgid())
        pidfd = peer_pidfd(ours)
        try:
            assert not has_ended(pidfd)
            assert pid_of(pidfd) == os.getpid()
            assert not os.get_inheritable(pidfd)
        finally:
            os.close(pidfd)


def pid_of(pidfd: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pid:"))


CONNECT = """
import socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(sys.argv[1])
input()
"""


@pytest.fixture
def connected(tmp_path) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A socket that a child connected to, and the child."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.settimeout(NET_S)
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with subprocess.Popen(
            [sys.executable, "-c", CONNECT, str(tmp_path / "s")], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as child:
            try:
                sock, _ = listener.accept()
                with sock:
                    yield sock, child
            finally:
                child.kill()


def test_the_peers_pidfd_is_of_the_process_that_connected(connected):
    sock, child = connected
    assert peer_credentials(sock).pid == child.pid
    pidfd = peer_pidfd(sock)
    try:
        assert not has_ended(pidfd)
        assert pid_of(pidfd) == child.pid
        child.kill()
        assert wait_ended(pidfd, NET_S)
    finally:
        os.close(pidfd)


def test_a_peer_that_ended_is_never_mistaken_for_another(connected, monkeypatch):
    """Newer kernels still give a pidfd, which has ended; older ones give none.  Its free pid is not looked at."""
    sock, child = connected
    child.kill()
    child.wait()
    monkeypatch.setattr(os, "pidfd_open", lambda pid: pytest.fail("its pid may be another's by now"))
    try:
        pidfd = peer_pidfd(sock)
    except ProcessLookupError:
        return
    try:
        assert has_ended(pidfd)
    finally:
        os.close(pidfd)


class OldKernel:
    """A socket whose kernel says `code` to `SO_PEERPIDFD`."""

    def __init__(self, sock: socket.socket, code: int) -> None:
        self.sock = sock
        self.code = code

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        if option == process.SO_PEERPIDFD:
            raise OSError(self.code, os.strerror(self.code))
        return self.sock.getsockopt(level, option, size)


def test_a_kernel_without_peer_pidfds(connected):
    sock, child = connected
    pidfd = peer_pidfd(OldKernel(sock, errno.ENOPROTOOPT))  # type: ignore[arg-type]
    try:
        assert pid_of(pidfd) == child.pid
    finally:
        os.close(pidfd)


@pytest.mark.parametrize("code", [errno.ESRCH, errno.EINVAL, errno.ENODATA])
def test_a_kernel_that_says_the_peer_has_ended(connected, code):
    sock, _ = connected
    with pytest.raises(ProcessLookupError):
        peer_pidfd(OldKernel(sock, code))  # type: ignore[arg-type]


# --- Tied to the parent ---

TIED = """
import os, sys
from trtpool.ipc.process import tie_to_parent
tie_to_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
sys.stdin.read()
"""

PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
sys.stdin.read()
"""


def test_a_tied_child_ends_when_its_parent_is_killed():
    """It inherits the pipes, which stay open: only the parent's end can end it."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, TIED], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        pidfd = os.pidfd_open(pid)
        try:
            assert not has_ended(pidfd)
            parent.kill()
            ended = wait_ended(pidfd, NET_S)
            if not ended:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            assert ended
        finally:
            os.close(pidfd)


def run_tied(parent_pid: int) -> int:
    """The exit code of a child that is tied to `parent_pid`."""
    return subprocess.run(
        [sys.executable, "-c", TIED, str(parent_pid)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False
    ).returncode


def test_a_tied_child_lives_while_its_parent_does():
    assert run_tied(os.getpid()) == 0


def test_a_parent_that_ended_before_or_whose_pid_is_anothers_ends_the_child():
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    assert run_tied(gone.pid) == 1
    assert run_tied(1) == 1, "alive, and not its parent"


def test_what_to_do_instead_of_ending():
    called = threading.Event()
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    tie_to_parent(gone.pid, called.set)
    assert called.is_set()


WATCHING = """
import os, select, threading
from trtpool.ipc.process import tie_to_parent
read, write = os.pipe()
tie_to_parent(os.getppid(), lambda: os.close(write))
(thread,) = set(threading.enumerate()) - {threading.main_thread()}
print(thread.daemon, thread.name, select.select([read], [], [], 0))
"""


def test_the_watch_is_a_daemon_thread_that_sleeps():
    """In a process of its own: the thread stays for as long as its process does, as it should."""
    done = subprocess.run([sys.executable, "-c", WATCHING], check=True, capture_output=True, text=True, timeout=NET_S)
    assert done.stdout == "True trtpool-parent ([], [], [])\n"
