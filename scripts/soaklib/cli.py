"""Options, the loop over time, the summary."""

from __future__ import annotations

import collections
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from trtpool.ipc.report import PoolReport

from .crew import Crew
from .faults import Saboteur
from .models import MODELS
from .plan import Fault, PoolPlan, faults, pool_plan, producer_plans
from .target import Target, own_holdings

STEP_S: Final = 0.02


class Summary:
    """What a soak came to."""

    def __init__(self, seed: int, plan: PoolPlan, took_s: float) -> None:
        self.seed = seed
        self.plan = plan
        self.took_s = took_s
        self.rows: list[tuple[str, str]] = []
        self.leaks: list[str] = []
        self.texts: list[str] = []
        self.lost = 0
        self.wrong = 0

    @property
    def good(self) -> bool:
        """Whether all is as it must be."""
        return not (self.lost or self.wrong or self.leaks)

    def add(self, name: str, value: object) -> None:
        self.rows.append((name, f"{value:,}" if isinstance(value, int) else str(value)))

    def add_all(self, name: str, counts: collections.Counter[str]) -> None:
        for what, count in sorted(counts.items()):
            self.add(f"{name}: {what}", count)

    def show(self) -> None:
        """Print it."""
        plan = self.plan
        table = Table(
            title=f"soak of {self.took_s:.0f} s, seed {self.seed}: {plan.slots} slots of {plan.items_per_slot}, "
            f"batches of up to {plan.max_batch}, delay {plan.max_delay_us} us",
            title_justify="left", show_header=False,
        )  # fmt: skip
        for name, value in self.rows:
            table.add_row(name, value)
        table.add_row("lost", f"{self.lost:,}")
        table.add_row("wrong", f"{self.wrong:,}")
        table.add_row("leaked", f"{len(self.leaks):,}")
        Console(width=120, soft_wrap=True).print(table)
        for text in [*self.texts, *(f"leak: {leak}" for leak in self.leaks)]:
            print(text)


def soak(
    folder: Path,
    models: list[str],
    *,
    minutes: float,
    seed: int,
    workers: int,
    producers: int,
    pause_s: float,
) -> Summary:
    """Run it; see the module `soaklib`."""
    before = own_holdings()
    plan = pool_plan(seed)
    began = time.monotonic()
    target = Target(folder, plan, workers, models)
    crew = Crew(target, producer_plans(seed), producers)
    saboteur = Saboteur(target, crew, faults(seed, pause_s))
    try:
        while time.monotonic() < began + 60 * minutes:
            crew.tend()
            saboteur.step()
            time.sleep(STEP_S)
        saboteur.finish()
        crew.dismiss()
        leaks = target.leaks_at_rest()
        report = target.report()
    finally:
        # Whatever went wrong, nothing stays behind.
        for member in crew.members:
            member.process.kill()
        last = target.leaks_at_the_end()
    summary = Summary(seed, plan, time.monotonic() - began)
    summary.leaks = leaks + last
    fill(summary, crew, saboteur, report)
    if own_holdings() != before:
        summary.leaks.append(f"in this process, descriptors and mappings: {own_holdings()}, {before} at the start")
    return summary


def fill(summary: Summary, crew: Crew, saboteur: Saboteur, report: PoolReport) -> None:
    """Enter what was counted."""
    totals = crew.totals
    done = sum(model.items for model in report.models)
    summary.add("producers", totals.producers)
    summary.add_all("producers", totals.roles)
    summary.add("items submitted", totals.submitted)
    summary.add("items answered, and right", totals.ok)
    summary.add("items nobody wanted to read", totals.unread)
    summary.add("items gone with their producer", totals.gone)
    summary.add_all("items ended by", totals.errors)
    summary.add_all("leases refused", totals.refusals)
    summary.add("items that the pool did", done)
    summary.add("batches", sum(model.batches for model in report.models))
    summary.add("batches retried", sum(model.retries for model in report.models))
    summary.add_all("fault", saboteur.done)
    summary.lost = totals.wrong["lost"]
    summary.wrong = sum(totals.wrong.values()) - summary.lost
    summary.texts = totals.texts
    for what, is_wrong in (
        ("producers saw more results than the pool has items", totals.ok > done),
        (f"{report.violations} violations of the protocol, and all producers keep it", report.violations > 0),
        ("nothing was submitted", not totals.ok),
    ):
        if is_wrong:
            summary.wrong += 1
            summary.texts.append(what)


def show_plan(seed: int, pause_s: float) -> None:
    """Print how a soak of this seed begins."""
    print(pool_plan(seed))
    plans: Iterator[Fault] = faults(seed, pause_s)
    for one in [*itertools.islice(producer_plans(seed), 10), *itertools.islice(plans, 20)]:
        print(one)


@click.command()
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Decides the pool, the load and the faults.")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--producers", type=click.IntRange(1, 256), default=5, show_default=True, help="Processes at once.")
@click.option("--models", default=",".join(MODELS), show_default=True, help="Some of these; negate must be there.")
@click.option(
    "--pause-s", type=click.FloatRange(0, min_open=True), default=0.7, show_default=True, help="Mean, between faults."
)
@click.option("--keep", type=click.Path(path_type=Path), help="A new folder for the logs [default: none is left].")
@click.option("--show-plan", "only_plan", is_flag=True, help="Only print how it would begin.")
def main(
    *,
    minutes: float,
    seed: int,
    workers: int,
    producers: int,
    models: str,
    pause_s: float,
    keep: Path | None,
    only_plan: bool,
) -> None:
    """Run a pool on the CPU under random load and random faults, check every item, and look for leaks.

    \b
    Exit code 0: every item ended as it may, and nothing was left; 1: not so.
    """  # noqa: D301  # click wants the character itself, to leave the lines as they are
    names = models.split(",")
    if not set(names) <= set(MODELS) or names[0] != "negate":
        raise click.UsageError(f"--models takes some of {','.join(MODELS)}, and negate first; got {models}")
    if only_plan:
        show_plan(seed, pause_s)
        return
    folder = keep or Path(tempfile.mkdtemp(prefix="trtpool-soak-"))
    folder.mkdir(parents=True, exist_ok=keep is None)
    try:
        summary = soak(
            folder, names, minutes=minutes, seed=seed, workers=workers, producers=producers, pause_s=pause_s
        )  # fmt: skip
        summary.show()
        if not summary.good:
            for name in ("pool.log", "producers.log"):
                print(f"--- the end of {name}", (folder / name).read_text(errors="replace")[-4000:], sep="\n")
    finally:
        if keep is None:
            shutil.rmtree(folder)
    sys.exit(not summary.good)
