"""Say what the files in some folders are, by their content, with the model Magika: ``classify_files.py FOLDER...``.

Run it with ``scripts/setup cpu models && .venv/bin/python scripts/examples/classify_files.py docs``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `scripts`
from scripts.examples.shell import needs, run

with needs("cpu", "models"):
    import numpy as np
    from rich.console import Console
    from rich.table import Table
    from scripts.packaged import packaged_file

    import trtpool

MODEL = "models/standard_v3_3"
LOOKED_AT = 4096
"""Bytes at either end of a file that are read; the model takes 1024 of each, less white space."""
LEAST = 8
"""Bytes below which the model is not asked."""


def files_in(folders: list[Path]) -> Iterator[Path]:
    """All files to classify."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.stat().st_size >= LEAST:
                yield path


def write(path: Path, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write the ends of a file into a slot, int32 ``(2048,)``: a byte each, and 256 where the file is too short."""
    with path.open("rb") as file:
        head = file.read(LOOKED_AT).lstrip()[:1024]
        file.seek(-min(LOOKED_AT, path.stat().st_size), 2)
        tail = file.read(LOOKED_AT).rstrip()[-1024:]
    features = inputs["bytes"]
    features[...] = 256
    features[: len(head)] = np.frombuffer(head, np.uint8)
    features[2048 - len(tail) :] = np.frombuffer(tail, np.uint8)


def main() -> int:
    """Run the example and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders = parser.parse_args().folders
    if strange := [str(folder) for folder in folders if not folder.is_dir()]:
        parser.error(f"{', '.join(strange)}: name folders that exist")
    table = Table("file", "is", "score")
    counts: Counter[str] = Counter()
    config = json.loads(packaged_file("magika", f"{MODEL}/config.min.json").read_text())
    with trtpool.Pool(packaged_file("magika", f"{MODEL}/model.onnx")) as pool:
        for path, result in pool.map(write, files_in(folders), return_exceptions=True):
            if isinstance(result, Exception):  # it cannot be read
                table.add_row(str(path), f"[red]{result}", "")
                continue
            scores = result.outputs["target_label"]
            best = int(scores.argmax())
            label = config["target_labels_space"][best]
            if scores[best] < config["thresholds"].get(label, config["medium_confidence_threshold"]):
                label = "unknown"
            counts[label] += 1
            table.add_row(str(path), label, f"{scores[best]:.2f}")
    Console().print(table)
    print(
        f"{counts.total()} file(s):", ", ".join(f"{count} {label}" for label, count in counts.most_common()) or "none"
    )
    return 0


if __name__ == "__main__":
    run(__file__, main)
