"""``scripts/bench.py --sweep``: which pools are measured, one parameter varied at a time around a base point.

::

    sweep        points and groups
    sweep_run    a pool and its producers, and what a point's windows come to
    sweep_cli    runs the groups; table and JSON
    sweep_plot   figures from the JSON, perhaps on another machine

The base is measured in each group again: figures relative to it are those of some seconds, in which a machine drifts
little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

ARENA_BYTES: Final = 1 << 30
"""Of inputs, at most: large items get fewer slots."""

FEW_SLOTS: Final = 16
"""And no fewer than these."""

LARGE_BYTES: Final = 3 * 1600 * 2560 * 4
"""An item of the plan reduce1600x2560, 49 MB."""


@dataclass(frozen=True)
class Point:
    """A pool, and how its producers use it.

    Attributes:
        producers: processes.
        slots, items_per_slot, max_batch, workers, lanes: see `trtpool.Pool`; lanes count on a GPU only, and workers are
            those of one GPU.
        run: slots leased, written and submitted at once.
        item_bytes: of one input.
        in_flight: slots that a producer keeps so, if there is room.
    """

    producers: int = 4
    slots: int = 4096
    items_per_slot: int = 1
    run: int = 16
    item_bytes: int = 1024
    workers: int = 1
    lanes: int = 3
    max_batch: int = 256
    in_flight: int = 64

    def fit(self) -> Point:
        """The same with no more slots than the arena has room for, and with runs and batches that these allow."""
        room = max(FEW_SLOTS, ARENA_BYTES // (self.item_bytes * self.items_per_slot))
        if room >= self.slots:
            return self
        return replace(
            self,
            slots=room,
            run=min(self.run, max(1, room // (4 * self.producers))),
            max_batch=min(self.max_batch, max(1, room // 4) * self.items_per_slot),
        )

    def for_plan(self) -> Point:
        """The same on a GPU, where a plan bounds the batch."""
        return replace(self, max_batch=min(self.max_batch, PLANS[self.item_bytes][1]))

    @property
    def window(self) -> int:
        """Runs that each producer keeps in flight: all together hold half of the slots at most, if they can."""
        return max(1, min(max(2, self.in_flight // self.run), self.slots // (2 * self.producers * self.run)))

    @property
    def cap(self) -> int:
        """Slots that one producer may hold; what is left over can be granted in advance."""
        return max(self.slots // 4, min(self.slots, 2 * self.run))

    @property
    def pool(self) -> Point:
        """What of it needs a pool of its own."""
        return replace(self, producers=0, run=0, in_flight=0)


BASE: Final = Point()

Values = tuple[int, ...]

GROUPS: Final[dict[str, tuple[Values, Values]]] = {
    "producers": ((1, 2, 4, 8, 16, 64), (1, 4, 16)),
    "run": ((1, 4, 16, 64), (1, 16, 64)),
    "slots": ((64, 256, 1024, 4096, 16_384, 65_536), (64, 4096, 65_536)),
    "items_per_slot": ((1, 4, 16, 64), (1, 64)),
    "item_bytes": ((1024, 16_384, 262_144, 4_194_304, LARGE_BYTES), (1024, 262_144, LARGE_BYTES)),
    "workers": ((1, 2), (1, 2)),
    "lanes": ((1, 2, 3, 6), (1, 3)),
}
"""For each parameter its values, and those of --quick; the base's is always among them."""

TITLES: Final = {
    "producers": "producers",
    "run": "slots per run",
    "slots": "slots",
    "items_per_slot": "items per slot",
    "item_bytes": "bytes per item",
    "workers": "workers",
    "lanes": "lanes",
}

PLANS: Final = {1024: ("mlp", 256), LARGE_BYTES: ("reduce1600x2560", 8)}
"""On a GPU: the plan for items of so many bytes, and its largest batch."""


@dataclass(frozen=True)
class Group:
    """One parameter varied.

    Attributes:
        name: of the parameter, an attribute of `Point`.
        values: in rising order.
    """

    name: str
    values: Values

    def point(self, value: int, *, gpu: bool) -> Point:
        """The base, but for one value, and for what that makes necessary."""
        point = replace(BASE, **{self.name: value}).fit()
        return point.for_plan() if gpu else point

    @property
    def base(self) -> int:
        """The value that the base point has."""
        return int(getattr(BASE, self.name))


def groups(only: str | None, *, gpu: bool, quick: bool) -> list[Group]:
    """What to measure.

    Raises:
        ValueError: a name is unknown, or means nothing there.
    """
    there = {name: values for name, values in GROUPS.items() if gpu or name != "lanes"}
    names = list(there) if only is None else only.split(",")
    if unknown := [name for name in names if name not in there]:
        raise ValueError(f"no parameter {', '.join(unknown)} to vary; there are {', '.join(there)}")
    found = []
    for name in names:
        values = there[name][quick]
        if gpu and name == "item_bytes":
            values = tuple(value for value in values if value in PLANS)
        found.append(Group(name, values))
    return found
