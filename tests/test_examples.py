"""The examples with trained models, as users run them."""
# ruff: noqa: E402 - imported once it is known that all optional packages are there

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.real import require_models

require_models()

import onnxruntime
import pyarrow.parquet as pq
from PIL import Image
from scripts import demo_pages
from scripts.examples import classify_files, embed_sentences, find_text


def run(script: str, *arguments: str | Path, code: int = 0, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run an example as its own process, after the Python statements `before`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"}
    text = f"import runpy, sys\n{before}\nrunpy.run_path({script!r}, run_name='__main__')"
    command = [sys.executable, "-c", text, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "head", "tail"),
    [
        (b"01234567", b"01234567", b"01234567"),
        (b" \n 01234567 \t ", b"01234567 \t ", b" \n 01234567"),
        (b"a" * 3000 + b"b" * 3000, b"a" * 1024, b"b" * 1024),
        (b" " * 4000 + b"a" * 200 + b" " * 4000, b"a" * 96, b"a" * 96),  # of 4096 bytes at either end
    ],
    ids=["short", "white space", "long", "mostly white space"],
)
def test_features_of_a_file_are_its_ends(tmp_path, content, head, tail):
    (tmp_path / "file").write_bytes(content)
    features = np.full(2048, -1, np.int32)
    classify_files.write(tmp_path / "file", {"bytes": features})
    assert features[: len(head)].tobytes() == np.frombuffer(head, np.uint8).astype(np.int32).tobytes()
    assert features[2048 - len(tail) :].tobytes() == np.frombuffer(tail, np.uint8).astype(np.int32).tobytes()
    assert (features[len(head) : 2048 - len(tail)] == 256).all()


@pytest.mark.system
def test_files_are_classified_by_content(tmp_path):
    script = Path(classify_files.__file__)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_bytes(script.read_bytes())
    Image.new("RGB", (40, 40), "red").save(tmp_path / "b.dat", format="png")
    with zipfile.ZipFile(tmp_path / "c", "w") as archive:
        archive.writestr("x", "y" * 100)
    (tmp_path / "d.txt").write_bytes(b"short")  # not asked
    (tmp_path / "e").write_bytes(np.random.default_rng(1).bytes(5000))
    out = run(str(script), tmp_path).stdout
    cells = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if "│" in line}
    assert {Path(file).name: label for file, label in cells.items()} == {
        "a.txt": "python",
        "b.dat": "png",
        "c": "zip",
        "e": cells[str(tmp_path / "e")],
    }
    assert cells[str(tmp_path / "e")] not in ("python", "png", "zip", "txt")
    assert "4 file(s): " in out


@pytest.mark.system
def test_a_file_that_cannot_be_read_is_a_row(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").write_bytes(b"0123456789")

    def files_in(folders: list[Path]) -> list[Path]:
        return [*folders[0].iterdir(), tmp_path / "never was"]

    monkeypatch.setattr(classify_files, "files_in", files_in)
    monkeypatch.setattr(sys, "argv", ["classify_files.py", str(tmp_path)])
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    assert classify_files.main() == 0
    out = capsys.readouterr().out
    assert "No such file" in out
    assert "1 file(s): " in out


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    done = run(str(Path(classify_files.__file__)), tmp_path / "none", code=2)
    assert done.stderr.endswith("none: name folders that exist\n")


# --- Sentences -----------------------------------------------------------------------------------


@pytest.mark.system
def test_the_nearest_sentences_to_a_question(tmp_path):
    (tmp_path / "text").write_text(
        "The central bank raised its rates.\n\nA kitten sleeps on the sofa.\nRain is expected in the north.\n"
    )
    out = run(str(Path(embed_sentences.__file__)), tmp_path / "text", "Where is the cat?").stdout.splitlines()
    assert out[0].startswith("3 sentences and the question, in ")
    assert out[1].split(maxsplit=1)[1] == "A kitten sleeps on the sofa."
    assert len(out) == 4


@pytest.mark.system
def test_vectors_come_in_the_order_of_the_sentences(tmp_path):
    sentences = ["a rather long sentence about a dog that runs in a park", "dog", "a bank", "dog", "one two three"]
    with embed_sentences.start_pool(tmp_path) as pool:
        vectors = embed_sentences.embed(pool, sentences)
        one_by_one = [embed_sentences.embed(pool, [sentence])[0] for sentence in sentences]
    np.testing.assert_allclose(vectors, one_by_one, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_without_its_packages_the_example_says_how_to_install_them():
    done = run(str(Path(embed_sentences.__file__)), "x", "y", code=9, before="sys.modules['tokenizers'] = None")
    assert "run: scripts/setup cpu models" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    done = run(str(Path(embed_sentences.__file__)), tmp_path / "none", "y", code=1)
    assert done.stderr.startswith("embed_sentences: ")
    assert "Traceback" not in done.stderr


# --- Pages ---------------------------------------------------------------------------------------

RAY = str(Path(find_text.__file__).with_name("find_text_ray.py"))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """What onnxruntime, called directly, finds on a page: as the rows of the table."""
    session = onnxruntime.InferenceSession(demo_pages.model_file(), providers=["CPUExecutionProvider"])
    x = np.empty((1, 3, demo_pages.HEIGHT, demo_pages.WIDTH), np.float32)
    with Image.open(path) as picture:
        demo_pages.write_input(picture, x[0])
        (output,) = session.run(None, {"x": x})
        return find_text.rows_of(str(path), picture.size, output[0, 0])


def assert_the_lines_of(pages: list[Path], table: list[dict[str, Any]]) -> None:
    """By their middles: onnxruntime may round a batch of another size otherwise, and a pixel be text or not."""
    assert len(table) > 10
    for page in pages:
        wanted, got = ([row for row in rows if row["page"] == str(page)] for rows in (lines_of(page), table))
        assert len(got) == len(wanted)
        for row in wanted:
            near = [other for other in got if np.abs(middle(other) - middle(row)).max() < 4]
            assert [other["score"] for other in near] == [pytest.approx(row["score"], abs=0.1)], row


def middle(row: dict[str, Any]) -> Any:
    return np.mean(row["corners"], axis=0)


@pytest.mark.system
def test_lines_on_pages_go_to_parquet(tmp_path):
    pages, output = tmp_path / "pages", tmp_path / "lines.parquet"
    pages.mkdir()
    (pages / "zz.png").write_bytes(b"no picture")
    out = run(find_text.__file__, pages, output, "--make", "4").stdout.splitlines()
    made = sorted(pages.glob("0*.png"))
    assert len(made) == 4
    assert [line.split(":")[0] for line in out[:-1]] == [path.name for path in [*made, pages / "zz.png"]]
    assert "cannot identify image file" in out[-2]
    rows = pq.read_table(output).to_pylist()
    assert out[-1] == f"{len(rows)} lines on 4 pages, in {output}; 1 files cannot be read."
    assert_the_lines_of(made, rows)


def test_row_groups_are_written_as_they_come(tmp_path, monkeypatch):
    """Nothing is lost or written twice at their borders, nor beside a file that cannot be read."""
    written = demo_pages.write_pages(tmp_path, 4)
    row = {"corners": [[0.0, 0.0]] * 4, "score": 1.0}

    class NoPool:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def find(_pool, paths):
        for path in paths:
            page = find_text.Page(path)
            yield page, ValueError("broken") if path == written[1] else [{"page": path.name, **row}] * 3

    monkeypatch.setattr(find_text, "GROUP", 2)
    monkeypatch.setattr(find_text, "find_text", find)
    monkeypatch.setattr("trtpool.Pool", lambda *_, **__: NoPool())
    monkeypatch.setattr(sys, "argv", ["find_text.py", str(tmp_path), str(tmp_path / "out.parquet")])
    assert find_text.main() == 0
    file = pq.ParquetFile(tmp_path / "out.parquet")
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert [rows for rows in groups if rows] == [3, 6]
    assert file.read()["page"].to_pylist() == [written[n].name for n in (0, 0, 0, 2, 2, 2, 3, 3, 3)]


def test_without_ray_the_example_says_how_to_install_it(tmp_path):
    done = run(RAY, tmp_path, tmp_path / "out", code=9, before="sys.modules['ray'] = None")
    assert done.stderr == "ray is not installed; run: scripts/setup cpu demo ray\n"


def test_ray_adds_to_no_folder_that_is_there(tmp_path):
    pytest.importorskip("ray", reason="not installed, so find_text_ray.py was not run: scripts/setup ray")
    done = run(RAY, tmp_path, tmp_path, code=2)
    assert done.stderr.endswith("name another folder\n")


@pytest.mark.system
@pytest.mark.timeout(240)
def test_the_same_inside_ray_data(tmp_path):
    pytest.importorskip("ray", reason="not installed, so find_text_ray.py was not run: scripts/setup ray")
    pages = tmp_path / "pages"
    pages.mkdir()
    demo_pages.write_pages(pages, 6)
    out = run(RAY, pages, tmp_path / "lines").stdout
    rows = pq.read_table(tmp_path / "lines").to_pylist()
    assert f"{len(rows)} lines on 6 pages" in out
    assert_the_lines_of(sorted(pages.iterdir()), rows)
