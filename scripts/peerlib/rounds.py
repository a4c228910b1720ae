"""The plan of a run, and carrying it out."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Final

from .contestant import Contestant, Measured
from .host import ContestantFailed, ProcessesLeft, guest
from .job import KINDS, Job, Kind
from .results import Row, Table

THROUGHPUT: Final = ("items/s", "CPU s")
SHARED: Final = (*THROUGHPUT, "least share")
"""From several producers."""
LATENCY: Final = ("p50 us", "p99 us", "CPU s")


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        rounds: turns of each contestant at each kind of work.
        window_s: length of a window.
        seed: of the order within rounds.
        engine: what computes in the peers' workers.
        kinds: names of `KINDS`.
    """

    rounds: int
    window_s: float
    seed: int
    engine: str = "numpy"
    kinds: Sequence[str] = tuple(KINDS)


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        tables: one for each kind of work and number of producers.
        missing: why contestants could not take part, by name.
        failed: what contestants did wrong, by kind of work and name.
        gave_up: those of them that are not tried at it again.
    """

    tables: list[Table]
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[tuple[str, str], str] = field(default_factory=dict)
    gave_up: set[tuple[str, str]] = field(default_factory=set)


def tables(kinds: Sequence[str]) -> list[Table]:
    """The empty tables of these kinds of work."""
    made = []
    for kind in (KINDS[name] for name in kinds):
        for count in kind.producers:
            title = f"{kind.workload.name}, {count} producer{'s' * (count > 1)}"
            made.append(Table(title, kind.name, count, SHARED if count > 1 else THROUGHPUT))
        if not kind.producers:
            made.append(Table(f"{kind.workload.name}, one at a time", kind.name, 0, LATENCY))
    return made


def plan(contestants: Sequence[str], options: Options) -> Iterator[tuple[int, str, str]]:
    """Rounds, kinds of work and contestants, in order: each contestant once for each kind in each round."""
    chance = random.Random(options.seed)
    for turn in range(options.rounds):
        for kind in options.kinds:
            for name in chance.sample(contestants, len(contestants)):
                yield turn, kind, name


def run(
    contestants: Mapping[str, type[Contestant]], options: Options, say: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Let all contestants take their turns; one that fails at a kind of work is not tried at it again.

    What it did before it failed stands.  Who leaves processes behind, which are killed, is told of, and goes on.
    """
    outcome = Outcome(tables(options.kinds))
    outcome.missing = {name: why for name, one in contestants.items() if (why := one.missing())}
    able = {name: one for name, one in contestants.items() if name not in outcome.missing}
    for table in outcome.tables:
        entered = {name: one for name, one in able.items() if table.kind in one.kinds}
        table.rows = {name: Row(name, one.own, one.bar) for name, one in entered.items()}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        models = {name: _model(KINDS[name], Path(folder)) for name in options.kinds}
        for turn, kind, name in plan(list(able), options):
            if kind not in able[name].kinds:
                continue
            say(f"round {turn + 1} of {options.rounds}, {kind}: {name}")
            _take_turn(able[name], KINDS[kind], models[kind], options, outcome)
            if turn == 0 and (failure := outcome.failed.get((kind, name))):
                say(f"FAILED: {failure}")
    return outcome


def _take_turn(one: type[Contestant], kind: Kind, model: Path, options: Options, outcome: Outcome) -> None:
    """One contestant's turn: a window in each table of `kind`."""
    here = [table for table in outcome.tables if table.kind == kind.name]
    windows: list[Measured] = []
    turn = kind.name, one.name
    if turn not in outcome.gave_up:
        try:
            for window in _windows(one, kind, model, options, [table.producers for table in here]):
                windows.append(window)  # noqa: PERF402  # those before a failure are kept
        except ContestantFailed as error:
            outcome.failed[turn] = str(error)
            if not isinstance(error, ProcessesLeft):
                outcome.gave_up.add(turn)
    for table, one_window in zip_longest(here, windows):
        table.rows[one.name].windows.append(one_window)


def _windows(
    one: type[Contestant], kind: Kind, model: Path, options: Options, producers: Sequence[int]
) -> Iterator[Measured]:
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        job = Job(kind, model, options.engine, Path(folder))
        with guest(one(), job) as up:
            for count in producers:
                yield up.run(count, options.window_s) if count else up.latency(options.window_s)


def _model(kind: Kind, folder: Path) -> Path:
    path = folder / f"mean{kind.workload.item_bytes}.onnx"
    if not path.exists():
        kind.workload.write_model(path)
    return path
