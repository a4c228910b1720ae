"""Pages with text for the demo: where they come from, and what happens to one before and after the model.

The model is PP-OCRv4 text detection: input ``x`` float32 ``(N, 3, H, W)``, one output float32
``(N, 1, H, W)``, the probability that a pixel lies in the core of a line of text.  H and W are
multiples of 32.  Around it::

    file --decode--> page --shrink or enlarge, normalise--> slot --model--> map --threshold--> components
                                                                                        |
                                            corners on the page <--scale-- widened box <'

The steps after the model are those of DB, "Real-time Scene Text Detection with Differentiable
Binarization" (https://arxiv.org/abs/1911.08947), with the constants of PaddleOCR.

The model comes out of the package rapidocr-onnxruntime and the scanned pages out of scikit-image.
Both are looked up as files and not imported: all that is wanted is the data in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import ConvexHull
from scripts import packaged

INSTALL = "scripts/demo"
"""The command that installs what the demo needs, and runs it."""

HEIGHT, WIDTH = 320, 640
"""Pixels of the model's input: about the shape of the two scans, so that little of it is margin."""

PRINT, FORMULA = "page.png", "text.png"
"""Photographs of a printed page and of a formula written by hand, both inside scikit-image's wheel."""

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
PIXEL_THRESHOLD = 0.3
SCORE_THRESHOLD = 0.5
MIN_SIDE = 3.0
WIDENING = 1.6
"""The map shows lines of text shrunk; DB widens a box of area A and perimeter L by ``WIDENING * A / L``."""

Floats = npt.NDArray[np.floating]
Map = npt.NDArray[np.float32]


class Region(NamedTuple):
    """A line of text on a page.

    Attributes:
        corners: in order round a rectangle of any angle, (x, y) in pixels of the page.
        score: mean of the map over the region's pixels, 0 to 1.
    """

    corners: tuple[tuple[float, float], ...]
    score: float


def packaged_file(package: str, inner: str) -> Path:
    """Return the file `inner` of an installed import package, without importing that.

    Raises:
        MissingExtra: the package is not installed, or has no such file.
    """
    return packaged.packaged_file(package, inner, INSTALL)


def model_file() -> Path:
    """Return the detection model's file."""
    return packaged_file("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx")


def write_pages(folder: Path, count: int) -> list[Path]:
    """Write `count` different pages as PNG files: the two scans, then turned, cropped and scaled copies.

    One in six shows the formula, in which the model, made for lines of text, is to find next to nothing.
    The pages are the same every time.
    """
    files = {name: packaged_file("skimage", f"data/{name}") for name in (PRINT, FORMULA)}
    scans = {name: Image.open(file).convert("L") for name, file in files.items()}
    paths = []
    for index in range(count):
        name = FORMULA if index % 6 == 1 else PRINT
        page = scans[name] if index < len(scans) else derive(scans[name], np.random.default_rng(index))
        paths.append(folder / f"{index:03d}-{name}")
        page.save(paths[-1])
    return paths


def derive(scan: Image.Image, random: np.random.Generator) -> Image.Image:
    """Return `scan` turned by up to 4 degrees, cropped to no less than 0.7 and scaled by 0.8 to 1.5."""
    paper = int(np.median(np.asarray(scan)))
    turned = scan.rotate(random.uniform(-4, 4), Image.Resampling.BICUBIC, expand=True, fillcolor=paper)
    sides = np.array(turned.size)
    kept = (sides * random.uniform(0.7, 1.0, 2)).astype(int)
    left, top = random.integers(0, sides - kept + 1)
    cropped = turned.crop((int(left), int(top), int(left + kept[0]), int(top + kept[1])))
    scale = random.uniform(0.8, 1.5)
    return cropped.resize((round(kept[0] * scale), round(kept[1] * scale)), Image.Resampling.BICUBIC)


def fit(size: tuple[int, int], height: int, width: int) -> tuple[float, int, int]:
    """Return the scale at which a page of `size` (width, height) fits, and the rows and columns it takes."""
    scale = min(width / size[0], height / size[1])
    return scale, min(height, max(1, round(size[1] * scale))), min(width, max(1, round(size[0] * scale)))


def write_input(page: Image.Image, out: Map) -> None:
    """Write `page` as the model wants it into `out`, float32 ``(3, H, W)``, every element of it.

    The page is scaled to fit into the top left corner, its channels go blue, green, red and each becomes
    ``(value / 255 - mean) / deviation``; the margin gets 0, the mean colour.  The only write of a
    normalised pixel is the one into `out`, so when that is a slot, nothing is left to copy.
    """
    _, rows, columns = fit(page.size, *out.shape[1:])
    pixels = np.asarray(page.convert("RGB").resize((columns, rows), Image.Resampling.BILINEAR))
    body = out[:, :rows, :columns]
    gain = (1 / (255 * DEVIATION))[:, None, None]
    np.multiply(pixels.transpose(2, 0, 1)[::-1], gain, out=body, dtype=np.float32)
    np.subtract(body, (MEAN / DEVIATION)[:, None, None], out=body)
    out[:, rows:] = 0
    out[:, :rows, columns:] = 0


def find_regions(probability: Map, size: tuple[int, int]) -> list[Region]:
    """Return the lines of text, top first, in `probability`, the map of a page of `size` (width, height).

    Args:
        probability: float32 ``(H, W)``, the model's output for one item.
        size: the page's own, in pixels; the regions are on its scale.
    """
    scale, rows, columns = fit(size, *probability.shape)
    page = probability[:rows, :columns]
    labels, count = ndimage.label(page > PIXEL_THRESHOLD, structure=np.ones((3, 3)))
    scores = ndimage.mean(page, labels, np.arange(1, count + 1)) if count else ()
    regions = []
    for label, (place, score) in enumerate(zip(ndimage.find_objects(labels), scores, strict=True), 1):
        if score <= SCORE_THRESHOLD:
            continue
        corners = widened_box(labels[place] == label)
        if corners is not None:
            corners += (place[1].start, place[0].start)
            on_page = np.clip(corners / scale, 0, size)
            regions.append(Region(tuple((float(x), float(y)) for x, y in on_page), float(score)))
    return sorted(regions, key=lambda region: min(y for _, y in region.corners))


def widened_box(mask: npt.NDArray[np.bool_]) -> Floats | None:
    """Return the corners (4, 2) of the smallest rectangle round `mask`, widened as DB does.

    The smallest rectangle round a set of points has a side on an edge of their convex hull, so each edge is
    tried.  A pixel counts as a square and not as a point, or one row of them would have no hull.

    Args:
        mask: bool ``(rows, columns)``, true on the pixels of one region, and somewhere in every row.

    Returns:
        (x, y) in pixels of `mask`, or None if the rectangle is too thin for text.
    """
    ys = np.arange(len(mask))
    ends = np.concatenate([mask.argmax(axis=1), mask.shape[1] - mask[:, ::-1].argmax(axis=1)])
    outline = np.stack([np.tile(ends, 2), np.concatenate([ys, ys, ys + 1, ys + 1])], axis=1)
    hull = outline[ConvexHull(outline).vertices].astype(float)
    edges = np.roll(hull, -1, axis=0) - hull
    along = edges / np.linalg.norm(edges, axis=1, keepdims=True)
    turns = np.stack([along, along[:, ::-1] * (-1, 1)], axis=1)  # (edges, 2, 2): turns an edge level
    turned = hull @ turns.transpose(0, 2, 1)  # (edges, points, 2): the hull with that edge level
    low, high = turned.min(axis=1), turned.max(axis=1)
    best = int(np.prod(high - low, axis=1).argmin())
    sides = high[best] - low[best]
    if sides.min() < MIN_SIDE:
        return None
    by = WIDENING * sides.prod() / (2 * sides.sum())
    (left, top), (right, bottom) = low[best] - by, high[best] + by
    corners: Floats = np.array([(left, top), (right, top), (right, bottom), (left, bottom)]) @ turns[best]
    return corners


def draw(pages: Sequence[tuple[Image.Image, Sequence[Region]]], columns: int = 2) -> Image.Image:
    """Return one picture of all `pages`, `columns` to a row, with their regions outlined in red."""
    tiles = []
    for page, regions in pages:
        scale, tall, wide = fit(page.size, HEIGHT, WIDTH)
        tile = page.convert("RGB").resize((wide, tall), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(tile)
        for region in regions:
            pen.polygon([(x * scale, y * scale) for x, y in region.corners], outline=(220, 20, 20), width=2)
        tiles.append(tile)
    sheet = Image.new("RGB", (columns * WIDTH, -(-len(tiles) // columns) * HEIGHT), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * WIDTH, index // columns * HEIGHT))
    return sheet
