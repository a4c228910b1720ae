"""Run all steps of the tutorial on the same pages, compare their answers, and print the gain of each step.

Run it with ``scripts/setup cpu demo etl && .venv/bin/python scripts/tutorial/measure.py``; on a GPU with a plan::

    trtpool build det.onnx -o det.plan --fp16 --shapes x=1x3x320x640:8x3x320x640:16x3x320x640
    TUTORIAL_PLAN=det.plan python scripts/tutorial/measure.py

The model then takes what the plan takes, and ``TUTORIAL_SIZE=1600x2560`` is for one of pages of that height and width.

Each round runs every step once, the steps in turn, so that a machine that is busy with other things is so for all of
them.  Starting is not measured: not the loading of the model, nor the start of a pool and of processes, each of which
has some pages before the clock starts.  Ratios are those within a round, and of these the median, with the least and
the greatest; the rates are only to show their size.
"""

from __future__ import annotations

import argparse
import importlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `scripts`
from scripts.examples.shell import needs, run

with needs("cpu", "demo", "etl"):
    import numpy as np
    from rich.console import Console
    from rich.table import Table
    from scripts.demo_pages import Region
    from scripts.tutorial import step0_loop, step1_infer, step2_map, step3_processes, step4_run
    from scripts.tutorial.pages import GPUS, SCAN_WIDTH, make_scans

    loop: Any = importlib.import_module("scripts.tutorial.tensorrt_loop") if GPUS else step0_loop

Found = list[tuple[Path, list[Region]]]
Measured = tuple[Found, float]
"""The pages with their lines, and the seconds that it took."""

ROUNDING = 12
"""Pixels of a scan by which the middle of a line may differ: onnxruntime rounds a batch of another size otherwise, and
a pixel of the map, four of a scan, may then be text or not."""


WARM_UP = 4
"""Pages that a step of one process has before the clock starts."""


def in_process(
    load: Callable[[], Any], find_text: Callable[[Any, Sequence[Path]], Iterator[Any]], warm_up: int = WARM_UP
) -> Any:
    """A step that is called here: loaded, warmed up, measured."""

    def measure(pages: Sequence[Path]) -> Measured:
        with ExitStack() as stack:
            loaded = load()
            if hasattr(loaded, "__exit__"):  # a session has nothing to close
                loaded = stack.enter_context(loaded)
            list(find_text(loaded, [pages[number % len(pages)] for number in range(warm_up)]))
            began_s = time.monotonic()
            found = list(find_text(loaded, pages))
            return found, time.monotonic() - began_s

    return measure


def as_a_job(pages: Sequence[Path]) -> Measured:
    """The job measures itself: from when its first producer was ready to the last row."""
    with tempfile.TemporaryDirectory(prefix="trtpool-tutorial-") as folder:
        output = Path(folder) / "lines.parquet"
        table = step4_run.run(pages, output)
        said = re.search(r"^time +([\d.,]+) s", table, re.MULTILINE)
        assert said is not None, table
        return list(step4_run.read(output)), float(said[1].replace(",", ""))


STEPS: dict[str, Callable[[Sequence[Path]], Measured]] = {
    "0  loop": in_process(loop.load, loop.find_text),
    "1  infer": in_process(step1_infer.load, step1_infer.find_text),
    "2  map": in_process(step1_infer.load, step2_map.find_text),
    "3  processes": in_process(
        step3_processes.load, step3_processes.find_text, step3_processes.SHARE * step3_processes.PRODUCERS
    ),
    "4  trtpool run": as_a_job,
}


def differing(wanted: Found, found: Found) -> str:
    """What is different in the answers of a step; empty if nothing is."""
    if [page.name for page, _ in wanted] != [page.name for page, _ in found]:
        return "other pages, or another order"
    for (page, lines), (_, others) in zip(wanted, found, strict=True):
        if len(lines) != len(others):
            return f"{page.name}: {len(others)} lines instead of {len(lines)}"
        middles, places = (np.array([np.mean(line.corners, axis=0) for line in one]) for one in (lines, others))
        if len(lines) and np.abs(middles - places).max() > ROUNDING:
            return f"{page.name}: lines at other places"
    return ""


def show(seconds: dict[str, list[float]], pages: int) -> None:
    """Print the table of all rounds."""
    table = Table("step", "pages/s", "over the loop", "over the step before")
    before, loop = "", next(iter(seconds))
    for step, taken in seconds.items():
        rate = f"{pages / statistics.median(taken):.1f}"
        table.add_row(step, rate, ratio(seconds[loop], taken), ratio(seconds[before or step], taken))
        before = step
    Console(width=100).print(table)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    """How many times faster: the median over rounds, and the least and the greatest."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


def main() -> int:
    """Run all and return the exit code: 1 if answers differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pages", type=int, default=64, help="different pages to make (default 64)")
    parser.add_argument("--width", type=int, default=SCAN_WIDTH, help=f"their width in pixels (default {SCAN_WIDTH})")
    parser.add_argument("--rounds", type=int, default=3, help="how often to run each step (default 3)")
    options = parser.parse_args()
    if min(options.pages, options.width, options.rounds) < 1:
        parser.error("--pages, --width and --rounds are 1 or more")
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    wrong, wanted = [], Found()
    with tempfile.TemporaryDirectory(prefix="trtpool-tutorial-") as folder:
        pages = make_scans(Path(folder), options.pages, options.width)
        for _ in range(options.rounds):
            wanted = []
            for step, measure in STEPS.items():
                found, took_s = measure(pages)
                seconds[step].append(took_s)
                wanted = wanted or found
                if what := differing(wanted, found):
                    wrong.append(f"{step}: {what}")
    show(seconds, len(pages))
    lines = sum(len(found) for _, found in wanted)
    print(f"{step3_processes.PRODUCERS} CPUs; {lines} lines on {len(pages)} pages of {options.width} pixels.")
    print("NOT EQUAL to the loop: " + "; ".join(wrong) if wrong else "EQUAL: each step found the lines of the loop.")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(__file__, main)
