"""The chain of two models: what happens between them, and that a wrong answer is noticed."""
# ruff: noqa: E402 - imported once it is known that all optional packages are there

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

for needed in ("PIL", "scipy", "onnxruntime"):
    pytest.importorskip(needed)

import onnxruntime
from PIL import Image, ImageDraw
from scripts import demo_pages
from scripts.examples import read_text

from trtpool.ipc.errors import MissingExtra


@pytest.fixture
def installed() -> None:
    """Skip where the models or the scans are not installed."""
    try:
        read_text.model_file("rec")
        demo_pages.packaged_file("skimage", "data/page.png")
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("best", "text"), [([0, 0], ""), ([1, 1, 0, 1, 2, 2], "aab"), ([2, 0, 0, 3], "b "), ([1, 2, 1], "aba")]
)
def test_repeats_and_gaps_are_no_letters(best, text):
    assert read_text.text_of(np.eye(4, dtype=np.float32)[best], ["", "a", "b", " "]) == text


@pytest.mark.parametrize("start", range(4))
def test_a_crop_is_level_and_upright_whichever_corner_is_first(start):
    """A tilted line whose left half is red and whose right half is blue."""
    turn = np.array([[np.cos(0.2), np.sin(0.2)], [-np.sin(0.2), np.cos(0.2)]])
    corners = np.array([(-60, -10), (60, -10), (60, 10), (-60, 10)]) @ turn + (100, 60)
    middle = (corners[0] + corners[1]) / 2, (corners[2] + corners[3]) / 2
    page = Image.new("RGB", (200, 120), "white")
    pen = ImageDraw.Draw(page)
    pen.polygon([tuple(corner) for corner in (corners[0], *middle, corners[3])], fill=(255, 0, 0))
    pen.polygon([tuple(corner) for corner in (middle[0], corners[1], corners[2], middle[1])], fill=(0, 0, 255))
    turned = np.roll(corners, start, axis=0)
    region = demo_pages.Region(tuple((float(x), float(y)) for x, y in turned), 1.0)
    cut = read_text.crop(page, region)
    assert cut.size == (120, 20)
    assert cut.getpixel((30, 10)) == (255, 0, 0)
    assert cut.getpixel((90, 10)) == (0, 0, 255)


@pytest.mark.parametrize("size", [(1, 1), (5000, 20), (3, 200)])
def test_every_element_of_a_used_slot_is_written(size):
    out = np.full(read_text.RECOGNISE, np.nan, np.float32)
    line = read_text.Line(0, demo_pages.Region((), 1.0), Image.new("RGB", size, "white"))
    read_text.write_line(line, {"x": out})
    assert np.isfinite(out).all()
    assert out[0, 0, 0] == 1


@pytest.mark.usefixtures("installed")
def test_an_answer_that_differs_in_one_bit_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(read_text, "start_pool", lambda _: pytest.fail("not for this"))
    page = Image.open(demo_pages.write_pages(tmp_path, 1)[0]).convert("RGB")
    letters = read_text.letters_of(read_text.model_file("rec"))
    assert len(letters) == 6625

    class Direct:
        """A pool that is onnxruntime itself."""

        def map(self, write, items, *, model, window):
            session = onnxruntime.InferenceSession(read_text.model_file(model), providers=["CPUExecutionProvider"])
            for item in items:
                x = np.empty((1, *(read_text.DETECT if model == "det" else read_text.RECOGNISE)), np.float32)
                write(item, {"x": x[0]})
                yield item, type("Result", (), {"outputs": {"y": session.run(None, {"x": x})[0][0]}})

    pool: Any = Direct()
    reads = list(read_text.read_lines(pool, read_text.find_lines(pool, [page]), letters))
    assert read_text.compare([page], reads) == []
    reads[3].output[5, 7] = np.nextafter(reads[3].output[5, 7], np.float32(1))
    (differing,) = read_text.compare([page], reads)
    assert repr(reads[3].text) in differing
    assert "lines found" in read_text.compare([page], reads[1:])[0]


@pytest.mark.usefixtures("installed")
def test_a_page_is_read_by_a_real_pool_of_both_models():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, read_text.__file__, "--pages", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "page 0: background.These markers" in done.stdout
    assert "EQUAL: all lines and outputs are onnxruntime's own, bit for bit." in done.stdout
