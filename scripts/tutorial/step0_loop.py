"""Where everybody begins: load, loop, predict."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `scripts`
import numpy as np
import onnxruntime
from scripts.demo_pages import Region
from scripts.tutorial.pages import MODEL, SHAPE, given, lines_of, show, write_page


def load() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(MODEL)


def find_text(session: onnxruntime.InferenceSession, pages: Sequence[Path]) -> Iterator[tuple[Path, list[Region]]]:
    for page in pages:
        x = np.empty(SHAPE, np.float32)
        write_page(page, x)
        (outputs,) = session.run(None, {"x": x[None]})
        yield page, lines_of(page, outputs[0])


if __name__ == "__main__":
    show(find_text(load(), given()))
