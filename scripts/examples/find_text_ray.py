"""The same as find_text.py inside Ray Data, on one machine or on a cluster: ``find_text_ray.py FOLDER OUTPUT``.

::

    paths --> tasks: decode --> actors: TrtPool --> tasks: lines --> Parquet, a file for each block
                                   |  |  |
                             one pool on each node, which has the model

FOLDER and OUTPUT, a folder too, must be there on every node.  Run it with ``scripts/setup cpu demo ray &&
.venv/bin/python scripts/examples/find_text_ray.py /tmp/pages /tmp/lines``; find_text.py makes pages.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `scripts`
from scripts.examples.shell import needs, run

# Processes that Ray starts import this module by its name.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
with needs("cpu", "demo", "ray"):
    import numpy as np
    import pyarrow.parquet as pq
    import ray
    import ray.data
    from PIL import Image
    from scripts import demo_pages
    from scripts.examples.find_text import SUFFIXES, rows_of

    import trtpool.ray

SHAPE = (3, demo_pages.HEIGHT, demo_pages.WIDTH)
Row = dict[str, Any]


def decode(row: Row) -> Row:
    """Decode a page: `x` is the model's input, float32 ``(3, H, W)``."""
    x = np.empty(SHAPE, np.float32)
    with Image.open(row["path"]) as picture:
        demo_pages.write_input(picture, x)
        return {"page": row["path"], "size": picture.size, "x": x}


def lines(row: Row) -> list[Row]:
    """A row for each line of text on a page, none if there is none."""
    (output,) = (value for name, value in row.items() if name not in ("page", "size"))
    return rows_of(row["page"], tuple(row["size"]), output[0])


def main() -> int:
    """Run the example and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--actors", type=int, default=2, help="processes that feed the pools (default 2)")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} is there already, and Ray would add to it; name another folder")
    pages = sorted(str(path) for path in options.folder.resolve().iterdir() if path.suffix.lower() in SUFFIXES)
    model = str(demo_pages.model_file())
    with trtpool.ray.NodePools(model, shapes={"x": SHAPE}) as pools:
        (
            ray.data.from_items([{"path": page} for page in pages])
            .map(decode)
            .map_batches(
                trtpool.ray.TrtPool,
                fn_constructor_args=[pools],
                batch_size=4,
                compute=ray.data.ActorPoolStrategy(size=options.actors),
                num_cpus=0.25,  # it waits, and copies; the pool computes
            )
            .flat_map(lines)
            .write_parquet(str(options.output))
        )
    found = pq.read_table(options.output).sort_by([("page", "ascending"), ("score", "descending")]).to_pylist()
    print(f"{len(found)} lines on {len(pages)} pages, in {options.output}, such as:")
    for row in found[:5]:
        corners = np.round(row["corners"]).astype(int).tolist()
        print(f"{Path(row['page']).name}: score {row['score']:.2f}, corners {corners}")
    return 0


if __name__ == "__main__":
    run(__file__, main)
