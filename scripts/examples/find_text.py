"""Find the lines of text on scanned pages, into a Parquet file: ``find_text.py FOLDER OUTPUT``.

FOLDER has images; ``--make 12`` puts that many pages there first.  The model is PP-OCRv4 detection.  Run it with
``scripts/setup cpu demo etl && .venv/bin/python scripts/examples/find_text.py /tmp/pages /tmp/lines.parquet --make 9``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `scripts`
from scripts.examples.shell import needs, run

with needs("cpu", "demo", "etl"):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from scripts import demo_pages

    import trtpool

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".tif", ".tiff"))
GROUP = 256
"""Pages whose lines are a row group: held in memory, and written when they are there."""

SCHEMA = pa.schema(
    [("page", pa.string()), ("corners", pa.list_(pa.list_(pa.float32(), 2), 4)), ("score", pa.float32())]
)


class Page:
    """A file, and its picture's size once that was decoded."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, (0, 0)


def write(page: Page, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
    """Decode a page, and write it into a slot, float32 ``(3, H, W)``."""
    with Image.open(page.path) as picture:
        page.size = picture.size
        demo_pages.write_input(picture, inputs["x"])


def rows_of(page: str, size: tuple[int, int], probability: npt.NDArray[Any]) -> list[dict[str, Any]]:
    """The lines of text on a page: a row for each, of `SCHEMA`."""
    regions = demo_pages.find_regions(probability, size)
    return [{"page": page, "corners": region.corners, "score": region.score} for region in regions]


def find_text(pool: trtpool.Client, paths: Sequence[Path]) -> Iterator[tuple[Page, list[dict[str, Any]] | Exception]]:
    """Each page with its lines, or with what is wrong with it, in the order of `paths`."""
    for page, result in pool.map(write, map(Page, paths), return_exceptions=True):
        if isinstance(result, Exception):
            yield page, result
        else:
            (output,) = result.outputs.values()
            yield page, rows_of(str(page.path), page.size, output[0])


def main() -> int:
    """Run the example and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--make", type=int, default=0, metavar="N", help="put N pages into FOLDER first")
    options = parser.parse_args()
    if options.make:
        options.folder.mkdir(parents=True, exist_ok=True)
        demo_pages.write_pages(options.folder, options.make)
    paths = sorted(path for path in options.folder.iterdir() if path.suffix.lower() in SUFFIXES)
    found: list[dict[str, Any]] = []
    lines = failed = 0
    shape = (3, demo_pages.HEIGHT, demo_pages.WIDTH)
    with (
        trtpool.Pool(demo_pages.model_file(), shapes={"x": shape}) as pool,
        pq.ParquetWriter(options.output, SCHEMA) as writer,
    ):
        for number, (page, answer) in enumerate(find_text(pool, paths), 1):
            if isinstance(answer, Exception):
                print(f"{page.path.name}: {answer}")
                failed += 1
            else:
                print(f"{page.path.name}: {len(answer)} lines")
                lines += len(answer)
                found += answer
            if number % GROUP == 0:
                writer.write_table(pa.Table.from_pylist(found, SCHEMA))
                found.clear()
        writer.write_table(pa.Table.from_pylist(found, SCHEMA))
    print(f"{lines} lines on {len(paths) - failed} pages, in {options.output}; {failed} files cannot be read.")
    return 0


if __name__ == "__main__":
    run(__file__, main)
