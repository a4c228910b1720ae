"""The parts of `trtpool run` without processes: inputs, images, columns, footers, sinks, the journal, dealing."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from trtpool.broker.jobs import columns, footers, images, reading, sinks, sources, tables, wire
from trtpool.broker.jobs.crew import Dealer
from trtpool.broker.jobs.functions import BuiltInDecoder, load_function
from trtpool.broker.jobs.journal import Entry, JobFolder, JobRecord, JobSettings
from trtpool.ipc.errors import ConfigError, InvalidInput
from trtpool.ipc.tensors import ModelSpec, TensorSpec

NCHW = TensorSpec("x", "float32", (3, 40, 60))
VECTOR = TensorSpec("y", "float32", (4,))


def find(*wanted: object, stdin: bytes = b"", any_file: bool = False) -> sources.Inputs:
    return sources.find([str(one) for one in wanted], lambda: stdin, any_file=any_file)


def pixels(height: int, width: int) -> Any:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)


# --- Inputs ---


def test_folders_globs_and_lists_name_the_same_images(tmp_path: Path) -> None:
    names = [tmp_path / "a.png", tmp_path / "b.JPG", tmp_path / "deep" / "c.tif"]
    (tmp_path / "deep").mkdir()
    for path in (*names, tmp_path / "notes.txt", tmp_path / ".hidden.png"):
        path.touch()
    wanted = tuple(map(str, names))
    assert find(tmp_path).paths == wanted
    assert find(tmp_path / "*.[pJ]*", tmp_path / "**" / "c.*").paths == wanted
    assert find("-", stdin="\n".join(wanted).encode() + b"\n").paths == wanted
    assert find("-", stdin="\0".join(wanted).encode()).paths == wanted
    assert set(find(tmp_path, any_file=True).paths) == {*wanted, str(tmp_path / "notes.txt")}


@pytest.mark.parametrize(
    ("name", "says"), [("gone.png", "no such file"), ("*.png", "nothing is there"), ("", "no images, Parquet, ")]
)
def test_inputs_that_are_not_there_are_refused(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find(tmp_path / name)


def test_a_list_that_is_empty_is_told_from_a_glob_that_finds_nothing() -> None:
    with pytest.raises(ConfigError, match="standard input names no files"):
        find("-", stdin=b"\n")


def test_one_job_has_one_kind_of_input(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    (tmp_path / "a.png").touch()
    with pytest.raises(ConfigError, match="several kinds"):
        find(tmp_path / "a.npy", tmp_path / "a.png")


def test_chunks_hold_every_row_once_and_none_spans_row_groups(tmp_path: Path) -> None:
    table = pa.table({"x": list(range(25))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=25)
    inputs = find(tmp_path)
    chunks = inputs.chunks(4)
    assert inputs.rows == 50
    assert [row for c in chunks for row in range(c.first, c.first + c.count)] == list(range(50))
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    reader = reading.Reader("parquet", {"x": "x"})
    read = [(item.key, int(value())) for chunk in chunks for item, value in reader.rows(chunk)]
    assert read == [(f"{tmp_path}/{name}.parquet#{row}", row) for name in "ab" for row in range(25)]


def test_a_file_that_changed_is_noticed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    inputs = find(tmp_path)
    sources.check_unchanged(inputs)
    np.save(tmp_path / "a.npy", np.zeros((4, 2)))
    with pytest.raises(ConfigError, match="changed since the job began"):
        sources.check_unchanged(inputs)


def test_values_of_parquet_columns() -> None:
    array = np.arange(12, dtype=np.float32)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(array), 4)[1:]
    assert tables.column_value(fixed[0]).tolist() == [4, 5, 6, 7]
    assert np.shares_memory(tables.column_value(fixed[0]), array), "it is copied"
    assert tables.column_value(pa.array([[[1, 2], [3, 4]]])[0]).tolist() == [[1, 2], [3, 4]]
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(array.reshape(2, 6))
    assert tables.column_value(tensors[1]).tolist() == [6, 7, 8, 9, 10, 11]
    assert tables.column_value(pa.array([b"png"])[0]).to_pybytes() == b"png"
    assert tables.column_value(pa.array([{"bytes": b"png", "path": "a"}])[0]).to_pybytes() == b"png"
    for bad in (pa.array([None, b"x"])[0], pa.array([[1, None]])[0], pa.array([[[1], [2, 3]]])[0]):
        with pytest.raises(InvalidInput):
            tables.column_value(bad)


def test_which_column_feeds_which_input(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "pic": [b"x"], "ids": [[1, 2]]}), tmp_path / "a.parquet")
    inputs = find(tmp_path)

    def choose(wanted: list[tuple[str, str]], *names: str) -> dict[str, str]:
        return sources.choose(inputs, wanted, names, any_type=False)

    assert choose([], "ids") == {"ids": "ids"}
    assert choose([("", "pic")], "x") == {"x": "pic"}
    assert choose([("a", "ids"), ("b", "pic")], "a", "b") == {"a": "ids", "b": "pic"}
    for wanted in ([], [("", "gone")], [("y", "pic")]):
        with pytest.raises(ConfigError, match="column"):
            choose(wanted, "x")


# --- Images ---


def written(spec: TensorSpec, value: Any, **options: Any) -> Any:
    out = np.full(spec.shape, 77, spec.numpy_dtype)
    images.ImageWriter(spec, images.complete(images.ImageOptions(**options), spec, (VECTOR,))).write(value, out)
    return out


def test_an_image_is_scaled_and_normalised_as_pillow_and_numpy_do_it() -> None:
    image = pixels(90, 200)
    scaled = np.asarray(Image.fromarray(image).resize((60, 40), Image.Resampling.BILINEAR), np.float32)
    assert np.array_equal(written(NCHW, image, fit="stretch"), scaled.transpose(2, 0, 1) * np.float32(1 / 255))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    wanted = ((scaled / 255 - mean) / std)[..., ::-1].transpose(2, 0, 1)
    assert np.allclose(written(NCHW, image, fit="stretch", norm="imagenet", channels="bgr"), wanted, atol=1e-5)


def test_a_letterbox_keeps_proportions_and_pads() -> None:
    image = np.full((20, 60, 3), 200, np.uint8)
    out = written(TensorSpec("x", "uint8", (40, 60, 3)), image, fit="letterbox", pad=9)
    assert (out[:10] == 9).all()
    assert (out[10:30] == 200).all()
    assert (out[30:] == 9).all()


def test_a_crop_takes_the_middle() -> None:
    image = np.zeros((40, 200, 3), np.uint8)
    image[:, 70:130] = 250
    assert (written(NCHW, image, norm="none", fit="crop") == 250).all()


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("uint8", (3, 8, 9)), ("uint8", (8, 9, 3)), ("uint8", (8, 9)), ("float16", (1, 8, 9)), ("float32", (8, 9, 1))],
)
def test_every_layout_is_written_whole(dtype: str, shape: tuple[int, ...]) -> None:
    spec = TensorSpec("x", dtype, shape)
    out = written(spec, pixels(30, 20), fit="stretch")
    layout = images.image_layout(spec)
    mode = "RGB" if layout.channels == 3 else "L"
    scaled = np.asarray(Image.fromarray(pixels(30, 20)).convert(mode).resize((9, 8), Image.Resampling.BILINEAR))
    scaled = scaled.reshape(8, 9, layout.channels)
    wanted = (scaled.transpose(2, 0, 1) if layout.planar else scaled).reshape(shape)
    scale = 1 if dtype == "uint8" else 1 / 255
    assert np.allclose(out, wanted * scale, atol=1e-3)


def test_buffers_and_files_of_any_mode_decode_alike(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(40, 60))
    image.save(tmp_path / "a.png")
    encoded = (tmp_path / "a.png").read_bytes()
    wanted = written(NCHW, tmp_path / "a.png")
    assert np.array_equal(written(NCHW, encoded), wanted)
    assert np.array_equal(written(NCHW, pa.py_buffer(encoded)), wanted)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    assert np.array_equal(written(NCHW, tmp_path / "alpha.png"), wanted)
    deep = (np.arange(2400, dtype=np.uint16) * 27).reshape(40, 60)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grey = written(TensorSpec("x", "uint8", (40, 60)), tmp_path / "deep.png")
    assert np.array_equal(grey, deep >> 8)


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("fit", images.FITS)
@pytest.mark.parametrize("shape", [(40, 60, 3), (3, 40, 60), (40, 60)])
def test_opencv_does_what_pillow_does(shape: tuple[int, ...], fit: str, channels: str, tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    ramp = np.linspace(0, 250, 180 * 200 * 3).reshape(180, 200, 3).astype(np.uint8)
    ramp[..., 1:] //= np.uint8(2)
    ramp[..., 2] //= 2
    Image.fromarray(ramp).save(tmp_path / "a.png")
    small = ramp[:40, :60].copy()
    spec = TensorSpec("x", "uint8", shape)
    for value in (tmp_path / "a.png", ramp, small):
        both = [written(spec, value, fit=fit, channels=channels, library=one) for one in ("pillow", "opencv")]
        assert np.allclose(both[0], both[1].astype(int), atol=3)


def test_opencv_scales_right_into_the_slot() -> None:
    pytest.importorskip("cv2")
    options = images.ImageOptions(library="opencv", fit="letterbox", norm="none")
    writer = images.ImageWriter(TensorSpec("x", "uint8", (40, 60, 3)), options)
    slot = np.zeros((40, 60, 3), np.uint8)
    scaled, _, _ = writer._library.fitted(pixels(90, 90), slot)
    assert np.shares_memory(scaled, slot)


def test_exif_says_how_an_image_is_turned(tmp_path: Path) -> None:
    image = Image.fromarray(np.repeat([[[0] * 3, [255] * 3]], 2, 0).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    out = written(TensorSpec("x", "uint8", (2, 2)), tmp_path / "a.png")
    assert out.tolist() == [[255, 0], [255, 0]]


def test_what_is_no_image_input_or_does_not_fit_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="--decode"):
        images.ImageWriter(VECTOR, images.ImageOptions(fit="crop", norm="unit"))
    with pytest.raises(ConfigError, match="as they are"):
        written(TensorSpec("x", "uint8", (3, 8, 9)), pixels(3, 3), norm="imagenet")
    with pytest.raises(ConfigError, match="--std 0"):
        written(NCHW, pixels(3, 3), std=(0.0,))


def test_arrays_are_copied_cast_and_checked() -> None:
    model = ModelSpec("m", "/m", (VECTOR,), (VECTOR,))
    decode, out = BuiltInDecoder(model, images.ImageOptions()), np.zeros(4, np.float32)
    decode(reading.Item(0, "a", np.arange(4)), {"y": out})
    assert out.tolist() == [0, 1, 2, 3]
    for bad in (np.zeros(5), np.zeros(4, complex), "text"):
        with pytest.raises(InvalidInput):
            decode(reading.Item(0, "a", bad), {"y": out})


@pytest.mark.parametrize("dotted", ["math", "math:", "no_such_module:f", "math:no_such", "math:pi"])
def test_a_function_that_is_not_there_is_named(dotted: str) -> None:
    with pytest.raises(ConfigError, match="--post"):
        load_function(dotted, "--post")


# --- Sinks ---


def filled(first: int, count: int, failing: tuple[int, ...] = (), **made: Any) -> columns.ChunkRows:
    """Rows whose output is their number; or what `made` says for each."""
    rows = columns.ChunkRows(first, count, () if made else (VECTOR,))
    for at in range(count):
        if at in failing:
            rows.fail(at, f"f{first + at}", "broken")
        else:
            given = {name: one(first + at) for name, one in made.items()} or {"y": np.full(4, first + at, np.float32)}
            rows.fill(at, f"f{first + at}", given)
    return rows


class Chunks:
    """A sink, and chunks of 5 rows that are appended to it."""

    def __init__(self, folder: Path, kind: str, total: int = 20) -> None:
        self.folder, self.kind, self.total = folder, kind, total
        self.entries: dict[int, Entry] = {}
        self.reopen()

    def reopen(self) -> None:
        self.sink = sinks.open_sink(self.kind, self.folder, self.folder / f"out.{self.kind}", self.entries, self.total)

    def add(self, number: int, rows: columns.ChunkRows) -> None:
        make = {
            "parquet": lambda: columns.parquet_file(rows, None),
            "arrow": lambda: columns.arrow_batch(rows, None),
            "jsonl": lambda: columns.json_lines(rows),
        }
        payload = b"".join(bytes(part) for part in make.get(self.kind, lambda: columns.array_bytes(rows))())
        chunk = wire.Chunk(number, rows.first, rows.count)
        self.note(self.sink.append(chunk, memoryview(payload), rows.failures()))

    def note(self, entries: list[Entry]) -> None:
        self.entries.update((entry.chunk, entry) for entry in entries)

    def finish(self) -> dict[str, Path]:
        self.note(self.sink.held())
        moves = self.sink.finish([self.entries[number] for number in sorted(self.entries)])
        self.sink.close()
        return {target: self.folder / name for name, target in moves}


def read_table(path: Path, kind: str) -> Any:
    if kind == "parquet":
        return pq.read_table(path)
    with pa.memory_map(str(path)) as mapped:
        return pa.ipc.open_file(mapped).read_all()


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl", "npy"])
def test_chunks_in_any_order_and_in_several_sessions_end_in_order(tmp_path: Path, kind: str) -> None:
    chunks = Chunks(tmp_path, kind)
    for number in (2, 0):
        chunks.add(number, filled(5 * number, 5, failing=(1,)))
    chunks.sink.close()
    if kind != "npy":
        with (tmp_path / "data").open("ab") as data:
            data.write(b"torn")  # what was being written when it ended
    chunks.reopen()
    for number in (3, 1):
        chunks.add(number, filled(5 * number, 5, failing=(1,)))
    files = chunks.finish()
    path = files[f"out.{kind}"]
    wanted = [None if row % 5 == 1 else [float(row)] * 4 for row in range(20)]
    if kind == "npy":
        got = [None if np.isnan(row).all() else row.tolist() for row in np.load(path)]
        errors = [json.loads(line) for line in files["out.npy.errors.jsonl"].read_text().splitlines()]
    else:
        lines = path.read_text().splitlines() if kind == "jsonl" else ()
        table = [json.loads(line) for line in lines] or read_table(path, kind).to_pylist()
        assert [(row["row"], row["key"]) for row in table] == [(row, f"f{row}") for row in range(20)]
        got = [row["y"] for row in table]
        errors = [row for row in table if row["error"]]
    assert got == wanted
    assert [(row["row"], row["key"], row["error"]) for row in errors] == [
        (n, f"f{n}", "broken") for n in (1, 6, 11, 16)
    ]


def test_footers_are_moved_for_every_type_and_many_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            **{f"c{number}": pa.array([number, None, number + 1]) for number in range(40)},
            "text": ["a", "b" * 1000, None],
            "list": [[1.5], [], None],
            "struct": [{"a": 1, "b": "x"}, None, {"a": None, "b": "y"}],
            "flag": [True, False, None],
        }
    )
    whole, metadata = b"", []
    for options in ({}, {"compression": "none", "use_dictionary": False}, {"write_page_index": True}):
        sink = io.BytesIO()
        pq.write_table(table, sink, **options)
        end = footers.moved(sink.getvalue(), len(whole))
        metadata.append(pq.read_metadata(io.BytesIO(footers.MAGIC + end)))
        whole += sink.getvalue()
    for other in metadata[1:]:
        metadata[0].append_row_groups(other)
    footer = io.BytesIO()
    metadata[0].write_metadata_file(footer)
    (tmp_path / "a.parquet").write_bytes(whole + footer.getvalue()[4:])
    assert pq.read_table(tmp_path / "a.parquet").equals(pa.concat_tables([table] * 3))
    assert pq.read_table(tmp_path / "a.parquet", filters=[("c3", "=", 4)]).num_rows == 3


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_gets_its_type_from_the_first_chunk_that_has_one(tmp_path: Path, kind: str) -> None:
    chunks = Chunks(tmp_path, kind)
    chunks.add(0, filled(0, 5, boxes=lambda row: []))
    chunks.add(1, filled(5, 5, failing=(0, 1, 2, 3, 4), boxes=str))
    assert not chunks.entries, "they are safe before they can be written"
    chunks.add(2, filled(10, 5, boxes=lambda row: [{"x": row / 2}]))
    chunks.add(3, filled(15, 5, boxes=lambda row: []))
    table = read_table(chunks.finish()[f"out.{kind}"], kind)
    assert (
        table.column("boxes").to_pylist()
        == [[]] * 5 + [None] * 5 + [[{"x": row / 2}] for row in range(10, 15)] + [[]] * 5
    )


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_of_different_types_are_refused(tmp_path: Path, kind: str) -> None:
    chunks = Chunks(tmp_path, kind)
    chunks.add(0, filled(0, 5, size=lambda row: row))
    with pytest.raises(ConfigError, match="`schema`"):
        chunks.add(1, filled(5, 5, size=lambda row: "large"))
    chunks.sink.close()


def test_a_model_whose_output_is_called_like_our_columns_needs_a_post() -> None:
    with pytest.raises(ConfigError, match="'key'"):
        columns.check_names(("y", "key"))


# --- The journal ---


def record(**settings: Any) -> JobRecord:
    base = JobSettings(
        model=("/m", 1, 2),
        inputs=("a",),
        columns=(),
        decode="",
        post="",
        image=images.ImageOptions(),
        sink="jsonl",
        pool="",
    )
    return JobRecord(settings=base, inputs=sources.Inputs("files", ("a",)), chunk_rows=3, folder="/")


def test_a_journal_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    entries = [Entry(number, number * 10, 10, ((number, "k", "t"),)) for number in range(3)]
    with JobFolder(tmp_path / "out") as folder:
        folder.begin(record())
        assert folder.entries() == {}
        folder.note(entries[:2])
    journal = tmp_path / "out.job" / "journal"
    whole = journal.read_bytes()
    for torn in range(len(whole)):
        journal.write_bytes(whole[:torn])
        with JobFolder(tmp_path / "out") as folder:
            kept = folder.entries()
            folder.note(entries[2:])
            assert kept == {n: entries[n] for n in range(whole[:torn].count(b"\n"))}
        with JobFolder(tmp_path / "out") as folder:
            assert folder.entries() == {**kept, 2: entries[2]}


def test_two_jobs_cannot_write_one_output(tmp_path: Path) -> None:
    with JobFolder(tmp_path / "out"), pytest.raises(ConfigError, match="another job"):
        JobFolder(tmp_path / "out")
    with JobFolder(tmp_path / "out"):
        pass


def test_moving_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    with JobFolder(tmp_path / "out.npy") as folder:
        folder.begin(record())
        (folder.path / "b.npy").write_text("b")
        (tmp_path / "out.a.npy").write_text("moved before")
        folder.write("moves", b'[["a.npy", "out.a.npy"], ["b.npy", "out.b.npy"]]')
    with JobFolder(tmp_path / "out.npy") as folder:
        assert folder.all_written
        folder.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.a.npy", "out.b.npy"]


# --- Dealing ---


def test_row_groups_stay_with_a_producer_while_there_are_others() -> None:
    chunks = [wire.Chunk(n, n, 1, path="a", group=n // 4) for n in range(12)]
    dealer = Dealer(chunks)
    last: list[Any] = [None, None]
    turns = random.Random(3)
    taken: dict[int, list[int]] = {0: [], 1: []}
    while dealer.rows:
        who = turns.randrange(2)
        last[who] = dealer.take(last[who])
        taken[who].append(last[who].number)
    assert sorted(taken[0] + taken[1]) == list(range(12))
    assert taken[0][:4] == [0, 1, 2, 3] or taken[1][:4] == [0, 1, 2, 3]
    assert dealer.take(None) is None
    dealer.put_back(chunks[7])
    assert dealer.take(None) == chunks[7]
