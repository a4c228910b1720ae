"""The core on pools with several GPUs: work that one GPU alone may run, beside work that any may run."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from tests.broker.core_rig import MS, Rig, sent
from trtpool.broker import events as e
from trtpool.broker.batching import rows_of
from trtpool.ipc import messages as m
from trtpool.ipc.report import PoolReport

HUGE = 2**31 - 1


class GpuRig(Rig):
    """A pool with one worker on each GPU: peer 10 on GPU 0, 11 on GPU 1, ...; producers 1 and 2."""

    def __init__(self, gpus: int = 2, *, slots: int = 32, lanes: int = 1, max_delay_us: int = 0) -> None:
        super().__init__((slots, 1, 4), gpus=gpus, max_delay_us=max_delay_us)
        self.join(1, 2)
        for gpu in range(gpus):
            self.worker(10 + gpu, lanes, gpu)

    def put(self, count: int = 1, gpu: int | None = None, *, peer: int = 1, deadline_ns: int | None = None) -> int:
        """Lease slots that are one run, and submit them a bit later than the last; the turn goes on.

        Returns the lease's id.
        """
        self.now_ns += 1
        ((lease_id, run),) = sent(self.say(peer, m.Lease(1, 0, count, 0)), m.Grant, peer)[0].leases
        assert run.count == count
        assert self.say(peer, m.Submit(lease_id, 0, count, 0, count, deadline_ns, 0, gpu)) == []
        return lease_id

    def go(self, after_ns: int = 0) -> list[tuple[int, list[int]]]:
        """End the turn; returns ``(worker, slots)`` of each batch that went out."""
        return [(peer, slots_of(run)) for peer, run in runs_of(self.turn(after_ns))]

    def running(self, peer: int) -> m.Run:
        """The oldest batch of a worker, as it was told of it."""
        batch = next(iter(self.core.workers[peer].batches.values()))
        return m.Run(batch.id, batch.attempt, 0, rows_of(batch.works, 1))

    def end_oldest(self, peer: int, *, fails: bool = False) -> list[e.Action]:
        """A worker ends its oldest batch."""
        run = self.running(peer)
        return self.say(peer, m.Failed(run.batch, run.attempt, "no")) if fails else self.finish(peer, run)

    def release(self, actions: list[e.Action], peer: int = 1) -> None:
        """Give back what has ended."""
        for done in sent(actions, m.Done, peer):
            self.say(peer, m.Release(done.lease, done.first, done.count))


@pytest.fixture
def rig() -> GpuRig:
    return GpuRig()


def runs_of(actions: list[e.Action]) -> list[tuple[int, m.Run]]:
    return [(a.peer, a.message) for a in actions if isinstance(a, e.Send) and isinstance(a.message, m.Run)]


def slots_of(run: m.Run) -> list[int]:
    return [slot for rows in run.rows for slot in range(rows.first, rows.first + rows.count)]


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(("gpus", "gpu"), [(0, 0), (0, HUGE), (1, 1), (2, 2), (2, HUGE)])
def test_a_gpu_that_the_pool_does_not_have(gpus, gpu):
    rig = GpuRig(gpus)
    lease = rig.lease(1)
    error = rig.refused(1, m.Submit(lease, 0, 1, 0, 1, gpu=gpu))
    assert f"GPU {gpu} of a pool with {gpus} GPUs" in error.text
    assert rig.say(1, m.Submit(lease, 0, 1, 0, 1)) == [], "nothing was used up"
    rig.do(e.WorkerJoined(20, 1))
    rig.refused(20, m.Ready("a GPU", 1, gpu))
    assert 20 not in dict(rig.go())


def test_the_figures_say_which_gpu_a_worker_is_on(rig):
    (answer,) = sent(rig.say(1, m.Status(1)), m.Report)
    workers = msgspec.json.decode(answer.body, type=PoolReport).workers
    assert [(one.pid, one.device, one.gpu) for one in workers] == [(1010, "a GPU", 0), (1011, "a GPU", 1)]


# --- Who runs what -------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 3])
def test_pinned_work_goes_to_its_gpu_alone_and_is_in_no_batch_with_other_work(lanes):
    rig = GpuRig(3, lanes=lanes)
    for gpu in (2, 0, None, 2, 1, 0):
        rig.put(1, gpu)
    assert sorted(rig.go()) == [(10, [1, 5]), (11, [2]), (11, [4]), (12, [0, 3])]


def test_the_oldest_goes_first_pinned_or_not(rig):
    short_batches(rig)
    for gpu in (1, None, 1, None):
        rig.put(1, gpu)
    assert rig.go() == [(11, [0, 2]), (10, [1, 3])]
    for gpu in (None, 1):
        rig.put(1, gpu)
        assert rig.go(1) == [], "both are busy"
    rig.end_oldest(11)
    assert rig.go() == [(11, [4])], "the pinned one is younger"
    rig.end_oldest(10)
    assert rig.go() == [], "and is for the other GPU"
    rig.end_oldest(11)
    assert rig.go() == [(11, [5])]


def test_work_for_any_gpu_goes_to_the_one_that_has_least_to_do(rig):
    rig.put(1, 0)
    assert rig.go() == [(10, [0])]
    rig.put(1)
    assert rig.go() == [(11, [1])]


@pytest.mark.parametrize("gpu", [0, 1])
def test_work_for_any_gpu_leaves_alone_the_one_that_pinned_work_waits_for(rig, gpu):
    rig.put(1)
    rig.put(1, gpu)
    assert rig.go() == [(11 - gpu, [0]), (10 + gpu, [1])]


def test_pinned_work_for_a_busy_gpu_holds_nobody_up(rig):
    rig.put(16, 0)
    rig.put(4, 1, peer=2)
    rig.put(2, peer=2)
    assert sorted(rig.go()) == [
        (10, [0, 1, 2, 3]), (10, [4, 5, 6, 7]), (11, [16, 17, 18, 19]), (11, [20, 21]),
    ]  # fmt: skip
    for _ in range(2):
        assert sent(rig.end_oldest(11), m.Done, 2)
        assert rig.go() == [], "what is left is the other GPU's"
    rig.end_oldest(10)
    assert rig.go() == [(10, [8, 9, 10, 11])]


def test_pinned_work_waits_for_its_gpu_and_nothing_waits_for_it(rig):
    rig.do(e.WorkerEnded(11, "SIGKILL"))
    rig.put(2, 1)
    for slot in range(2, 6):
        rig.put(1, 0 if slot % 2 else None)
        assert rig.go(MS) == [(10, [slot])]
        assert sent(rig.end_oldest(10), m.Done)
    rig.worker(12, gpu=1)
    assert rig.go() == [(12, [0, 1])]


def test_a_worker_without_a_gpu_takes_no_pinned_work(rig):
    rig.do(e.WorkerEnded(10, ""))
    rig.worker(20)
    rig.put(1, 0)
    assert rig.go() == []
    rig.put(1, 1)
    rig.put(1)
    assert sorted(rig.go()) == [(11, [1]), (20, [2])]


def test_several_workers_on_one_gpu_share_its_work(rig):
    rig.worker(20, gpu=1)
    for slot, worker in enumerate((11, 20, 11, 20)):
        rig.put(1, 1)
        assert rig.go() == [(worker, [slot])]


def test_models_share_a_gpu_by_age():
    rig = Rig((8, 1, 4), (8, 1, 4), gpus=2)
    rig.join(1)
    leases = [rig.lease(1, 1, model) for model in (0, 1, 0, 1)]
    for index, (lease, gpu) in enumerate(zip(leases, (1, 1, None, 0), strict=True)):
        rig.now_ns += 1
        rig.say(1, m.Submit(lease, 0, 1, 0, 1, gpu=gpu))
        assert rig.core.models[index % 2].line(gpu).queue.items == 1
    rig.worker(11, gpu=1)
    runs = runs_of(rig.turn())
    assert [(peer, run.model, slots_of(run)) for peer, run in runs] == [(11, 0, [0]), (11, 1, [0])]
    rig.finish(11, runs[0][1])
    ((_, run),) = runs_of(rig.turn())
    assert (run.model, slots_of(run)) == (0, [1])
    rig.worker(10, gpu=0)
    ((peer, run),) = runs_of(rig.turn())
    assert (peer, run.model, slots_of(run)) == (10, 1, [1])


def short_batches(rig: Rig) -> None:
    """From here on batches are short: one that is not full is not sent ahead."""
    rig.core.models[0].run_ns = 1000


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("small", [None, 0, 1])
def test_full_batches_starve_no_small_one(small, lanes):
    """All lanes are busy whenever one comes free, and all that is pinned otherwise always fills a batch."""
    rig = GpuRig(lanes=lanes, slots=128)
    short_batches(rig)

    def feed() -> list[int]:
        """Fill the others' queues, and end the turn; returns the slots that went out."""
        for gpu in {None, 0, 1} - {small}:
            if rig.core.models[0].line(gpu).queue.items < 4:
                rig.put(4, gpu)
        return [slot for _, slots in rig.go(1000) for slot in slots]

    while feed():
        pass
    assert [len(worker.batches) for worker in rig.core.workers.values()] == [lanes + 1, lanes + 1]
    lease = rig.core.producers[2].leases[rig.put(1, small, peer=2)]
    ends = 0
    while lease.first not in feed():
        rig.release(rig.end_oldest(10 + ends % 2))
        ends += 1
        assert ends <= 2 * (lanes + 2), "it is starved"
    assert ends, "the workers were busy"


# --- Time ----------------------------------------------------------------------------------------


def test_each_gpus_work_is_held_back_by_itself():
    rig = GpuRig(max_delay_us=1000)
    rig.put(3, 1)
    first_ns = rig.now_ns + MS
    assert rig.go() == []
    rig.now_ns += MS // 2
    rig.put(3)
    second_ns = rig.now_ns + MS
    rig.put(4, 0)
    assert rig.go() == [(10, [6, 7, 8, 9])], "a full one waits for nothing"
    assert rig.core.next_timer_ns() == first_ns
    assert rig.go(first_ns - rig.now_ns - 1) == []
    assert rig.go(1) == [(11, [0, 1, 2])]
    assert rig.core.next_timer_ns() == second_ns
    rig.end_oldest(11)
    assert rig.go(second_ns - rig.now_ns) == [(11, [3, 4, 5])]


@pytest.mark.parametrize("suspect", [False, True])
def test_a_deadline_ends_pinned_work_whose_gpu_is_gone(rig, suspect):
    lease = rig.put(1, 1, deadline_ns=5 * MS)
    if suspect:
        assert rig.go()
    rig.do(e.WorkerEnded(11, "SIGKILL"))
    assert rig.core.books.suspects == suspect
    assert rig.turn(5 * MS - 1) == []
    (done,) = sent(rig.turn(1), m.Done)
    assert (done.lease, done.status) == (lease, m.DEADLINE)
    assert rig.states() == (31, 0, 0, 0, 1)
    assert rig.core.books.suspects == 0


@pytest.mark.parametrize("suspect", [False, True])
def test_pinned_work_whose_gpu_is_gone_is_cancelled(rig, suspect):
    lease = rig.put(1, 1)
    if suspect:
        assert rig.go()
    rig.do(e.WorkerEnded(11, "SIGKILL"))
    rig.put(1, 0)
    (done,) = sent(rig.say(1, m.Cancel(lease, 0, 1)), m.Done)
    assert (done.lease, done.status) == (lease, m.CANCELLED)
    assert rig.core.books.suspects == 0
    assert rig.go() == [(10, [1])]


@pytest.mark.parametrize("event", [e.ProducerClosed(1), e.ProducerEnded(1)])
def test_pinned_work_goes_with_its_owner(rig, event):
    rig.put(2, 1)
    assert rig.go()
    rig.do(e.WorkerEnded(11, "SIGKILL"))
    assert rig.core.books.suspects == 2
    rig.put(3, 1)
    rig.put(1, 1, peer=2)
    rig.do(event)
    rig.worker(12, gpu=1)
    assert rig.core.books.suspects == 0
    assert rig.go() == [(12, [5])]


@pytest.mark.parametrize("suspect", [False, True])
def test_a_drain_waits_for_pinned_work(rig, suspect):
    rig.put(1, 1)
    if suspect:
        assert rig.go()
    rig.do(e.WorkerEnded(11, "SIGKILL"))
    rig.do(e.Drain())
    assert rig.turn(MS) == []
    rig.worker(12, gpu=1)
    assert rig.go() == [(12, [0])]
    assert sent(rig.end_oldest(12), m.Done)
    assert rig.turn() == [e.Drained()]


# --- Work that failed, and runs alone ------------------------------------------------------------


def test_a_suspect_waits_for_its_gpu_and_no_worker_waits_for_it(rig):
    rig.put(2, 1)
    assert rig.go() == [(11, [0, 1])]
    rig.do(e.WorkerEnded(11, "SIGKILL"))
    for slot, gpu in ((2, None), (3, 0)):
        rig.put(1, gpu)
        assert rig.go() == [(10, [slot])]
        assert sent(rig.end_oldest(10), m.Done)
    rig.worker(12, gpu=1)
    rig.put(1, 1)
    for slot in (0, 1, 4):
        assert rig.go() == [(12, [slot])], "each alone, and before what came later"
        assert rig.running(12).attempt == (slot != 4)
        assert sent(rig.end_oldest(12), m.Done)


def test_suspects_of_a_gpu_that_is_gone_hold_up_no_others(rig):
    for gpu in (1, 0):
        rig.put(1, gpu)
    assert sorted(rig.go()) == [(10, [1]), (11, [0])]
    rig.do(e.WorkerEnded(11, "SIGKILL"))
    rig.end_oldest(10, fails=True)
    assert rig.core.books.suspects == 2
    assert rig.go() == [(10, [1])]
    assert sent(rig.end_oldest(10), m.Done)
    assert rig.core.books.suspects == 1


def test_the_oldest_suspects_go_first_whatever_they_are_pinned_to(rig):
    for gpu in (0, 1, 0):
        rig.put(1, gpu)
        if gpu == 0:
            rig.go()
    rig.end_oldest(10)
    for peer in (10, 11):
        rig.end_oldest(peer, fails=True)
    assert rig.go() == [(11, [1])]
    rig.end_oldest(11)
    assert rig.go() == [(10, [2])]


def test_a_suspect_for_any_gpu_goes_where_no_older_work_waits_that_has_no_choice(rig):
    short_batches(rig)
    rig.put(1, 0)
    assert rig.go() == [(10, [0])]
    rig.put(1, 0)
    assert rig.go(1) == []
    rig.put(1)
    assert rig.go(1) == [(11, [2])]
    rig.end_oldest(11, fails=True)
    assert rig.go() == [(11, [2])], "worker 10 would be first, and has older work to do"
    rig.end_oldest(10)
    assert rig.go() == [(10, [1])]
    rig.put(1, 0)
    rig.end_oldest(11, fails=True)
    assert rig.go(1) == [], "what is left for worker 10 is younger than the suspect, which waits until it is idle"
    rig.end_oldest(10)
    assert rig.go() == [(10, [2])]


def test_endless_suspects_do_not_starve_what_is_pinned_to_their_gpu():
    """Worker 11 fails all that it is given, faster than worker 10 can try it again."""
    rig = GpuRig(slots=256)
    rig.put(8)
    pinned = -1
    for turn in range(50):
        rig.put(4)
        if turn == 10:
            pinned = rig.put(1, 0, peer=2)
        rig.go()
        rig.end_oldest(11, fails=True)
        actions = rig.end_oldest(10)
        rig.release(actions)
        assert rig.core.books.suspects, "there always are some"
        if pinned in [done.lease for done in sent(actions, m.Done, 2)]:
            return
    pytest.fail("it is starved")


@pytest.mark.parametrize("deadly", [True, False])
@pytest.mark.parametrize("gpus", [2, 3])
def test_poison_fails_alone_on_its_own_gpu_and_all_others_succeed(gpus, deadly):
    rig = GpuRig(gpus, slots=60)
    pins: list[int | None] = [*range(gpus), None]
    pin_of: dict[int, int | None] = {}
    for gpu in 3 * pins:
        lease = rig.core.producers[1].leases[rig.put(3, gpu)]
        pin_of.update(dict.fromkeys(range(lease.first, lease.first + 3), gpu))
    first_of = {lease.id: lease.first for lease in rig.core.producers[1].leases.values()}
    poison = {0, 5, 3 * gpus + 1, 6 * gpus + 4}
    assert {pin_of[slot] for slot in poison} == {0, 1, None}
    fresh = itertools.count(100)
    status_of: dict[int, int] = {}
    turns = 0
    while len(status_of) < len(pin_of):
        turns += 1
        assert turns < 500
        for peer, run in runs_of(rig.turn(MS)):
            if peer not in rig.core.workers:
                continue  # it ended meanwhile, with an earlier batch of this turn
            gpu = rig.core.workers[peer].gpu
            slots = slots_of(run)
            assert {pin_of[slot] for slot in slots} <= {None, gpu}
            if not poison.intersection(slots):
                answers = rig.finish(peer, run)
            elif deadly:
                answers = rig.do(e.WorkerEnded(peer, "SIGSEGV"))
                rig.worker(next(fresh), gpu=gpu)
            else:
                answers = rig.say(peer, m.Failed(run.batch, run.attempt, "bad input"))
            for done in sent(answers, m.Done, 1):
                for slot in range(first_of[done.lease] + done.first, first_of[done.lease] + done.first + done.count):
                    assert slot not in status_of, "it ends once"
                    status_of[slot] = done.status
    bad = m.WORKER_DIED if deadly else m.ENGINE_FAILED
    assert status_of == {slot: bad if slot in poison else m.OK for slot in pin_of}
    assert rig.core.books.suspects == 0
