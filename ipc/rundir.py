"""The run directory: where a pool's sockets and its lock are, and whose it may be.

::

    RUN_DIR/          0700, ours                0711 where other users are allowed
        lock          0600                      0600    flock held by the supervisor while it lives; see `holder`
        lifeline      0600                      0666    AF_UNIX SOCK_SEQPACKET
        requests      0600                      0600    the same, for commands such as `trtpool reload`
        zmq-EPOCH     0600                      0666    the broker's ROUTER, ipc://

A directory whose lock is free is left over from a pool that was killed: `claim` empties it.

Where other users are allowed, the modes let everybody connect, and the broker turns away who is not allowed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
from pathlib import Path
from typing import Final

from . import holder
from .errors import NameInUse, PoolNotFound, RunDirError
from .process import wait_ended

LIFELINE: Final = "lifeline"
REQUESTS: Final = "requests"
LOCK: Final = "lock"
ZMQ_PREFIX: Final = "zmq-"
SUN_PATH_BYTES: Final = 107
"""Longest path of a Unix socket (unix(7): 108 with the final NUL)."""

MAX_LINKS: Final = 40
"""Most links followed on the way to a run directory; the kernel's own limit, path_resolution(7)."""


def run_dir_mode(*, shared: bool) -> int:
    """The mode of a run directory; `shared`: users other than the pool's own are allowed."""
    return 0o711 if shared else 0o700


def socket_mode(*, shared: bool) -> int:
    """The mode of a socket in a run directory."""
    return 0o666 if shared else 0o600


def default_root() -> Path:
    """`$XDG_RUNTIME_DIR/trtpool`, else ``/tmp/trtpool-UID``."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    with contextlib.suppress(PermissionError):  # it may be left over from another user, by su or sudo
        if runtime and Path(runtime).is_dir():
            return Path(runtime) / "trtpool"
    return Path("/tmp") / f"trtpool-{os.getuid()}"  # noqa: S108  # checked for owner, mode and links before use


def run_dir_of(name: str = "default", run_dir: str | os.PathLike[str] | None = None) -> Path:
    """The run directory of pool `name`: `run_dir`, else `$TRTPOOL_RUN_DIR`, else `default_root`/NAME."""
    chosen = run_dir or os.environ.get("TRTPOOL_RUN_DIR")
    return Path(os.path.abspath(chosen)) if chosen else default_root() / name


def check_path_length(run_dir: Path) -> None:
    """Refuse a path in which the sockets' names would be too long for the kernel.

    Raises:
        RunDirError: it is.
    """
    longest = run_dir / f"{ZMQ_PREFIX}{2**16}"
    over = len(os.fsencode(longest)) - SUN_PATH_BYTES
    if over > 0:
        raise RunDirError(
            f"the run directory's path is {over} bytes too long for a Unix socket: {run_dir}; "
            "choose a shorter one with --run-dir, such as /tmp/pool"
        )


def check_private(path: Path, *, what: str = "run directory", entered: bool = False) -> None:
    """Refuse a directory that is a link, someone else's, or open to others.

    Args:
        path: the directory.
        what: what to call it.
        entered: whether others may pass through it, as they may through one of a pool with several users.

    Raises:
        RunDirError: it is one of these, or no directory.
    """
    try:
        info = path.lstat()
    except OSError as error:
        raise RunDirError(f"the {what} {path} cannot be used: {error.strerror}") from error
    if stat.S_ISLNK(info.st_mode):
        raise RunDirError(f"the {what} {path} is a symbolic link, which is refused; name the directory itself")
    if not stat.S_ISDIR(info.st_mode):
        raise RunDirError(f"the {what} {path} is not a directory; remove it or choose another with --run-dir")
    if info.st_uid != os.getuid():
        raise RunDirError(f"the {what} {path} belongs to uid {info.st_uid}, not to you; choose another with --run-dir")
    if info.st_mode & (0o066 if entered else 0o077):
        raise RunDirError(
            f"the {what} {path} has mode {stat.S_IMODE(info.st_mode):04o}, so others could get in; "
            f"run: chmod 700 {path}"
        )


def check_way(path: Path, what: str = "run directory") -> None:
    """Refuse a path of which somebody else could exchange a part, and so put another thing in its place.

    Each directory on the way, and each link, must belong to us, to root, or to the owner of ``/``, who is root seen
    from within a user namespace.  A directory that others may write to must be sticky, as /tmp is: what is ours in
    it is then ours alone.  Our own group counts as ourselves, since many systems give each user one.

    Args:
        path: absolute; its last part need not be there yet.
        what: what to call it.

    Raises:
        RunDirError: somebody else could; the text says where.
    """
    trusted = {0, os.getuid(), Path("/").stat().st_uid}

    def refuse(part: Path, why: str) -> RunDirError:
        return RunDirError(
            f"the {what} {path} could be exchanged by others, since {part} {why}; choose another place: below "
            "directories that only you or root may write to, or that are sticky, as /tmp and /dev/shm mostly are"
        )

    def check(part: Path, info: os.stat_result) -> None:
        if info.st_uid not in trusted:
            raise refuse(part, f"belongs to uid {info.st_uid}")
        others = 0o002 if info.st_gid == os.getgid() else 0o022
        if stat.S_ISDIR(info.st_mode) and info.st_mode & others and not info.st_mode & stat.S_ISVTX:
            raise refuse(part, f"has mode {stat.S_IMODE(info.st_mode):04o}")

    here, todo, links = Path("/"), [*reversed(path.parts[1:-1])], 0
    try:
        check(here, here.stat())
        while todo:
            name = todo.pop()
            entry = here.parent if name == ".." else here / name
            info = entry.lstat()
            check(entry, info)
            if stat.S_ISLNK(info.st_mode):
                links += 1
                if links > MAX_LINKS:
                    raise refuse(entry, "leads through too many links")
                target = entry.readlink()
                here = Path("/") if target.is_absolute() else here
                todo += [part for part in reversed(target.parts) if part != "/"]
            else:
                here = entry
    except OSError:  # whoever makes or opens it says what is wrong
        return


def check_reachable(path: Path) -> None:
    """Refuse a run directory for several users to which nobody but us can get.

    Raises:
        RunDirError: one of the directories above it lets nobody else pass.
    """
    for part in path.parents:
        if part.exists() and not part.stat().st_mode & 0o011:
            raise RunDirError(
                f"the users that --allow-user names cannot get to the run directory {path}, since {part} has mode "
                f"{stat.S_IMODE(part.stat().st_mode):04o}; choose another with --run-dir, such as /tmp/pool"
            )


class RunDir:
    """A claimed run directory: ours alone until `release`, or until this process ends."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def claim(cls, path: Path, *, shared: bool = False) -> RunDir:
        """Make the directory if need be, lock it, and remove what a killed pool left in it.

        Args:
            path: where, absolute.
            shared: users other than the pool's own are allowed.

        Raises:
            RunDirError: it cannot be used.
            NameInUse: a pool runs there.
        """
        check_path_length(path)
        check_way(path if path.parent != default_root() else path.parent)
        if shared:
            check_reachable(path)
        parent = path.parent
        try:
            if parent == default_root():
                parent.mkdir(mode=0o700, exist_ok=True)
                check_private(parent, what="directory of run directories")  # before anything is made in it
            path.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError as error:
            raise RunDirError(f"the run directory {path} is not a directory; choose another with --run-dir") from error
        except OSError as error:
            raise RunDirError(
                f"the run directory {path} cannot be made: {error.strerror}; choose another with --run-dir"
            ) from error
        _check_mode(path, run_dir_mode(shared=shared))
        try:
            fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RunDirError(
                f"the lock {path / LOCK} cannot be opened: {error.strerror}; choose another with --run-dir"
            ) from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise NameInUse(
                    f"a pool runs in {path} already (pid {holder.pid_of(fd)}); stop it with `trtpool stop`, "
                    "or start this one with another --name"
                ) from None
            removed = not os.fstat(fd).st_nlink  # by its last holder, after we opened it
            if not removed:
                _write_pid(fd, path)
                _remove_leftovers(path)
                path.chmod(run_dir_mode(shared=shared))
        except BaseException:
            os.close(fd)
            raise
        if removed:
            os.close(fd)
            return cls.claim(path, shared=shared)
        return cls(path, fd)

    def release(self) -> None:
        """Remove the directory's contents and the directory, then unlock.  Again: nothing."""
        if self._lock_fd < 0:
            return
        _remove_leftovers(self.path)
        # Remove the lock while we hold it: one who waits for it then finds no file and starts anew.
        with contextlib.suppress(OSError):
            (self.path / LOCK).unlink()
        with contextlib.suppress(OSError):  # somebody put a file of their own there: theirs
            self.path.rmdir()
        os.close(self._lock_fd)
        self._lock_fd = -1


def _check_mode(path: Path, wanted: int) -> None:
    """Refuse a directory that is not ours, or whose mode is neither `wanted` nor ours to change.

    One that holds nothing but what pools make was made by one, perhaps with other users than this.
    """
    check_private(path, entered=True)
    mode = path.stat().st_mode & 0o777
    if mode != wanted and not all(entry.name == LOCK or _is_socket_of_ours(entry) for entry in path.iterdir()):
        raise RunDirError(
            f"the run directory {path} has mode {mode:04o} and holds other files than a pool's: choose another with "
            f"--run-dir, or run: chmod {wanted:o} {path}"
        )


def _is_socket_of_ours(entry: Path) -> bool:
    ours = entry.name in (LIFELINE, REQUESTS) or entry.name.startswith(ZMQ_PREFIX)
    return ours and stat.S_ISSOCK(entry.lstat().st_mode)


def _remove_leftovers(path: Path) -> None:
    """Remove what pools make; sockets and nothing else, so that a wrong --run-dir loses no data."""
    for entry in path.iterdir():
        if _is_socket_of_ours(entry):
            entry.unlink()


def _write_pid(fd: int, path: Path) -> None:
    """Say in a lock whose it is."""
    os.ftruncate(fd, 0)  # first, so that nobody takes a dead pool's pid for ours
    try:
        holder.say(fd)
    except OSError as error:
        with contextlib.suppress(OSError):  # nobody's, so that no other pool trips over it
            (path / LOCK).unlink()
        raise RunDirError(
            f"nothing can be written in the run directory {path}: {error.strerror}; make room, or choose another "
            "with --run-dir"
        ) from error


def running_supervisor(path: Path) -> int:
    """A pidfd of the supervisor whose pool runs in `path`.

    Raises:
        PoolNotFound: none does.
        RunDirError: the directory is not ours, or the pool is in another pid namespace.
    """
    missing = PoolNotFound(f"no pool runs in {path}; start one with `trtpool start`")
    if not path.exists():
        raise missing
    check_private(path, entered=True)
    try:
        fd = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise missing from None
        raise RunDirError(f"the lock {path / LOCK} cannot be opened: {error.strerror}") from error
    try:
        pid = holder.pid_of(fd)
        elsewhere = holder.is_elsewhere(fd)
        try:
            pidfd = os.pidfd_open(pid) if pid and not elsewhere else -1
        except ProcessLookupError:
            pidfd = -1
        # The lock is tried after the pidfd is open: still held and the same pid written, so it is the holder's.
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except BlockingIOError:
            held = True
        if held and pidfd >= 0 and holder.pid_of(fd) == pid:
            return pidfd
        if pidfd >= 0:
            os.close(pidfd)
        if held and elsewhere:
            raise RunDirError(
                f"the pool in {path} runs in another container, so it cannot be signalled from here; run this there "
                "(docker exec, kubectl exec), or stop that container"
            )
        raise missing
    finally:
        os.close(fd)


def stop(path: Path, timeout_s: float | None) -> bool:
    """Ask the pool in `path` to drain and end; returns whether it ended within `timeout_s`.

    Raises:
        PoolNotFound: no pool runs there.
    """
    pidfd = running_supervisor(path)
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        return wait_ended(pidfd, timeout_s)
    finally:
        os.close(pidfd)
