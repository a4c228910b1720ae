"""`trtpool run` on real images, with real processes, some of which are killed."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.models import save
from tests.system.rig import CLI, PATIENCE_S, Process, command_of, family, wait_until

HEIGHT, WIDTH = 24, 32

# Sums of rows and of columns, so that places count.
SUMS = (
    f"sums (float[N,3,{HEIGHT},{WIDTH}] x) => (float[N,3,{HEIGHT}] rows, float[N,3,{WIDTH}] y)"
    " <int64[1] last = {3}, int64[1] third = {2}>"
    " { rows = ReduceSum<keepdims=0>(x, last) y = ReduceSum<keepdims=0>(x, third) }"
)
VECTORS = "vectors (float[N,4] x) => (float[N,4] y) { y = Neg(x) }"
IMAGES = ("astronaut.png", "coffee.png", "chelsea.png", "camera.png", "page.png", "rocket.jpg", "horse.png", "text.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 images, small versions of scikit-image's: every suffix, colour and grey, of many sizes."""
    data = Path(pytest.importorskip("skimage.data").__file__).parent
    folder = tmp_path_factory.mktemp("pictures")
    rng = random.Random(5)
    for number in range(60):
        image = Image.open(data / IMAGES[number % len(IMAGES)])
        image = image.resize((rng.randrange(20, 120), rng.randrange(20, 120)))
        suffix = (".png", ".tif", ".webp")[number % 3]
        image.save(folder / f"{number:03}{suffix}")
    return folder


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    return save(SUMS, tmp_path, "sums")


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    return save(VECTORS, tmp_path, "vectors")


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run where the test's files are."""
    monkeypatch.chdir(tmp_path)


def run(*arguments: object, **options: object) -> Process:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return Process(*CLI, "run", *map(str, arguments), *flags)


def finished(*arguments: object, code: int = 0, **options: object) -> str:
    """Run to the end; returns what was said, on both streams."""
    with run(*arguments, **options) as process:
        said = process.rest(1) + process.rest(2)
        assert process.wait() == code, said
    return said


def expected(model: Path, paths: list[Path]) -> dict[str, npt.NDArray[Any]]:
    """What onnxruntime itself makes of images, one by one, with a letterbox by Pillow and NumPy alone."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    answers: dict[str, list[npt.NDArray[Any]]] = {"rows": [], "y": []}
    for path in paths:
        image = Image.open(path).convert("RGB")
        scale = min(WIDTH / image.width, HEIGHT / image.height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        left, top = (WIDTH - size[0]) // 2, (HEIGHT - size[1]) // 2
        canvas = Image.new("RGB", (WIDTH, HEIGHT))
        canvas.paste(image.resize(size, Image.Resampling.BILINEAR), (left, top))
        x = np.asarray(canvas, np.float32).transpose(2, 0, 1) * np.float32(1 / 255)
        for name, answer in zip(answers, session.run(list(answers), {"x": x[None]}), strict=True):
            answers[name].append(answer[0])
    return {name: np.stack(arrays) for name, arrays in answers.items()}


def column(table: Any, name: str, *shape: int) -> npt.NDArray[Any]:
    return np.array(table.column(name).to_pylist(), np.float32).reshape(len(table), *shape)


def check(table: Any, model: Path, paths: list[Path]) -> None:
    """Assert that a table has a row for each image, in order, equal to onnxruntime's."""
    assert table.column("key").to_pylist() == [os.fspath(path) for path in paths]
    assert table.column("row").to_pylist() == list(range(len(paths)))
    assert table.column("error").null_count == len(paths)
    wanted = expected(model, paths)
    assert np.array_equal(column(table, "rows", 3, HEIGHT), wanted["rows"])
    assert np.array_equal(column(table, "y", 3, WIDTH), wanted["y"])


def test_images_to_parquet_equal_onnxruntime_called_directly(sums: Path, pictures: Path) -> None:
    said = finished(sums, input=pictures, output="out.parquet", producers=2, rows_per_group=7)
    assert "letterbox to 32x24, RGB, unit, NCHW float32" in said
    assert "60 of 60 rows" in said
    check(pq.read_table("out.parquet"), sums, sorted(pictures.iterdir()))
    assert pq.read_metadata("out.parquet").num_row_groups == 9
    assert not Path("out.parquet.job").exists()
    assert "is there already" in finished(sums, input=pictures, output="out.parquet", code=3)
    assert "is done already" in finished("--resume", sums, input=pictures, output="out.parquet")


def test_the_same_from_encoded_images_in_parquet_to_npy(sums: Path, pictures: Path) -> None:
    paths = sorted(pictures.iterdir())
    table = pa.table({"id": list(range(60)), "image": [path.read_bytes() for path in paths]})
    pq.write_table(table, "in.parquet", row_group_size=13)
    finished(sums, input="in.parquet", output="out.npy", producers=2)
    wanted = expected(sums, paths)
    for name, array in wanted.items():
        assert np.array_equal(np.load(f"out.{name}.npy"), array)


def test_the_same_from_encoded_images_in_arrow_to_arrow(sums: Path, pictures: Path) -> None:
    paths = sorted(pictures.iterdir())
    table = pa.table({"id": list(range(60)), "image": [path.read_bytes() for path in paths]})
    for name, make in (("a", pa.ipc.new_file), ("b", pa.ipc.new_stream)):  # Hugging Face's are streams
        with pa.OSFile(f"{name}.arrow", "wb") as file, make(file, table.schema) as writer:
            writer.write_table(table.slice(30 * (name == "b"), 30), max_chunksize=13)
    finished(sums, input="?.arrow", output="out.arrow", producers=2, rows_per_group=7)
    with pa.memory_map("out.arrow") as mapped:
        done = pa.ipc.open_file(mapped).read_all()
        assert done.column("key").to_pylist()[28:32] == ["a.arrow#28", "a.arrow#29", "b.arrow#0", "b.arrow#1"]
        assert done.column("error").null_count == 60
        wanted = expected(sums, paths)
        for name, shape in (("rows", (3, HEIGHT)), ("y", (3, WIDTH))):
            assert done.schema.field(name).type == pa.fixed_shape_tensor(pa.float32(), shape)
            assert np.array_equal(done.column(name).combine_chunks().to_numpy_ndarray(), wanted[name])


def test_rows_of_arrow_that_cannot_be_read_are_error_rows(vectors: Path) -> None:
    rows = [[1.0] * 4, None, [1.0] * 5, [2.0] * 4]
    table = pa.table({"x": rows})
    with pa.OSFile("in.feather", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    finished(vectors, input="in.feather", output="out.arrow", code=21)
    with pa.memory_map("out.arrow") as mapped:
        done = pa.ipc.open_file(mapped).read_all().to_pylist()
    assert [row["y"] for row in done] == [[-1.0] * 4, None, None, [-2.0] * 4]
    assert done[1]["error"] == "InvalidInput: the value is null"
    assert done[2]["error"] == "InvalidInput: input 'x' takes shape (4,), the row has (5,)"


def test_a_corrupt_input_is_an_error_row_and_a_list_may_name_what_is_not_there(sums: Path, pictures: Path) -> None:
    good = sorted(pictures.iterdir())[:6]
    Path("broken.png").write_bytes(good[0].read_bytes()[:100])
    Path("text.png").write_text("not an image")
    listed = [good[0], "broken.png", *good[1:3], "gone.png", "text.png", *good[3:]]
    with run(sums, input="-", output="out.parquet", producers=2) as process:
        for path in listed:
            process.say(str(path))
        process.popen.stdin.close()
        said = process.rest(1)
        assert process.wait() == 21, process.rest(2)
    assert "with errors" in said
    assert "error: gone.png: FileNotFoundError" in said
    table = pq.read_table("out.parquet")
    errors = table.column("error").to_pylist()
    assert [at for at, error in enumerate(errors) if error] == [1, 4, 5]
    assert table.column("y")[4].as_py() is None
    whole = table.filter(pa.compute.is_null(table.column("error")))
    assert np.array_equal(column(whole, "y", 3, WIDTH), expected(sums, good)["y"])


def test_too_many_errors_stop_a_job_which_can_be_resumed(vectors: Path) -> None:
    Path("mine.py").write_text(
        "def decode(item, inputs):\n"
        "    if item.row % 2:\n        raise ValueError('odd')\n"
        "    inputs['x'][...] = item.value\n"
    )
    np.save("in.npy", np.arange(160, dtype=np.float32).reshape(40, 4))
    job: dict[str, Any] = {
        "input": "in.npy",
        "output": "out.jsonl",
        "decode": "mine:decode",
        "producers": 1,
        "rows_per_group": 5,
    }
    assert "more than --max-errors 6" in finished(vectors, **job, max_errors=6, code=22)
    assert "use --resume" in finished(vectors, **job, code=3)
    assert "other settings" in finished("--resume", vectors, **job, fit="crop", code=3)
    finished("--resume", vectors, **job, code=21)
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(40))
    assert [row["y"] for row in rows[::2]] == (-np.arange(160.0).reshape(40, 4)[::2]).tolist()
    assert {row["error"] for row in rows[1::2]} == {"ValueError: odd"}


def test_lists_in_parquet_go_through_functions_of_the_user(vectors: Path) -> None:
    Path("mine.py").write_text(
        "def post(item, outputs):\n"
        "    y = outputs['y']\n"
        "    boxes = [{'at': int(i), 'v': float(y[i])} for i in y.nonzero()[0]]\n"
        "    return {'boxes': boxes, 'vector': y, 'of': item.key}\n"
    )
    values = np.arange(120, dtype=np.float32).reshape(30, 4)
    values[:11] = 0  # the first chunk does not know what a box is
    pq.write_table(pa.table({"v": pa.FixedSizeListArray.from_arrays(values.reshape(-1), 4)}), "in.parquet")
    finished(vectors, input="in.parquet", output="out.parquet", post="mine:post", producers=2, rows_per_group=10)
    rows = pq.read_table("out.parquet").to_pylist()
    assert [row["vector"] for row in rows] == (-values).tolist()
    assert [row["of"] for row in rows] == [f"in.parquet#{number}" for number in range(30)]
    assert [[box["v"] for box in row["boxes"]] for row in rows] == [[-v for v in row if v] for row in values.tolist()]


def test_unordered_rows_are_all_there_once(vectors: Path) -> None:
    values = np.random.default_rng(3).random((200, 4), np.float32)
    np.save("in.npy", values)
    finished("--unordered", vectors, input="in.npy", output="out.jsonl", producers=2, rows_per_group=3)
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert sorted(row["row"] for row in rows) == list(range(200))
    assert all(np.array_equal(np.float32(row["y"]), -values[row["row"]]) for row in rows)


# --- Interruptions ---

# Notes each row that is decoded, waits to be told when it comes to one, and ends its process at another.
NOTING = """
import os

def decode(item, inputs):
    with open("decoded", "a") as file:
        file.write(f"{item.row}\\n")
    if item.row == int(os.environ.get("DEADLY", -1)):
        os.kill(os.getpid(), 9)
    if item.row == int(os.environ.get("STUCK", -1)):
        with open("stuck") as gate:
            gate.read()
    inputs["x"][...] = item.value
"""


def numbers(path: Path) -> list[int]:
    """Rows that were decoded, in this order."""
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def end_whole_job(process: Process, victim: int) -> None:
    """Kill one process of a job, and wait until none of it is left."""
    others = [psutil.Process(process.pid), *family(process.pid)]
    os.kill(victim, signal.SIGKILL)
    assert not psutil.wait_procs(others, timeout=PATIENCE_S)[1]


@pytest.mark.parametrize("sink", ["parquet", "arrow", "jsonl", "npy"])
def test_killed_at_random_points_a_job_is_resumed_and_redoes_nothing_that_is_safe(
    vectors: Path, tmp_path: Path, sink: str
) -> None:
    Path("mine.py").write_text(NOTING)
    values = np.arange(1600, dtype=np.float32).reshape(400, 4)
    np.save("in.npy", values)
    rng = random.Random(sink)
    job: dict[str, Any] = {
        "input": "in.npy",
        "output": f"out.{sink}",
        "decode": "mine:decode",
        "producers": 2,
        "rows_per_group": 5,
    }
    journal = Path(f"out.{sink}.job") / "journal"
    decoded, safe = Path("decoded"), set[int]()
    for _ in range(3):
        before = len(numbers(decoded))
        with run("--resume", vectors, **job) as process:
            until = before + rng.randrange(1, 100)
            wait_until(lambda: len(numbers(decoded)) >= until, "some are decoded", process.popen.poll)  # noqa: B023
            end_whole_job(process, process.pid)
        assert not safe.intersection(numbers(decoded)[before:]), "what was safe is done again"
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        chunks = [json.loads(line)["chunk"] for line in lines if line.endswith(b"\n")]
        safe = {row for chunk in chunks for row in range(chunk * 5, chunk * 5 + 5)}
    before = len(numbers(decoded))
    finished("--resume", vectors, **job)
    assert sorted(numbers(decoded)[before:]) == sorted(set(range(400)) - safe)
    if sink == "npy":
        got = np.load("out.npy")
    elif sink == "parquet":
        got = column(pq.read_table("out.parquet"), "y", 4)
    elif sink == "arrow":
        with pa.memory_map("out.arrow") as mapped:
            got = column(pa.ipc.open_file(mapped).read_all(), "y", 4)
    else:
        got = np.array([json.loads(line)["y"] for line in Path("out.jsonl").read_text().splitlines()])
    assert np.array_equal(got, -values)
    assert not Path(f"out.{sink}.job").exists()


def test_a_row_that_ends_producers_is_an_error_row(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text(NOTING)
    monkeypatch.setenv("DEADLY", "17")
    values = np.arange(160, dtype=np.float32).reshape(40, 4)
    np.save("in.npy", values)
    said = finished(
        vectors, input="in.npy", output="out.jsonl", decode="mine:decode", producers=2, rows_per_group=5, code=21
    )
    assert "producers replaced" in said
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert "ended 2 producers: SIGKILL" in rows[17].pop("error")
    assert rows[17]["y"] is None
    assert [row["y"] for row in rows if row["row"] != 17] == np.delete(-values, 17, 0).tolist()


@pytest.mark.parametrize("victim", ["trtpool.workers", "trtpool.broker", "trtpool.broker.jobs.produce"])
def test_a_job_survives_the_end_of_its_processes(vectors: Path, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    Path("mine.py").write_text(NOTING)
    os.mkfifo("stuck")
    monkeypatch.setenv("STUCK", "30")
    values = np.arange(240, dtype=np.float32).reshape(60, 4)
    np.save("in.npy", values)
    job: dict[str, Any] = {
        "input": "in.npy",
        "output": "out.npy",
        "decode": "mine:decode",
        "producers": 2,
        "rows_per_group": 5,
    }
    with run(vectors, **job) as process:
        with open("stuck", "w"):  # noqa: PTH123  # opens when a producer comes to that row
            Path("mine.py").write_text(NOTING.replace('"STUCK"', '"NOWHERE"'))  # for the producer that is replaced
            next(child for child in family(process.pid) if command_of(child) == victim).kill()
            Path("stuck").unlink()  # for the other producer, should it get the chunk of one that was killed
            Path("stuck").touch()
        said = process.rest(1) + process.rest(2)
        assert process.wait() == 0, said
    assert np.array_equal(np.load("out.npy"), -values)


def test_a_signal_stops_a_job_and_leaves_what_is_done(vectors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text(NOTING)
    os.mkfifo("stuck")
    np.save("in.npy", np.zeros((60, 4), np.float32))
    job: dict[str, Any] = {
        "input": "in.npy",
        "output": "out.npy",
        "decode": "mine:decode",
        "producers": 1,
        "rows_per_group": 5,
    }
    monkeypatch.setenv("STUCK", "30")
    with run(vectors, **job) as process, open("stuck", "w"):  # noqa: PTH123  # opens when it comes to that row
        process.kill(signal.SIGTERM)
        said = process.rest(2)
        assert process.wait() == 1
    assert "rows are safe, go on with --resume" in said
    monkeypatch.delenv("STUCK")
    finished("--resume", vectors, **job)
    assert not np.load("out.npy").any()


# --- What is refused ---


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"output": "out.csv"}, 3, "name a file that ends in"),
        ({"input": "*.png"}, 3, "quote globs"),
        ({"decode": "nowhere:f"}, 3, "there is no module nowhere in "),
        ({"decode": "os:sep"}, 3, "os:sep is not a function; its type is str"),
        ({"max_batch": "other=3"}, 3, "--max-batch other=...: the job has one model, vectors"),
        ({"norm": "unit", "std": "0.5"}, 3, "contradict"),
        ({"column": "x"}, 3, "--column is for Parquet, Arrow and tar shards"),
        ({"output": "nowhere/out.npy"}, 3, "there is no folder nowhere; make it first"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(vectors: Path, options: dict[str, str], code: int, says: str) -> None:
    np.save("in.npy", np.zeros((3, 4), np.float32))
    said = finished(vectors, **{"input": "in.npy", "output": "out.npy", **options}, code=code)
    assert says in said
    assert said.count("\n") == 1
    left = {path.name for path in Path().iterdir()}
    assert left - {"trtpool"} == {"in.npy", "vectors.onnx"}, "more than the inputs and where pools live"


def test_what_a_shell_makes_of_a_glob_is_told_from_a_model(vectors: Path) -> None:
    said = finished(vectors, "b.npy", "c.npy", input="a.npy", output="out.npy", code=2)
    assert said.startswith("trtpool: there are 2 words too many, from b.npy on; quote globs, as in --input ")


def test_start_does_not_load_what_run_needs() -> None:
    code = "import sys, trtpool.broker.cli; print([n for n in sys.modules if 'jobs' in n or n in ('pyarrow', 'PIL')])"
    with Process(CLI[0], "-c", code) as process:
        assert process.succeed() == "[]\n"
