"""What a model did on each device, and how its times were spread."""

from __future__ import annotations

import hypothesis.strategies as st
import msgspec
from hypothesis import given

from tests.broker.core_rig import MS, Rig, sent
from trtpool.broker import events as e
from trtpool.broker import reporting
from trtpool.broker.meters import HISTOGRAMS, NOTE_BYTES, NOTES_BYTES, Meter, note
from trtpool.broker.reporting import report
from trtpool.ipc import messages as m
from trtpool.ipc.histogram import Histogram, bucket_of
from trtpool.ipc.report import DeviceReport, PoolReport

small = st.integers(0, 10**9)
notes = st.lists(
    st.tuples(st.integers(0, 256), st.integers(1, 16), small, small, small, small, small).filter(
        lambda one: not 0 < one[0] < one[1]
    ),
    max_size=40,
)


def put(meter: Meter, *one: int) -> None:
    note(meter.notes, meter.at, *one)
    meter.at += NOTE_BYTES


def seen(histogram: Histogram) -> dict[int, int]:
    return {bucket: count for bucket, count in enumerate(histogram.counts, histogram.first) if count}


@given(notes)
def test_counting_many_at_a_time_is_counting_each(noted):
    meter = Meter()
    expected: dict[str, dict[int, int]] = {name: {} for name in HISTOGRAMS}

    def expect(name: str, number: int, times: int) -> None:
        if times:
            bucket = bucket_of(number)
            expected[name][bucket] = expected[name].get(bucket, 0) + times

    for one in noted:
        items, batches, queue_ns, with_worker_ns, *device = one
        put(meter, *one)
        expect("dispatch", max(0, with_worker_ns - sum(device)), 1)
        for name, took in zip(("copy_in", "compute", "copy_out"), device, strict=True):
            expect(name, took // batches, batches if took else 0)
        if items:
            expect("sizes", items // batches - 1, batches)
            expect("queue", queue_ns // items, items)
            expect("latency", (queue_ns + with_worker_ns * items) // items, items)
    meter.count()
    assert {name: seen(meter.histogram(name)) for name in HISTOGRAMS} == expected
    assert meter.items == sum(one[0] for one in noted)
    assert meter.batches == sum(one[1] for one in noted)
    assert meter.histogram("queue").total == sum(one[2] for one in noted)
    assert meter.histogram("copy_out").total == sum(one[6] for one in noted)


def device(rig: Rig, model: int = 0) -> DeviceReport:
    (one,) = report(rig.core).models[model].devices
    return one


def test_a_batch_is_counted_where_it_ran():
    rig = Rig((16, 1, 4), gpus=2)
    rig.join(1)
    rig.worker(10, gpu=0)
    rig.worker(11, gpu=1)
    rig.submit(1, 3, gpu=1)
    (run,) = sent(rig.turn(5 * MS), m.Run, 11)
    rig.now_ns += 7 * MS
    rig.finish(11, run, compute_ns=2 * MS)
    one = device(rig)
    assert (one.gpu, one.items, one.batches) == (1, 3, 1)
    assert one.queue == Histogram(bucket_of(5 * MS), (3,), 15 * MS)
    assert one.latency == Histogram(bucket_of(12 * MS), (3,), 36 * MS)
    assert one.dispatch.total == 5 * MS - 4
    assert one.compute == Histogram(bucket_of(2 * MS), (1,), 2 * MS)
    assert (one.copy_in.total, one.copy_out.total) == (1, 3)
    assert one.sizes == Histogram(bucket_of(2), (1,), 2)
    (client,) = report(rig.core).clients
    assert (client.pid, client.items, client.slots) == (101, 3, 3)


def test_work_of_an_owner_that_ended_is_a_batch_without_items():
    rig = Rig()
    rig.join(1)
    rig.worker()
    rig.submit(1)
    (run,) = sent(rig.turn(), m.Run, 10)
    rig.do(e.ProducerEnded(1))
    rig.finish(10, run)
    one = device(rig)
    assert (one.items, one.batches, one.latency.count, one.compute.count) == (0, 1, 0, 1)


def test_notes_are_counted_when_there_is_no_room_for_more():
    rig = Rig()
    rig.join(1)
    rig.worker()
    ended = NOTES_BYTES // NOTE_BYTES + 3
    for _ in range(ended):
        lease = rig.submit(1)
        (run,) = sent(rig.turn(), m.Run, 10)
        rig.finish(10, run)
        rig.say(1, m.Release(lease, 0, 1))
    assert rig.core.models[0].meters[None].batches == ended - 3
    assert device(rig).batches == ended


def test_the_wait_for_slots_is_counted():
    rig = Rig((4, 1, 1))
    rig.join(1, 2)
    lease = rig.lease(1, 3)
    rig.say(2, m.Lease(5, 0, 2, None))
    rig.turn()
    rig.now_ns += 9 * MS
    rig.say(1, m.Release(lease, 0, 3))
    assert sent(rig.turn(), m.Grant, 2)
    waits = report(rig.core).models[0].leases
    assert waits == Histogram(0, (1, *[0] * (bucket_of(9 * MS) - 1), 1), 9 * MS)
    rig.say(2, m.Lease(6, 0, 1, 0))
    assert report(rig.core).models[0].leases.count == 3


def test_ends_of_workers_are_counted():
    rig = Rig()
    rig.worker(10)
    rig.do(e.WorkerEnded(10, "SIGKILL"))
    assert report(rig.core).worker_ends == 1


def test_a_wait_of_weeks_for_many_items_does_no_harm():
    rig = Rig((2, 2**20, 2**20))
    rig.join(1)
    rig.submit(1)
    rig.now_ns += 10**15
    rig.worker()
    (run,) = sent(rig.turn(), m.Run, 10)
    rig.finish(10, run)
    assert device(rig).items == 2**20


def test_a_report_of_very_many_models_and_gpus_fits_a_frame(monkeypatch):
    monkeypatch.setattr(reporting, "MAX_METERS", 3)
    rig = Rig((16, 1, 4), (16, 1, 4), gpus=2)
    rig.join(1)
    for gpu in range(2):
        rig.worker(10 + gpu, gpu=gpu)
        for model in range(2):
            rig.submit(1, 2, model, gpu=gpu)
            (run,) = sent(rig.turn(), m.Run, 10 + gpu)
            rig.finish(10 + gpu, run)
    (one,) = report(rig.core).models[0].devices
    assert (one.gpu, one.items, one.batches, one.compute.count) == (-1, 4, 2, 2)
    assert (one.copied_in_bytes, one.copied_out_bytes) == (4 * 8, 4 * 4)
    again = msgspec.json.decode(msgspec.json.encode(report(rig.core)), type=PoolReport)
    assert again == report(rig.core)
