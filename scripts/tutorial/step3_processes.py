"""Several processes decode, and all of them feed the one pool."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `scripts`
from scripts.demo_pages import Region
from scripts.tutorial import step1_infer, step2_map
from scripts.tutorial.pages import given, show

import trtpool

PRODUCERS = len(os.sched_getaffinity(0))
SHARE = 8
"""Pages that a process is given at a time."""


class Loaded(NamedTuple):
    pool: trtpool.Pool
    producers: ProcessPoolExecutor


def work(handle: trtpool.PoolHandle, pages: Sequence[Path]) -> list[tuple[Path, list[Region]]]:
    return list(step2_map.find_text(handle.client, pages))  # connects once in each process


@contextmanager
def load() -> Iterator[Loaded]:
    spawn = multiprocessing.get_context("spawn")
    with step1_infer.load() as pool, ProcessPoolExecutor(PRODUCERS, spawn) as producers:
        yield Loaded(pool, producers)


def find_text(loaded: Loaded, pages: Sequence[Path]) -> Iterator[tuple[Path, list[Region]]]:
    handle = loaded.pool.handle()
    shares = [pages[first : first + SHARE] for first in range(0, len(pages), SHARE)]
    for found in loaded.producers.map(work, [handle] * len(shares), shares):
        yield from found


if __name__ == "__main__":
    with load() as loaded:
        show(find_text(loaded, given()))
