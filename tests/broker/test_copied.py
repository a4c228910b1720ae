"""The bytes that batches took to a GPU and back, as they are counted, against what there was to copy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console

from tests.broker.core_rig import MS, Rig, layouts, sent, variant, written
from tests.workers.fake_tensorrt import Tensor, batched
from tests.workers.gpu_rig import GpuRig
from trtpool.broker import events as e
from trtpool.broker.batching import UNIFORM
from trtpool.broker.copied import CopiedBytes
from trtpool.broker.core import Core
from trtpool.broker.exposition import Figures
from trtpool.broker.meters import LARGEST
from trtpool.broker.reporting import report
from trtpool.broker.snapshot import restore, save
from trtpool.broker.top import Look, Top
from trtpool.ipc import messages as m
from trtpool.ipc.tensors import ModelSpec, TensorSpec
from trtpool.workers.engine import Rows

FLOAT = 4  # bytes of a number; all tensors here are float32, but for one


def copied(core: Core, gpu: int = 0, model: int = 0) -> tuple[int, int]:
    """Bytes to and from one GPU, as a report has them and as Prometheus is told them."""
    now = report(core)
    (device,) = [one for one in now.models[model].devices if one.gpu == gpu]
    registry = CollectorRegistry()
    registry.register(Figures(now))
    labels = {"model": f"m{model}", "gpu": str(gpu)}
    for direction, size in (("in", device.copied_in_bytes), ("out", device.copied_out_bytes)):
        labels["direction"] = direction
        assert registry.get_sample_value("trtpool_copied_bytes_total", labels) == size
    return device.copied_in_bytes, device.copied_out_bytes


def run(rig: Rig, count: int, size: int = 0, shared: int = 0, worker: int = 10) -> m.Run:
    """A batch of `count` slots is sent; of a model that varies, items have `size` columns."""
    rig.submit(1, count, variant=variant(size, shared) if size else UNIFORM)
    (sent_run,) = sent(rig.turn(), m.Run, worker)
    return sent_run


@pytest.fixture
def rig() -> Rig:
    """Inputs x (2, 1 to 9) and a shared number k, outputs y (0 to 9) and a number z; slots of two items."""
    rig = Rig((32, 2, 8), gpus=2, varies=True)
    rig.join(1)
    for gpu in range(2):
        rig.worker(10 + gpu, gpu=gpu)
    return rig


def test_what_crosses_the_bus_has_the_items_real_shape_and_shared_inputs_once(rig):
    rig.finish(10, run(rig, 3, size=2))
    assert copied(rig.core) == ((6 * 2 * 2 + 1) * FLOAT, 6 * (2 + 1) * FLOAT)
    rig.finish(10, run(rig, 1, size=9, shared=1))
    assert copied(rig.core) == ((6 * 2 * 2 + 1 + 2 * 2 * 9 + 1) * FLOAT, (6 * 3 + 2 * 10) * FLOAT)


def test_an_output_has_the_shape_that_the_worker_tells(rig):
    batch = run(rig, 2, size=9)
    rig.say(10, m.Finished(batch.batch, 0, 1, 2, 3, 0, 1, shapes=((0,),)))
    assert copied(rig.core) == ((4 * 18 + 1) * FLOAT, 4 * FLOAT)


def test_items_that_were_copied_again_count_again_and_shared_inputs_do_not(rig):
    batch = run(rig, 1, size=3)
    rig.say(10, m.Finished(batch.batch, 0, 1, 2, 3, 0, 1, shapes=written(batch), filled_items=5))
    assert copied(rig.core) == (((2 + 5) * 6 + 1) * FLOAT, 2 * (3 + 1) * FLOAT)


def test_each_gpu_has_its_own(rig):
    rig.submit(1, 1, gpu=1, variant=variant(4))
    (batch,) = sent(rig.turn(), m.Run, 11)
    rig.finish(11, batch)
    assert copied(rig.core, gpu=1) == ((2 * 8 + 1) * FLOAT, 2 * 5 * FLOAT)
    assert [one.gpu for one in report(rig.core).models[0].devices] == [1]


def test_a_batch_counts_when_it_has_ended_well(rig):
    batch = run(rig, 2, size=9)
    rig.say(10, m.Failed(batch.batch, 0, "no"))
    assert report(rig.core).models[0].devices == ()
    rig.refused(10, m.Finished(batch.batch, 0, 1, 2, 3, 0))
    for _ in range(2):  # its halves
        (half,) = sent(rig.turn(), m.Run)
        rig.refused(10, m.Finished(half.batch, half.attempt, 1, 2, 3, 0, 1, shapes=((10,),)))
        rig.finish(10, half)
    assert copied(rig.core) == (2 * (2 * 18 + 1) * FLOAT, 2 * 2 * 10 * FLOAT)


@pytest.mark.parametrize("varies", [False, True])
def test_what_was_copied_for_an_owner_that_has_ended_counts(varies):
    rig = Rig((32, 2, 8), gpus=1, varies=varies)
    rig.join(1, 2)
    of_both = variant(2) if varies else UNIFORM
    rig.submit(1, 1, variant=of_both)
    rig.submit(2, 2, variant=of_both)
    rig.worker(10, gpu=0)
    (batch,) = sent(rig.turn(), m.Run)
    rig.do(e.ProducerEnded(1))
    rig.finish(10, batch)
    assert rig.figures().items == 4
    assert copied(rig.core) == (((6 * 4 + 1) * FLOAT, 6 * 3 * FLOAT) if varies else (6 * 2 * FLOAT, 6 * FLOAT))


def test_of_one_shape_and_several_batches_in_one_run_it_is_items_times_bytes():
    rig = Rig((64, 1, 4), gpus=1)
    rig.join(1)
    rig.submit(1, 9)
    rig.worker(10, gpu=0)
    rig.core.models[0].run_ns = 1000  # brief batches go together
    (batch,) = sent(rig.turn(), m.Run)
    rig.say(10, m.Finished(batch.batch, 0, 3, 3, 3, 0, 3))
    items = sum(rows.items for rows in batch.rows)
    assert items > 4
    assert copied(rig.core) == (items * 2 * FLOAT, items * FLOAT)


def test_on_the_cpu_nothing_is_copied_to_a_gpu():
    rig = Rig((32, 2, 8), varies=True)
    rig.join(1)
    rig.worker()
    rig.finish(10, run(rig, 2, size=9))
    (device,) = report(rig.core).models[0].devices
    assert (device.items, device.copied_in_bytes, device.copied_out_bytes) == (4, 0, 0)


@pytest.mark.parametrize("varies", [False, True])
def test_who_takes_over_goes_on_counting(varies):
    rig = Rig((32, 2, 8), gpus=1, varies=varies)
    rig.join(1)
    rig.worker(10, gpu=0)
    rig.finish(10, run(rig, 2, size=2 * varies))
    before = copied(rig.core)
    batch = run(rig, 2, size=2 * varies)  # it runs while the broker dies
    core = Core(layouts((32, 2, 8), varies=varies), gpus=1, started_ns=MS)
    restore(core, save(rig.core))
    assert copied(core) == before
    core.handle(e.Received(10, m.Finished(batch.batch, 0, 1, 2, 3, 0, 1, shapes=written(batch))), rig.now_ns)
    assert copied(core) == (2 * before[0], 2 * before[1])


def test_a_worker_that_lies_makes_no_sum_that_64_bits_cannot_hold(rig):
    for _ in range(2):
        batch = run(rig, 1, size=9)
        rig.say(10, m.Finished(batch.batch, 0, 1, 2, 3, 0, 1, shapes=((9,),), filled_items=2**63 - 1))
    into, _ = copied(rig.core)
    assert into == LARGEST
    core = Core(layouts((32, 2, 8), varies=True), gpus=2, started_ns=MS)
    restore(core, save(rig.core))
    assert copied(core) == copied(rig.core)


def test_top_shows_the_bytes_of_the_time_between_two_looks(rig):
    rig.finish(10, run(rig, 1, size=9))
    before = Look(report(rig.core), 0.0)
    rig.finish(10, run(rig, 4, size=2))
    in_bytes, out_bytes = (8 * 4 + 1) * FLOAT, 8 * 3 * FLOAT
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(Top(before, Look(report(rig.core), in_bytes / 1e6)).show(1000))
    (line,) = [line for line in capture.get().splitlines() if line.startswith("gpu 0 ")]
    assert line.split()[5:9] == ["1.0", "MB", f"{out_bytes / in_bytes:.1f}", "MB"]


def test_a_shared_input_may_have_several_shapes_too():
    inputs = (TensorSpec("x", "float16", (4,), (1,)), TensorSpec("k", "float32", (3, 5), (0, 5), shared=True))
    bytes_of = CopiedBytes(ModelSpec("m", "/m.plan", inputs, (TensorSpec("y", "int8", (7,)),)))
    assert bytes_of.of(10, ((3,), (2, 5))) == (10 * 3 * 2 + 2 * 5 * FLOAT, 10 * 7)


# --- Against a device --------------------------------------------------------------------------------

VARYING = (
    "varying",
    [Tensor("x", (-1, 2, -1), [[(1, 2, 1), (4, 2, 3), (16, 2, 5)]])],
    [Tensor("y", ("N", 2, "x.2")), Tensor("s", ("N", "x.2")), Tensor("m", ("N", 1))],
)
SHARED = ("shared", [batched("x", (3,)), Tensor("k", ()), Tensor("b", (2, 3))], [Tensor("y", ("N", 3))])
FIXED = ("neg", [Tensor("x", (8, 4))], [Tensor("y", (8, 4))])
UPTO = ("upto", [Tensor("x", (-1, -1), [[(5, 1), (6, 4), (8, 6)]])], [Tensor("y", ("N", "?")), Tensor("n", ("N", 1))])


@pytest.mark.parametrize(
    ("model", "given", "inputs"),
    [
        (VARYING, {}, ((2, 2),)),
        (VARYING, {}, ((2, 5),)),
        (SHARED, {}, ()),
        (FIXED, {}, ()),
        (UPTO, {"y": (6,)}, ((4,),)),
    ],
    ids=["smaller", "largest", "shared", "filled up on the device", "filled up with the last item"],
)
@pytest.mark.parametrize("batch", [[Rows(0, 2, 3)], [Rows(4, 1, 1), Rows(0, 2, 4), Rows(9, 1, 2)], [Rows(3, 4, 8)]])
def test_it_is_what_a_device_was_asked_to_copy(model, given, inputs, batch, tmp_path: Path) -> None:
    with GpuRig(tmp_path, model, lanes=1, items_per_slot=2, shapes=given) as rig:
        for plane in rig.inputs.values():
            plane[...] = 3  # of an output whose shape depends on the data, what it has of each item
        rig.engine.run([Rows(8, 1, 1)], inputs)
        rig.runtime.copies.clear()
        times = rig.engine.run(batch, inputs)
        asked = [sum(one.size for one in rig.runtime.copies if one.to_device is way) for way in (True, False)]
        items = sum(rows.items for rows in batch)
        bytes_of = CopiedBytes(rig.engine.spec)
        assert bytes_of.of(items, inputs, times.shapes, filled=times.filled_items) == tuple(asked)
        assert times.filled_items == (max(0, 5 - items) if model is UPTO else 0)
        assert np.prod(asked) > 0
