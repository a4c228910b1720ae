"""Batches of all forms through one plan, under compute-sanitizer: ``python -m tests.gpu.sanitized mlp.plan``."""

from __future__ import annotations

import sys

import numpy as np

from tests.gpu.harness import Bound
from trtpool.workers.cuda import Cuda
from trtpool.workers.engine import Rows


def main() -> None:
    with Bound(Cuda(), sys.argv[1], 40, items_per_slot=3, max_batch=30, chunk_bytes=1 << 16, lanes=2) as bound:
        bound.x[...] = np.random.default_rng().standard_normal(bound.x.shape)
        batches = [
            [Rows(7, 1, 1)],
            [Rows(30, 10, 30)],
            [Rows(5, 1, 2), Rows(0, 3, 8), Rows(39, 1, 3), Rows(20, 4, 12)],
        ]
        for _ in range(3):  # enqueued, captured, a graph
            for lane in range(2):
                for batch in batches:
                    bound.engine.launch(lane, batch)
                    bound.engine.wait(lane)
        for lane in range(2):
            bound.engine.launch(lane, batches[lane])
        for lane in range(2):
            bound.engine.wait(lane)
        assert np.isfinite(bound.y[30:40]).all()
    print("done")  # noqa: T201


if __name__ == "__main__":
    main()
