"""A client and its handles in other processes: forks, multiprocessing, interrupts."""

from __future__ import annotations

import signal

import pytest

from tests.system.rig import hold, producer, wait_all_free

TRANSPORTS = ["lifeline", "zmq"]

FORKED = """
import gc, traceback

def child(lease, result):
    sentence = "call trtpool.connect() in the child, or give the child pool.handle(), which connects by itself"
    calls = [
        lambda: pool.lease(model="negate"),
        lambda: pool.lease_many(2, model="negate"),
        lambda: pool.infer(x=np.zeros(4, "f4"), model="negate"),
        lambda: pool.map(print, [1], model="negate"),
        pool.status,
        lambda: lease.inputs["x"],
        lease.submit,
        lambda: result.outputs["y"],
    ]
    for call in calls:
        try:
            call()
        except trtpool.ForkedClient as error:
            assert sentence in str(error), error
        else:
            raise AssertionError("the parent's client was used in its child")
    assert pool.session.link._lifeline.fileno() == -1
    lease.release()
    pool.close()
    with trtpool.connect(run_dir=run_dir, transport=os.environ["TRANSPORT"]) as own:
        assert own.infer(x=np.full(4, 3, "f4"), model="negate")["y"].tolist() == [-3] * 4

def value(lease):
    lease.inputs["x"][...] = 2
    return lease.submit().result(timeout_s=60)

first = pool.lease(model="negate")
result = value(first)
lease = pool.lease(model="negate")
if (pid := os.fork()) == 0:
    try:
        child(lease, result)
        del lease, result, first, pool
        gc.collect()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert result.outputs["y"].tolist() == [-2] * 4
assert value(lease).outputs["y"].tolist() == [-2] * 4
first.release()
lease.release()
pool.close()
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_forked_child_is_told_what_to_do_and_harms_nobody(transport, pool, client):
    with producer(pool, FORKED, transport=transport) as one:
        assert one.succeed() == ""
    wait_all_free(client)


BUSY_FORK = """
import threading

# The child inherits locks that threads of its parent hold, and none of those threads.
stop = threading.Event()

def work():
    while not stop.is_set():
        pool.infer(x=np.zeros((5, 4), "f4"), model="negate")

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
handle = pool.handle()
for value in range(10):
    if (pid := os.fork()) == 0:
        try:
            pool.lease(model="negate")
        except trtpool.ForkedClient:
            pass
        os._exit(0 if handle.infer(x=np.full(4, value, "f4"), model="negate")["y"].tolist() == [-value] * 4 else 1)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
pool.close()
"""


def test_forks_while_threads_use_the_client(pool, client):
    with producer(pool, BUSY_FORK) as one:
        assert one.succeed() == ""
    wait_all_free(client)


MULTIPROCESSING = """
import functools, multiprocessing

ask = functools.partial(pool.handle().infer, model="negate")
ask({"x": np.zeros(4, "f4")})  # this process has connected before it forks
with multiprocessing.get_context(sys.argv[2]).Pool(2) as processes:
    answers = processes.map(ask, [{"x": np.full((3, 4), value, "f4")} for value in range(20)], chunksize=1)
    assert [answer["y"][0, 0] for answer in answers] == [-value for value in range(20)]
    print(pool.status().producers)
    processes.close()
    processes.join()
pool.close()
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_handle_under_multiprocessing(method, pool, client):
    with producer(pool, MULTIPROCESSING, method) as one:
        # This test's client, the program's, its handle's, and one in each process that had something to do.
        assert int(one.line()) in (4, 5)
        assert one.succeed() == ""
    wait_all_free(client)


INTERRUPTED = """
lease = pool.lease(model="negate")
lease.inputs["x"][...] = 7
submitted = lease.submit()
try:
    print("waiting", flush=True)
    submitted.result()
except KeyboardInterrupt:
    wait("interrupted")
assert submitted.result(timeout_s=60).outputs["y"].tolist() == [-7] * 4
lease.release()
assert pool.infer(x=np.ones(4, "f4"), model="negate")["y"].tolist() == [-1] * 4
pool.close()
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_interrupt_leaves_the_client_usable(transport, pool, client):
    with producer(pool, INTERRUPTED, transport=transport) as one:
        with pool.stopped_worker():
            running = hold(client, [1, 2])
            one.wait_for_line("waiting")
            one.kill(signal.SIGINT)
            one.wait_for_line("interrupted")
        one.say()
        assert one.succeed() == ""
        for work in running:
            work.release()
    wait_all_free(client)


ASYNC = """
import asyncio

async def one(value):
    with pool.lease(model="negate", timeout_s=60) as lease:
        lease.inputs["x"][...] = value
        return (await lease.submit()).outputs["y"].tolist()

async def main():
    limit = asyncio.Semaphore(8)  # leasing blocks the loop, so no more are asked for than there are

    async def limited(value):
        async with limit:
            return await one(value)

    return await asyncio.gather(*map(limited, range(100)))

assert asyncio.run(main()) == [[-value] * 4 for value in range(100)]
pool.close()
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_awaiting_a_real_pool(transport, pool, client):
    with producer(pool, ASYNC, transport=transport) as one:
        assert one.succeed() == ""
    wait_all_free(client)


def test_a_client_that_is_never_closed_ends_quietly_with_its_process(pool, client):
    code = """
    import concurrent.futures
    lease = pool.lease(model="negate")
    lease.inputs["x"][...] = 1
    submitted = lease.submit()
    concurrent.futures.wait([submitted])  # which starts the background thread
    view = submitted.result().outputs["y"]
"""
    with producer(pool, code) as one:
        assert one.succeed() == ""
    wait_all_free(client)
