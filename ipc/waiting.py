"""Many threads, one socket, no thread of our own: the thread that waits drives the socket.

Of the threads that wait, one is the *leader*: it sleeps on the socket with the lock released, and handles what
arrives for all.  The others, *followers*, each sleep on a lock of their own and are woken when what they wait
for is over, or to take the lead when the leader leaves.  With one thread, which is the usual case, there is
never a switch between threads.  (Schmidt et al., "Leader/Followers", Pattern Languages of Programs 2000.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

from .link import Link


class Sleeper:
    """A thread that sleeps until `wake`."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def sleep(self, timeout_s: float | None) -> None:
        """Sleep until woken or time is up."""
        self._lock.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s))

    def wake(self) -> None:
        """Wake it; called under the driver's lock, so that two wakes cannot meet."""
        if self._lock.locked():
            self._lock.release()


class Waitable(Protocol):
    """What `Driver.wait` needs of a target, or of several taken together."""

    @property
    def over(self) -> bool: ...

    def add_sleeper(self, sleeper: Sleeper) -> None: ...

    def remove_sleeper(self, sleeper: Sleeper) -> None: ...


class Finishable(Protocol):
    """What `Driver.finish` needs of a target."""

    over: bool
    sleepers: list[Sleeper]


class Target:
    """Something that threads wait for: `over` turns true once, by `Driver.finish`."""

    def __init__(self) -> None:
        self.over = False
        self.sleepers: list[Sleeper] = []

    def add_sleeper(self, sleeper: Sleeper) -> None:
        """Note a thread to be woken when this is over."""
        self.sleepers.append(sleeper)

    def remove_sleeper(self, sleeper: Sleeper) -> None:
        """It sleeps no more."""
        self.sleepers.remove(sleeper)


class AnyOf:
    """Several targets, one of which is enough."""

    def __init__(self, targets: Sequence[Waitable]) -> None:
        self._targets = targets

    @property
    def over(self) -> bool:
        """Whether one of them is over."""
        return any(target.over for target in self._targets)

    def add_sleeper(self, sleeper: Sleeper) -> None:
        """Note a thread to be woken when one is over."""
        for target in self._targets:
            target.add_sleeper(sleeper)

    def remove_sleeper(self, sleeper: Sleeper) -> None:
        """It sleeps no more."""
        for target in self._targets:
            target.remove_sleeper(sleeper)


class Driver:
    """The lock over a client's state, and the waiting.  A context manager: ``with driver:`` holds the lock.

    Args:
        link: where to sleep.
        receive: handles all that has arrived; called under the lock.
        unlocked: does what must not be done under the lock, such as callbacks; called after each unlock.
    """

    def __init__(self, link: Link, receive: Callable[[], None], unlocked: Callable[[], None]) -> None:
        self._link = link
        self._receive = receive
        self._unlocked = unlocked
        self._lock = threading.Lock()
        self._leader: Waitable | None = None
        self._followers: list[Sleeper] = []

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        self._unlocked()

    def try_acquire(self) -> bool:
        """Take the lock if it is free; for `unlocked`, which leaves by `release`."""
        return self._lock.acquire(blocking=False)

    def release(self) -> None:
        """Let go of the lock without calling `unlocked`."""
        self._lock.release()

    def try_visit(self) -> None:
        """Take and leave the lock if it is free, so that `receive` and `unlocked` run; else its holder sees to it."""
        if self._lock.acquire(blocking=False):
            try:
                self._receive()
            finally:
                self.__exit__(None, None, None)

    def quiesce(self) -> None:
        """Wait until no thread sleeps on the link; what they wait for must be over."""
        while True:
            with self:
                if self._leader is None and not self._followers:
                    return
                self._link.wake()
            time.sleep(0.001)

    def finish(self, target: Finishable) -> None:
        """Mark `target` as over and wake who waits for it; under the lock."""
        target.over = True
        for sleeper in target.sleepers:
            sleeper.wake()
        if self._leader is not None and self._leader.over:
            self._link.wake()

    def wait(self, target: Waitable, timeout_s: float | None) -> bool:
        """Wait until `target` is over; False when `timeout_s` passed first.  The lock must not be held."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._lock.acquire()
        try:
            while True:
                self._receive()
                if target.over:
                    return True
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return False
                if self._leader is None:
                    self._lead(target, remaining)
                else:
                    self._follow(target, remaining)
        finally:
            if self._leader is None and self._followers:
                self._followers[0].wake()
            self.__exit__(None, None, None)

    def _lead(self, target: Waitable, timeout_s: float | None) -> None:
        self._leader = target
        self.__exit__(None, None, None)
        try:
            # What the hooks after unlocking have finished may be the very thing.
            if not target.over:
                self._link.wait(timeout_s)
        finally:
            self._lock.acquire()
            self._leader = None

    def _follow(self, target: Waitable, timeout_s: float | None) -> None:
        sleeper = Sleeper()
        target.add_sleeper(sleeper)
        self._followers.append(sleeper)
        self.__exit__(None, None, None)
        try:
            sleeper.sleep(timeout_s)
        finally:
            self._lock.acquire()
            target.remove_sleeper(sleeper)
            self._followers.remove(sleeper)


class Background:
    """A thread that drives the socket while somebody waits who does not: callbacks, `await`, other libraries.

    It is started when it is first needed, and sleeps, without touching the socket, while nobody does.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._watched = 0
        self._duty: Target | None = None
        self._called = threading.Event()
        self._stopped = False
        self._thread: threading.Thread | None = None

    @property
    def active(self) -> bool:
        """Whether somebody relies on it now."""
        return self._watched > 0

    def watch(self) -> None:
        """One more waits; under the lock."""
        self._watched += 1
        self._called.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="trtpool-client", daemon=True)
            self._thread.start()

    def unwatch(self) -> None:
        """One has what it waited for; under the lock."""
        self._watched -= 1
        if not self._watched:
            self._called.clear()
            if self._duty is not None:
                self._driver.finish(self._duty)

    def stop(self) -> None:
        """End the thread; under the lock."""
        self._stopped = True
        self._called.set()
        if self._duty is not None:
            self._driver.finish(self._duty)

    def join(self) -> None:
        """Wait for its end; not under the lock."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._called.wait()
            duty = Target()
            with self._driver:
                if self._stopped:
                    return
                if not self._watched:
                    continue
                self._duty = duty
            self._driver.wait(duty, None)
