"""Each fault in each state of a process, brought about on purpose; nothing is left of it, and others notice nothing."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import trtpool
from tests.system.rig import (
    StartedPool,
    answer,
    family,
    figures,
    hold,
    producer,
    submit,
    wait_until,
    watching,
)

WorkerDoes = Callable[..., dict[str, str]]


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal that ends a process, and see that it has ended."""
    with watching([pid]) as wait:
        os.kill(pid, number)
        wait()


def wait_stopped(pid: int) -> None:
    """Wait until all of a process stands still."""
    wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it stands still")


# --- A producer ----------------------------------------------------------------------------------

# Brings about a state, says so, and does as it is told.
IN_STATE = """
    import threading

    state, got = sys.argv[2], []
    if state == "waiting":
        asking = threading.Thread(target=lambda: got.append(pool.lease(model="negate", timeout_s=60)), daemon=True)
        asking.start()
    else:
        got.append(pool.lease(model="negate"))
        got[0].inputs["x"][...] = 7
    if state in ("queued", "running", "done"):
        submitted = got[0].submit()
    if state == "done":
        submitted.result(timeout_s=60)
    print("there", flush=True)
    word = sys.stdin.readline().strip()
    if word == "exit":
        sys.exit(0)
    if word == "_exit":
        os._exit(0)
    if state == "waiting":
        asking.join()
        got[0].inputs["x"][...] = 7
    if state in ("leased", "waiting"):
        submitted = got[0].submit()
    assert submitted.result(timeout_s=60).outputs["y"].tolist() == [-7] * 4
    got[0].release()
    pool.close()
    print("right", flush=True)
"""


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP", "exit", "_exit"])
@pytest.mark.parametrize("state", ["leased", "queued", "running", "done", "waiting"])
def test_a_producer_in_each_state(state: str, fault: str, pool: StartedPool, client: trtpool.Client) -> None:
    """It ends and leaves nothing, or goes on and has its result; the work of another is done."""
    work: list[trtpool.Submitted] = []
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(pool.connect())
        standing = stack.enter_context(contextlib.ExitStack())
        if state in ("queued", "running"):
            standing.enter_context(pool.stopped_worker())
        if state == "queued":
            work = hold(client, [1, 2])
        if state == "waiting":
            for one in (client, other):
                leases = one.lease_many(min(figures(client).free, client.session.models[0].cap), model="negate")
                standing.callback(leases.release)
        peer = stack.enter_context(producer(pool, IN_STATE, state))
        peer.wait_for_line("there")
        count = len(work) + 1 if state == "queued" else 1
        wait_until(lambda: getattr(now := figures(client), state) + (now.running if state == "queued" else 0) == count)
        if state == "queued":
            assert figures(client).queued > 0
        if fault == "SIGKILL":
            peer.kill()
            assert peer.wait() == -signal.SIGKILL
        elif fault == "SIGSTOP":
            peer.kill(signal.SIGSTOP)
            wait_stopped(peer.pid)
        else:
            peer.say(fault)
            assert peer.wait() == 0, peer.rest(2)
        standing.close()
        assert [answer(submitted) for submitted in work] == [-1, -2][: len(work)]
        assert answer(submit(client, 9)) == -9
        if fault == "SIGSTOP":
            peer.kill(signal.SIGCONT)
            peer.say("go on")
            assert peer.succeed() == "right\n"


# --- A worker ------------------------------------------------------------------------------------

# What a worker finds in a file it does once: before it computes, or when its outputs are written and not reported.
AT_MOMENT = """
try:
    moment, _, deed = open({place!r}).read().partition(" ")
    os.unlink({place!r})
except FileNotFoundError:
    pass
else:
    if moment == "written":
        super().run(batch)
    exec(deed)
"""

DEEDS = {
    "SIGKILL": "os.kill(os.getpid(), 9)",
    "SIGSTOP": "os.kill(os.getpid(), 19)",
    "exit": "os._exit(0)",
    "raises": "raise RuntimeError('this engine failed')",
}


def test_a_worker_at_each_moment_of_a_batch(
    negate: Path, run_dir: Path, worker_does: WorkerDoes, tmp_path: Path
) -> None:
    """Idle, before it computes, and with outputs written that nobody was told of: each item is done, counted once."""
    place = tmp_path / "deed"
    env = worker_does(run=AT_MOMENT.format(place=str(place)))
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=4, slots=16, env=env) as pool,
        pool.connect() as client,
    ):
        done = 0
        for moment in ("idle", "begun", "written"):
            for name, deed in DEEDS.items():
                worker = pool.worker
                if moment == "idle":
                    if name in ("exit", "raises"):  # it does neither by itself
                        continue
                    os.kill(worker, getattr(signal, name))
                else:
                    scratch = tmp_path / "scratch"
                    scratch.write_text(f"{moment} {deed}")
                    scratch.rename(place)  # at once, as a whole
                work = [submit(client, value) for value in range(6)]
                if name == "SIGSTOP":
                    wait_stopped(worker)
                    os.kill(worker, signal.SIGCONT)
                assert [-answer(one) for one in work] == [0, 1, 2, 3, 4, 5], (moment, name)
                done += len(work)
                assert (figures(client).items, figures(client).failed_items) == (done, 0), (moment, name)
                wait_until(lambda: len(client.status().workers) == 1, "a worker is there")
                assert not place.exists()
                assert (pool.worker == worker) == (name == "SIGSTOP"), (moment, name)
        client.close()
        pool.check_at_rest()
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


# --- The broker ----------------------------------------------------------------------------------


CONNECTS = """
    import threading
    pool.close()

    def use(me):
        for value in range(30):
            with trtpool.connect(run_dir=run_dir) as own:
                assert own.infer(x=np.full(4, me * value, "f4"), timeout_s=60)["y"].tolist() == [-me * value] * 4
            if value == 5:
                os.write(1, b"connects\\n")  # whole, unlike what threads print

    threads = [threading.Thread(target=use, args=(me,)) for me in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("all", flush=True)
"""


def test_a_broker_killed_while_clients_connect(small: StartedPool) -> None:
    with producer(small, CONNECTS) as one:
        for _ in range(3):
            one.wait_for_line("connects")
            kill(small.broker)
        assert "all" in one.succeed()


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGHUP])
def test_a_broker_that_ends_otherwise_is_followed_by_another(number: int, small: StartedPool) -> None:
    with small.connect() as client:
        with small.stopped_worker():
            work = hold(client, [1, 2, 3])
            kill(small.broker, number)
        assert [answer(one) for one in work] == [-1, -2, -3]
        assert client.status().epoch == 2


def test_a_broker_killed_while_it_drains(small: StartedPool) -> None:
    with small.connect() as client:
        with small.stopped_worker():
            work = hold(client, [1, 2, 3])
            small.kill(signal.SIGTERM)
            wait_until(lambda: client.status().draining, "it drains")
            kill(small.broker)
            with pytest.raises(trtpool.PoolClosed, match="grants no more slots"):
                client.lease()
        assert [answer(one) for one in work] == [-1, -2, -3]
        assert small.wait() == 0


def test_a_broker_killed_while_a_worker_starts(
    negate: Path, run_dir: Path, worker_does: WorkerDoes, tmp_path: Path
) -> None:
    """The next broker hears of it from the supervisor, and it from the next broker."""
    stuck = tmp_path / "stuck"
    env = worker_does(load=f"if os.path.exists({str(stuck)!r}): os.kill(os.getpid(), signal.SIGSTOP)")
    with StartedPool(negate, run_dir=run_dir, max_batch=2, slots=16, env=env) as pool, pool.connect() as client:
        with pool.stopped_worker() as worker:
            work = hold(client, [1, 2, 3])
            stuck.touch()
            kill(worker)
        (loading,) = wait_until(lambda: set(pool.pids("trtpool.workers")) - {worker}, "another worker starts")
        wait_stopped(loading)
        kill(pool.broker)
        stuck.unlink()
        os.kill(loading, signal.SIGCONT)
        assert [answer(one) for one in work] == [-1, -2, -3]
        assert pool.worker == loading
        client.close()
        pool.check_at_rest()
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


def test_brokers_killed_peerright_after_the_other(small: StartedPool) -> None:
    """Also before the next is ready, which may happen twice in a row."""
    with small.connect() as client:
        with small.stopped_worker():
            work = hold(client, [1, 2, 3, 4])
            for _ in range(2):
                first = small.broker
                kill(first)
                second = wait_until(lambda: set(small.pids("trtpool.broker")) - {first}, "the next is there").pop()  # noqa: B023
                kill(second)
                client.status()
        assert [answer(one) for one in work] == [-1, -2, -3, -4]
        assert client.status().epoch == 5


def test_a_broker_killed_while_a_child_of_a_dead_producer_lives(small: StartedPool) -> None:
    """The child has the arena mapped and a copy of the lifeline; what counts is the end of its parent."""
    code = """
        slot = pool.lease()
        if not os.fork():
            wait(f"child {os.getpid()}")
            os._exit(0)
        wait("parent")
    """
    with small.connect() as client, producer(small, code) as parent:
        words = {parent.line(), parent.line()}
        (child,) = (int(word.split()[1]) for word in words if word.startswith("child"))
        os.kill(small.broker, signal.SIGSTOP)
        parent.kill()
        parent.wait()
        kill(small.broker)
        wait_until(lambda: figures(client).free == 16, "its slot is free", client.status)
        assert psutil.pid_exists(child)
        with watching([child]) as wait:
            assert parent.popen.stdin is not None
            parent.popen.stdin.close()
            wait()


# --- The supervisor ------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["nobody", "worker", "broker", "both"])
def test_a_supervisor_that_stands_still_is_waited_for(victim: str, small: StartedPool) -> None:
    """Who is there does not need it while all live; who ended meanwhile is replaced when it goes on."""
    with small.connect() as client, small.stopped_worker() as worker:
        work = hold(client, [1, 2, 3])
        broker = small.broker
        small.kill(signal.SIGSTOP)
        wait_stopped(small.pid)
        victims = {"nobody": [], "worker": [worker], "broker": [broker], "both": [broker, worker]}[victim]
        for pid in victims:
            kill(pid)
        if victim == "nobody":
            os.kill(worker, signal.SIGCONT)
            assert [answer(one) for one in work] == [-1, -2, -3]
            work = [submit(client, 4)]
            assert answer(work.pop()) == -4
        small.kill(signal.SIGCONT)
        if victim == "broker":
            os.kill(worker, signal.SIGCONT)
        assert [answer(one) for one in work] == [-1, -2, -3][: len(work)]
        assert client.status().epoch == (2 if broker in victims else 1)


@pytest.mark.parametrize("with_", ["broker", "worker", "both"])
def test_a_supervisor_killed_together_with_another(with_: str, negate: Path, run_dir: Path) -> None:
    """All ends, clients are told, and another pool can be started there."""
    with StartedPool(negate, run_dir=run_dir, max_batch=2, slots=16) as pool, pool.connect() as client:
        with watching(process.pid for process in family(pool.pid)) as wait:
            with pool.stopped_worker() as worker:
                work = hold(client, [1, 2, 3])
                victims = {"broker": [pool.broker], "worker": [worker], "both": [pool.broker, worker]}[with_]
                for pid in [*victims, pool.pid]:
                    os.kill(pid, signal.SIGKILL)
                assert pool.wait() == -signal.SIGKILL
            wait()  # for a worker that stands still, when it goes on
        for one in work:
            with pytest.raises(trtpool.PoolClosed):
                one.result(timeout_s=60)
        with pytest.raises(trtpool.PoolClosed):
            client.lease()
    with StartedPool(negate, run_dir=run_dir) as pool:
        pool.stop()
    assert not run_dir.exists()


def test_a_producer_and_the_supervisor_killed_together(negate: Path, run_dir: Path) -> None:
    with (
        StartedPool(negate, run_dir=run_dir, max_batch=2, slots=16) as pool,
        producer(pool, "slots = pool.lease_many(3); wait('there')") as one,
    ):
        one.wait_for_line("there")
        with watching(process.pid for process in family(pool.pid)) as wait:
            one.kill()
            pool.kill()
            assert (one.wait(), pool.wait()) == (-signal.SIGKILL, -signal.SIGKILL)
            wait()
