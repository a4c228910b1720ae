"""Arrow IPC as input and output of `trtpool run`, without processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather

from tests.broker.test_job_parts import Chunks, filled, find
from trtpool.broker.jobs import columns, reading, sources
from trtpool.broker.jobs.batches import BatchFile
from trtpool.ipc.errors import ConfigError
from trtpool.ipc.tensors import TensorSpec


def write_file(path: Path, table: Any, rows: int, **options: Any) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_stream(path: Path, table: Any, rows: int, **options: Any) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def rows_of(inputs: sources.Inputs, column: str, most: int = 4) -> list[Any]:
    reader = reading.Reader(inputs.kind, {"x": column})
    return [(item.key, value()) for chunk in inputs.chunks(most) for item, value in reader.rows(chunk)]


TABLE = pa.table({"id": list(range(25)), "x": [[row, row + 1.0] for row in range(25)], "pic": [b"png"] * 25})


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("write", [write_file, write_stream])
def test_record_batches_are_row_groups(tmp_path: Path, write: Callable[..., Path], compression: str | None) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    paths = [write(tmp_path / f"{name}.arrow", TABLE, 10, options=options) for name in "ab"]
    inputs = find(tmp_path)
    assert inputs.kind == "arrow"
    assert [file.groups for file in inputs.stored] == [(10, 10, 5)] * 2
    assert all(chunk.count <= 4 for chunk in inputs.chunks(4))
    assert [(key, value.tolist()) for key, value in rows_of(inputs, "x")] == [
        (f"{path}#{row}", [row, row + 1.0]) for path in paths for row in range(25)
    ]
    assert [value.to_pybytes() for _, value in rows_of(inputs, "pic")] == [b"png"] * 50
    reader = BatchFile(str(paths[0]), ["x"])
    assert [reader.batch(number)["x"][0].as_py()[0] for number in (2, 0, 1)] == [20, 0, 10]


def test_feather_of_any_version_is_read_or_refused(tmp_path: Path) -> None:
    feather.write_feather(TABLE, str(tmp_path / "a.feather"))
    assert len(rows_of(find(tmp_path / "a.feather"), "x")) == 25
    (tmp_path / "old.feather").write_bytes(b"FEA1" + bytes(100))
    with pytest.raises(ConfigError, match=r"old\.feather cannot be read"):
        find(tmp_path / "old.feather")


def test_a_batch_that_is_not_compressed_is_read_where_it_is(tmp_path: Path) -> None:
    values = np.arange(400_000, dtype=np.float32)
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(values), 10_000)})
    path = write_file(tmp_path / "a.arrow", table, 10)
    before = pa.total_allocated_bytes()
    read = rows_of(find(path), "x")
    assert pa.total_allocated_bytes() - before < values.nbytes / 40
    assert np.array_equal(np.stack([value for _, value in read]), values.reshape(-1, 10_000))


def test_columns_are_chosen_as_in_parquet(tmp_path: Path) -> None:
    inputs = find(write_file(tmp_path / "a.ipc", TABLE, 10))
    assert sources.choose(inputs, (), ["x"], any_type=False) == {"x": "x"}
    assert sources.choose(inputs, [("", "pic")], ["x"], any_type=False) == {"x": "pic"}
    with pytest.raises(ConfigError, match=r"a\.ipc has the columns id, x, pic; say with --column"):
        sources.choose(inputs, (), ["y"], any_type=False)


@pytest.mark.parametrize("write", [write_file, write_stream])
def test_what_is_cut_off_is_refused(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write(tmp_path / "a.arrow", TABLE, 10)
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ConfigError, match=r"a\.arrow cannot be read"):
        find(path)


def test_a_damaged_batch_is_counted_and_an_error_of_its_rows_alone(tmp_path: Path) -> None:
    values = np.random.default_rng(3).integers(0, 4, (30, 500))
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(values.reshape(-1), 500)})
    path = write_file(tmp_path / "a.arrow", table, 10, options=pa.ipc.IpcWriteOptions(compression="zstd"))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle - 200 : middle + 200] = bytes(400)
    path.write_bytes(data)
    inputs = find(path)
    assert inputs.stored[0].groups == (10, 10, 10), "counting reads what it counts"
    reader = reading.Reader("arrow", {"x": "x"})
    good = []
    for chunk in inputs.chunks(5):
        for item, value in reader.rows(chunk):
            try:
                assert np.array_equal(value(), values[item.row])
            except (OSError, ValueError):
                continue
            good.append(item.row)
    assert good == [*range(10), *range(20, 30)]


def test_a_batch_whose_places_lie_outside_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.arrow", pa.table({"x": [b"a" * 8, b"b" * 8]}), 10)
    offsets = np.array([0, 8, 16], np.int32).tobytes()
    data = path.read_bytes()
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, np.array([0, 1 << 30, 16], np.int32).tobytes()))
    with pytest.raises(ValueError, match=r"(?i)offset"):
        rows_of(find(path), "x")


# --- Output ---


def test_outputs_keep_shapes_and_dtypes_and_readers_map_them(tmp_path: Path) -> None:
    specs = (TensorSpec("s", "int64", ()), TensorSpec("v", "float16", (3,)), TensorSpec("m", "uint8", (2, 3)))
    chunks = Chunks(tmp_path, "arrow", 10)
    for number in (1, 0):
        rows = columns.ChunkRows(number * 5, 5, specs)
        for at in range(4):
            rows.fill(at, "k", {spec.name: np.full(spec.shape, number * 5 + at, spec.dtype) for spec in specs})
        rows.fail(4, "k", "broken")
        chunks.add(number, rows)
    path = chunks.finish()["out.arrow"]
    before = pa.total_allocated_bytes()
    with pa.memory_map(str(path)) as mapped:
        reader = pa.ipc.open_file(mapped)
        table = reader.read_all()
        assert reader.num_record_batches == 2
        assert pa.total_allocated_bytes() == before, "it is not mapped"
        table.validate(full=True)
    assert table.schema.field("s").type == pa.int64()
    assert table.schema.field("v").type == pa.list_(pa.float16(), 3)
    assert table.schema.field("m").type == pa.fixed_shape_tensor(pa.uint8(), [2, 3])
    assert table.column("row").to_pylist() == list(range(10))
    assert table.column("s").to_pylist() == [None if row % 5 == 4 else row for row in range(10)]
    assert table.column("error").to_pylist() == ["broken" if row % 5 == 4 else None for row in range(10)]
    tensors = [row and list(row) for row in table.column("m").combine_chunks().storage.to_pylist()]
    assert tensors == [None if row % 5 == 4 else [row] * 6 for row in range(10)]


def test_what_is_written_is_read_again_and_as_a_stream_too(tmp_path: Path) -> None:
    chunks = Chunks(tmp_path, "arrow", 200)
    for number in range(40):
        chunks.add(number, filled(number * 5, 5))
    path = chunks.finish()["out.arrow"]
    (tmp_path / "again.arrow").write_bytes(path.read_bytes())
    assert [value.tolist() for _, value in rows_of(find(tmp_path / "again.arrow"), "y")] == [
        [float(row)] * 4 for row in range(200)
    ]
    stream = pa.ipc.open_stream(pa.BufferReader(path.read_bytes()[8:]))
    assert stream.read_all().num_rows == 200


def test_a_dictionary_type_is_refused() -> None:
    schema = pa.schema([pa.field("a", pa.dictionary(pa.int32(), pa.string()))])
    with pytest.raises(ConfigError, match="'a' has a dictionary type"):
        columns.arrow_batch(filled(0, 3, a=str), schema)
