"""No loop at all: `trtpool run` has the processes, the stream, the file and what happens when something fails.

As a program this prints the command and runs it::

    trtpool run MODEL --input - --output lines.parquet --decode ...step4_run:decode --post ...step4_run:lines
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `scripts`
import pyarrow.parquet as pq
from scripts.demo_pages import Region
from scripts.tutorial.pages import GPUS, MODEL, SHAPE, given, lines_of, show, write_page
from scripts.tutorial.step3_processes import PRODUCERS

ROOT = Path(__file__).resolve().parents[2]
ME = "scripts.tutorial.step4_run"


def decode(item: Any, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
    write_page(item.value, inputs["x"])


def lines(item: Any, outputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    (output,) = outputs.values()
    found = lines_of(item.value, output)
    return {"corners": [line.corners for line in found], "scores": [line.score for line in found]}


def command(output: Path) -> list[str]:
    """The command, which reads the names of pages from standard input; `decode` and `lines` are found from `ROOT`."""
    options = {
        "input": "-",
        "output": output,
        "shape": f"x={'x'.join(map(str, SHAPE))}",
        "producers": PRODUCERS,
        "decode": f"{ME}:decode",
        "post": f"{ME}:lines",
    }
    if GPUS:
        options["gpus"] = ",".join(map(str, GPUS))
    pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "trtpool.broker.cli", "run", str(MODEL), *pairs]


def run(pages: Sequence[Path], output: Path) -> str:
    """Run the job; returns the table that it prints in the end."""
    names = "\n".join(str(page.resolve()) for page in pages)
    done = subprocess.run(command(output), input=names, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return done.stdout


def read(output: Path) -> Iterator[tuple[Path, list[Region]]]:
    """What is in the job's file: each page with its lines."""
    for row in pq.read_table(output).to_pylist():
        found = zip(row["corners"], row["scores"], strict=True)
        yield Path(row["key"]), [Region(tuple(map(tuple, corners)), score) for corners, score in found]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="trtpool-tutorial-") as folder:
        print(run(given(), Path(folder) / "lines.parquet"))
        show(read(Path(folder) / "lines.parquet"))
