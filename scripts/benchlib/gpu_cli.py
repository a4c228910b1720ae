"""``scripts/bench.py --gpu``: finds or builds the plans, runs the cases, and keeps what came of them."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from trtpool.broker.gpus import gpu_list
from trtpool.ipc.errors import ConfigError

from . import gpu_report, report
from .gpu_cases import CASES, GpuCase, Options, run
from .gpu_results import Result
from .gpu_watch import GpuWatch

BUILD_S: Final = 400.0

RECIPES: Final = {
    "mlp": ("mlp", ("--fp16", "--shapes", "x=1x256:64x256:256x256")),
    "resnet50_fp16": ("resnet50", ("--fp16", "--shapes", "images=1x3x224x224:32x3x224x224:64x3x224x224")),
    "resnet50_fp16_io16": (
        "resnet50", ("--fp16", "--io", "fp16", "--shapes", "images=1x3x224x224:32x3x224x224:64x3x224x224"),
    ),
    "resnet50_u8": ("resnet50_u8", ("--fp16", "--shapes", "images=1x224x224x3:32x224x224x3:64x224x224x3")),
    "reduce1600x2560": (
        "reduce1600x2560", ("--shapes", "image=1x3x1600x2560:4x3x1600x2560:8x3x1600x2560"),
    ),
    "ppocr_det": ("ppocr_det", ("--fp16", "--shapes", "x=1x3x1600x2560:2x3x1600x2560:4x3x1600x2560")),
}  # fmt: skip
"""For each plan its ONNX file, and how `trtpool build` makes it."""

MADE: Final = ("resnet50", "resnet50_u8", "mlp", "reduce1600x2560")
"""The ONNX files that `scripts/make_models.py` writes; others must lie beside the plans."""


@dataclass(frozen=True)
class Choice:
    """What the command line says; None where it says nothing."""

    gpu: str
    engines: Path
    quick: bool
    only: str | None
    rounds: int | None
    window_s: float | None
    limit_s: float
    huge_pages: bool
    json_path: Path | None


def choose(only: str | None, gpus: tuple[str, ...], *, quick: bool) -> list[GpuCase]:
    """The cases to run.

    Raises:
        click.BadParameter: a name is unknown, or its case needs two GPUs and there is one.
    """
    if only is None:
        return [case for case in CASES.values() if case.pair <= (len(gpus) > 1) and not (quick and case.thorough)]
    names = only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise click.BadParameter(
            f"no case {', '.join(unknown)} with --gpu; there are {', '.join(CASES)}", param_hint="--only"
        )
    cases = [CASES[name] for name in names]
    if len(gpus) < 2 and any(case.pair for case in cases):
        raise click.BadParameter("a case of two GPUs needs two, such as --gpu 0,1", param_hint="--only")
    return cases


def find_plan(name: str, engines: Path, made: Path) -> Path | None:
    """A plan's file: as it is, unpacked from ``.xz`` into `made`, or built there; None if there is none."""
    for plan in (engines / f"{name}.plan", made / f"{name}.plan"):
        if plan.is_file():
            return plan
    packed = engines / f"{name}.plan.xz"
    if not packed.is_file():
        return None
    target = made / f"{name}.plan"
    target.write_bytes(lzma.decompress(packed.read_bytes()))
    return target


def build_command(name: str, engines: Path, made: Path, gpu: str) -> tuple[list[str], Path]:
    """The command that builds a plan, and the ONNX file that it needs first."""
    model, options = RECIPES[name]
    onnx = engines / f"{model}.onnx"
    if not onnx.is_file():
        onnx = made / f"{model}.onnx"
    command = [sys.executable, "-m", "trtpool.broker.cli", "build", os.fspath(onnx), "-o", f"{made / name}.plan"]
    return [*command, *options, "--gpu", gpu], onnx


def _build(console: Console, name: str, engines: Path, made: Path, gpu: str) -> str:
    """Build a plan into `made`; why that failed, or ""."""
    command, onnx = build_command(name, engines, made, gpu)
    if not onnx.is_file() and onnx.stem not in MADE:
        return f"there is no {name}.plan in {engines}, and no {onnx.name} to build it from"
    console.print(f"{engines} has no {name}.plan: building it from {onnx}", highlight=False, markup=False)
    try:
        if not onnx.is_file():
            models = Path(__file__).parent.parent / "make_models.py"
            subprocess.run([sys.executable, models, made, onnx.stem], check=True, timeout=BUILD_S)
        subprocess.run(command, check=True, timeout=BUILD_S)
    except subprocess.CalledProcessError as error:
        return f"{name}.plan could not be built, for the reason above (exit code {error.returncode})"
    except subprocess.TimeoutExpired:
        return f"{name}.plan was not built within {BUILD_S:.0f} s"
    return ""


def find_or_build(console: Console, name: str, engines: Path, made: Path, gpu: str) -> Path | str:
    """A plan, which is built into `made` if there is none; a text says why that failed."""
    plan = find_plan(name, engines, made)
    if plan is not None:
        return plan
    return _build(console, name, engines, made, gpu) or made / f"{name}.plan"


def main(choice: Choice) -> None:
    """Run the cases one after the other; a case that cannot run is reported, and the others go on."""
    gpus = _gpus(choice.gpu)
    cases = choose(choice.only, gpus, quick=choice.quick)
    began_s = time.monotonic()
    console = Console(width=gpu_report.WIDTH)
    results: list[Result] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, GpuWatch(gpus) as watch:
        machine = report.machine() | {"gpus": [f"{one.name}, {one.link}" for one in watch.gpus.values()]}
        console.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False, markup=False)
        if watch.why:
            console.print(watch.why, markup=False)
        console.print()
        plans: dict[str, Path] = {}
        options = Options(
            gpus=gpus,
            plans=plans,
            rounds=choice.rounds or (3 if choice.quick else 5),
            window_s=choice.window_s or (0.4 if choice.quick else 0.8),
            until_s=began_s + choice.limit_s,
            huge_pages=choice.huge_pages,
            watch=watch,
        )
        for case in cases:
            why = _prepare(console, case, choice.engines, Path(folder), options)
            if not why:
                try:
                    results.append(run(case, options))
                    gpu_report.show(console, results[-1])
                except Exception as error:  # noqa: BLE001  # the next case may do better, and time here is dear
                    why = f"{type(error).__name__}: {error}"
            if why:
                skipped[case.name] = why
                console.print(f"{case.name} was left out: {why}\n", highlight=False, markup=False)
            _keep(choice.json_path, machine, results, skipped, time.monotonic() - began_s)
    for line in gpu_report.summary(results):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"took {time.monotonic() - began_s:.0f} s", highlight=False)
    if not results:
        sys.exit(1)


def _gpus(text: str) -> tuple[str, ...]:
    try:
        return gpu_list(text)
    except ConfigError as error:
        raise click.BadParameter(str(error), param_hint="--gpu") from error


def _prepare(console: Console, case: GpuCase, engines: Path, made: Path, options: Options) -> str:
    """Find or build a case's plan; why the case cannot run, or ""."""
    if time.monotonic() > options.until_s:
        return "time is up; --limit-s gives more, --only asks for less"
    if case.plan not in options.plans:
        plan = find_or_build(console, case.plan, engines, made, options.gpus[0])
        if isinstance(plan, str):
            return plan
        options.plans[case.plan] = plan
    return ""


def _keep(
    path: Path | None, machine: dict[str, Any], results: list[Result], skipped: dict[str, str], took_s: float
) -> None:
    """Write what there is so far; whole, whenever this is ended."""
    if path is None:
        return
    content = {
        "machine": machine,
        "took_s": round(took_s, 1),
        "skipped": skipped,
        "cases": [gpu_report.as_dict(result) for result in results],
    }
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)
