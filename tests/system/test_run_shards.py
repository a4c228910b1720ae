"""`trtpool run` on tar shards, with real processes, some of which are killed."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.models import save
from tests.system.rig import wait_until
from tests.system.test_run import (
    NOTING,
    SUMS,
    VECTORS,
    WIDTH,
    column,
    end_whole_job,
    expected,
    finished,
    numbers,
    pictures,
    run,
)

__all__ = ["pictures"]  # a fixture

BOTH = "both (float[N,4] a, float[N,4] b) => (float[N,4] y) { y = Sub(a, b) }"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shard(path: str, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz" if path.endswith("gz") else "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_images_in_shards_equal_those_in_files(tmp_path: Path, pictures: Path, suffix: str) -> None:
    sums = save(SUMS, tmp_path, "sums")
    paths = sorted(pictures.iterdir())
    Path("shards").mkdir()
    for number in range(3):
        members: dict[str, bytes] = {}
        for path in paths[number * 20 : number * 20 + 20]:
            members |= {f"p/{path.name}": path.read_bytes(), f"p/{path.stem}.json": b"{}"}
        shard(f"shards/{number}.{suffix}", members)
    said = finished(sums, input=f"shards/*.{suffix}", output="out.parquet", producers=2, rows_per_group=7)
    assert "letterbox to 32x24, RGB, unit, NCHW float32" in said
    table = pq.read_table("out.parquet")
    assert table.column("key").to_pylist() == [
        f"shards/{number // 20}.{suffix}#p/{path.name}" for number, path in enumerate(paths)
    ]
    wanted = expected(sums, paths)
    assert np.array_equal(column(table, "y", 3, WIDTH), wanted["y"])


def test_corrupt_members_and_shards_are_error_rows(tmp_path: Path, pictures: Path) -> None:
    sums = save(SUMS, tmp_path, "sums")
    good = [path for path in sorted(pictures.iterdir()) if path.suffix == ".png"][:4]
    data = [path.read_bytes() for path in good]
    members = {"0.png": data[0], "1.png": data[1][:90], "2.png": b"", "3.txt": b"none", "4.png": data[2]}
    cut = Path(shard("a.tar", {**members, "5.png": data[3], "6.png": bytes(30000)}))
    cut.write_bytes(cut.read_bytes()[:-30000])
    shard("b.tar", {"7.png": data[3]})
    job: dict[str, Any] = {"input": "*.tar", "output": "out.parquet", "column": "png", "producers": 2}
    assert "more than --max-errors 4" in finished(sums, **job, max_errors=4, code=22)
    finished("--resume", sums, **job, code=21)
    table = pq.read_table("out.parquet")
    errors = dict(zip(table.column("key").to_pylist(), table.column("error").to_pylist(), strict=True))
    assert [key for key, error in errors.items() if error is None] == [
        *("a.tar#0.png", "a.tar#4.png", "a.tar#5.png", "b.tar#7.png")
    ]
    assert errors["a.tar#2.png"] == "InvalidInput: its bytes are no image that Pillow knows"
    assert errors["a.tar#3"] == "InvalidInput: the sample has no member .png"
    assert "cut off within this member" in errors["a.tar#6.png"]
    assert "the shard is damaged, so rows of it may be missing" in errors["a.tar"]
    whole = table.filter(pa.compute.is_null(table.column("error")))
    wanted = expected(sums, [good[0], good[2], good[3], good[3]])
    assert np.array_equal(column(whole, "y", 3, WIDTH), wanted["y"])


def test_members_for_two_inputs(tmp_path: Path) -> None:
    model = save(BOTH, tmp_path, "both")
    a, b = np.random.default_rng(3).random((2, 30, 4), np.float32)
    members: dict[str, bytes] = {}
    for number in range(30):
        members |= {f"{number:02}.left.npy": npy(a[number]), f"{number:02}.right.npy": npy(b[number])}
    shard("in.tar", members)
    assert "--column a=SUFFIX, --column b=SUFFIX" in finished(model, input="in.tar", output="out.npy", code=3)
    finished("--column=b=right.npy", "--column=a=left.npy", model, input="in.tar", output="out.npy", producers=2)
    assert np.array_equal(np.load("out.npy"), a - b)


def test_arrays_that_do_not_fit_are_error_rows_which_say_what_would(tmp_path: Path) -> None:
    model = save(VECTORS, tmp_path, "vectors")
    arrays = [np.ones(4, np.float32), np.ones(5, np.float32), np.ones(4, complex), np.ones((2, 2), np.float64)]
    shard("in.tar", {f"{number}.npy": npy(array) for number, array in enumerate(arrays)})
    finished(model, input="in.tar", output="out.jsonl", code=21)
    errors = [json.loads(line)["error"] for line in Path("out.jsonl").read_text().splitlines()]
    assert errors == [
        None,
        "InvalidInput: input 'x' takes shape (4,), the row has (5,)",
        "InvalidInput: input 'x' takes float32, the row has complex128",
        "InvalidInput: input 'x' takes shape (4,), the row has (2, 2)",
    ]


def test_a_function_gets_a_sample(tmp_path: Path) -> None:
    model = save(VECTORS, tmp_path, "vectors")
    Path("mine.py").write_text(
        "import json\n"
        "def decode(item, inputs):\n"
        "    inputs['x'][...] = item.value['npy'] * json.loads(item.value['json'])['scale']\n"
        "def post(item, outputs):\n"
        "    return {'y': outputs['y'], 'scale': json.loads(item.value['json'])['scale']}\n"
    )
    members: dict[str, bytes] = {}
    for number in range(20):
        scale = json.dumps({"scale": number}).encode()
        members |= {f"{number:02}.json": scale, f"{number:02}.npy": npy(np.full(4, 2.0, np.float32))}
    shard("in.tar", members)
    flags = ("--column=npy", "--column=json", "--decode=mine:decode", "--post=mine:post")
    finished(*flags, model, input="in.tar", output="out.jsonl", producers=2)
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [(row["key"], row["scale"], row["y"]) for row in rows] == [
        (f"in.tar#{number:02}", number, [-2.0 * number] * 4) for number in range(20)
    ]


def test_killed_at_random_points_a_job_of_shards_is_resumed(tmp_path: Path) -> None:
    model = save(VECTORS, tmp_path, "vectors")
    Path("mine.py").write_text(NOTING)
    values = np.arange(1200, dtype=np.float32).reshape(300, 4)
    for number, suffix in enumerate(("tar", "tgz", "tar")):
        at = range(number * 100, number * 100 + 100)
        shard(f"{number}.{suffix}", {f"{row:03}.npy": npy(values[row]) for row in at})
    rng = random.Random(11)
    job: dict[str, Any] = {
        "input": "*.t*",
        "output": "out.parquet",
        "decode": "mine:decode",
        "producers": 2,
        "rows_per_group": 5,
    }
    decoded, journal, safe = Path("decoded"), Path("out.parquet.job") / "journal", set[int]()
    for _ in range(2):
        before = len(numbers(decoded))
        with run("--resume", model, **job) as process:
            until = before + rng.randrange(20, 100)
            wait_until(lambda: len(numbers(decoded)) >= until, "some are decoded", process.popen.poll)  # noqa: B023
            end_whole_job(process, process.pid)
        assert not safe.intersection(numbers(decoded)[before:]), "what was safe is done again"
        lines = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
        chunks = [json.loads(line)["chunk"] for line in lines if line.endswith(b"\n")]
        safe = {row for chunk in chunks for row in range(chunk * 5, chunk * 5 + 5)}
    before = len(numbers(decoded))
    os.utime("0.tar", (0, 0))
    assert "0.tar changed since the job began" in finished("--resume", model, **job, code=3)
    record = json.loads((Path("out.parquet.job") / "job.json").read_text())
    at = record["inputs"]["stored"][0]["mtime_ns"]
    os.utime("0.tar", ns=(at, at))
    finished("--resume", model, **job)
    assert sorted(numbers(decoded)[before:]) == sorted(set(range(300)) - safe)
    table = pq.read_table("out.parquet")
    assert np.array_equal(column(table, "y", 4), -values)
    assert table.column("key")[150].as_py() == "1.tgz#150.npy"
