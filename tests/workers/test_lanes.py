"""Lanes on a fake GPU: straight from the planes and back, graphs, several in flight, and nothing left behind."""

from __future__ import annotations

import itertools
import logging
import math
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.fake_cuda import TICK_NS, FakeRuntime
from tests.workers.fake_device import NET_S, Event, cudaError_t
from tests.workers.fake_tensorrt import FAULT, Tensor, batched, neg
from tests.workers.gpu_rig import HOT, POISON, GpuRig, batch_of
from trtpool.ipc.errors import DeviceUnavailable
from trtpool.workers import copies, forms, lanes
from trtpool.workers.engine import BatchRefused, EngineError, Rows

SUM = (
    "sum",
    [batched("a", (3,)), batched("b", (3,))],
    [Tensor("sum", ("N", 3)), Tensor("twice", ("N", 3))],
)
"""Two inputs and two outputs, of items of 12 bytes, which no page is a multiple of."""

SCATTERED = [Rows(9, 1, 1), Rows(0, 2, 2), Rows(5, 1, 1), Rows(11, 3, 3)]


@pytest.fixture(params=[False, True], ids=["lazy", "threads"])
def runtime(request):
    return FakeRuntime(threads=request.param)


# --- Copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies_batches", [True, False])
@pytest.mark.parametrize("batch", [batch_of(5, 3), [Rows(7, 2, 2), Rows(1, 1, 1)], SCATTERED], ids=["1", "2", "4"])
def test_copies_are_from_and_to_the_rows_of_the_planes(batch, copies_batches, tmp_path):
    runtime = FakeRuntime(copies_batches=copies_batches)
    with GpuRig(tmp_path, SUM, runtime=runtime, lanes=1) as rig:
        runtime.copies.clear()
        rig.run(batch)
        spec = rig.engine.spec
        copies_in = [(copy.host, copy.size) for copy in runtime.copies if copy.to_device]
        copies_out = [(copy.host, copy.size) for copy in runtime.copies if not copy.to_device]
        assert copies_in == rig.addresses(spec.inputs, batch)
        assert copies_out == rig.addresses(spec.outputs, batch)
        many = copies_batches and 2 * len(batch) >= copies.BATCH_COPIES
        assert {copy.batched for copy in runtime.copies} == {many}
        assert runtime.calls["cudaMemcpyBatchAsync"] == 2 * many


def test_items_lie_dense_on_the_device(tmp_path):
    with GpuRig(tmp_path, lanes=1) as rig:
        rig.runtime.copies.clear()
        rig.run(SCATTERED)
        given = [copy for copy in rig.runtime.copies if copy.to_device]
        assert [copy.size for copy in given] == [16, 32, 16, 48]
        assert [copy.device - given[0].device for copy in given] == [0, 16, 48, 64]


@pytest.mark.parametrize("items_per_slot", [1, 3])
@pytest.mark.parametrize("copies_batches", [True, False])
def test_copies_are_cut_where_registrations_meet(copies_batches, items_per_slot, tmp_path):
    runtime = FakeRuntime(copies_batches=copies_batches)
    sizes = {"slots": 900 // items_per_slot, "items_per_slot": items_per_slot, "max_batch": 60}
    with GpuRig(tmp_path, SUM, runtime=runtime, chunk_bytes=4096, **sizes) as rig:
        bounds = rig.registration.bounds
        assert len(bounds) > 9
        plane = rig.inputs["a"].ctypes.data
        assert plane + 4096 in bounds
        across = 4096 // 12 // items_per_slot  # the slot that lies on both sides
        for batch in (
            [Rows(across, 1, items_per_slot)],
            [Rows(across - 10 // items_per_slot, 20, 20 * items_per_slot)],
            [Rows(across + 9, 2, 2 * items_per_slot), Rows(across - 2, 5, 5 * items_per_slot), Rows(0, 1, 1)],
        ):
            runtime.copies.clear()
            rig.run(batch)
            assert all(
                bounds[index] - copy.host >= copy.size
                for copy in runtime.copies
                for index in [next(number for number, bound in enumerate([*bounds, 1 << 62]) if bound > copy.host)]
                if index < len(bounds)
            )
            parts = [(copy.host, copy.size) for copy in runtime.copies if copy.to_device]
            whole = rig.addresses(rig.engine.spec.inputs, batch)
            assert len(parts) > len(whole)
            assert sum(size for _, size in parts) == sum(size for _, size in whole)


def test_a_batch_that_ends_in_part_of_a_slot(tmp_path):
    with GpuRig(tmp_path, items_per_slot=3, slots=8, max_batch=9) as rig:
        for batch in ([Rows(2, 2, 4)], [Rows(7, 1, 1), Rows(0, 1, 3), Rows(4, 2, 5)]):
            rig.run(batch)


def test_inputs_are_read_when_the_device_gets_there_and_not_before(tmp_path):
    """No copy on the host: what the plane holds when the copy runs is what the engine gets."""
    with GpuRig(tmp_path, lanes=1) as rig:
        rig.engine.launch(0, batch_of(4))
        rig.inputs["x"][:4] = 77
        rig.engine.wait(0)
        rig.check(batch_of(4))


def test_a_small_batch_is_padded_on_the_device_alone(tmp_path):
    with GpuRig(tmp_path, neg(least=4), lanes=1) as rig:
        rig.run(batch_of(8))
        rig.runtime.copies.clear()
        rig.run(batch_of(1, 20))
        assert [copy.size for copy in rig.runtime.copies] == [16, 16]


def test_the_largest_batch_may_be_below_the_plans_smallest(tmp_path):
    with GpuRig(tmp_path, neg(least=4), max_batch=2) as rig:
        rig.run(batch_of(1))
        rig.run(batch_of(2))


def test_the_phases_take_time(runtime, tmp_path):
    with GpuRig(tmp_path, runtime=runtime) as rig:
        rig.engine.launch(1, SCATTERED)
        times = rig.engine.wait(1)
        assert min(times.copy_in_ns, times.compute_ns, times.copy_out_ns) > 0
        assert times.gathered_items == 0


def test_the_phases_are_those_of_copies_and_engine(tmp_path):
    runtime = FakeRuntime(copies_batches=False)
    with GpuRig(tmp_path, runtime=runtime) as rig:
        times = []
        for batch in ([Rows(2, 8, 8)], [Rows(9, 2, 2), Rows(0, 2, 2), Rows(5, 2, 2), Rows(12, 2, 2)]):
            rig.engine.launch(0, batch)
            times.append(rig.engine.wait(0))
        one, four = times
        assert four.copy_in_ns - one.copy_in_ns == pytest.approx(3 * TICK_NS, abs=2)
        assert four.compute_ns == pytest.approx(one.compute_ns, abs=2)
        assert four.copy_out_ns - one.copy_out_ns == pytest.approx(3 * TICK_NS, abs=2)


# --- Graphs --------------------------------------------------------------------------------------


def test_a_size_is_captured_when_it_comes_again(tmp_path):
    with GpuRig(tmp_path, lanes=1) as rig:
        plain, captured, launched = (rig.run(batch_of(3, first)) for first in (0, 4, 8))
        assert (plain["execute_async_v3"], plain["cudaGraphLaunch"], plain["cudaStreamBeginCapture"]) == (1, 0, 0)
        assert (captured["execute_async_v3"], captured["cudaStreamBeginCapture"]) == (2, 1)
        assert (launched["execute_async_v3"], launched["cudaGraphLaunch"], launched["cudaStreamBeginCapture"]) == (
            0,
            1,
            0,
        )


def test_the_smallest_and_the_largest_are_captured_before_the_first_request(tmp_path):
    with GpuRig(tmp_path, neg(least=2), lanes=2) as rig:
        assert [[*lane._graphs] for lane in rig.lanes] == [[2, 8], [2, 8]]
        for items in (1, 2, 8):  # 1 is padded
            calls = rig.run(batch_of(items))
            assert (calls["execute_async_v3"], calls["cudaGraphLaunch"]) == (0, 1)


def test_a_size_that_was_warmed_up_is_a_graph_from_its_first_batch_on(tmp_path):
    with GpuRig(tmp_path, lanes=2) as rig:
        for items in (3, 5, 3):
            rig.engine.warm_up(items)
        assert [[*lane._graphs] for lane in rig.lanes] == [[1, 8, 3, 5]] * 2, "on each lane, once"
        for lane in range(2):
            calls = rig.run(batch_of(5), lane=lane)
            assert (calls["execute_async_v3"], calls["cudaGraphLaunch"]) == (0, 1)


def test_each_lane_has_graphs_of_its_own(tmp_path):
    with GpuRig(tmp_path, lanes=2) as rig:
        for _ in range(3):
            rig.run(batch_of(5), lane=1)
        assert [[*lane._graphs] for lane in rig.lanes] == [[1, 8], [1, 8, 5]]
        assert rig.run(batch_of(5), lane=0)["cudaGraphLaunch"] == 0


def test_beyond_the_bound_the_graph_that_was_used_least_recently_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "MAX_GRAPHS", 3)
    with GpuRig(tmp_path, lanes=1) as rig:
        for items in (1, 4, 4, 1, 5, 5):
            rig.run(batch_of(items))
        assert [*rig.lanes[0]._graphs] == [4, 1, 5]
        assert rig.runtime.left()["graphexec"] == 3
        rig.run(batch_of(8))
        assert [*rig.lanes[0]._graphs] == [4, 1, 5], "one that went is made again when its size has come twice again"
        for items in (8, 4, 4):  # 8 comes back, and 4 goes
            rig.run(batch_of(items))
        assert [*rig.lanes[0]._graphs] == [5, 8, 4]


@pytest.mark.parametrize("flavour", ["tensorrt", "lean", "rtx"])
def test_what_cannot_be_captured_is_enqueued_each_time(flavour, tmp_path, caplog):
    caplog.set_level(logging.INFO, "trtpool.worker")
    with GpuRig(tmp_path, lanes=1, flavour=flavour, uncapturable=True) as rig:
        for _ in range(4):
            assert rig.run(batch_of(3))["execute_async_v3"] == 1
        # TensorRT for RTX says so beforehand; the others are tried once, whatever the size.
        tried = flavour != "rtx"
        assert rig.runtime.calls["cudaStreamBeginCapture"] == tried
        assert rig.runtime.calls["is_stream_capturable"] == (not tried)
        assert ("CUDA graphs are not used, since this engine cannot be captured" in caplog.text) == tried


def test_a_graph_that_cuda_does_not_make_is_done_without(tmp_path):
    runtime = FakeRuntime()
    runtime.fail("cudaGraphInstantiate", cudaError_t.cudaErrorMemoryAllocation)
    with GpuRig(tmp_path, runtime=runtime, lanes=1) as rig:
        assert not runtime.last_error
        for _ in range(3):
            assert rig.run(batch_of(8))["execute_async_v3"] == 1


def test_graphs_can_be_left_out(tmp_path):
    with GpuRig(tmp_path, graphs=False) as rig:
        for _ in range(3):
            assert rig.run(batch_of(3))["execute_async_v3"] == 1
        assert not rig.runtime.calls["cudaStreamBeginCapture"]


# --- In flight -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_lanes_end_in_any_order(order, runtime, tmp_path):
    with GpuRig(tmp_path, SUM, runtime=runtime) as rig:
        batches = [batch_of(5), [Rows(20, 2, 2), Rows(8, 4, 4), Rows(30, 1, 1)], batch_of(8, 12)]
        for _ in range(3):  # plain, captured, as graphs
            rig.poison()
            for lane, batch in enumerate(batches):
                rig.engine.launch(lane, batch)
            for lane in order:
                rig.engine.wait(lane)
            rig.check(*batches)


def test_a_lane_that_is_waited_for_is_done_and_others_need_not_be(tmp_path):
    with GpuRig(tmp_path) as rig:
        for lane in range(3):
            rig.engine.launch(lane, batch_of(4, 4 * lane))
        rig.engine.wait(1)
        rig.check(batch_of(4, 4))
        rig.engine.wait(2)
        rig.check(batch_of(4, 4), batch_of(4, 8))


@pytest.mark.parametrize("busy_poll", [False, True])
def test_whether_a_batch_has_ended_is_asked_without_waiting(busy_poll, tmp_path):
    runtime = FakeRuntime(threads=True)
    with GpuRig(tmp_path, runtime=runtime, busy_poll=busy_poll) as rig:
        for stream in runtime.streams():
            stream.held = True
        for lane in range(3):
            rig.engine.launch(lane, batch_of(4, 4 * lane))
        assert [rig.engine.poll(lane) for lane in range(3)] == [None] * 3
        stream = runtime.stream(rig.lanes[1]._handle)
        stream.go()
        stream.wait(stream.put)
        assert [rig.engine.poll(lane) is None for lane in range(3)] == [True, False, True]
        rig.check(batch_of(4, 4))
        rig.engine.launch(1, batch_of(4, 20))
        runtime.go()
        for lane in range(3):
            while (times := rig.engine.poll(lane)) is None:
                pass
            assert min(times.copy_in_ns, times.compute_ns, times.copy_out_ns) > 0
        rig.check(*(batch_of(4, first) for first in (0, 4, 8, 20)))


def test_the_answer_that_a_batch_runs_does_not_disturb_tensorrt(tmp_path):
    """CUDA keeps "not ready" as the last error, for which libraries ask after their own calls."""
    with GpuRig(tmp_path, lanes=2) as rig:
        for _ in range(3):  # plain, captured, as a graph
            rig.engine.launch(0, batch_of(3))
            assert rig.engine.poll(0) is None
            assert rig.runtime.last_error
            rig.engine.launch(1, batch_of(3, 8))
            for lane in (0, 1):
                rig.engine.wait(lane)
            rig.check(batch_of(3), batch_of(3, 8))


def test_who_blocks_on_a_lane_that_was_used_again_waits_for_that(tmp_path):
    with GpuRig(tmp_path, lanes=1) as rig:
        for first in (0, 8):
            rig.engine.launch(0, batch_of(4, first))
            rig.engine.block(0)
            rig.engine.block(0)
            assert rig.engine.poll(0) is not None
        rig.check(batch_of(4), batch_of(4, 8))


def test_only_the_event_at_the_end_is_waited_for(tmp_path):
    """What a thread may block on costs an interrupt."""
    for busy_poll in (False, True):
        with GpuRig(tmp_path, lanes=2, busy_poll=busy_poll) as rig:
            events = [handle for handle in rig.runtime._handles.values() if isinstance(handle, Event)]
            assert sum(event.blocks for event in events) == (0 if busy_poll else 2)


@given(data=st.data())
def test_any_batches_on_any_lanes(data, tmp_path_factory):
    items_per_slot = data.draw(st.sampled_from([1, 3]))
    chunk_bytes = data.draw(st.sampled_from([4096, 8192, 1 << 30]))
    sizes = {"slots": 400, "items_per_slot": items_per_slot, "max_batch": 12, "chunk_bytes": chunk_bytes}
    runtime = FakeRuntime(copies_batches=data.draw(st.booleans()))
    with GpuRig(tmp_path_factory.getbasetemp(), SUM, runtime=runtime, **sizes) as rig:
        flying: set[int] = set()
        ran: list[list[Rows]] = []
        for lane in data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=12)):
            if lane in flying:
                rig.engine.wait(lane)
                flying.remove(lane)
                continue
            # Each lane has slots of its own, so that none is in two batches.
            batch: list[Rows] = []
            left, first = 12, lane * 130 + data.draw(st.integers(0, 100))
            while left and len(batch) < 4:
                items = data.draw(st.integers(1, left))
                batch.append(Rows(first, -(-items // items_per_slot), items))
                left -= items
                first += batch[-1].count + data.draw(st.integers(0, 2))
            rig.engine.launch(lane, batch)
            flying.add(lane)
            ran.append(batch)
        for lane in flying:
            rig.engine.wait(lane)
        rig.check(*ran)


def test_a_launch_allocates_nothing(tmp_path):
    with GpuRig(tmp_path, SUM) as rig:
        batches = [batch_of(items) for items in range(1, 9)] + [SCATTERED]
        for _ in range(2):
            for lane, batch in itertools.product(range(3), batches):
                rig.run(batch, lane)
        left = rig.runtime.left()
        for lane, batch in itertools.product(range(3), batches):
            assert {*rig.run(batch, lane)} <= HOT
        assert rig.runtime.left() == left


def test_a_launch_waits_for_nothing(tmp_path):
    runtime = FakeRuntime(threads=True)
    with GpuRig(tmp_path, runtime=runtime) as rig:
        for stream in runtime.streams():
            stream.held = True
        for lane in range(3):
            rig.engine.launch(lane, batch_of(8, 8 * lane))  # would never come back
        rig.check()
        runtime.go()
        for lane in range(3):
            rig.engine.wait(lane)
        rig.check(batch_of(24))


# --- Failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [True, False])
def test_a_batch_that_the_engine_refuses_leaves_the_lane_free(graphs, tmp_path):
    with GpuRig(tmp_path, graphs=graphs, refused=[3]) as rig:
        for _ in range(3):
            with pytest.raises(EngineError, match="no kernel for a batch of 3"):
                rig.engine.launch(0, batch_of(3))
            assert all(stream.done == stream.put for stream in rig.runtime.streams())
            rig.run(batch_of(4))


@pytest.mark.parametrize("call", ["cudaEventRecord", "cudaMemcpyAsync", "cudaMemcpyBatchAsync", "cudaGraphLaunch"])
def test_a_launch_that_cuda_refuses_leaves_nothing_running(call, tmp_path):
    runtime = FakeRuntime(copies_batches=call == "cudaMemcpyBatchAsync")
    with GpuRig(tmp_path, SUM, runtime=runtime) as rig:
        batch = [Rows(20, 4, 4), Rows(3, 4, 4)]
        times = rig.run(batch)[call]
        assert times
        for nth in range(1, times + 1):
            rig.runtime.fail(call, cudaError_t.cudaErrorInvalidValue, nth)
            with pytest.raises(EngineError, match=call):
                rig.engine.launch(0, batch)
            assert all(stream.done == stream.put for stream in rig.runtime.streams())
            rig.run(batch)


def test_a_fault_of_the_device_is_told_by_all_and_does_not_break_close(tmp_path):
    with GpuRig(tmp_path, faults=True) as rig:
        rig.engine.launch(0, batch_of(2))
        rig.inputs["x"][1, 0, 3] = FAULT
        rig.engine.launch(1, batch_of(2, 4))
        with pytest.raises(EngineError, match="cudaErrorIllegalAddress, 700"):
            rig.engine.block(0)
        for lane in (0, 1):
            with pytest.raises(EngineError, match="cudaErrorIllegalAddress, 700"):
                rig.engine.wait(lane)
            with pytest.raises(EngineError, match="cudaErrorIllegalAddress, 700"):
                rig.engine.poll(lane)
        with pytest.raises(EngineError, match="700"):
            rig.engine.launch(2, batch_of(1))


def calls_of_bind(folder: Path) -> list[tuple[str, int]]:
    """Each call that making two lanes takes, and each time: ("cudaMalloc", 1), ("cudaMalloc", 2), ..."""
    with GpuRig(folder, SUM, lanes=2, bind=False, scratch_bytes=512) as rig:
        before = rig.runtime.calls.copy()
        rig.bind()
        made = rig.runtime.calls - before
    # The fake's stream would go on capturing, graphs are destroyed come what may, and the last two are TensorRT's.
    for name in ("cudaStreamEndCapture", "cudaGraphDestroy", "execute_async_v3", "set_input_shape"):
        assert made.pop(name)
    return [(name, nth) for name, times in sorted(made.items()) for nth in range(1, times + 1)]


def test_lanes_that_cannot_be_made_give_everything_back(tmp_path):
    """Each call fails once, each time that it is made."""
    calls = calls_of_bind(tmp_path)
    for name, nth in calls:
        with GpuRig(tmp_path, SUM, lanes=2, bind=False, scratch_bytes=512) as rig:
            before = rig.runtime.left()
            rig.runtime.fail(name, cudaError_t.cudaErrorNotSupported, nth)
            try:
                rig.bind()
            except DeviceUnavailable:
                failed = True
            else:
                failed = False
            assert failed == (name not in ("cudaStreamBeginCapture", "cudaGraphInstantiate")), f"call {nth} of {name}"
            assert not rig.runtime.last_error, f"call {nth} of {name}"
            if failed:
                assert rig.runtime.left() == before, f"call {nth} of {name}"
                assert rig.engine.lanes == 0
                rig.bind()
            rig.run(batch_of(8))
    assert {"cudaMalloc", "cudaMemset", "cudaEventCreateWithFlags", "cudaGraphInstantiate"} <= {
        name for name, _ in calls
    }


# --- The end -------------------------------------------------------------------------------------


def test_close_waits_for_what_runs(tmp_path):
    with GpuRig(tmp_path) as rig:
        for lane in range(3):
            rig.engine.launch(lane, batch_of(8, 8 * lane))
        rig.check()
        made = rig.lanes
        rig.engine.close()
        rig.check(batch_of(24))
        assert rig.runtime.left() == {"registration": 1}
        for one in made:
            one.close()
            with pytest.raises(EngineError, match="closed"):
                one.launch(batch_of(1), 1)


def test_close_waits_for_a_stream_that_works_by_itself(tmp_path):
    runtime = FakeRuntime(threads=True)
    with GpuRig(tmp_path, runtime=runtime, lanes=1) as rig:
        (stream,) = runtime.streams()
        stream.held = True
        rig.engine.launch(0, batch_of(8))
        closing = threading.Thread(target=rig.engine.close)
        closing.start()
        rig.check()
        assert runtime.left()["memory"] == 2
        runtime.go()
        closing.join(NET_S)
        rig.check(batch_of(8))


# --- Items that differ in shape ------------------------------------------------------------------

VARYING = (
    "varying",
    [Tensor("x", (-1, 2, -1), [[(1, 2, 1), (4, 2, 3), (16, 2, 5)]])],
    [Tensor("y", ("N", 2, "x.2")), Tensor("s", ("N", "x.2")), Tensor("m", ("N", 1))],
)
"""Items of 8 to 40 bytes in, and 8 to 40, 4 to 20 and 4 out."""


@pytest.mark.parametrize("items_per_slot", [1, 3])
def test_only_the_bytes_that_are_there_cross_the_bus(items_per_slot, tmp_path):
    with GpuRig(tmp_path, VARYING, lanes=1, items_per_slot=items_per_slot) as rig:
        runtime = rig.runtime
        for size in (2, 5):
            for batch in ([Rows(3, -(-4 // items_per_slot), 4)], [Rows(9, 1, 1), Rows(2, 2, 2 * items_per_slot)]):
                runtime.copies.clear()
                rig.engine.run(batch, ((2, size),))
                items = sum(rows.items for rows in batch)
                into, out = (
                    sum(copy.size for copy in runtime.copies if copy.to_device == direction)
                    for direction in (True, False)
                )
                assert (into, out) == (items * 8 * size, items * (12 * size + 4))


def test_adjacent_slots_of_small_items_are_one_copy_for_each_tensor(tmp_path):
    with GpuRig(tmp_path, VARYING, lanes=1) as rig:
        rig.engine.run([Rows(3, 6, 6)], ((2, 2),))
        before = rig.runtime.calls.copy()
        rig.engine.run([Rows(3, 6, 6)], ((2, 2),))
        calls = rig.runtime.calls - before
        # x; y and s; m fills its rows.
        assert (calls["cudaMemcpy2DAsync"], calls["cudaMemcpyAsync"], calls["cudaMemcpyBatchAsync"]) == (3, 1, 0)


@pytest.mark.parametrize("copies_batches", [True, False])
def test_copies_of_small_items_do_not_cross_where_registrations_meet(copies_batches, tmp_path):
    runtime = FakeRuntime(copies_batches=copies_batches)
    with GpuRig(tmp_path, VARYING, runtime=runtime, lanes=1, slots=400, max_batch=16, chunk_bytes=4096) as rig:
        x = rig.inputs["x"]
        x[...] = rig.random.integers(-9, 9, x.shape)
        first = 4096 // x[0].nbytes - 4
        rig.poison()
        rig.engine.run([Rows(first, 12, 12)], ((2, 3),))  # the fake refuses a copy that crosses
        given = x.reshape(400, -1)[first : first + 12, :6].reshape(12, 2, 3)
        got = rig.outputs["y"].reshape(400, -1)
        assert (got[first : first + 12, :6].reshape(12, 2, 3) == -given).all()


def test_rows_further_apart_than_cuda_takes_are_copied_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "MAX_PITCH", 16)
    with GpuRig(tmp_path, VARYING, lanes=1) as rig:
        before = rig.runtime.calls["cudaMemcpy2DAsync"]
        rig.inputs["x"][...] = 3
        rig.engine.run([Rows(1, 5, 5)], ((2, 2),))
        assert rig.runtime.calls["cudaMemcpy2DAsync"] == before
        assert (rig.outputs["y"].reshape(32, -1)[1:6, :4] == -3).all()


def test_a_shape_is_captured_when_it_came_often(tmp_path):
    with GpuRig(tmp_path, VARYING, lanes=1) as rig:
        assert not rig.runtime.calls["cudaStreamBeginCapture"], "zeros are of no shape that may come"
        for turn in range(1, lanes.OFTEN + 3):
            before = rig.runtime.calls.copy()
            rig.engine.run(batch_of(5), ((2, 2),))
            calls = rig.runtime.calls - before
            assert calls["cudaStreamBeginCapture"] == (turn == lanes.OFTEN)
            assert calls["cudaGraphLaunch"] == (turn > lanes.OFTEN)
        rig.engine.run(batch_of(5), ((2, 4),))
        assert rig.lanes[0].has_graph(5, ((2, 2),))
        assert not rig.lanes[0].has_graph(5, ((2, 4),))
        assert not rig.lanes[0].has_graph(4, ((2, 2),))


def test_graphs_of_shapes_are_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "MAX_GRAPHS", 2)
    monkeypatch.setattr(lanes, "OFTEN", 3)
    with GpuRig(tmp_path, VARYING, lanes=1) as rig:
        for size in (1, 2, 3):
            for _ in range(3):
                rig.engine.run(batch_of(2), ((2, size),))
        assert [rig.lanes[0].has_graph(2, ((2, size),)) for size in (1, 2, 3)] == [False, True, True]
        assert rig.runtime.left()["graphexec"] == 2


def test_what_is_kept_of_shapes_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "MAX_FORMS", 2)
    monkeypatch.setattr(lanes, "MAX_COUNTED", 3)
    with GpuRig(tmp_path, VARYING, lanes=1) as rig:
        for size in (1, 2, 3, 4, 5, 1):
            rig.engine.run(batch_of(size), ((2, size),))
        (lane,) = rig.lanes
        assert [*lane._forms._kept] == [((2, 5),), ((2, 1),)]
        assert len(lane._seen) == 3


def test_a_shape_that_was_set_is_not_set_again(tmp_path):
    with GpuRig(tmp_path, VARYING, lanes=1, graphs=False) as rig:
        calls = []
        for size, items in ((2, 3), (2, 3), (2, 4), (2, 4), (3, 4), (3, 4)):
            rig.engine.run(batch_of(items), ((2, size),))  # what a shape's outputs are is asked once
            before = rig.runtime.calls["set_input_shape"]
            rig.engine.run(batch_of(items), ((2, size),))
            calls.append(rig.runtime.calls["set_input_shape"] - before)
        assert calls == [0] * 6


def test_a_launch_of_a_known_shape_allocates_nothing(tmp_path):
    with GpuRig(tmp_path, VARYING) as rig:
        cases = [(lane, batch, size) for lane in range(3) for batch in (batch_of(4), SCATTERED) for size in (2, 5)]
        for _ in range(lanes.OFTEN):
            for lane, batch, size in cases:
                rig.engine.launch(lane, batch, ((2, size),))
                rig.engine.wait(lane)
        left, before = rig.runtime.left(), rig.runtime.calls.copy()
        for lane, batch, size in cases:
            rig.engine.launch(lane, batch, ((2, size),))
            rig.engine.wait(lane)
        assert {*(rig.runtime.calls - before)} <= HOT
        assert rig.runtime.left() == left


# --- Several profiles ----------------------------------------------------------------------------


def profiled(
    *profiles: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
) -> tuple[str, list[Tensor], list[Tensor]]:
    """``y = -x`` for items ``(T,)``, with a profile for each smallest, best and largest ``(N, T)``."""
    return "neg", [Tensor("x", (-1, -1), profiles)], [Tensor("y", ("N", "x.1"))]


def chosen(rig: GpuRig, items: int, size: int) -> tuple[int, int]:
    """The profile that a batch takes, and how many items are run."""
    lane = rig.lanes[0]
    step = lane._forms.step(lane._forms.find(((size,),)), items)
    return step.context._raw.profile, step.items


def test_a_batch_takes_the_profile_that_covers_it_and_is_nearest(tmp_path):
    model = profiled(((1, 1), (1, 4), (8, 8)), ((1, 1), (8, 8), (8, 8)), ((1, 6), (8, 32), (8, 64)))
    with GpuRig(tmp_path, model, lanes=2) as rig:
        assert chosen(rig, 1, 4) == (0, 1)
        assert chosen(rig, 8, 8) == (1, 8)
        assert chosen(rig, 8, 6) == (1, 8)
        assert chosen(rig, 8, 9) == (2, 8)
        for size in (4, 8, 9, 64):
            for lane in range(2):
                for items in (1, 8):
                    rig.inputs["x"][...] = size
                    rig.poison()
                    rig.engine.launch(lane, batch_of(items, 3), ((size,),))
                    assert rig.engine.wait(lane).shapes == ((size,),)
                    got = rig.outputs["y"].reshape(32, -1)
                    assert (got[3 : 3 + items, :size] == -size).all()


def test_profiles_of_other_batches_fill_up_as_little_as_can_be(tmp_path):
    four = [[(1, 4), (4, 4), (8, 4)], [(16, 4), (32, 4), (64, 4)]]
    model = ("neg", [Tensor("x", (-1, 4), four)], [Tensor("y", ("N", 4))])
    with GpuRig(tmp_path, model, slots=128, max_batch=64, lanes=1) as rig:
        lane = rig.lanes[0]
        steps = [lane._forms.step(lane._forms.find(()), items) for items in (1, 8, 9, 16, 64)]
        assert [(step.context._raw.profile, step.items) for step in steps] == [
            (0, 1),
            (0, 8),
            (1, 16),
            (1, 16),
            (1, 64),
        ]
        for items in (1, 8, 9, 15, 16, 64, 9):
            for first in (0, 40):
                rig.run(batch_of(items, first))


def test_shapes_between_the_profiles_are_refused_and_the_ranges_named(tmp_path):
    model = profiled(((1, 1), (4, 4), (8, 8)), ((1, 16), (4, 16), (8, 32)))
    with GpuRig(tmp_path, model, lanes=1) as rig:
        with pytest.raises(BatchRefused, match=r"takes items of x \(1 to 8\) or x \(16 to 32\), not \(\(9,\),\)"):
            rig.engine.run(batch_of(1), ((9,),))
        rig.engine.run(batch_of(1), ((16,),))


def test_lanes_have_a_context_for_each_profile_and_no_more_where_profiles_are_not_shared(tmp_path, caplog):
    model = profiled(((1, 1), (4, 4), (8, 8)), ((1, 16), (4, 16), (8, 32)))
    with GpuRig(tmp_path, model, lanes=2) as rig:
        raws = [context._raw for lane in rig.lanes for context in lane._forms._contexts.values()]
        assert [raw.profile for raw in raws] == [0, 1, 0, 1]
        assert len({id(raw) for raw in raws}) == 4
    with GpuRig(tmp_path, model, lanes=2, unshared="select") as rig:
        assert rig.engine.lanes == 1
        assert "runs on 1 lanes instead of 2" in caplog.text
        rig.engine.run(batch_of(3), ((20,),))


# --- Outputs that depend on the data -------------------------------------------------------------

UPTO = (
    "upto",
    [Tensor("x", (-1, 6), [[(1, 6), (4, 6), (8, 6)]])],
    [Tensor("y", ("N", "?")), Tensor("n", ("N", 1))],
)
"""The first numbers of each item, as many as the largest first one says."""


@pytest.mark.parametrize("flavour", ["tensorrt", "lean", "rtx"])
@pytest.mark.parametrize("room", [0, lanes.TOLD_BYTES])
def test_a_batch_whose_answer_is_too_large_fails_alone(room, flavour, tmp_path, monkeypatch):
    """Whether there is more memory on the device than rows need, or not."""
    monkeypatch.setattr(lanes, "TOLD_BYTES", room)
    with GpuRig(tmp_path, UPTO, lanes=2, flavour=flavour, shapes={"y": (3,)}) as rig:
        x, y = rig.inputs["x"].reshape(32, 6), rig.outputs["y"].reshape(32, 3)
        x[:, 0] = 2
        x[4, 0] = 5
        for _ in range(2):
            rig.poison()
            before = y.copy()
            rig.engine.launch(1, batch_of(4, 8))
            text = "needs 160 bytes for this batch, and there is room for 96" if not room else r"has shape \(8, 5\)"
            with pytest.raises(BatchRefused, match=rf"output 'y' {text}.*--shape y=\.\.\., the largest item"):
                rig.engine.launch(0, batch_of(8))
            np.testing.assert_array_equal(y[:8].view(np.uint8), before[:8].view(np.uint8))
            assert rig.engine.wait(1).shapes == ((2,),)
            rig.engine.launch(0, batch_of(4))
            assert rig.engine.wait(0).shapes == ((2,),)
            np.testing.assert_array_equal(y[:4, :2], x[:4, :2])


def test_memory_for_the_most_that_there_could_be_is_done_without_where_there_is_none(tmp_path):
    sure = 8 * (24 + 12 + 4)  # x, y and n
    runtime = FakeRuntime(memory_bytes=sure + 8)
    with GpuRig(tmp_path, UPTO, lanes=1, runtime=runtime, shapes={"y": (3,)}) as rig:
        assert sum(size for _, size in runtime._memory.values()) == sure
        rig.inputs["x"][...] = 3
        assert rig.engine.run(batch_of(8)).shapes == ((3,),)


def test_an_answer_whose_shape_is_not_told_is_an_error_of_its_batch(tmp_path, monkeypatch):
    with GpuRig(tmp_path, UPTO, lanes=1, shapes={"y": (6,)}) as rig:
        rig.inputs["x"][...] = 3
        (context,) = rig.lanes[0]._forms._contexts.values()
        with monkeypatch.context() as patched:
            patched.setattr(context._allocators["y"], "notify_shape", lambda _name, _shape: None)
            with pytest.raises(BatchRefused, match="did not tell the shape of output 'y'"):
                rig.engine.launch(0, batch_of(8))
        assert rig.engine.run(batch_of(8)).shapes == ((3,),)


def test_what_depends_on_the_data_is_never_captured(tmp_path):
    with GpuRig(tmp_path, UPTO, lanes=1, shapes={"y": (6,)}) as rig:
        rig.inputs["x"][...] = 3
        for _ in range(lanes.OFTEN + 2):
            rig.engine.run(batch_of(8))
        assert not rig.runtime.calls["cudaStreamBeginCapture"]


# --- Formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["CHW4", "CHW16", "HWC8"])
def test_items_of_a_format_are_copied_as_they_lie(word, tmp_path):
    form = f"Some format (k{word})"
    image = Tensor("x", (-1, 3, -1, 2), [[(1, 3, 1, 2), (4, 3, 4, 2), (8, 3, 4, 2)]], "HALF", format=form)
    model = ("neg", [image], [Tensor("y", ("N", 3, "x.2", 2), dtype="HALF", format=form)])
    with GpuRig(tmp_path, model, lanes=1) as rig:
        x, y = (planes[name].reshape(32, -1) for planes, name in ((rig.inputs, "x"), (rig.outputs, "y")))
        for height in (4, 3):
            shape = (1, height, 2, int(word[3:])) if word.startswith("CHW") else (height, 2, 8)
            size = math.prod(shape)
            rig.poison()
            assert rig.engine.run(batch_of(5), (shape,)).shapes == (shape,)
            assert (y[:5, :size] == -x[:5, :size]).all()
            assert (y[:5, size:].view(np.uint8) == POISON).all()
