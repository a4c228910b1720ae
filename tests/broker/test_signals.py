"""Signals that ask the supervisor to stop."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator

import pytest

from trtpool.broker.signals import STOP, Signals, Stopped


@pytest.fixture
def epoll() -> Iterator[select.epoll]:
    with select.epoll() as one:
        yield one


@pytest.mark.parametrize("number", STOP)
def test_a_signal_is_counted_and_wakes_once(number, epoll):
    signals = Signals(epoll)
    before = signal.getsignal(number)
    with signals.caught():
        assert epoll.poll(0) == []
        os.kill(os.getpid(), number)
        assert signals.asked == 1
        assert [fd for fd, _ in epoll.poll(0)] == [signals.fd]
        signals.clear()
        assert epoll.poll(0) == []
        signals.clear()  # no more than a wake-up for nothing
    assert signal.getsignal(number) is before


def test_it_interrupts_only_where_that_is_asked_for(epoll):
    signals = Signals(epoll)
    with signals.caught():
        with signals.interrupts():
            pass
        with pytest.raises(Stopped), signals.interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked == 2


def test_one_that_came_before_interrupts_as_well(epoll):
    signals, waited = Signals(epoll), False
    with signals.caught():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped), signals.interrupts():
            waited = True
    assert not waited
