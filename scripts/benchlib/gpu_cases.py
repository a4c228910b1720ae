"""The cases of ``--gpu``: which plan in which batches, who takes part, and how they take turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from .gpu_items import Load, Tensor
from .gpu_loops import Bus, BusSetup, Loop, LoopSetup
from .gpu_pool import PoolPerformer, PoolSetup
from .gpu_results import ALONE, BEFOREHAND, BESIDE, BUS, CEILING, POOL, SERIES, TODAY, Aim, Result, Row
from .gpu_stage import Stage
from .gpu_today import Today, TodaySetup
from .gpu_watch import GpuWatch
from .gpu_window import LEAD_S, Performer, Window

READY_S: Final = 150.0
"""How long a contender may take to be up: the pool loads CUDA and TensorRT three times, one after the other."""
BUS_S: Final = 0.3
TODAY_ROUNDS: Final = 2
"""It is so far behind that two windows do."""


@dataclass(frozen=True)
class Options:
    """How long to measure, and on what.

    Attributes:
        gpus: as users name them.
        plans: the file of each plan that there is, by name.
        rounds: windows of each contender.
        window_s: length of a window.
        until_s: `time.monotonic()` from which on no round begins.
        huge_pages: for the pool's arena.
        watch: how busy the GPUs are.
    """

    gpus: tuple[str, ...]
    plans: dict[str, Path]
    rounds: int
    window_s: float
    until_s: float
    huge_pages: bool
    watch: GpuWatch


@dataclass(frozen=True)
class GpuCase:
    """One plan in batches of one size.

    Attributes:
        name: for ``--only``.
        plan: the plan's name.
        max_batch: items in a batch.
        producers, run, window: processes, the slots that each writes at a time, and such runs in flight for each.
        slots, items_per_slot: of the pool for one GPU.
        period: slots that each has prepared; a prime.
        today_window: items in flight for each producer of "today".
        aims: what is compared.
        thorough: left out by ``--quick``.
        pair: on two GPUs.
    """

    name: str
    plan: str
    max_batch: int
    producers: int
    run: int
    window: int
    slots: int
    period: int
    today_window: int
    aims: tuple[Aim, ...]
    items_per_slot: int = 1
    thorough: bool = False
    pair: bool = False

    def load(self) -> Load:
        return Load((), self.items_per_slot, self.run, self.period)

    def loop(self, plan: Path, gpu: str, *, series: bool = False) -> LoopSetup:
        writers = 0 if series else self.producers
        return LoopSetup(plan, gpu, self.max_batch, self.load(), series, writers, self.slots)

    def pool(self, plan: Path, gpus: tuple[str, ...], *, huge_pages: bool = False) -> PoolSetup:
        count = max(1, len(gpus))
        return PoolSetup(
            plan, gpus, self.max_batch, count * self.slots, count * self.producers, self.window, self.load(),
            huge_pages=huge_pages,
        )  # fmt: skip

    def today(self, plan: Path, gpu: str) -> TodaySetup:
        load = Load((), 1, 1, self.period)
        return TodaySetup(plan, gpu, self.max_batch, self.producers, self.today_window, load)


REPORTED: Final = (Aim(BEFOREHAND, (CEILING,)), Aim(POOL, (TODAY,)))
OF_CEILING: Final = (Aim(POOL, (BESIDE,), 0.97), *REPORTED)
OF_BUS: Final = (Aim(POOL, (BUS,), 0.97), Aim(BESIDE, (BUS,)), Aim(POOL, (BESIDE,)), *REPORTED)
OF_SERIES: Final = (Aim(POOL, (BESIDE,), 0.97), Aim(POOL, (SERIES,), 1.55), Aim(CEILING, (SERIES,)), *REPORTED)
NO_AIM: Final = (Aim(POOL, (BESIDE,)), *REPORTED)

FIRST, SECOND, BOTH = "pool, 1st GPU", "pool, 2nd GPU", "pool, both GPUs"
CEILING_1, CEILING_2, CEILINGS = "ceiling, 1st GPU", "ceiling, 2nd GPU", "ceilings, both"
BESIDE_BOTH: Final = "both + writers"
BEFOREHAND_1, BEFOREHAND_2, BEFOREHAND_BOTH = "1st, pre-written", "2nd, pre-written", "both, pre-written"
OF_PAIR: Final = (
    Aim(BOTH, (FIRST, SECOND), 0.95),
    Aim(BEFOREHAND_BOTH, (BEFOREHAND_1, BEFOREHAND_2)),
    Aim(CEILINGS, (CEILING_1, CEILING_2)),
    Aim(BESIDE_BOTH, (CEILING_1, CEILING_2)),
    Aim(BOTH, (BESIDE_BOTH,)),
)


def _images(name: str, plan: str, aims: tuple[Aim, ...] = OF_CEILING, *, pair: bool = False) -> GpuCase:
    """224 x 224 pixels: 600 KB an item, 300 KB or 150 KB."""
    return GpuCase(
        name, plan, max_batch=64, producers=4, run=16, window=6, slots=768, period=17, today_window=32, aims=aims,
        pair=pair,
    )  # fmt: skip


def _large(name: str, max_batch: int, aims: tuple[Aim, ...], *, thorough: bool = False, pair: bool = False) -> GpuCase:
    """1600 x 2560 pixels: 49 MB an item."""
    return GpuCase(
        name, "reduce1600x2560", max_batch=max_batch, producers=12, run=1, window=5, slots=104, period=3,
        today_window=2, aims=aims, thorough=thorough, pair=pair,
    )  # fmt: skip


CASES: Final = {
    case.name: case
    for case in (
        _images("resnet50", "resnet50_fp16"),
        _large("reduce", 8, OF_BUS),
        GpuCase(
            "ppocr", "ppocr_det", max_batch=2, producers=12, run=1, window=3, slots=72, period=3, today_window=1,
            aims=OF_SERIES,
        ),
        _images("resnet50_io16", "resnet50_fp16_io16"),
        _images("resnet50_u8", "resnet50_u8"),
        _large("reduce4", 4, OF_BUS, thorough=True),
        GpuCase(
            "mlp", "mlp", max_batch=256, producers=4, run=4, window=6, slots=192, period=31, today_window=128,
            aims=NO_AIM, items_per_slot=64,
        ),
        GpuCase(
            "mlp1", "mlp", max_batch=1, producers=4, run=16, window=4, slots=512, period=193, today_window=32,
            aims=NO_AIM, thorough=True,
        ),
        _images("resnet50_pair", "resnet50_fp16", OF_PAIR, pair=True),
        _images("resnet50_io16_pair", "resnet50_fp16_io16", OF_PAIR, pair=True),
        _large("reduce_pair", 8, OF_PAIR, pair=True),
    )
}  # fmt: skip
"""In the order of what matters, should time run out."""


@dataclass(frozen=True)
class Act:
    """One row's turn in a round.

    Attributes:
        row: its name.
        stages: who performs, all at once.
        options: for the window, made from what the rows are by then.
        gpus: where; to see how busy they are.
        rounds: how many it takes part in; None: all.
        window_s: the window's length; None: as all have it.
    """

    row: str
    stages: tuple[Stage, ...]
    gpus: tuple[str, ...]
    options: Callable[[dict[str, Row]], dict[str, float]] = lambda _rows: {}
    rounds: int | None = None
    window_s: float | None = None


def run(case: GpuCase, options: Options) -> Result:
    """Run a case; contenders that fail say so in their rows."""
    started_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        acts = (_pair_acts if case.pair else _acts)(case, options, stack)
        stages = dict.fromkeys(stage for act in acts for stage in act.stages)
        ready_until_s = min(time.monotonic() + READY_S, options.until_s + 60)
        for stage in stages:
            stage.ready(ready_until_s - time.monotonic())
        facts = {act.row: act.stages[0].facts for act in acts}
        rows = {act.row: Row(act.row, *_item_bytes(act, facts)) for act in acts}
        for turn in _turns(options, acts):
            for act in acts if turn % 2 == 0 else list(reversed(acts)):
                _perform(act, turn, rows, options)
        for act in acts:
            rows[act.row].failure = next((stage.failure for stage in act.stages if stage.failure), "")
        for stage in stages:
            stage.dismiss()  # all at once, before each is waited for
    title = f"{case.plan}, batches of {case.max_batch}, {case.producers} producers" + " a GPU" * case.pair
    return Result(case.name, title, case.max_batch, case.aims, rows, facts, time.monotonic() - started_s)


def _turns(options: Options, acts: Sequence[Act]) -> Iterator[int]:
    """The rounds, as many as there is time for, but one at least."""
    took_s = 0.0
    for turn in range(options.rounds):
        began_s = time.monotonic()
        if turn and began_s + took_s > options.until_s:
            return
        yield turn
        took_s = time.monotonic() - began_s
        if all(stage.failure for act in acts for stage in act.stages):
            return


def _perform(act: Act, turn: int, rows: dict[str, Row], options: Options) -> None:
    row = rows[act.row]
    window = None
    if act.rounds is None or turn < act.rounds:
        window_s = options.window_s if act.window_s is None else act.window_s
        given = act.options(rows)
        for stage in act.stages:
            stage.begin(window_s, **given)
        window = together([stage.finish(window_s) for stage in act.stages])
    row.windows.append(window)
    # The driver's answers lag behind: the first half tells of the contender before.
    began_s = 0.0 if window is None else window.ended_s - window.took_s / 2
    row.busy.append(None if window is None else options.watch.busy(act.gpus, began_s, window.ended_s))


def together(windows: Sequence[Window | None]) -> Window | None:
    """Windows of several at once as one: rates and costs are added; None if one is missing."""
    known = [window for window in windows if window is not None]
    if len(known) < len(windows) or len(known) < 2:
        return known[0] if len(known) == len(windows) else None
    began_s, ended_s = min(one.began_s for one in known), max(one.ended_s for one in known)
    took_s = ended_s - began_s

    def total(of: Callable[[Window], float]) -> float:
        return sum(of(one) / one.took_s for one in known) * took_s

    return Window(
        total(lambda one: one.items),
        total(lambda one: one.batches),
        began_s,
        ended_s,
        total(lambda one: one.copies_in),
        total(lambda one: one.copies_out),
        {who: sum(one.cpu_s.get(who, 0.0) for one in known) for who in known[0].cpu_s},
        {name: sum(one.figures.get(name, 0.0) for one in known) / len(known) for name in known[0].figures},
    )


def _item_bytes(act: Act, facts: dict[str, dict[str, object]]) -> tuple[int, int]:
    """Bytes of an item's inputs and of its outputs, as any contender found them."""
    if act.row == BUS:
        return 1, 0
    for one in facts.values():
        if one.get("inputs"):
            return _bytes_of(one["inputs"]), _bytes_of(one["outputs"])
    return 1, 0


def _bytes_of(tensors: object) -> int:
    assert isinstance(tensors, list)
    return sum(Tensor(**tensor).item_bytes for tensor in tensors)


def _at_rate_of(row: str, without: str) -> Callable[[dict[str, Row]], dict[str, float]]:
    """Writers go as fast as the loop beside them goes: as it went last, at first as it went without them."""

    def options(rows: dict[str, Row]) -> dict[str, float]:
        for name in (row, without):
            if name in rows and rows[name].done:
                return {"writers_per_s": rows[name].done[-1].items_per_s}
        return {}

    return options


def _written_beforehand(_rows: dict[str, Row]) -> dict[str, float]:
    """Producers submit what their slots hold already."""
    return {"writes": 0.0}


def _acts(case: GpuCase, options: Options, stack: contextlib.ExitStack) -> list[Act]:
    """The contenders on one GPU, started."""
    plan, gpu = options.plans[case.plan], options.gpus[0]

    def stage(name: str, make: Callable[[], Performer]) -> Stage:
        return stack.enter_context(contextlib.closing(Stage(f"{case.name}: {name}", make)))

    pool = stage(POOL, partial(PoolPerformer, case.pool(plan, (gpu,), huge_pages=options.huge_pages)))
    ceiling = stage(CEILING, partial(Loop, case.loop(plan, gpu)))
    series = stage(SERIES, partial(Loop, case.loop(plan, gpu, series=True)))
    today = stage(TODAY, partial(Today, case.today(plan, gpu)))
    bus = stage(BUS, partial(Bus, BusSetup(gpu)))
    on = (gpu,)
    return [
        Act(BUS, (bus,), on, window_s=BUS_S),
        Act(CEILING, (ceiling,), on),
        Act(BESIDE, (ceiling,), on, _at_rate_of(BESIDE, CEILING)),
        Act(POOL, (pool,), on),
        Act(BEFOREHAND, (pool,), on, _written_beforehand),
        Act(SERIES, (series,), on),
        Act(TODAY, (today,), on, rounds=TODAY_ROUNDS),
        Act(ALONE, (ceiling,), (), lambda _rows: {"alone": 1.0}, rounds=TODAY_ROUNDS, window_s=BUS_S + LEAD_S),
    ]


def _pair_acts(case: GpuCase, options: Options, stack: contextlib.ExitStack) -> list[Act]:
    """The contenders on two GPUs, started."""
    plan, (first, second) = options.plans[case.plan], options.gpus[:2]
    pair = (first, second)

    def stage(name: str, make: Callable[[], Performer]) -> Stage:
        return stack.enter_context(contextlib.closing(Stage(f"{case.name}: {name}", make)))

    def pool(name: str, gpus: tuple[str, ...]) -> Stage:
        return stage(name, partial(PoolPerformer, case.pool(plan, gpus, huge_pages=options.huge_pages)))

    both, one, two = pool(BOTH, pair), pool(FIRST, (first,)), pool(SECOND, (second,))
    for one_pool in (both, one, two):  # before the writers' rings: a pool refuses to start where memory looks short
        one_pool.ready(READY_S)
    loops = tuple(stage(f"{CEILING} on {gpu}", partial(Loop, case.loop(plan, gpu))) for gpu in pair)
    return [
        Act(CEILING_1, (loops[0],), (first,)),
        Act(CEILING_2, (loops[1],), (second,)),
        Act(CEILINGS, loops, pair),
        Act(BESIDE_BOTH, loops, pair, _per_gpu(_at_rate_of(BESIDE_BOTH, CEILINGS))),
        Act(FIRST, (one,), (first,)),
        Act(SECOND, (two,), (second,)),
        Act(BOTH, (both,), pair),
        Act(BEFOREHAND_1, (one,), (first,), _written_beforehand),
        Act(BEFOREHAND_2, (two,), (second,), _written_beforehand),
        Act(BEFOREHAND_BOTH, (both,), pair, _written_beforehand),
    ]


def _per_gpu(options: Callable[[dict[str, Row]], dict[str, float]]) -> Callable[[dict[str, Row]], dict[str, float]]:
    return lambda rows: {name: value / 2 for name, value in options(rows).items()}
