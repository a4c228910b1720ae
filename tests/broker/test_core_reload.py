"""Workers that take the place of others; test_core_machine and test_ledger do it at any moment."""

from __future__ import annotations

from tests.broker.core_rig import Rig, sent
from trtpool.broker import events as e
from trtpool.broker.reporting import report
from trtpool.ipc import messages as m


def ready() -> Rig:
    """Producer 1, worker 10, which serves, and worker 11, which stands by."""
    rig = Rig()
    rig.join(1)
    rig.worker(10)
    rig.worker(11, ahead=1)
    return rig


def runs(actions: list[e.Action]) -> list[tuple[int, int]]:
    """Batches that were sent, and to whom."""
    found = [one for one in actions if isinstance(one, e.Send) and isinstance(one.message, m.Run)]
    return [(one.peer, one.message.batch) for one in found]


def test_a_worker_that_stands_by_gets_no_work():
    rig = ready()
    for _ in range(3):  # full batches, more than the one that serves is given at once
        rig.submit(1, 4)
    rig.turn()
    assert rig.states()[2:4] == (4, 8), "some waits, though a worker is idle"
    assert not rig.core.workers[11].batches


def test_from_the_switch_on_the_new_one_gets_all_and_the_old_one_finishes():
    rig = ready()
    rig.submit(1)
    (old,) = sent(rig.turn(), m.Run, 10)
    rig.submit(1)
    assert rig.switch(1) == [e.Switched(1)]
    ((peer, _),) = runs(rig.turn())
    assert peer == 11
    assert rig.states()[3] == 2, "what the old one has runs on"
    (done,) = sent(rig.finish(10, old), m.Done, 1)
    assert done.status == m.OK
    actions = rig.turn()
    assert e.Leaves(10) in actions
    assert sent(actions, m.Bye, 10)
    assert e.Leaves(10) not in rig.turn(), "it is told once"


def test_an_idle_one_that_was_replaced_leaves_at_once():
    rig = ready()
    rig.switch(1)
    assert e.Leaves(10) in rig.turn()


def test_what_an_old_one_had_when_it_died_is_run_by_a_new_one():
    rig = ready()
    rig.submit(1, 2)
    rig.turn()
    rig.switch(1)
    rig.do(e.WorkerEnded(10, "SIGKILL"))
    (again,) = sent(rig.turn(), m.Run, 11)
    assert again.attempt == 1


def test_the_same_switch_again_changes_nothing():
    rig = ready()
    rig.switch(1)
    rig.turn()
    assert rig.switch(1, "/elsewhere.onnx") == [e.Switched(1)]
    assert report(rig.core).models[0].path == "/new.onnx"
    assert rig.turn() == []


def test_an_old_one_that_is_ready_too_late_leaves():
    rig = ready()
    rig.switch(1)
    rig.worker(12, ahead=-1)
    assert e.Leaves(12) in rig.turn()


def test_an_old_one_that_hangs_is_killed_as_ever():
    rig = Rig(batch_timeout_s=0.001)
    rig.join(1)
    rig.worker(10)
    rig.worker(11, ahead=1)
    rig.submit(1)
    rig.turn()
    rig.switch(1)
    assert [one.peer for one in rig.turn(2_000_000) if isinstance(one, e.Hung)] == [10]
    assert e.Leaves(10) not in rig.turn()


def test_the_report_says_who_answers():
    rig = ready()
    assert (report(rig.core).generation, report(rig.core).models[0].path) == (0, "/m.onnx")
    rig.switch(1)
    now = report(rig.core)
    assert (now.generation, now.models[0].path) == (1, "/new.onnx")
    assert {worker.pid: worker.generation for worker in now.workers} == {1010: 0, 1011: 1}
