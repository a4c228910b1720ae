"""Read the text on some scanned pages with two models in one pool: detect lines, crop them, recognise each.

::

    pages --> det: where is text? --> crop each line --> rec: which letters? --> text
                  (slots of det)                            (slots of rec)

Both models share the pool's workers by weight.  The chain is two calls of `map`, the second fed by the first: while
lines of one page are recognised, the next pages are detected.  In the end the same crops go through onnxruntime
directly; where the answers differ in anything, the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `scripts`
from scripts.examples.shell import needs, run

with needs("cpu", "demo"):
    import numpy as np
    import onnxruntime
    from PIL import Image
    from scripts import demo_pages
    from scripts.demo_pages import Region

    import trtpool

DETECT = (3, demo_pages.HEIGHT, demo_pages.WIDTH)
RECOGNISE = (3, 48, 960)
"""The recognition model takes lines 48 pixels high; these are wide enough for one across a page."""

Planes = Mapping[str, "npt.NDArray[Any]"]


class Line(NamedTuple):
    """A line of text, cut out of a page."""

    page: int
    region: Region
    picture: Image.Image


class Read(NamedTuple):
    """What was made of a line: its text and the model's own output, ``(steps, letters)`` float32."""

    line: Line
    text: str
    output: npt.NDArray[Any]


def model_file(name: str) -> Path:
    """A model of the package rapidocr-onnxruntime."""
    return demo_pages.packaged_file("rapidocr_onnxruntime", f"models/ch_PP-OCRv4_{name}_infer.onnx")


def letters_of(model: Path) -> list[str]:
    """What the columns of the recognition model's output stand for; the first is none, the last a space."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return ["", *session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]


def start_pool(workers: int) -> trtpool.Pool:
    """A pool of both models."""
    det = trtpool.Model(model_file("det"), name="det", slots=8, max_batch=2, shapes={"x": DETECT})
    rec = trtpool.Model(model_file("rec"), name="rec", slots=24, max_batch=4, shapes={"x": RECOGNISE}, weight=2)
    return trtpool.Pool([det, rec], workers=workers)


def crop(page: Image.Image, region: Region) -> Image.Image:
    """A region of a page, turned level; its corners are in order round it, so its top is what goes furthest right."""
    corners = np.array(region.corners)
    edges = np.roll(corners, -1, axis=0) - corners
    upper_left, upper_right, lower_right, lower_left = np.roll(corners, -int(edges[:, 0].argmax()), axis=0)
    width = max(1, round(float(np.linalg.norm(upper_right - upper_left))))
    height = max(1, round(float(np.linalg.norm(lower_left - upper_left))))
    quad = np.concatenate([upper_left, lower_left, lower_right, upper_right]).tolist()
    return page.transform((width, height), Image.Transform.QUAD, quad, Image.Resampling.BICUBIC)


def write_page(page: tuple[int, Image.Image], inputs: Planes) -> None:
    """Write a page to a slot of the detection model."""
    demo_pages.write_input(page[1], inputs["x"])


def write_line(line: Line, inputs: Planes) -> None:
    """Write a line to a slot of the recognition model, every element: height 48, -1 to 1, and 0 beyond its end."""
    out = inputs["x"]
    _, height, most = out.shape
    width = min(most, max(1, round(line.picture.width * height / line.picture.height)))
    pixels = np.asarray(line.picture.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), np.float32)
    np.subtract(pixels.transpose(2, 0, 1)[::-1] / np.float32(127.5), np.float32(1), out=out[:, :, :width])
    out[:, :, width:] = 0


def text_of(output: npt.NDArray[Any], letters: Sequence[str]) -> str:
    """The text of an output, ``(steps, letters)``: the best letter of each step, repeats and gaps left out."""
    best = output.argmax(axis=1)
    kept = best[np.flatnonzero(np.diff(best, prepend=0))]
    return "".join(letters[index] for index in kept)


def find_lines(pool: trtpool.Client, pages: Iterable[Image.Image]) -> Iterator[Line]:
    """Detect lines on pages and cut them out."""
    for (index, page), result in pool.map(write_page, enumerate(pages), model="det", window=4):
        (output,) = result.outputs.values()
        for region in demo_pages.find_regions(output[0], page.size):
            yield Line(index, region, crop(page, region))


def read_lines(pool: trtpool.Client, lines: Iterable[Line], letters: Sequence[str]) -> Iterator[Read]:
    """Recognise lines, which may come from `find_lines` of the same pool."""
    for line, result in pool.map(write_line, lines, model="rec", window=16):
        (output,) = result.outputs.values()
        yield Read(line, text_of(output, letters), output.copy())


def compare(pages: Sequence[Image.Image], reads: Sequence[Read]) -> list[str]:
    """Send everything through onnxruntime directly, one by one; returns what differs."""
    det, rec = (
        onnxruntime.InferenceSession(model_file(name), providers=["CPUExecutionProvider"]) for name in ("det", "rec")
    )
    differing, lines = [], []
    for index, page in enumerate(pages):
        x = np.empty((1, *DETECT), np.float32)
        demo_pages.write_input(page, x[0])
        (output,) = det.run(None, {"x": x})
        lines += [(index, region) for region in demo_pages.find_regions(output[0, 0], page.size)]
    if lines != [(read.line.page, read.line.region) for read in reads]:
        differing.append(f"{len(lines)} lines found, and {len(reads)} through the pool, or at other places")
    for read in reads:
        x = np.empty((1, *RECOGNISE), np.float32)
        write_line(read.line, {"x": x[0]})
        (output,) = rec.run(None, {"x": x})
        if not np.array_equal(output[0], read.output):
            worst = np.abs(output[0] - read.output).max()
            differing.append(f"{read.text!r} on page {read.line.page}: by up to {worst:.3g}")
    return differing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chain and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pages", type=int, default=6, help="different pages to make (default 6)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default 1)")
    options = parser.parse_args(arguments)
    if options.pages < 1:
        parser.error(f"--pages {options.pages}: make at least one")
    with tempfile.TemporaryDirectory(prefix="trtpool-chain-") as folder:
        pages = [Image.open(path).convert("RGB") for path in demo_pages.write_pages(Path(folder), options.pages)]
    letters = letters_of(model_file("rec"))
    with start_pool(options.workers) as pool:
        began_s = time.monotonic()
        reads = list(read_lines(pool, find_lines(pool, pages), letters))
        took_s = time.monotonic() - began_s
    for read in reads:
        print(f"page {read.line.page}: {read.text}")
    print(f"{len(reads)} lines on {len(pages)} pages in {took_s:.2f} s.")
    differing = compare(pages, reads)
    if differing:
        print(f"NOT EQUAL to onnxruntime called directly: {'; '.join(differing)}")
        return 1
    print("EQUAL: all lines and outputs are onnxruntime's own, bit for bit.")
    return 0


if __name__ == "__main__":
    run(__file__, main)
