"""The examples with trained models, as users run them."""
# ruff: noqa: E402 - imported once it is known that all optional packages are there

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.real import require_models

require_models()

from PIL import Image
from scripts import classify_files, embed_sentences


def run(script: str, *arguments: str | Path, code: int = 0, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run an example as its own process, after the Python statements `before`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"}
    text = f"import runpy, sys\n{before}\nrunpy.run_path({script!r}, run_name='__main__')"
    command = [sys.executable, "-c", text, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
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
