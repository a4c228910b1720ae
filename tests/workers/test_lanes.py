"""Lanes on a fake GPU: straight from the planes and back, graphs, several in flight, and nothing left behind."""

from __future__ import annotations

import itertools
import logging
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.fake_cuda import TICK_NS, FakeRuntime
from tests.workers.fake_device import NET_S, Event, cudaError_t
from tests.workers.fake_tensorrt import FAULT, Tensor, batched, neg
from tests.workers.gpu_rig import HOT, GpuRig, batch_of
from trtpool.ipc.errors import DeviceUnavailable
from trtpool.workers import copies, lanes
from trtpool.workers.engine import EngineError, Rows

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
