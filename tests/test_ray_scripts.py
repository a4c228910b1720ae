"""The scripts that compare with Ray Data and lose a node: what they say without Ray, and what they notice.

The whole of them runs by hand; docs/performance.md and docs/reliability.md have what came of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.real import require_models

require_models()

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.mark.parametrize("name", ["ray_cost.py", "ray_node_loss.py"])
def test_without_ray_the_script_says_how_to_install_it(name):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    text = f"import runpy, sys\nsys.modules['ray'] = None\nrunpy.run_path({str(SCRIPTS / name)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=100, check=False, env=environment
    )
    assert done.returncode == 9
    assert done.stderr == "ray is not installed; run: scripts/setup cpu models ray\n"


@pytest.fixture
def rows(tmp_path) -> Any:
    """The model's file, sentences, and the right row for each."""
    pytest.importorskip("ray", reason="not installed: scripts/setup ray")
    from scripts import minilm, ray_cost

    model = str(minilm.write_model(tmp_path / "minilm.onnx"))
    items = ray_cost.sentences(20)
    inputs = ray_cost.Tokens().of([item["text"] for item in items])
    (vectors,) = ray_cost.load(model).run(["sentence_embedding"], inputs)
    return model, items, [{"id": item["id"], "vector": vector} for item, vector in zip(items, vectors, strict=True)]


def test_every_row_is_accounted_for_in_any_order(rows):
    from scripts import ray_node_loss

    model, items, found = rows
    assert ray_node_loss.wrong(items, found[::-1], model) == []


def test_rows_that_are_missing_twice_strange_or_wrong_are_noticed(rows):
    from scripts import ray_node_loss

    model, items, found = rows
    assert ray_node_loss.wrong(items, found[:-1], model) == ["1 rows are missing, such as [19]"]
    assert ray_node_loss.wrong(items, [*found, found[3]], model) == ["1 rows came more than once, such as [3]"]
    strange, *_ = ray_node_loss.wrong(items, [*found, {**found[3], "id": 77}], model)
    assert strange == "1 rows were never asked for, such as [77]"
    swapped = [{**row, "vector": np.roll(row["vector"], 1)} if row["id"] == 5 else row for row in found]
    (differing,) = ray_node_loss.wrong(items, swapped, model)
    assert differing.startswith("vectors differ in the rows [0, 1, 2, ")
