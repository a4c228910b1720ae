"""Find the lines of text on some scanned pages, with a pool and several producers, and check the answers.

Starts ``trtpool start`` on the CPU with a trained text detector, has `--producers` processes decode pages
straight into slots, prints what they found and where the time went, and saves a picture of it.  Then the
same pages go through onnxruntime directly, in this process and one by one: the maps must be equal, bit for
bit, or the exit code is 1.

::

    demo.py ---- trtpool start MODEL ----> supervisor, broker, worker
       |                                        | arena
       |---- producer 1: decode, write to slot -|
       |---- producer 2: decode, write to slot -'--> maps.npy (pages, H, W) --> compare with onnxruntime

Other exit codes are those of trtpool's errors: 9 when a package is missing, 15 when the pool does not start.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `scripts`, here and in the producers
try:
    import numpy as np
    import onnxruntime
    from PIL import Image
    from rich.console import Console
    from rich.table import Table
    from scripts import demo_pages
    from scripts.demo_pages import HEIGHT, WIDTH, Region

    import trtpool
    from trtpool.ipc.errors import PoolError, StartFailed, TrtpoolError
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    print(f"the demo needs the package {package}; run: scripts/demo", file=sys.stderr)
    raise SystemExit(9) from None

INPUT = "x"
MAX_BATCH = 4
PAGES_DRAWN = 6
READY_WITHIN_S = 60
STOPPED_WITHIN_S = 30


class Found(NamedTuple):
    """What one producer got for one page; `compute_ns` is that of the whole batch the page was in."""

    page: int
    producer: int
    regions: list[Region]
    lease_ns: int
    queue_ns: int
    compute_ns: int


class Produced(NamedTuple):
    """What one producer did, from its first page to its last answer, on the clock of `time.monotonic_ns`."""

    found: list[Found]
    start_ns: int
    end_ns: int


def start_command(model: Path, name: str, run_dir: Path, workers: int) -> list[str]:
    """Return the pool's command line, with `trtpool` as a module: found without being installed."""
    return [
        *(sys.executable, "-m", "trtpool.broker.cli", "start", str(model)),
        *("--name", name, "--run-dir", str(run_dir), "--device", "cpu"),
        *("--shape", f"{INPUT}=3x{HEIGHT}x{WIDTH}"),
        *("--max-batch", str(MAX_BATCH), "--workers", str(workers)),
    ]


@contextlib.contextmanager
def running(command: Sequence[str], console: Console) -> Iterator[None]:
    """Run a pool from when it is ready until the block ends.

    Raises:
        StartFailed: it ended, or took over `READY_WITHIN_S`, before it was ready.
        PoolError: the block ended well and the pool did not.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_ready(process, console)
            yield
        finally:
            process.terminate()
            try:
                process.communicate(timeout=STOPPED_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
    if process.returncode:
        raise PoolError(f"the pool was asked to stop and ended with code {process.returncode}")


def wait_ready(process: subprocess.Popen[str], console: Console) -> None:
    """Show what the pool prints until it says that it is ready."""
    assert process.stdout is not None
    watchdog = threading.Timer(READY_WITHIN_S, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            console.print(line.rstrip(), style="dim", markup=False, highlight=False)
            if line.startswith("ready"):
                return
    finally:
        watchdog.cancel()
    raise StartFailed(f"the pool ended with code {process.wait()} before it was ready; its own words are above")


def produce(pool_name: str, producer: int, jobs: Sequence[tuple[int, Path]], maps_file: Path) -> Produced:
    """Send pages through the pool, as a process of its own; write each map to its row of `maps_file`."""
    maps = np.lib.format.open_memmap(maps_file, mode="r+")
    pages = ((index, Image.open(path)) for index, path in jobs)  # opened here, decoded in `write`

    def write(job: tuple[int, Image.Image], inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        demo_pages.write_input(job[1], inputs[INPUT])

    found = []
    with trtpool.connect(pool_name) as pool:
        start_ns = time.monotonic_ns()
        for (index, page), result in pool.map(write, pages, window=2 * MAX_BATCH, ordered=False):
            (output,) = result.outputs.values()
            maps[index] = output[0]
            regions = demo_pages.find_regions(output[0], page.size)
            timings = result.timings
            found.append(Found(index, producer, regions, timings.lease_ns, timings.queue_ns, timings.compute_ns))
        end_ns = time.monotonic_ns()
    maps.flush()
    return Produced(found, start_ns, end_ns)


def produce_all(pool_name: str, paths: Sequence[Path], maps_file: Path, producers: int) -> list[Produced]:
    """Deal the pages out to `producers` processes and return what each did."""
    jobs = list(enumerate(paths))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(producers, mp_context=spawn) as executor:
        futures = [
            executor.submit(produce, pool_name, number + 1, jobs[number::producers], maps_file)
            for number in range(producers)
        ]
        return [future.result() for future in futures]


class Comparison(NamedTuple):
    """How the pool's maps compare with onnxruntime's own."""

    differing: list[str]
    worst: float
    seconds: float


def compare(model: Path, paths: Sequence[Path], maps: npt.NDArray[Any]) -> Comparison:
    """Run every page through onnxruntime, alone, and compare with its row of `maps`, ``(pages, H, W)``."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = np.empty((1, 3, HEIGHT, WIDTH), np.float32)
    differing, worst, seconds = [], 0.0, 0.0
    for path, ours in zip(paths, maps, strict=True):
        demo_pages.write_input(Image.open(path), x[0])
        start = time.perf_counter()
        (answer,) = session.run(None, {INPUT: x})
        seconds += time.perf_counter() - start
        if not np.array_equal(ours, answer[0, 0]):
            differing.append(path.name)
            worst = max(worst, float(np.abs(ours - answer[0, 0]).max()))
    return Comparison(differing, worst, seconds)


def table_of(found: Sequence[Found], paths: Sequence[Path]) -> Table:
    """Return a row for each page, and the means of the times."""
    table = Table(
        title="Lines of text found, and where the time went (ms; compute is its whole batch's)",
        show_footer=True,
    )
    times = {
        "wait for slot": [one.lease_ns / 1e6 for one in found],
        "queue": [one.queue_ns / 1e6 for one in found],
        "compute": [one.compute_ns / 1e6 for one in found],
    }
    table.add_column("page", "all, mean times")
    table.add_column("producer", justify="right")
    table.add_column("lines", str(sum(len(one.regions) for one in found)), justify="right")
    table.add_column("score", justify="right")
    for phase, values in times.items():
        table.add_column(phase, f"{np.mean(values):.1f}", justify="right")
    for one, *row in zip(found, *times.values(), strict=True):
        score = f"{np.mean([region.score for region in one.regions]):.2f}" if one.regions else "-"
        cells = (paths[one.page].name, str(one.producer), str(len(one.regions)), score)
        table.add_row(*cells, *(f"{time_ms:.1f}" for time_ms in row))
    return table


def positive(text: str) -> int:
    """Parse a count of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pages", type=positive, default=24, help="different pages to make (default 24)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="picture to save (default demo.png)")
    parser.add_argument("--producers", type=positive, default=2, help="producer processes (default 2)")
    parser.add_argument("--workers", type=positive, default=1, help="worker processes (default 1)")
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir() or options.out.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--out {options.out}: name a picture, such as demo.png, in a folder that exists")
    return options


def demo(options: argparse.Namespace, console: Console) -> bool:
    """Run the demo; returns whether all answers are equal."""
    with tempfile.TemporaryDirectory(prefix="trtpool-demo-") as temporary:
        folder = Path(temporary)
        model = demo_pages.model_file()
        paths = demo_pages.write_pages(folder, options.pages)
        maps = np.lib.format.open_memmap(
            folder / "maps.npy", mode="w+", dtype=np.float32, shape=(len(paths), HEIGHT, WIDTH)
        )
        name, run_dir = f"demo-{os.getpid()}", folder / "run"
        os.environ["TRTPOOL_RUN_DIR"] = str(run_dir)  # where the producers find the pool
        command = start_command(model, name, run_dir, options.workers)
        typed = shlex.join(["trtpool", *command[command.index("start") :]])
        console.print(f"$ {typed}", style="bold", markup=False, highlight=False, soft_wrap=True)
        with running(command, console):
            produced = produce_all(name, paths, folder / "maps.npy", options.producers)
        found = sorted(one for part in produced for one in part.found)
        console.print(table_of(found, paths))
        span_s = (max(part.end_ns for part in produced) - min(part.start_ns for part in produced)) / 1e9
        console.print(
            f"{len(found)} pages in {span_s:.2f} s, decoding and finding included: {len(found) / span_s:.1f} "
            f"pages/s with {options.producers} producer(s) and {options.workers} worker(s)."
        )
        drawn = found[:PAGES_DRAWN]
        demo_pages.draw([(Image.open(paths[one.page]), one.regions) for one in drawn]).save(options.out)
        console.print(f"The lines found on the first {len(drawn)} pages are drawn in {options.out}.")
        compared = compare(model, paths, maps)
    console.print(f"onnxruntime called directly, a page at a time: {len(paths) / compared.seconds:.1f} pages/s.")
    if compared.differing:
        console.print(
            f"NOT EQUAL: {len(compared.differing)} of {len(paths)} maps differ from onnxruntime's, by up to "
            f"{compared.worst:.3g}: {', '.join(compared.differing)}",
            style="bold red",
        )
        return False
    console.print(f"EQUAL: all {len(paths)} maps are onnxruntime's own, bit for bit.", style="bold green")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    options = parse(arguments)
    try:
        return 0 if demo(options, Console()) else 1
    except TrtpoolError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
