#!/usr/bin/env python
"""What Ray Data costs with the model in each actor, and with one pool on the node: memory and items a second.

    plain   actors that make tokens of sentences, and run the model, of which each has its own
    pool    actors that make tokens of sentences, and feed one pool: trtpool.ray.TrtPool

The same sentences, model (all-MiniLM-L6-v2, 90 MB), batches and number of actors.  Each plain actor's model has one
thread; of the pool's there is one for each of --workers, with one thread too.  Each run has a Ray of its own; runs take
turns.

Memory is the proportional set size (PSS: what is shared counts once in all) of the actors, the pool and its keeper, at
its peak; Ray's own processes are left out, which are the same in both.  Items a second count from the first quarter of
the rows to the last, since actors do not start at once, and so does CPU time, which is that of all processes, Ray's
too.  On a machine with other work the rate depends on how many processes ask for a CPU, and CPU time says more.

Run it where ray is installed: ``scripts/setup cpu models ray && .venv/bin/python scripts/ray_cost.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `scripts`
from scripts.examples.shell import needs, run

with needs("cpu", "models", "ray"):
    import numpy as np
    import numpy.typing as npt
    import onnxruntime
    import ray
    import ray.data
    from scripts import minilm
    from scripts.peerlib import processes
    from scripts.peerlib.ray_cluster import cluster

    import trtpool.ray

ROOT: Final = Path(__file__).resolve().parent.parent
TOKENS: Final = 64
"""Sentences are padded or cut to so many."""
BATCH: Final = 16
CHECKED: Final = 16
"""One row of so many is compared with the model called directly."""
SAMPLE_S: Final = 0.2
KINDS: Final = ("plain", "pool")

Batch = dict[str, npt.NDArray[Any]]


class Figures(NamedTuple):
    """Of one run: items a second, CPU time of an item, the peak of memory in bytes, of how many processes that was."""

    rate: float
    cpu_ms: float
    pss: int
    processes: int


class Tokens:
    """Makes the model's inputs of sentences."""

    def __init__(self) -> None:
        self._tokenizer = minilm.load_tokenizer()
        self._tokenizer.enable_truncation(TOKENS)
        self._tokenizer.enable_padding(length=TOKENS)

    def of(self, texts: Sequence[str]) -> Batch:
        rows = [minilm.inputs_of(encoding) for encoding in self._tokenizer.encode_batch([str(text) for text in texts])]
        return {name: np.stack([row[name] for row in rows]) for name in minilm.INPUTS}


def load(model: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Plain:
    """An actor with a model of its own."""

    def __init__(self, model: str) -> None:
        self._session, self._tokens = load(model), Tokens()

    def __call__(self, batch: Batch) -> Batch:
        (vectors,) = self._session.run(["sentence_embedding"], self._tokens.of(list(batch["text"])))
        return {"id": batch["id"], "vector": vectors}


class Pooled(trtpool.ray.TrtPool):
    """An actor that feeds its node's pool."""

    def __init__(self, pools: trtpool.ray.NodePools) -> None:
        super().__init__(pools)
        self._tokens = Tokens()

    def __call__(self, batch: Batch) -> Batch:
        out = super().__call__({"id": batch["id"], **self._tokens.of(list(batch["text"]))})
        return {"id": out["id"], "vector": out["sentence_embedding"]}


class Memory:
    """Watches, in a thread, what the processes of the job take."""

    def __init__(self) -> None:
        self.peak, self.processes = 0, 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(SAMPLE_S):
            sizes = [pss(pid) for pid in job_processes()]
            if sum(sizes) > self.peak:
                self.peak, self.processes = sum(sizes), len(sizes)


def job_processes() -> set[int]:
    """Actors of the job, and what they have started."""
    actors = {process.pid for process in processes.below(os.getpid()) if is_actor(process.pid)}
    return actors | {process.pid for actor in actors for process in processes.below(actor)}


def is_actor(pid: int) -> bool:
    with contextlib.suppress(OSError):
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
        return title.startswith((b"ray::MapWorker", b"ray::Keeper", b"ray::Registry"))
    return False


def pss(pid: int) -> int:
    """Bytes of a process, with its part of what it shares; 0 if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def sentences(count: int) -> list[dict[str, Any]]:
    """Lines of this repository's documents, again and again."""
    files = sorted((ROOT / "docs").glob("*.md"))
    lines = [line for file in files for line in file.read_text().splitlines() if len(line.split()) > 5]
    return [{"id": number, "text": lines[number % len(lines)]} for number in range(count)]


@contextlib.contextmanager
def stage(kind: str, model: str, actors: int, workers: int) -> Iterator[dict[str, Any]]:
    """What `map_batches` is called with."""
    common = {"batch_size": BATCH, "compute": ray.data.ActorPoolStrategy(size=actors), "num_cpus": 0.5}
    if kind == "plain":
        yield {"fn": Plain, "fn_constructor_args": [model], **common}
        return
    shapes = dict.fromkeys(minilm.INPUTS, (TOKENS,))
    with trtpool.ray.NodePools(model, shapes=shapes, workers=workers, threads=1, max_batch=BATCH) as pools:
        yield {"fn": Pooled, "fn_constructor_args": [pools], **common}


def run_one(kind: str, model: str, actors: int, rows: int, workers: int) -> Figures:
    """Run one kind in this process, check its answers, and return its figures."""
    processes.adopt_orphans()  # so that all of Ray stays below
    items = sentences(rows)
    with cluster(), Memory() as memory:
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.from_items(items, override_num_blocks=-(-rows // BATCH))
        vectors = np.full((rows, minilm.WIDTH), np.nan, np.float32)
        with stage(kind, model, actors, workers) as options:
            done = counted_from = 0
            began_s = cpu_s = 0.0
            for batch in dataset.map_batches(**options).iter_batches(batch_size=None, batch_format="numpy"):
                vectors[batch["id"]] = batch["vector"]
                done += len(batch["id"])
                if not counted_from and done >= rows // 4:
                    counted_from, began_s, cpu_s = done, time.monotonic(), processes.cpu_s()
            rate = (rows - counted_from) / (time.monotonic() - began_s)
            cpu_ms = (processes.cpu_s() - cpu_s) / (rows - counted_from) * 1000
    checked = items[::CHECKED]
    (wanted,) = load(model).run(["sentence_embedding"], Tokens().of([item["text"] for item in checked]))
    np.testing.assert_allclose(vectors[::CHECKED], wanted, atol=1e-4)
    assert np.isfinite(vectors).all(), "rows are missing"
    return Figures(rate, cpu_ms, memory.peak, memory.processes)


def run_apart(kind: str, model: Path, actors: int, rows: int, workers: int) -> Figures:
    """Run one kind in a process of its own."""
    words = {"one": kind, "model": model, "actors": actors, "rows": rows, "workers": workers}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in words.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"ray_cost: {kind} with {actors} actors failed:\n{done.stderr}")
    return Figures(*json.loads(done.stdout.splitlines()[-1]))


def show(actors: int, plain: Sequence[Figures], pool: Sequence[Figures]) -> None:
    """Print the figures of all rounds with so many actors: medians, and ratios within rounds."""
    for name, all_of in (("plain", plain), ("pool", pool)):
        rate, cpu_ms, size, count = (statistics.median(values) for values in zip(*all_of, strict=True))
        per_item = f"{rate:7.1f} items/s  {cpu_ms:6.1f} ms of CPU each"
        print(f"{actors} actors  {name:5}  {per_item}  {size / 2**20:6.0f} MiB in {count:.0f} processes")
    rates = [b.rate / a.rate for a, b in zip(plain, pool, strict=True)]
    sizes = [b.pss / a.pss for a, b in zip(plain, pool, strict=True)]
    cpu = [b.cpu_ms / a.cpu_ms for a, b in zip(plain, pool, strict=True)]
    print(
        f"{actors} actors  pool / plain: items/s {spread(rates)}, CPU {spread(cpu)}, memory {spread(sizes)}", flush=True
    )


def spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


def main() -> int:
    """Run all and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--actors", default="2,4,8", help="how many, with commas (default 2,4,8)")
    parser.add_argument("--rows", type=int, default=1024, help="sentences (default 1024)")
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cpus, help=f"workers of the pool (default: CPUs, {cpus})")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)  # for this script itself
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one, options.model, int(options.actors), options.rows, options.workers)))
        return 0
    with tempfile.TemporaryDirectory(prefix="trtpool-ray-cost-") as folder:
        model = minilm.write_model(Path(folder) / "minilm.onnx")
        for actors in map(int, options.actors.split(",")):
            rounds = [
                [run_apart(kind, model, actors, options.rows, options.workers) for kind in KINDS]
                for _ in range(options.rounds)
            ]
            plain, pool = zip(*rounds, strict=True)
            show(actors, plain, pool)
    return 0


if __name__ == "__main__":
    run(__file__, main)
