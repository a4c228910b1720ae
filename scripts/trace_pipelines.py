#!/usr/bin/env python
"""Record a bad and a good pipeline, and draw both: ``trace_pipelines.py FOLDER``; docs/tracing.md shows the pictures.

The model costs the same for a batch of 8 as for one item, as small models on GPUs do.  To fill an item takes 6 ms of
waiting, as for a picture that comes over a network.

bad.json   one producer: lease, fill, submit, wait for the result, and only then the next
good.json  four producers, each with `map` and a window, so that several items are under way
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
import numpy.typing as npt
import onnx.parser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `scripts`
from scripts.draw_trace import draw, picture_of

import trtpool

FILL_S: Final = 0.006
MAX_BATCH: Final = 8
PRODUCERS: Final = 4
DRAWN_MS: Final = 120.0

MODEL: Final = """
    <ir_version: 8, opset_import: ["" : 17]>
    model (float[N,4] x) => (float[N,4] y) <int64[2] shape = {300, 300}, float zero = {0}> {
        w = ConstantOfShape(shape)  m = ReduceMax<keepdims=0>(x)  v = Add(w, m)
        p = MatMul(v, v)  q = MatMul(p, v)  r = MatMul(q, v)  s = ReduceMax<keepdims=0>(r)  z = Mul(s, zero)
        y = Add(x, z)
    }
"""


def write(item: int, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
    """Fill an item, which takes its time."""
    time.sleep(FILL_S)
    inputs["x"][...] = item


def bad(client: trtpool.Client, until: Callable[[], bool]) -> int:
    """One at a time; returns how many."""
    done = 0
    while not until():
        with client.lease() as slot:
            write(done, slot.inputs)
            slot.submit().result()
        done += 1
    return done


def good(client: trtpool.Client, until: Callable[[], bool]) -> int:
    """Several under way; returns how many."""

    def items() -> Iterator[int]:
        done = 0
        while not until():
            yield done
            done += 1

    return sum(1 for _ in client.map(write, items(), window=2 * MAX_BATCH))


PIPELINES: Final[dict[str, tuple[Callable[[trtpool.Client, Callable[[], bool]], int], int]]] = {
    "bad": (bad, 1),
    "good": (good, PRODUCERS),
}


def produce(name: str, run_dir: str) -> None:
    """A producer's process: until its standard input ends; prints how many items it had."""
    with trtpool.connect(run_dir=run_dir) as client:
        print("ready", flush=True)
        print(PIPELINES[name][0](client, lambda: bool(select.select([sys.stdin], [], [], 0)[0])))


def record(name: str, folder: Path, trace: Path, seconds: float) -> float:
    """Record one of the pipelines; returns its items a second."""
    model, run_dir = folder / "model.onnx", folder / "run"
    onnx.save(onnx.parser.parse_model(MODEL), model)
    command = [sys.executable, __file__, "--produce", name, str(run_dir)]
    with trtpool.Pool(model, run_dir=run_dir, threads=1, max_batch=MAX_BATCH, slots=12 * MAX_BATCH) as pool:
        producers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(PIPELINES[name][1])
        ]
        for process in producers:
            assert process.stdout is not None
            process.stdout.readline()
        with pool.trace(trace):
            before = pool.status().models[0].items
            time.sleep(seconds)
            items = pool.status().models[0].items - before
        for process in producers:
            process.communicate()
    return items / seconds


def busy(trace: dict[str, Any]) -> float:
    """How much of the time the one worker computes."""
    spent_us: float = sum(event["dur"] for event in trace["traceEvents"] if event.get("cat") == "device")
    whole_ns: int = trace["otherData"]["end_ns"] - trace["otherData"]["start_ns"]
    return 1000 * spent_us / whole_ns


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True)
@click.option("--format", "suffix", type=click.Choice(["png", "svg"]), default="png", show_default=True)
def main(folder: Path, seconds: float, suffix: str) -> None:
    """Write bad.json, good.json and a picture of each to FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PIPELINES:
        trace = folder / f"{name}.json"
        with tempfile.TemporaryDirectory() as scratch:
            rate = record(name, Path(scratch), trace, seconds)
        written = json.loads(trace.read_bytes())
        title = f"{name}: {rate:.0f} items/s, the worker computes {busy(written):.0%} of the time"
        from_ms = max(0.0, 1000 * seconds - 2 * DRAWN_MS)
        draw(picture_of(written, from_ms, DRAWN_MS, title, most=2), folder / f"trace-{name}.{suffix}")
        click.echo(title)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--produce"]:
        produce(*sys.argv[2:4])
    else:
        main()
