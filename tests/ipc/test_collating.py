"""`trtpool.torch` in one process; worker processes are in tests/system/test_etl_torch.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.ipc.fake_pool import BAD, SUM, figures, until
from trtpool.ipc.collating import Collate, view
from trtpool.ipc.errors import EngineFailed, InvalidInput, LeaseTooLarge, SpentHandle

torch = pytest.importorskip("torch")


def sample(value: float) -> Any:
    return torch.full((4,), float(value))


def test_samples_that_are_inputs(client):
    batch = Collate(client)([sample(value) for value in range(5)])
    assert batch["y"].shape == (5, 4)
    assert batch["y"].dtype == torch.float32
    assert batch["total"].tolist() == [4 * value for value in range(5)]
    assert batch["total"].dtype == torch.float64


def test_samples_with_more_than_the_input(client):
    collate = Collate(client.handle())
    outputs, labels, names = collate([(sample(value), value, f"page {value}") for value in range(3)])
    assert outputs["total"].tolist() == [0, 4, 8]
    assert labels.tolist() == [0, 1, 2]
    assert names == ["page 0", "page 1", "page 2"]
    batch = collate([{"x": sample(value), "path": f"page {value}"} for value in range(3)])
    assert set(batch) == {"y", "total", "path"}
    assert batch["path"] == ["page 0", "page 1", "page 2"]


def test_arrays_and_decoders(client):
    def decode(out: np.ndarray) -> None:
        out[...] = 7

    batch = Collate(client)([np.full(4, 5, np.float32), decode, sample(1)])
    assert batch["total"].tolist() == [20, 28, 4]


def test_several_inputs(make_pool):
    client = make_pool(SUM).connect()
    a = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    batch = Collate(client)([{"a": a, "b": 10 * a, "n": 1}, {"a": a, "b": a, "n": 2}])
    assert batch["sum"].tolist() == [(11 * a).tolist(), (2 * a).tolist()]
    assert batch["n"].tolist() == [1, 2]
    with pytest.raises(InvalidInput, match="takes a, b: make each sample a dict with these names"):
        Collate(client)([(a, a)])


@pytest.mark.parametrize("count", [1, 3, 4, 8])
def test_slots_that_hold_several_items(make_pool, count):
    client = make_pool(items_per_slot=3, max_batch=6).connect()
    batch = Collate(client)([sample(value) for value in range(count)])
    assert batch["total"].tolist() == [4 * value for value in range(count)]


def test_a_lease_of_several_runs(pool, client):
    single = [pool.connect().lease() for _ in range(4)]
    single[1].release()
    others = pool.connect().lease_many(11)
    batch = Collate(client)([sample(1), sample(2)])
    assert batch["total"].tolist() == [4, 8]
    others.release()
    for lease in single:
        lease.release()


def test_tensors_are_views_that_keep_their_slots(pool, client):
    batch = Collate(client)([sample(value) for value in range(4)])
    pool.connect().infer(x=np.full((200, 4), 77, np.float32))
    assert batch["total"].tolist() == [0, 4, 8, 12]
    assert figures(pool.connect()).free == 12
    kept = batch.pop("y")[1:2].view(-1)
    del batch
    assert figures(pool.connect()).free == 12
    assert kept.tolist() == [-1] * 4
    del kept
    until(pool.connect(), lambda now: now.free == 16)


def test_a_view_of_a_result(client):
    with client.lease() as slot:
        slot.inputs["x"][...] = 3
        result = slot.submit().result()
        tensors = view(result)
        assert tensors["y"].data_ptr() == result.outputs["y"].__array_interface__["data"][0]
        assert tensors["total"].item() == 12
    with pytest.raises(SpentHandle):
        view(result)


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        ([torch.zeros(5)], r"input 'x' must have shape \(4,\), got \(5,\)"),
        ([torch.zeros(4, dtype=torch.float64)], "input 'x' must be float32, got float64"),
        ([{"z": sample(1)}], "model 'neg' takes x, and a sample has no 'x'"),
        ([{"x": sample(1), "y": 1}], "samples have y, which the model gives as well"),
    ],
)
def test_samples_that_do_not_fit(client, samples, text):
    with pytest.raises(InvalidInput, match=text):
        Collate(client)(samples)
    assert figures(client).free == 16


def test_batches_that_fail(client):
    with pytest.raises(EngineFailed, match="a bad item"):
        Collate(client)([sample(1), sample(BAD)])
    with pytest.raises(LeaseTooLarge, match="13 slots were asked for and this client may hold 12"):
        Collate(client)(13 * [sample(1)])
    until(client, lambda now: now.free == 16)
