"""Who drives the socket: leaders, followers, the background thread.  The link here is an event and a queue."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ipc.fake_pool import NET_S
from trtpool.ipc.waiting import LONGEST_SLEEP_S, AnyOf, Background, Driver, Target


class FakeLink:
    """`wait` sleeps until `wake`; `slept` counts the threads that are in it, `timeouts` notes what they asked for."""

    def __init__(self) -> None:
        self.woken = threading.Semaphore(0)
        self.inside = threading.Semaphore(0)
        self.timeouts: list[float | None] = []
        self.threads: set[int] = set()
        self.raises: BaseException | None = None

    def wait(self, timeout_s: float | None) -> None:
        assert not self.threads, "two threads sleep on the socket at once"
        self.threads.add(threading.get_ident())
        self.timeouts.append(timeout_s)
        self.inside.release()
        try:
            self.woken.acquire(timeout=NET_S if timeout_s is None else min(timeout_s, NET_S))
            if self.raises is not None:
                error, self.raises = self.raises, None
                raise error
        finally:
            self.threads.clear()

    def wake(self) -> None:
        self.woken.release()


class Rig:
    """A driver whose socket brings targets, which are then over, and whose afterwork is a list of calls."""

    def __init__(self) -> None:
        self.link = FakeLink()
        self.arrived: deque[Target] = deque()
        self.afterwork: deque[Callable[[], object]] = deque()
        self.threads: list[threading.Thread] = []
        self.driver = Driver(self.link, self.receive, lambda: bool(self.afterwork), self.unlocked)  # type: ignore[arg-type]

    def receive(self) -> bool:
        """Take in one that has arrived, as a link takes a frame; whether there was one."""
        if not self.arrived:
            return False
        self.driver.finish(self.arrived.popleft())
        return True

    def unlocked(self) -> None:
        while self.afterwork:
            self.afterwork.popleft()()

    def bring(self, *targets: Target) -> None:
        """The socket turns readable."""
        self.arrived.extend(targets)
        self.link.wake()

    def wait(self, target: Any, timeout_s: float | None = NET_S) -> list[bool | BaseException]:
        """Wait in a thread; the answer, or what was raised, is in the list when `join` has returned."""
        answers: list[bool | BaseException] = []

        def work() -> None:
            try:
                answers.append(self.driver.wait(target, timeout_s))
            except BaseException as error:  # noqa: BLE001  # an answer too
                answers.append(error)

        thread = threading.Thread(target=work)
        self.threads.append(thread)
        thread.start()
        return answers

    def lead(self, target: Any) -> list[bool | BaseException]:
        """The same, and returns when it sleeps on the socket."""
        answers = self.wait(target)
        assert self.link.inside.acquire(timeout=NET_S)
        return answers

    def follow(self, target: Target) -> list[bool | BaseException]:
        """The same, and returns when it sleeps as a follower."""
        answers = self.wait(target)
        while not target.sleepers:
            pass
        return answers

    def join(self) -> None:
        for thread in self.threads:
            thread.join(NET_S)
            assert not thread.is_alive(), "a thread waits for what is over"


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.join()


def test_what_is_over_is_not_waited_for(rig):
    target = Target()
    rig.bring(target)
    assert rig.driver.wait(target, None)
    assert not rig.link.timeouts


@pytest.mark.parametrize("timeout_s", [0, -1, 1e-9])
def test_time_passes(rig, timeout_s):
    assert not rig.driver.wait(Target(), timeout_s)
    assert rig.driver.wait(Target(), timeout_s) is False


@pytest.mark.parametrize("timeout_s", [1e9, float("inf"), 2.0**70])
def test_the_kernel_is_never_asked_to_sleep_longer_than_it_can(rig, timeout_s):
    target = Target()
    answers = rig.wait(target, timeout_s)
    rig.bring(target)
    rig.join()
    assert answers == [True]
    assert all(slept <= LONGEST_SLEEP_S for slept in rig.link.timeouts)


def test_a_follower_takes_over_when_the_leader_has_what_it_waits_for(rig):
    first, second = Target(), Target()
    led, followed = rig.lead(first), rig.follow(second)
    rig.bring(first)
    assert rig.link.inside.acquire(timeout=NET_S), "the other sleeps on the socket now"
    assert led == [True]
    assert followed == []
    rig.bring(second)
    rig.join()
    assert followed == [True]


def test_the_leader_handles_what_arrives_for_followers(rig):
    first, second, third = Target(), Target(), Target()
    led, second_answer, third_answer = rig.lead(first), rig.follow(second), rig.follow(third)
    rig.bring(third)
    rig.threads[2].join(NET_S)
    assert (led, second_answer, third_answer) == ([], [], [True])
    rig.bring(second, first)
    rig.join()
    assert (led, second_answer) == ([True], [True])


def test_a_visitor_that_takes_in_the_leaders_answer_wakes_it(rig):
    target = Target()
    answers = rig.lead(target)
    rig.arrived.append(target)  # the socket's descriptor told nobody: the visitor was faster
    rig.driver.try_visit()
    rig.join()
    assert answers == [True]


def test_many_threads_each_get_their_own(rig):
    targets = [Target() for _ in range(20)]
    answers = [rig.lead(targets[0])] + [rig.wait(target) for target in targets[1:]]
    for target in reversed(targets):
        rig.bring(target)
    rig.join()
    assert answers == [[True]] * 20


def test_a_follower_whose_time_passes_leaves_nothing(rig):
    leader, late = Target(), Target()
    rig.lead(leader)
    answers = rig.wait(late, 1e-6)
    rig.threads[1].join(NET_S)
    assert answers == [False]
    assert late.sleepers == []
    rig.bring(leader)


def test_any_of_several(rig):
    targets = [Target() for _ in range(3)]
    answers = rig.lead(AnyOf(targets))
    rig.bring(targets[1])
    rig.join()
    assert answers == [True]


def test_any_of_several_as_follower_leaves_no_sleeper(rig):
    leader = Target()
    rig.lead(leader)
    targets = [Target(), Target()]
    answers = rig.wait(AnyOf(targets))
    while not targets[1].sleepers:
        pass
    rig.bring(targets[1])
    rig.threads[1].join(NET_S)
    assert answers == [True]
    assert [target.sleepers for target in targets] == [[], []]
    rig.bring(leader)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_an_interrupted_leader_hands_over(rig, kind):
    second = Target()
    led, followed = rig.lead(Target()), rig.follow(second)
    error = rig.link.raises = kind()
    rig.link.wake()
    assert rig.link.inside.acquire(timeout=NET_S), "the follower leads now"
    assert led == [error]
    rig.bring(second)
    rig.join()
    assert followed == [True]


def test_an_interrupt_leaves_the_driver_usable(rig):
    rig.link.raises = KeyboardInterrupt()
    rig.link.wake()
    with pytest.raises(KeyboardInterrupt):
        rig.driver.wait(Target(), None)
    target = Target()
    rig.bring(target)
    assert rig.driver.wait(target, NET_S)
    with rig.driver:
        assert not rig.driver.led


def test_afterwork_may_wait_itself(rig):
    """A callback that leases and waits: its thread must not be the leader while it runs."""
    inner, outer = Target(), Target()
    said: list[bool] = []

    def callback() -> None:
        rig.bring(inner)
        said.append(rig.driver.wait(inner, NET_S))
        rig.bring(outer)

    rig.afterwork.append(callback)
    assert rig.driver.wait(outer, NET_S)
    assert said == [True]


def test_others_are_served_while_afterwork_takes_long(rig):
    """The leader steps aside for it, and a follower leads."""
    first, second, go_on = Target(), Target(), threading.Event()
    rig.lead(first)
    followed = rig.follow(second)
    started = threading.Event()
    rig.afterwork.extend([started.set, lambda: go_on.wait(NET_S)])
    rig.link.wake()  # the leader looks, and finds it
    assert started.wait(NET_S)
    assert rig.link.inside.acquire(timeout=NET_S)
    rig.bring(second)
    rig.threads[1].join(NET_S)
    assert followed == [True]
    rig.bring(first)
    go_on.set()


def test_what_a_finalizer_leaves_while_the_lock_is_held_is_not_slept_over(rig):
    """It finds the lock taken and goes; its holder, about to sleep as leader, must see to it."""
    target = Target()
    receive = rig.receive

    def receive_and_drop() -> bool:
        rig.driver._receive = receive
        rig.afterwork.append(lambda: rig.bring(target))
        rig.driver.try_visit()  # as a finalizer does: the lock is held, by us
        return False

    rig.driver._receive = receive_and_drop
    assert rig.driver.wait(target, NET_S)


# --- The background thread -----------------------------------------------------------------------


class Watched(Target):
    def __init__(self) -> None:
        super().__init__()
        self.watched = False


@pytest.fixture
def background(rig: Rig) -> Iterator[Background]:
    made = Background(rig.driver)
    receive = rig.receive

    def receive_and_count() -> bool:
        if not rig.arrived:
            return False
        target = rig.arrived.popleft()
        rig.driver.finish(target)
        if getattr(target, "watched", False):
            made.unwatch()
        return True

    rig.driver._receive = receive_and_count
    yield made
    with rig.driver:
        made.stop()
    made.join()
    assert made._thread is None or not made._thread.is_alive()
    rig.driver._receive = receive


def test_no_thread_before_it_is_needed(rig, background):
    assert background._thread is None
    assert not background.idle


def test_it_drives_while_somebody_is_watched_and_not_else(rig, background):
    first, second = Watched(), Watched()
    background.watch(first)
    assert rig.link.inside.acquire(timeout=NET_S)
    background.watch(second)  # seen when the first is over
    assert not background.idle
    rig.bring(first)
    while not first.over:
        pass
    rig.bring(second)
    while not (second.over and background.idle):
        pass
    third = Watched()
    background.watch(third)
    while not rig.link.threads:
        pass
    rig.bring(third)
    while not background.idle:
        pass


def test_what_is_over_is_not_watched(rig, background):
    target = Watched()
    rig.driver.finish(target)
    background.watch(target)
    while not background.idle:
        pass
    assert not target.watched


def test_watching_the_same_twice_counts_once(rig, background):
    target = Watched()
    background.watch(target)
    background.watch(target)
    rig.bring(target)
    while not background.idle:
        pass


def test_watching_takes_no_lock_of_the_drivers(rig, background):
    """`concurrent.futures.wait` watches holding the locks of its futures, which announcing takes too."""
    with rig.driver:
        background.watch(Watched())


def test_nothing_is_started_after_the_end(rig, background):
    with rig.driver:
        background.stop()
    background.watch(Watched())
    assert background._thread is None
