"""The model moves into a pool: one line to start it, one to call it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `scripts`
import numpy as np
from scripts.demo_pages import Region
from scripts.tutorial.pages import GPUS, MODEL, SHAPE, given, lines_of, show, write_page

import trtpool


def load() -> trtpool.Pool:
    return trtpool.Pool(MODEL, shapes={"x": SHAPE}, gpus=GPUS)


def find_text(pool: trtpool.Pool, pages: Sequence[Path]) -> Iterator[tuple[Path, list[Region]]]:
    for page in pages:
        x = np.empty(SHAPE, np.float32)
        write_page(page, x)
        (output,) = pool.infer(x=x).values()
        yield page, lines_of(page, output)


if __name__ == "__main__":
    with load() as pool:
        show(find_text(pool, given()))
