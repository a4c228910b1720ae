"""Children and parents: watching processes by pidfd, which a reused pid cannot confuse; answering a parent.

See pidfd_open(2) and, for `SO_PEERPIDFD` (Linux 6.5), unix(7).
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final, NamedTuple

SO_PEERPIDFD: Final = 77  # not in the socket module yet


class Credentials(NamedTuple):
    """Who is at the other end of a Unix socket, as the kernel saw it when they connected."""

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: socket.socket) -> Credentials:
    """`SO_PEERCRED` of a connected Unix socket."""
    return Credentials(*struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))


def peer_pidfd(sock: socket.socket) -> int:
    """A pidfd of the process that connected `sock`.

    Raises:
        ProcessLookupError: it has ended already.
        OSError: this process, or the machine, has no descriptors left.
    """
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4)
        return int(struct.unpack("i", raw)[0])
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        if error.errno != errno.ENOPROTOOPT:
            raise ProcessLookupError("the process at the other end has ended") from error
        # An older kernel, where the pid could have been reused since.
        return os.pidfd_open(peer_credentials(sock).pid)


def has_ended(pidfd: int) -> bool:
    """Whether the process has ended (it may still be a zombie)."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def wait_ended(pidfd: int, timeout_s: float | None = None) -> bool:
    """Wait for the process to end; False when `timeout_s` seconds passed first."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(None if timeout_s is None else max(0, int(timeout_s * 1000))))


def describe_exit(returncode: int) -> str:
    """How a child ended, from `subprocess.Popen.returncode`, with the likely cause."""
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    likely = {
        "SIGKILL": "killed from outside, or by the kernel for want of memory: see dmesg",
        "SIGSEGV": "a crash in native code, such as the engine's",
        "SIGBUS": "shared memory was lost under it",
        "SIGABRT": "native code gave up: see the lines before",
        "SIGILL": "a library built for another processor",
    }.get(name)
    return f"{name} ({likely})" if likely else name


def tie_to_parent(parent_pid: int, on_end: Callable[[], None] | None = None) -> None:
    """End this process when its parent ends, from a daemon thread that sleeps on the parent's pidfd.

    `PR_SET_PDEATHSIG` would fire when the *thread* that spawned us ends, which is something else.

    Args:
        parent_pid: who started us, as it told us: if it has ended already, another pid is our parent now.
        on_end: called in the thread; the default ends the process at once, without clean-up.
    """
    end = on_end or (lambda: os._exit(1))
    try:
        pidfd = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        end()
        return
    if os.getppid() != parent_pid:  # a pid reused between fork and now
        os.close(pidfd)
        end()
        return

    def watch() -> None:
        wait_ended(pidfd)
        end()

    threading.Thread(target=watch, name="trtpool-parent", daemon=True).start()


@contextlib.contextmanager
def only_answer() -> Iterator[BinaryIO]:
    """Standard output, for our answer alone: what libraries print, native ones too, goes to standard error from now."""
    answer_fd = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with os.fdopen(answer_fd, "wb") as out:
        yield out
