"""`trtpool.arrow`: record batches in and out."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.ipc.fake_pool import BAD, MODEL, NET_S, SUM, figures, until
from trtpool.ipc.arrow import fill, infer, map_batches, view
from trtpool.ipc.arrow_columns import column_of, items_of
from trtpool.ipc.errors import EngineFailed, InvalidInput, PoolBusy, SpentHandle
from trtpool.ipc.tensors import TensorSpec

pa = pytest.importorskip("pyarrow")


def items(count: int) -> npt.NDArray[Any]:
    return np.arange(count * 4, dtype=np.float32).reshape(count, 4)


def lists(array: npt.NDArray[Any]) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def batch_of(count: int, **more: Any) -> Any:
    return pa.RecordBatch.from_pydict({"id": pa.array(range(count), pa.int64()), "x": lists(items(count)), **more})


def numpy_of(column: Any) -> npt.NDArray[Any]:
    return np.array(column.to_pylist())


# --- Columns -------------------------------------------------------------------------------------

SPEC = TensorSpec("x", "int32", (2, 3))
ROWS = np.arange(5 * 6, dtype=np.int32).reshape(5, 2, 3)
FLAT = pa.array(ROWS.reshape(-1))
NESTED = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(FLAT, 3), 2)
LISTS = pa.array([row.reshape(-1).tolist() for row in ROWS], pa.list_(pa.int32()))
COLUMNS = {
    "fixed-size list": pa.FixedSizeListArray.from_arrays(FLAT, 6),
    "nested": NESTED,
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int32(), (2, 3)), pa.FixedSizeListArray.from_arrays(FLAT, 6)
    ),
    "list": LISTS,
    "large list": LISTS.cast(pa.large_list(pa.int32())),
    "fixed binary": pa.array([row.tobytes() for row in ROWS], pa.binary(24)),
    "binary": pa.array([row.tobytes() for row in ROWS], pa.binary()),
    "large binary": pa.array([row.tobytes() for row in ROWS], pa.large_binary()),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize(("start", "count"), [(0, 5), (1, 3), (4, 1), (2, 0)])
def test_columns_of_many_kinds_and_their_slices(kind, start, count):
    np.testing.assert_array_equal(items_of(SPEC, COLUMNS[kind].slice(start, count), "c"), ROWS[start : start + count])


@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_are_read_where_they_are(kind):
    column = COLUMNS[kind]
    storage = getattr(column, "storage", column)
    buffers = [buffer for buffer in storage.buffers() if buffer is not None]
    address = items_of(SPEC, column, "c").__array_interface__["data"][0]
    assert any(buffer.address == address for buffer in buffers)


def test_numbers_and_booleans():
    for dtype in ("int8", "uint16", "int64", "float16", "float32", "float64", "bool"):
        array = np.array([0, 1, 1, 0, 1]).astype(dtype)
        scalar, row = TensorSpec("s", dtype, ()), TensorSpec("s", dtype, (1,))
        np.testing.assert_array_equal(items_of(scalar, pa.array(array).slice(1), "c"), array[1:])
        np.testing.assert_array_equal(items_of(row, pa.array(array), "c"), array[:, None])


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([[1] * 6, None], pa.list_(pa.int32(), 6)), "column 'c' has 1 nulls, and a tensor cannot have any"),
        (pa.array([[1] * 5 + [None]], pa.list_(pa.int32(), 6)), "column 'c' has 1 nulls"),
        (pa.array([[1] * 6, [1] * 5], pa.list_(pa.int32())), "has 6 values in its first row and 5 in row 1"),
        (pa.array([b"1" * 24, b"1"]), "has 24 values in its first row and 1 in row 1"),
        (pa.array([b"1" * 23]), "has rows of bytes, and an item of 'x' takes 24"),
        (pa.array([[1] * 6], pa.list_(pa.int64(), 6)), r"holds int64, and input 'x' takes int32; convert it with"),
        (pa.array([[1] * 5], pa.list_(pa.int32(), 5)), r"has rows of shape \(5,\), and input 'x' takes \(2, 3\)"),
        (
            pa.array([[[1] * 2] * 3], pa.list_(pa.list_(pa.int32(), 2), 3)),
            r"has rows of shape \(3, 2\), and input 'x' takes \(2, 3\)",
        ),
        (pa.array([1], pa.int32()), r"has rows of shape \(1,\), and input 'x' takes"),
        (pa.array(["a"]), "column 'c' of type string is no tensor"),
    ],
)
def test_columns_that_do_not_fit(column, text):
    with pytest.raises(InvalidInput, match=text):
        items_of(SPEC, column, "c")


def test_tensors_in_another_order():
    kind = pa.fixed_shape_tensor(pa.int32(), (3, 2), permutation=[1, 0])
    column = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(FLAT, 6))
    with pytest.raises(InvalidInput, match=r"holds tensors in the order \[1, 0\]; write them in row-major order"):
        items_of(SPEC, column, "c")


@pytest.mark.parametrize("shape", [(), (4,), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8"])
def test_items_become_columns_over_the_same_memory(shape, dtype):
    array = np.arange(5 * int(np.prod(shape)), dtype=dtype).reshape(5, *shape)
    column = column_of(array)
    np.testing.assert_array_equal(items_of(TensorSpec("x", dtype, shape), column, "c"), array)
    array[...] = 7
    np.testing.assert_array_equal(items_of(TensorSpec("x", dtype, shape), column, "c"), array)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_rows_that_failed_are_null(shape, dtype):
    column = column_of(np.ones((4, *shape), dtype), {1, 3})
    assert column.is_null().to_pylist() == [False, True, False, True]
    assert column.null_count == 2


# --- Batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_slot", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 4, 13, 100])
def test_a_record_batch(make_pool, count, per_slot):
    client = make_pool(items_per_slot=per_slot, max_batch=4 * per_slot).connect()
    out = infer(client, batch_of(count))
    assert isinstance(out, pa.RecordBatch)
    assert out.schema.names == ["id", "y", "total"]
    assert out.schema.field("y").type == pa.list_(pa.float32(), 4)
    assert out.column("id").to_pylist() == list(range(count))
    np.testing.assert_array_equal(numpy_of(out.column("y")).reshape(count, 4), -items(count))
    np.testing.assert_array_equal(numpy_of(out.column("total")), items(count).sum(axis=1))
    assert figures(client).free == 16


def test_a_table_keeps_its_batches(client):
    table = pa.Table.from_batches([batch_of(5), batch_of(0), batch_of(17)])
    out = infer(client.handle(), table)
    assert isinstance(out, pa.Table)
    assert out.num_rows == 22
    assert [len(chunk) for chunk in out.column("y").chunks if len(chunk)] == [5, 17]
    assert infer(client, table.slice(0, 0)).schema.names == ["id", "y", "total"]


def test_several_inputs_out_of_other_columns(make_pool):
    client = make_pool(SUM).connect()
    batch = pa.RecordBatch.from_pydict({"left": COLUMNS["tensor"], "right": COLUMNS["binary"], "note": ["n"] * 5})
    out = infer(client, batch, columns={"a": "left", "b": "right"})
    assert out.schema.names == ["note", "sum"]
    np.testing.assert_array_equal(out.column("sum").to_numpy_ndarray(), 2 * ROWS)
    assert infer(client, batch, columns={"a": "left", "b": "right"}, keep=["left"]).schema.names == ["left", "sum"]


def test_nothing_is_copied_of_columns_that_are_kept(client):
    batch = batch_of(9)
    out = infer(client, batch, keep=["x"])
    assert out.column("x").values.buffers()[1].address == batch.column("x").values.buffers()[1].address


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"columns": {"x": "pixels"}}, r"no one column 'pixels' for input 'x'; name the column with columns="),
        ({"columns": {"z": "x"}}, "model 'neg' has no input z; it has x"),
        ({"keep": ["pixels"]}, "there is no column pixels to keep"),
        ({"on_error": "ignore"}, "on_error='ignore' is neither"),
        ({"model": "other"}, "no model 'other'"),
    ],
)
def test_what_cannot_be(client, options, text):
    with pytest.raises(InvalidInput, match=text):
        infer(client, batch_of(3), **options)
    assert figures(client).free == 16


def test_a_name_that_comes_twice(client):
    batch = batch_of(3, y=[1, 2, 3])
    with pytest.raises(InvalidInput, match="column y would come twice"):
        infer(client, batch)
    assert infer(client, batch, keep=["id"]).schema.names == ["id", "y", "total"]


# --- Streams -------------------------------------------------------------------------------------


def test_a_stream_of_batches_of_all_sizes(client):
    sizes = [3, 0, 50, 1, 1, 1, 0, 0, 7, 16]
    found = list(map_batches(client, [batch_of(size) for size in sizes]))
    assert [batch.num_rows for batch in found] == sizes
    for batch in found:
        np.testing.assert_array_equal(numpy_of(batch.column("y")).reshape(-1, 4), -items(batch.num_rows))
    assert figures(client).free == 16


def test_a_table_is_a_stream_of_its_batches(client):
    table = pa.Table.from_batches([batch_of(5), batch_of(2)])
    assert [batch.num_rows for batch in map_batches(client, table)] == [5, 2]


def test_the_next_batches_are_read_ahead_and_no_further(pool, client):
    read = 0

    def endless() -> Iterator[Any]:
        nonlocal read
        while True:
            read += 1
            yield batch_of(2)

    stream = map_batches(client, endless())
    next(stream)
    assert 2 <= read <= 10
    for _ in range(30):
        next(stream)
    assert read <= 30 + 10
    stream.close()
    until(client, lambda now: now.free == 16)


def test_small_batches_are_in_flight_together(pool, client):
    with pool.held():
        stream = threading.Thread(target=lambda: list(map_batches(client, (batch_of(1) for _ in range(20)))))
        stream.start()
        until(pool.connect(), lambda now: now.running + now.queued == 8)
    stream.join(NET_S)
    assert figures(client).items == 20


def test_a_pool_that_stays_full(pool, client):
    held = [pool.connect().lease_many(8) for _ in range(2)]
    with pytest.raises(PoolBusy):
        infer(client, batch_of(3), timeout_s=0.01)
    for leases in held:
        leases.release()


# --- Rows that fail ------------------------------------------------------------------------------


def spoilt(count: int, *bad: int) -> Any:
    array = items(count)
    array[list(bad), 0] = BAD
    return batch_of(count).set_column(1, "x", lists(array))


def test_the_first_row_that_fails_is_raised(client):
    with pytest.raises(EngineFailed, match=r"a bad item .*\(item 9\)") as caught:
        infer(client, spoilt(20, 9))
    assert caught.value.index == 9
    until(client, lambda now: now.free == 16)


@pytest.mark.parametrize("per_slot", [1, 2])
def test_rows_that_failed_say_why(make_pool, per_slot):
    client = make_pool(items_per_slot=per_slot, max_batch=4).connect()
    first, second = map_batches(client, [spoilt(21, 4, 20), batch_of(3)], on_error="null")
    failed = {4, 20} if per_slot == 1 else {4, 5, 20}
    assert {row for row, text in enumerate(first.column("error").to_pylist()) if text is not None} == failed
    assert first.column("error")[4].as_py().startswith("EngineFailed: a bad item")
    for name in ("y", "total"):
        assert {row for row, value in enumerate(first.column(name).to_pylist()) if value is None} == failed
    good = [row for row in range(21) if row not in failed]
    assert first.column("total").take(pa.array(good)).to_pylist() == items(21).sum(axis=1)[good].tolist()
    assert second.column("error").to_pylist() == [None] * 3
    assert second.schema == first.schema
    assert figures(client).free == 16


# --- Without a copy ------------------------------------------------------------------------------


def test_filling_slots_and_a_view_of_the_answer(client):
    with client.lease_many(5) as leases:
        (run,) = leases
        assert fill(run, batch_of(5)) == 5
        result = run.submit().result()
        out = view(result)
        np.testing.assert_array_equal(numpy_of(out.column("y")), -items(5))
        address = result.outputs["y"].__array_interface__["data"][0]
        assert out.column("y").values.buffers()[1].address == address, "the slots themselves"
        del out
    assert figures(client).free == 16


def test_slots_that_hold_several_items(make_pool):
    client = make_pool(items_per_slot=3, max_batch=6).connect()
    with client.lease_many(2) as leases:
        result = leases[0].submit(items=fill(leases[0], batch_of(4))).result()
        out = view(result)
        assert out.num_rows == 4
        np.testing.assert_array_equal(numpy_of(out.column("y")), -items(4))
        del out
    with client.lease() as slot:
        result = slot.submit(items=fill(slot, batch_of(2))).result()
        np.testing.assert_array_equal(numpy_of(view(result).column("y")), -items(2))


def test_a_batch_that_is_kept_keeps_its_slots_and_stays_as_it_is(pool, client):
    with client.lease_many(4) as leases:
        fill(leases[0], batch_of(4))
        kept = view(leases[0].submit().result()).slice(1, 2)
    pool.connect().infer(x=np.full((200, 4), 77, np.float32))
    np.testing.assert_array_equal(numpy_of(kept.column("y")), -items(4)[1:3])
    assert figures(client).free == 12
    flat = kept.column("y").values
    del kept
    assert figures(client).free == 12
    del flat
    gc.collect()
    pool.wait_all_free()


def test_more_rows_than_there_is_room_for(client):
    with client.lease_many(3) as leases, pytest.raises(InvalidInput, match="4 rows do not fit into 3 slots"):
        fill(leases[0], batch_of(4))


def test_a_view_of_what_was_released(client):
    lease = client.lease()
    lease.inputs["x"][...] = 1
    result = lease.submit().result()
    lease.release()
    with pytest.raises(SpentHandle):
        view(result)
    with pytest.raises(SpentHandle):
        fill(lease, batch_of(1))


def test_the_public_module():
    import trtpool.arrow

    assert trtpool.arrow.infer is infer
    assert MODEL.name == "neg"
