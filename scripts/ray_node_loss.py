#!/usr/bin/env python
"""Kill a node of a Ray cluster in the middle of a job, and account for every row.

A cluster of two nodes on this machine, each with a pool of its own; sentences go through `trtpool.ray.TrtPool` on both.
When the second node has done a quarter of the rows, all its processes are killed at once, with SIGKILL: raylet, actors,
keeper, and the pool's supervisor, broker and worker.  In the end each row must be there once, with the vector that the
model gives when it is called directly.  The exit code is 1 if not.  Run it where ray is installed: ``scripts/setup cpu
models ray && .venv/bin/python scripts/ray_node_loss.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `scripts`
from scripts.examples.shell import needs, run

# Ray's processes import this repository, and leave no token in the user's home.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
with needs("cpu", "models", "ray"):
    import numpy as np
    import ray
    import ray.data
    from ray.cluster_utils import Cluster
    from scripts import minilm, ray_cost
    from scripts.peerlib import processes
    from scripts.ray_cost import BATCH, TOKENS, Batch

    import trtpool.ray

NOTICE: Final = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}
"""So that Ray notices a lost node in seconds."""


class Ledger:
    """An actor on the node that stays, which is told of each batch that was done, and where."""

    def __init__(self) -> None:
        self._done: list[tuple[str, int]] = []

    def note(self, node: str, rows: int) -> None:
        self._done.append((node, rows))

    def rows_by_node(self) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for node, rows in self._done:
            sums[node] += rows
        return dict(sums)


class Embed(ray_cost.Pooled):
    """Tells the ledger of each batch."""

    def __init__(self, pools: trtpool.ray.NodePools, ledger: Any) -> None:
        super().__init__(pools)
        self._ledger = ledger

    def __call__(self, batch: Batch) -> Batch:
        out = super().__call__(batch)
        node = ray.get_runtime_context().get_node_id()
        ray.get(self._ledger.note.remote(node, len(out["id"])))
        return {**out, "node": np.array([node] * len(out["id"]))}


@contextlib.contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster of two nodes; yields the second."""
    head = {"num_cpus": 2, "resources": {"head": 1}, "include_dashboard": False, "_system_config": NOTICE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield second
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill_node(node: Any) -> Counter[str]:
    """Kill all processes of a node at once; returns how many of each name."""
    roots = [info.process.pid for infos in node.all_processes.values() for info in infos]
    # All are stopped before any is killed, so that none lives to see another's end.
    below = {process.pid: process.name for root in roots for process in processes.below(root)}
    doomed = {**{root: found.name for root in roots if (found := processes.read(root))}, **below}
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    return Counter(doomed.values())


def lose(node: Any, ledger: Any, after_rows: int, told: dict[str, Any]) -> None:
    """Wait until a node has done so many rows, and kill it."""
    while told["rows"] < after_rows:
        told["rows"] = ray.get(ledger.rows_by_node.remote()).get(node.node_id, 0)
    told["killed"] = kill_node(node)
    told["at_s"] = time.monotonic()


def embed(model: str, items: list[dict[str, Any]], node: Any) -> tuple[list[Any], dict[str, Any], dict[str, int]]:
    """The job: its rows, what was killed and when, and the rows that were done on each node."""
    ledger = ray.remote(Ledger).options(num_cpus=0, resources={"head": 0.1}).remote()
    told: dict[str, Any] = {"rows": 0}
    loser = threading.Thread(target=lose, args=(node, ledger, len(items) // 4, told), daemon=True)
    shapes = dict.fromkeys(minilm.INPUTS, (TOKENS,))
    with trtpool.ray.NodePools(model, shapes=shapes, threads=1, max_batch=BATCH) as pools:
        loser.start()
        rows = (
            ray.data.from_items(items, override_num_blocks=-(-len(items) // BATCH))
            .map_batches(
                Embed,
                fn_constructor_args=[pools, ledger],
                batch_size=BATCH,
                compute=ray.data.ActorPoolStrategy(size=4),
                num_cpus=0.5,
            )
            .take_all()
        )
        loser.join()
        told["end_s"] = time.monotonic()
        return rows, told, ray.get(ledger.rows_by_node.remote())


def wrong(items: list[dict[str, Any]], rows: list[Any], model: str) -> list[str]:
    """What is wrong with the rows; nothing if all are accounted for."""
    times = Counter(int(row["id"]) for row in rows)
    problems = [
        f"{len(found)} rows {what}, such as {sorted(found)[:5]}"
        for what, found in (
            ("are missing", [item["id"] for item in items if item["id"] not in times]),
            ("came more than once", [number for number, count in times.items() if count > 1]),
            ("were never asked for", set(times) - {item["id"] for item in items}),
        )
        if found
    ]
    session, tokens = ray_cost.load(model), ray_cost.Tokens()
    texts = {item["id"]: item["text"] for item in items}
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        (wanted,) = session.run(["sentence_embedding"], tokens.of([texts.get(row["id"], "") for row in some]))
        if not np.allclose([row["vector"] for row in some], wanted, atol=1e-4):
            problems.append(f"vectors differ in the rows {[int(row['id']) for row in some]}")
    return problems


def main() -> int:
    """Run it and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048, help="sentences (default 2048)")
    options = parser.parse_args()
    if options.rows < 4:
        parser.error(f"--rows {options.rows}: a quarter of them is to be done on the node that is lost; give 4 or more")
    items = ray_cost.sentences(options.rows)
    processes.adopt_orphans()  # so that what a node started stays below this process
    with tempfile.TemporaryDirectory(prefix="trtpool-ray-loss-") as folder:
        model = str(minilm.write_model(Path(folder) / "minilm.onnx"))
        with two_nodes() as second:
            ray.data.DataContext.get_current().enable_progress_bars = False
            began_s = time.monotonic()
            rows, told, done = embed(model, items, second)
        problems = wrong(items, rows, model)
    killed = ", ".join(f"{count} {name}" for name, count in sorted(told["killed"].items()))
    print(f"killed after {told['at_s'] - began_s:.1f} s, when it had done {told['rows']} rows: {killed}")
    print(f"the job ended {told['end_s'] - told['at_s']:.1f} s later")
    print(f"rows: {len(items)} in, {len(rows)} out; done {sum(done.values())} times,")
    print(f"  {done.get(second.node_id, 0)} on the lost node, {sum(done.values()) - len(items)} of all a second time")
    print(f"  {sum(row['node'] == second.node_id for row in rows)} of those in the result are from the lost node")
    print("; ".join(problems) if problems else "ACCOUNTED FOR: each row is there once, with its own vector")
    return 1 if problems else 0


if __name__ == "__main__":
    run(__file__, main)
