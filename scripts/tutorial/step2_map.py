"""The loop becomes a stream: pages are decoded right into slots, while the model runs on those before."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `scripts`
from scripts.demo_pages import Region
from scripts.tutorial.pages import given, lines_of, show, write_page
from scripts.tutorial.step1_infer import load

import trtpool


def write(page: Path, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
    write_page(page, inputs["x"])


def find_text(pool: trtpool.Client, pages: Sequence[Path]) -> Iterator[tuple[Path, list[Region]]]:
    for page, result in pool.map(write, pages):
        (output,) = result.outputs.values()
        yield page, lines_of(page, output)


if __name__ == "__main__":
    with load() as pool:
        show(find_text(pool, given()))
