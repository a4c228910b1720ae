"""What is the same in all steps: the model's file, scans to run it on, and what is done before and after it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy.typing as npt
from PIL import Image
from scripts import demo_pages
from scripts.demo_pages import Region

MODEL = Path(os.environ.get("TUTORIAL_PLAN") or demo_pages.model_file())
GPUS = [0] if MODEL.suffix == ".plan" else None
"""A plan that `trtpool build` made of the model runs on a GPU."""

SHAPE = (3, *map(int, os.environ.get("TUTORIAL_SIZE", f"{demo_pages.HEIGHT}x{demo_pages.WIDTH}").split("x")))
SCAN_WIDTH = 2480
"""Pixels across a page of A4 at 300 dots an inch."""


def make_scans(folder: Path, count: int, width: int = SCAN_WIDTH) -> list[Path]:
    """Write `count` different pages as JPEG files as a scanner does, `width` pixels wide and in colour."""
    scans = []
    for path in demo_pages.write_pages(folder, count):
        with Image.open(path) as page:
            height = round(width * page.height / page.width)
            scans.append(path.with_suffix(".jpg"))
            page.convert("RGB").resize((width, height), Image.Resampling.BICUBIC).save(scans[-1], quality=90)
        path.unlink()
    return scans


def write_page(path: Path, x: npt.NDArray[Any]) -> None:
    """Decode a page into `x`, float32 ``(3, H, W)``, every element of it."""
    with Image.open(path) as picture:
        demo_pages.write_input(picture, x)


def lines_of(path: Path, output: npt.NDArray[Any]) -> list[Region]:
    """The lines of text on a page, of the model's output, float32 ``(1, H, W)``."""
    with Image.open(path) as picture:  # reads no more than the size
        return demo_pages.find_regions(output[0], picture.size)


def show(found: Any) -> None:
    """Print how many lines each page has."""
    for path, lines in found:
        print(f"{path}: {len(lines)} lines")


def given() -> list[Path]:
    """The pages that the command line names."""
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: {Path(sys.argv[0]).name} PAGE...")
    return [Path(argument) for argument in sys.argv[1:]]
