"""Many threads, one socket, no thread of our own: the thread that waits drives the socket.

Of the threads that wait, one is the *leader*: it sleeps on the socket with the lock released, and handles what
arrives for all.  The others, *followers*, each sleep on a lock of their own and are woken when what they wait
for is over, or to take the lead when the leader leaves.  With one thread, which is the usual case, there is
never a switch between threads.  (Schmidt et al., "Leader/Followers", Pattern Languages of Programs 2000.)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Protocol

from .link import Link

LONGEST_SLEEP_S: Final = 1e6
"""The kernel and Python bound a single sleep; who waits longer sleeps again."""


class Stopped(Exception):
    """Another thread told this one to stop waiting; never seen by users."""


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


class Watchable(Protocol):
    """What `Background.watch` needs of a target; `watched` is its own."""

    over: bool
    watched: bool


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
        receive: handles what has arrived, or a part of it, and returns whether there was any; called under the lock.
        pending: whether `unlocked` has something to do.
        unlocked: does what must not be done under the lock, such as callbacks; called after each unlock.  It may
            use the client, and so wait itself: the thread that calls it neither leads nor follows.
    """

    def __init__(
        self,
        link: Link,
        receive: Callable[[], bool],
        pending: Callable[[], bool],
        unlocked: Callable[[], None],
    ) -> None:
        self._link = link
        self._receive = receive
        self._pending = pending
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
                while self._receive():
                    pass
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

    @property
    def led(self) -> bool:
        """Whether a thread sleeps on the link.  Whoever uses the link then must also receive: see `Link`."""
        return self._leader is not None

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
                received = self._receive()
                if target.over:
                    return True
                if received:
                    continue
                remaining = None if deadline is None else min(deadline - time.monotonic(), LONGEST_SLEEP_S)
                if remaining is not None and remaining <= 0:
                    return False
                if self._pending():
                    self._step_aside()
                elif self._leader is None:
                    self._lead(target, remaining)
                else:
                    self._follow(target, remaining)
        finally:
            self._hand_over()
            self.__exit__(None, None, None)

    def _hand_over(self) -> None:
        """Have a follower take the lead if there is no leader; under the lock."""
        if self._leader is None and self._followers:
            self._followers[0].wake()

    def _step_aside(self) -> None:
        """Let go of the lock for `unlocked`, which may take long: another thread leads meanwhile."""
        self._hand_over()
        try:
            self._lock.release()
            self._unlocked()
        finally:
            self._lock.acquire()

    # The lock is let go of within the `try`, with no call before it: an interrupt comes after it or not at all.
    # What a finalizer left while we held the lock is seen right after; what it leaves later, it sees to itself.

    def _lead(self, target: Waitable, timeout_s: float | None) -> None:
        self._leader = target
        try:
            self._lock.release()
            if not self._pending():
                self._link.wait(timeout_s)
        finally:
            self._lock.acquire()
            self._leader = None

    def _follow(self, target: Waitable, timeout_s: float | None) -> None:
        sleeper = Sleeper()
        target.add_sleeper(sleeper)
        self._followers.append(sleeper)
        try:
            self._lock.release()
            if not self._pending():
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
        self._arrivals: deque[Watchable] = deque()
        self._watched = 0
        self._duty: Target | None = None
        self._called = threading.Event()
        self._stopped = False
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether there is a thread and nobody relies on it."""
        return self._thread is not None and not self._watched and not self._arrivals

    def watch(self, target: Watchable) -> None:
        """Drive the socket until `target` is over.

        Takes no lock but one of its own: `concurrent.futures.wait` calls this holding those of its futures, and who
        takes the driver's lock may have to announce one of them.
        """
        self._arrivals.append(target)
        if not self._called.is_set():
            self._called.set()
        if self._thread is None:
            self._start()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._run, name="trtpool-client", daemon=True)
                self._thread.start()

    def unwatch(self) -> None:
        """One that was `watched` is over; under the lock."""
        self._watched -= 1
        if not self._watched and self._duty is not None:
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

    def _admit(self) -> bool:
        """Count those who came; whether anybody relies on us now.  Under the lock."""
        while self._arrivals:
            target = self._arrivals.popleft()
            if not target.over and not target.watched:
                target.watched = True
                self._watched += 1
        return self._watched > 0

    def _run(self) -> None:
        while True:
            self._called.wait()
            duty = Target()
            with self._driver:
                if self._stopped:
                    return
                self._called.clear()  # before we look: who comes later sets it again
                if not self._admit():
                    continue
                self._called.set()
                self._duty = duty
            self._driver.wait(duty, None)
