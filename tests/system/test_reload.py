"""Other engines for a pool that serves, in real processes and under load."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import trtpool
from tests.models import save
from tests.system.rig import (
    CLI,
    PATIENCE_S,
    Process,
    StartedPool,
    answer,
    family,
    hold,
    pool_of_ones_own,
    producer,
    submit,
    wait_all_free,
    wait_until,
    watching,
)

TWICE = "twice (float[N,4] x) => (float[N,4] y) { y = Add(x, x) }"
THRICE = "thrice (float[N,4] x) => (float[N,4] y) { a = Add(x, x) y = Add(a, x) }"
WIDE = (
    "wide (float[N,5] x) => (float[N,4] z) <int64[1] s = {0}, int64[1] e = {4}, int64[1] a = {1}> "
    "{ z = Slice(x, s, e, a) }"
)

# Streams items until its standard input ends, and says how many were answered by which model, in order of the items.
STREAM = """
    import itertools, select

    def going_on():
        for item in itertools.count(1):
            if select.select([sys.stdin], [], [], 0)[0]:
                return
            yield item

    def write(item, inputs):
        inputs["x"][...] = item

    seen = []
    for item, result in pool.map(write, going_on(), window=8, model="negate"):
        factors = set((result.outputs["y"] / item).tolist())
        assert len(factors) == 1, (item, result.outputs["y"])
        factor = factors.pop()
        if not seen or seen[-1][0] != factor:
            seen.append([factor, 0])
            print("answered by", factor, flush=True)
        seen[-1][1] += 1
        last = item
    assert sum(count for _, count in seen) == last
    print("all", last, flush=True)
    pool.close()
"""


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    return save(TWICE, tmp_path, "twice")


@pytest.fixture
def pool(negate: Path, run_dir: Path) -> Iterator[StartedPool]:
    """Two workers, at rest in the end."""
    with pool_of_ones_own(negate, run_dir, workers=2, threads=1, slots=32, max_batch=4) as pool:
        yield pool


def reload(pool: StartedPool, model: Path | str, *options: str) -> Process:
    return Process(*CLI, "reload", str(model), f"--run-dir={pool.run_dir}", *options)


def test_under_load_answers_change_and_none_is_lost(pool: StartedPool, twice: Path) -> None:
    old = set(pool.pids("trtpool.workers"))
    with producer(pool, STREAM) as stream, producer(pool, STREAM, transport="zmq") as other:
        for one in (stream, other):
            one.wait_for_line("answered by -1.0")
        with reload(pool, f"negate={twice}") as command:
            said = command.succeed()
        assert "generation 1 from now on" in said
        assert old.isdisjoint(pool.pids("trtpool.workers")), "no old engine is left"
        for one in (stream, other):
            # Both engines run at once for a while, so answers of items that are neighbours may come from either; then
            # one alone is left.
            one.wait_for_line("answered by 2.0")
            one.say()
            assert "all " in one.succeed()
    with pool.connect() as client:
        report = client.status()
        assert report.generation == 1
        assert [worker.generation for worker in report.workers] == [1, 1]
        assert report.models[0].path == str(twice)
        assert (report.models[0].failed_items, report.models[0].retries, report.violations) == (0, 0, 0)


def test_a_worker_that_is_started_again_has_the_new_engine(pool: StartedPool, twice: Path, tmp_path: Path) -> None:
    for _ in range(2):  # the second time the same file once more
        with reload(pool, twice) as command:
            command.succeed()
    with reload(pool, save(THRICE, tmp_path, "thrice")) as command:
        assert "generation 3" in command.succeed()
    workers = pool.pids("trtpool.workers")
    with watching(workers) as wait:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        wait()
    with pool.connect() as client:
        assert answer(submit(client, 5)) == 15


def test_another_signature_is_refused_with_the_difference(pool: StartedPool, tmp_path: Path) -> None:
    workers = pool.pids("trtpool.workers")
    with reload(pool, save(WIDE, tmp_path, "wide")) as command:
        assert command.wait() == trtpool.ModelError.exit_code
        said = command.rest(2)
    assert "input x float32 (N, 5) in place of x float32 (N, 4); output y float32 (N, 4) is missing" in said
    assert "output z float32 (N, 4) is new; nothing has changed" in said
    assert pool.pids("trtpool.workers") == workers
    with pool.connect() as client:
        assert answer(submit(client, 5)) == -5
        assert client.status().generation == 0


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("missing.onnx", trtpool.ModelError, "No such file"),
        ("cls=twice.onnx", trtpool.ConfigError, "no model is called 'cls'; there are negate"),
        ("twice.plan", trtpool.ConfigError, "is a TensorRT plan, which needs a GPU"),
    ],
)
def test_what_cannot_be_loaded_is_said(model: str, kind: type[trtpool.TrtpoolError], words: str, pool: StartedPool):
    with reload(pool, model) as command:
        assert command.wait() == kind.exit_code
        assert words in command.rest(2)


def test_without_a_pool(run_dir: Path, twice: Path) -> None:
    with Process(*CLI, "reload", twice, f"--run-dir={run_dir}") as command:
        assert command.wait() == trtpool.PoolNotFound.exit_code


def test_if_one_new_worker_cannot_load_nothing_changes(negate, run_dir, twice, worker_does, tmp_path) -> None:
    once = tmp_path / "once"
    # The second of the new workers ends while it loads; the first is ready by then, or is not.
    env = worker_does(
        load=f"if 'twice' in str(arguments) and not os.path.exists({str(once)!r}):\n"
        f"    try:\n        os.mkdir({str(tmp_path / 'first')!r})\n"
        f"    except FileExistsError:\n        os.mkdir({str(once)!r})\n        os.kill(os.getpid(), signal.SIGKILL)"
    )
    with StartedPool(negate, run_dir=run_dir, workers=2, slots=32, threads=1, env=env) as pool:
        old = pool.pids("trtpool.workers")
        with reload(pool, twice) as command:
            assert command.wait() == trtpool.StartFailed.exit_code
            assert "could not be loaded beside those that serve, nothing has changed: worker" in command.rest(2)
        wait_until(lambda: pool.pids("trtpool.workers") == old, "the new workers have ended")
        with pool.connect() as client:
            assert answer(submit(client, 5)) == -5
        with reload(pool, twice) as command:  # as if nothing had been
            assert "reloaded" in command.succeed()
        with pool.connect() as client:
            assert answer(submit(client, 5)) == 10
        pool.check_at_rest()
        pool.kill(signal.SIGTERM)
        assert pool.wait() == 0


def test_what_an_old_worker_has_is_finished_by_it(negate: Path, run_dir: Path, twice: Path) -> None:
    with StartedPool(negate, run_dir=run_dir, max_batch=2, slots=16) as pool, pool.connect() as client:
        with pool.stopped_worker():
            work = hold(client, [1, 2])
            with reload(pool, twice) as command:
                command.wait_for_line("switched")
                later = submit(client, 7)
                assert answer(later) == 14, "the new engine answers while the old one is not done"
                assert client.status().generation == 1
                os.kill(min(pool.pids("trtpool.workers")), signal.SIGCONT)
                assert {answer(one) for one in work} <= {-1, -2, 2, 4}
                assert "reloaded" in command.succeed()
        wait_all_free(client)


def test_called_off_by_its_command_nothing_changes(negate, run_dir, twice, worker_does) -> None:
    env = worker_does(load="if 'twice' in str(arguments): os.kill(os.getpid(), signal.SIGSTOP)")
    with StartedPool(negate, run_dir=run_dir, slots=32, env=env) as pool:
        old = pool.pids("trtpool.workers")
        with reload(pool, twice) as command:
            command.wait_for_line("loading in 1 new workers")
            with reload(pool, twice) as another:
                assert another.wait() == trtpool.PoolBusy.exit_code
                assert "another reload is under way" in another.rest(2)
            command.kill(signal.SIGINT)
            command.wait()
        wait_until(lambda: pool.pids("trtpool.workers") == old, "the new worker has ended")
        with reload(pool, twice, "--timeout-s=0.5") as command:
            assert command.wait() == trtpool.PoolBusy.exit_code
            assert "called off" in command.rest(2)
        wait_until(lambda: pool.pids("trtpool.workers") == old, "the new worker has ended")
        with pool.connect() as client:
            assert answer(submit(client, 5)) == -5
        # One that is loading when the pool is stopped does not hold it up.
        with reload(pool, twice) as command:
            command.wait_for_line("loading in 1 new workers")
            pool.kill(signal.SIGTERM)
            assert command.wait() == trtpool.PoolClosed.exit_code
            assert "the pool is being stopped" in command.rest(2)
        assert pool.wait() == 0


@pytest.mark.parametrize("moment", ["looking", "loading", "switched"])
def test_a_broker_that_dies_meanwhile_changes_nothing_of_that(moment: str, pool: StartedPool, twice: Path) -> None:
    with producer(pool, STREAM) as stream:
        stream.wait_for_line("answered by -1.0")
        with reload(pool, twice) as command:
            command.wait_for_line(moment)
            os.kill(pool.broker, signal.SIGKILL)
            assert "generation 1 from now on" in command.succeed()
        stream.wait_for_line("answered by 2.0")
        stream.say()
        assert "all " in stream.succeed()
    with pool.connect() as client:
        report = client.status()
        assert (report.epoch, report.generation, report.models[0].path) == (2, 1, str(twice))
        assert report.models[0].failed_items == 0


def test_brokers_after_it_go_on_with_the_new_engines(pool: StartedPool, twice: Path) -> None:
    with reload(pool, twice) as command:
        command.succeed()
    for epoch in (2, 3):
        broker = pool.broker
        with watching([broker]) as wait:
            os.kill(broker, signal.SIGKILL)
            wait()
        with pool.connect() as client:
            assert answer(submit(client, 5)) == 10
            assert (client.status().epoch, client.status().generation) == (epoch, 1)


def test_an_old_worker_that_dies_while_others_load_is_started_again(pool: StartedPool, twice: Path) -> None:
    with producer(pool, STREAM) as stream:
        stream.wait_for_line("answered by -1.0")
        victim = pool.pids("trtpool.workers")[0]
        with reload(pool, twice) as command:
            command.wait_for_line("loading")
            os.kill(victim, signal.SIGKILL)
            assert "generation 1 from now on" in command.succeed()
        stream.wait_for_line("answered by 2.0")
        stream.say()
        assert "all " in stream.succeed()
    wait_until(lambda: len(pool.pids("trtpool.workers")) == 2, "two workers")


def test_several_models_at_once_and_by_a_program(negate: Path, twice: Path, tmp_path: Path) -> None:
    thrice = save(THRICE, tmp_path, "thrice")
    with trtpool.Pool([f"a={negate}", f"b={negate}"], slots=16) as pool:

        def answers() -> list[float]:
            found = []
            for name in "ab":
                with pool.lease(model=name) as lease:
                    lease.inputs["x"][...] = 1
                    found.append(float(lease.submit().result(timeout_s=PATIENCE_S).outputs["y"][0]))
            return found

        with pytest.raises(trtpool.ConfigError, match=r"which model is .*twice\.onnx for"):
            pool.reload(twice)
        with pytest.raises(trtpool.ConfigError, match="two files are given for model 'a'"):
            pool.reload(f"a={twice}", f"a={thrice}")
        with pytest.raises(trtpool.ModelError, match="cannot take the place of model 'b'"):
            pool.reload(f"a={twice}", f"b={save(WIDE, tmp_path, 'wide')}")
        assert answers() == [-1, -1]
        assert pool.reload(f"b={twice}") == 1
        assert answers() == [-1, 2]
        assert pool.reload(f"a={twice}", f"b={thrice}") == 2
        assert answers() == [2, 3]
        assert len([one for one in family(pool.supervisor_pid) if one.cmdline()[-1] == "trtpool.workers"]) == 1
    with pytest.raises(trtpool.PoolClosed, match="was closed"):
        pool.reload(f"a={twice}")
