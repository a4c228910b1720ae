"""`trtpool top` in a real terminal: a pty, and pyte to read its screen."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator

import numpy as np
import pyte
import pytest

import trtpool
from tests.system.rig import CLI, PATIENCE_S, Process, StartedPool, wait_until
from trtpool.ipc.errors import PoolNotFound

ROWS, COLUMNS = 40, 80


class Terminal:
    """A command in a terminal of 80 columns."""

    def __init__(self, *command: str | os.PathLike[str]) -> None:
        self.fd, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.before = termios.tcgetattr(inner)
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self.popen = subprocess.Popen(
            command,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
        )
        self.inner = inner

    def _read(self) -> None:
        while select.select([self.fd], [], [], 0)[0]:
            self._stream.feed(os.read(self.fd, 65536))

    def screen(self) -> list[str]:
        """What is on it now."""
        self._read()
        return [line.rstrip() for line in self._screen.display]

    def wait_for(self, *parts: str) -> list[str]:
        """Until all of this is on the screen."""

        def found() -> list[str]:
            screen = self.screen()
            return screen if all(part in "\n".join(screen) for part in parts) else []

        return wait_until(found, f"{parts} on the screen", self.screen)

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def wait(self) -> int:
        """Its end, while the terminal goes on showing what it writes."""
        wait_until(lambda: self.screen() and self.popen.poll() is not None, "its end", self.screen)
        return self.popen.wait(PATIENCE_S)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()
        os.close(self.fd)
        with contextlib.suppress(OSError):
            os.close(self.inner)


@pytest.fixture
def pool(negate, run_dir) -> Iterator[StartedPool]:
    with StartedPool(negate, run_dir=run_dir) as pool:
        yield pool


def top(pool: StartedPool, *options: str) -> tuple[str, ...]:
    return (*CLI, "top", f"--run-dir={pool.run_dir}", *options)


def row(screen: list[str], table: str, name: str) -> list[str]:
    start = next(index for index, line in enumerate(screen) if line.startswith(table + " "))
    return next(line for line in screen[start + 1 :] if line.startswith(name + " ")).removeprefix(name).split()


def test_it_shows_what_happens_and_leaves_with_q(pool):
    with Terminal(*top(pool, "--interval-s=0.1")) as terminal, pool.connect() as client:
        idle = terminal.wait_for("trtpool default", "items/s", "client ", f"pid {os.getpid()}")
        assert row(idle, "model", "negate")[0] == "0"

        def busy() -> list[str]:
            client.infer(x=np.ones((64, 4), np.float32))
            screen = terminal.screen()
            with contextlib.suppress(StopIteration, IndexError):  # half a screen
                if row(screen, "model", "negate")[0] != "0" and row(screen, "client", f"pid {os.getpid()}")[0] != "0":
                    return screen
            return []

        screen = wait_until(busy, "a rate", terminal.screen)
        items, batch, p50, p90, p99, *_ = row(screen, "model", "negate")
        assert int(items.replace(",", "")) > 0
        assert 1 <= float(batch) <= 8
        assert 0 < float(p50) <= float(p90) <= float(p99)
        terminal.press("q")
        assert terminal.wait() == 0
        assert termios.tcgetattr(terminal.inner) == terminal.before, "the terminal is as it was"


def test_ctrl_c_leaves_too(pool):
    with Terminal(*top(pool, "--interval-s=0.1")) as terminal:
        terminal.wait_for("items/s")
        terminal.popen.send_signal(signal.SIGINT)
        assert terminal.wait() == 0
        assert termios.tcgetattr(terminal.inner) == terminal.before


def test_it_says_when_the_pool_ends(pool):
    with Terminal(*top(pool, "--interval-s=0.1")) as terminal:
        terminal.wait_for("items/s")
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0
        assert terminal.wait() == trtpool.PoolClosed.exit_code
        terminal.wait_for("trtpool: ")
        assert termios.tcgetattr(terminal.inner) == terminal.before


def test_it_goes_on_with_another_broker(pool):
    with Terminal(*top(pool, "--interval-s=0.1")) as terminal:
        terminal.wait_for("restarts: 0 broker")
        os.kill(pool.broker, signal.SIGKILL)
        terminal.wait_for("restarts: 1 broker")
        terminal.press("q")
        assert terminal.wait() == 0


def test_once_prints_one_look_without_a_terminal(pool):
    with Process(*top(pool, "--once", "--interval-s=0.1"), env={"COLUMNS": "80"}) as process:
        lines = process.succeed().splitlines()
    assert lines[0].startswith("trtpool default  serving")
    assert row(lines, "slots", "negate")[:5] == ["4,096", "0", "0", "0", "0"]
    assert max(map(len, lines)) <= 80


def test_without_a_terminal_it_says_what_to_do(pool):
    with Process(*top(pool)) as process:
        assert "print one look with --once" in process.rest(2)
        assert process.wait() == 2


def test_no_pool(run_dir):
    with Process(*CLI, "top", "--once", f"--run-dir={run_dir}") as process:
        assert process.rest(2).startswith("trtpool: ")
        assert process.wait() == PoolNotFound.exit_code
