"""`trtpool.torch` with worker processes: each is a producer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.system.rig import Process

pytest.importorskip("torch")

PROGRAM = """
import sys, warnings
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
import trtpool, trtpool.torch

class Numbers(Dataset):
    def __init__(self, count, bad=None):
        self.count, self.bad = count, bad
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        return {"x": torch.full((5,) if index == self.bad else (4,), float(index)), "name": f"item {index}"}

class Stream(IterableDataset):
    def __iter__(self):
        me = torch.utils.data.get_worker_info()
        return (torch.full((4,), float(value)) for value in range(me.id, 41, me.num_workers))

def load(pool, dataset, **options):
    collate = trtpool.torch.Collate(pool.handle())
    return DataLoader(dataset, collate_fn=collate, num_workers=2, multiprocessing_context=context, **options)

if __name__ == "__main__":
    context, run_dir, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with trtpool.connect(run_dir=run_dir) as pool:
        values, names = [], []
        for _ in range(epochs):
            for batch in load(pool, Numbers(50), batch_size=4):
                assert batch["y"].shape[1:] == (4,) and batch["y"].is_shared()
                values += batch["y"][:, 0].tolist()
                names += batch["name"]
        assert values == epochs * [-float(value) for value in range(50)], values
        assert names == epochs * [f"item {value}" for value in range(50)]

        if epochs == 1:  # each worker imports torch anew, which takes long
            sys.exit(print("well"))

        kept = [batch["y"] for batch in load(pool, Stream(), batch_size=3)]
        assert sorted(torch.cat(kept)[:, 0].tolist()) == sorted(-float(value) for value in range(41))

        try:
            list(load(pool, Numbers(50, bad=17), batch_size=4))
        except trtpool.InvalidInput as error:
            assert "must have shape (4,), got (5,)" in str(error)
        else:
            raise AssertionError("the bad item was taken")
        print("well")
"""

FAILING = """
import sys
import torch
from torch.utils.data import DataLoader
import trtpool, trtpool.torch

def number(index):
    return torch.tensor(index)

if __name__ == "__main__":
    with trtpool.connect(run_dir=sys.argv[1]) as pool:
        samples = [number(index) for index in (0, 1, 2, 3, 99, 1)]  # the table has 4 entries
        collate = trtpool.torch.Collate(pool, model="picky")
        seen = []
        try:
            for batch in DataLoader(samples, batch_size=2, num_workers=2, collate_fn=collate):
                seen += batch["y"].tolist()
        except trtpool.EngineFailed as error:
            assert "DataLoader worker" in str(error) and "out of data bounds" in str(error), error
        print(seen)
"""


def run(program: str, tmp_path: Path, *arguments: object) -> str:
    path = tmp_path / "program.py"
    path.write_text(program)
    with Process(sys.executable, path, *map(str, arguments)) as process:
        return process.succeed()


@pytest.mark.parametrize(("context", "epochs"), [("fork", 2), ("spawn", 1), ("forkserver", 1)])
def test_workers_are_producers(context, epochs, small, tmp_path):
    assert run(PROGRAM, tmp_path, context, small.run_dir, epochs) == "well\n"


def test_an_item_that_fails_in_the_engine_is_raised_where_the_loader_is_read(pool, tmp_path):
    assert run(FAILING, tmp_path, pool.run_dir) == "[0.0, 1.0, 2.0, 3.0]\n"
