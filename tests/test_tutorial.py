"""The tutorial's programs: docs/tutorial.md shows what runs, all give the loop's answers, and a gain is a ratio."""
# ruff: noqa: E402 - imported once it is known that all optional packages are there

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.real import require_models

require_models()

from PIL import Image
from scripts.demo_pages import Region
from scripts.tutorial import measure, pages

ROOT = Path(measure.__file__).resolve().parents[2]
STEPS = sorted(Path(measure.__file__).parent.glob("step*.py"))


def run(*command: str | Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=200, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.system
@pytest.mark.timeout(240)
def test_every_step_finds_the_lines_of_the_loop():
    out = run(measure.__file__, "--pages", "5", "--width", "640", "--rounds", "1")
    assert "EQUAL: each step found the lines of the loop." in out
    lines = re.search(r"(\d+) lines on 5 pages", out)
    assert lines is not None
    assert int(lines[1]) > 20
    rates = {row[1]: float(row[2]) for row in re.finditer(r"│ (\d)  [a-z ]+│ ([\d.]+)", out)}
    assert sorted(rates) == list("01234")
    assert min(rates.values()) > 0


@pytest.mark.system
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.stem)
def test_each_step_is_a_program(step, tmp_path):
    scans = pages.make_scans(tmp_path, 2, 640)
    out = run(step, *scans).splitlines()
    first, second = (line for line in out if line.startswith(str(tmp_path)))
    assert first.startswith(f"{scans[0]}: ")
    assert int(first.split()[-2]) > 3
    assert second.startswith(f"{scans[1]}: ")


def test_scans_are_pages_in_colour_of_one_width(tmp_path):
    scans = pages.make_scans(tmp_path, 3, 700)
    assert sorted(tmp_path.iterdir()) == sorted(scans)
    for scan in scans:
        with Image.open(scan) as picture:
            assert (picture.format, picture.mode, picture.width) == ("JPEG", "RGB", 700)


def line(x: float = 0.0, score: float = 0.9) -> Region:
    return Region(((x, 0.0), (x + 10, 0.0), (x + 10, 5.0), (x, 5.0)), score)


A, B = Path("a"), Path("b")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([(A, [line(0)]), (B, [])], ""),
        ([(A, [line(3)]), (B, [])], ""),  # a pixel of the map
        ([(A, [line(100)]), (B, [])], "a: lines at other places"),
        ([(A, [line(0), line(0)]), (B, [])], "a: 2 lines instead of 1"),
        ([(A, [line(0)])], "other pages, or another order"),
        ([(B, []), (A, [line(0)])], "other pages, or another order"),
    ],
)
def test_other_answers_are_noticed(found, said):
    assert measure.differing([(A, [line(0)]), (B, [])], found) == said


def test_an_answer_that_differs_is_the_exit_code(monkeypatch, capsys, tmp_path):
    right: measure.Found = [(A, [line()])]
    wrong: measure.Found = [(A, [])]
    steps = {"0  loop": lambda pages: (right, 2.0), "1  other": lambda pages: (wrong, 1.0)}
    monkeypatch.setattr(measure, "STEPS", steps)
    monkeypatch.setattr(measure, "make_scans", lambda folder, count, width: [A])
    monkeypatch.setattr(sys, "argv", ["measure.py", "--rounds", "2"])
    assert measure.main() == 1
    out = capsys.readouterr().out
    assert "NOT EQUAL to the loop: 1  other: a: 0 lines instead of 1; 1  other: a" in out
    assert re.search(r"1  other *│ 1.0 *│ 2.00 \(2.00 - 2.00\) *│ 2.00", out)


def test_a_ratio_is_of_one_round():
    assert measure.ratio([1.0, 10.0, 100.0], [1.0, 5.0, 25.0]) == "2.00 (1.00 - 4.00)"


def blocks() -> list[str]:
    """The Python that docs/tutorial.md shows."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)


def test_what_the_tutorial_shows_is_what_runs():
    programs = "\n".join(path.read_text() for path in STEPS)
    shown = [part.strip("\n") for block in blocks() for part in block.split("\n\n\n")]
    assert len(shown) >= 6
    assert [part for part in shown if part not in programs] == []
