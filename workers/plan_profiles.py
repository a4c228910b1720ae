"""The optimization profiles of a plan: which of its axes is the batch, and which shapes its inputs take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trtpool.ipc.errors import ModelError
from trtpool.ipc.settings import ShapeRange
from trtpool.ipc.tensors import Span

from .contexts import Dims
from .formats import Format
from .ranges import ends, show_range


class ItemRange(NamedTuple):
    """Shapes of an item as the network declares them: the smallest, the best and the largest."""

    low: Dims
    best: Dims
    high: Dims

    def takes(self, shape: Dims) -> bool:
        return len(shape) == len(self.low) and all(
            low <= size <= high for low, size, high in zip(self.low, shape, self.high, strict=True)
        )

    def cut(self, least: Dims, most: Dims) -> ItemRange | None:
        """Those from `least` to `most`, which have as many axes; None: there are none."""
        low, high = tuple(map(max, self.low, least)), tuple(map(min, self.high, most))
        if any(a > b for a, b in zip(low, high, strict=True)):
            return None
        best = tuple(sorted(sizes)[1] for sizes in zip(low, self.best, high, strict=True))
        return ItemRange(low, best, high)


class ShapeProfile(NamedTuple):
    """What one optimization profile takes.

    Attributes:
        number: TensorRT's.
        least, best, most: items in a batch.
        items: by input.
    """

    number: int
    least: int
    best: int
    most: int
    items: Mapping[str, ItemRange]

    def takes(self, shapes: Mapping[str, Dims]) -> bool:
        """Whether it takes an item of these shapes, by input, as the network declares them."""
        return all(self.items[name].takes(shape) for name, shape in shapes.items())

    def is_within(self, other: ShapeProfile) -> bool:
        """Whether `other` takes all items that this one takes."""
        return all(
            other.items[name].takes(item.low) and other.items[name].takes(item.high)
            for name, item in self.items.items()
        )


class Axes:
    """Where the batch is.

    Args:
        path: the plan's file.
        name: what clients call the model.
        inputs: names.
        dims: the shape of every tensor, -1 where it is open.
        batched: they have a batch axis.

    Attributes:
        shared: inputs that have none, beside others that do.

    Raises:
        ModelError: nobody can tell which axis it is.
    """

    def __init__(
        self, path: Path, name: str, inputs: Sequence[str], dims: Mapping[str, Dims], *, batched: bool
    ) -> None:
        self.path = path
        self.inputs = inputs
        self.dims = dims
        self.batched = batched
        self.shared: frozenset[str] = self._find_shared(name) if batched else frozenset()

    def _find_shared(self, name: str) -> frozenset[str]:
        firsts = {one: self.dims[one][0] for one in self.inputs if self.dims[one]}
        is_open = any(first < 0 for first in firsts.values())
        if not is_open and len(set(firsts.values())) != 1:
            shown = ", ".join(f"{one} {show(self.dims[one])}" for one in self.inputs)
            what = "different first axes, so none can be the batch" if firsts else "no first axis for the batch"
            raise ModelError(
                f"the inputs of {self.path} ({shown}) have {what}: build it of a model with one, or run each item as "
                f"a call of its own with --no-batch {name}"
            )
        return frozenset(one for one in self.inputs if one not in firsts or (is_open and firsts[one] >= 0))

    def item(self, name: str, dims: Dims) -> Dims:
        """What of the shape of a whole tensor is an item's."""
        return dims[1:] if self.batched and name not in self.shared else dims

    def call(self, name: str, items: int, item: Dims) -> Dims:
        """The shape of a whole tensor in a batch of `items` items."""
        return (items, *item) if self.batched and name not in self.shared else item

    def is_open(self, name: str) -> bool:
        """Whether a tensor's shape is to be set, or learnt."""
        return min(self.dims[name], default=0) < 0


def read_profiles(
    engine: Any, axes: Axes, given: Mapping[str, ShapeRange], formats: Mapping[str, Format]
) -> tuple[ShapeProfile, ...]:
    """The profiles of `engine` that serve what the user asks for, cut down to that.

    Args:
        engine: an ``ICudaEngine``.
        axes: where the batch is.
        given: shapes in memory, of some tensors.
        formats: of all tensors.

    Raises:
        ModelError: none does.
    """
    found = [_read_profile(engine, axes, number) for number in range(max(1, engine.num_optimization_profiles))]
    usable = [profile for profile, _ in found if profile.least <= profile.most]
    if not usable:
        raise ModelError(f"the inputs of {axes.path} have no batch size in common: {found[0][1]}; build it again")
    asked: dict[str, tuple[Dims, Dims]] = {}
    for name in axes.inputs:
        if name in given:
            most, least = (formats[name].declared(end) for end in ends(given[name]))
            _check_asked(
                axes.path, name, given[name], (least, most), [one.items[name] for one in usable], formats[name]
            )
            asked[name] = least, most
    served: dict[Any, ShapeProfile] = {}
    for profile in usable:
        items = {name: one.cut(*asked[name]) if name in asked else one for name, one in profile.items.items()}
        cut = {name: one for name, one in items.items() if one is not None}
        if len(cut) == len(items):
            # Some plans have the same profile again and again, for contexts that cannot share one.
            key = (profile.least, profile.best, profile.most, *cut.values())
            served.setdefault(key, profile._replace(items=cut))
    if not served:
        shown = " ".join(f"--shape {name}={show_range(given[name])}" for name in asked)
        raise ModelError(f"{shown}: no profile of {axes.path} takes these together; build it with one that does")
    return tuple(served.values())


def _read_profile(engine: Any, axes: Axes, number: int) -> tuple[ShapeProfile, str]:
    """A profile as the plan has it, and the batches of its inputs in words; without a common one it has none."""
    items: dict[str, ItemRange] = {}
    batches: dict[str, Dims] = {}
    for name in axes.inputs:
        if axes.is_open(name):
            ends_of = [tuple(shape) for shape in engine.get_tensor_profile_shape(name, number)]
        else:
            ends_of = [axes.dims[name]] * 3
        items[name] = ItemRange(*(axes.item(name, shape) for shape in ends_of))
        if axes.batched and name not in axes.shared:
            batches[name] = tuple(shape[0] for shape in ends_of)
    if not axes.batched:
        return ShapeProfile(number, 1, 1, 1, items), ""
    lows, bests, highs = zip(*batches.values(), strict=True)
    least, most = max(lows), min(highs)
    shown = ", ".join(f"{name} {low} to {high}" for name, (low, _, high) in batches.items())
    return ShapeProfile(number, least, sorted((least, max(bests), most))[1], most, items), shown


def _check_asked(
    path: Path, name: str, given: ShapeRange, asked: tuple[Dims, Dims], ranges: Sequence[ItemRange], form: Format
) -> None:
    """Whether both ends of what the user asks for are within what the plan takes."""
    if all(any(one.takes(end) for one in ranges) for end in asked):
        return
    shown = " or ".join(
        f"of {show(form.in_memory(one.low))}"
        if one.low == one.high
        else f"from {show(form.in_memory(one.low))} to {show(form.in_memory(one.high))}"
        for one in dict.fromkeys(ranges)
    )
    raise ModelError(f"--shape {name}={show_range(given)} does not fit {path}, which was built for items {shown}")


def largest_batch(profiles: Sequence[ShapeProfile]) -> int:
    """The largest batch that items of any shape can be in."""
    return min(max(other.most for other in profiles if one.is_within(other)) for one in profiles)


def spans(
    profiles: Sequence[ShapeProfile], varying: Sequence[str], formats: Mapping[str, Format]
) -> tuple[tuple[Span, ...], ...]:
    """What profiles take of the inputs that vary, without those that are within another; nothing if that is one."""
    ranges: list[ShapeProfile] = []
    for profile in profiles:
        if not any(profile.is_within(other) for other in ranges):
            ranges = [other for other in ranges if not other.is_within(profile)] + [profile]
    if len(ranges) < 2:
        return ()
    return tuple(
        tuple(
            Span(formats[name].in_memory(one.items[name].low), formats[name].in_memory(one.items[name].high))
            for name in varying
        )
        for one in ranges
    )


def show(shape: tuple[int | str, ...]) -> str:
    """A shape in the words of the command line."""
    return "x".join("?" if size == -1 else str(size) for size in shape) if shape else "scalars"
