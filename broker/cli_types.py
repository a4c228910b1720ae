"""Types of options that the commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import click

PER_MODEL: Final = ("slots", "items_per_slot", "max_batch", "max_delay_us", "max_slots_per_producer", "weight")
"""Options that may be given for one model: `ModelOptions`."""


if TYPE_CHECKING:
    _Base = click.ParamType[tuple[str, int]]
else:
    _Base = click.ParamType  # not generic in older releases


class PerModel(_Base):
    """``NUMBER`` for all models, or ``MODEL=NUMBER``; converted to the model's name, empty for all, and the number."""

    name = "[MODEL=]NUMBER"

    def __init__(self, least: int, most: int) -> None:
        self.number = click.IntRange(least, most)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        model, _, number = str(value).rpartition("=")
        return model, self.number(number, param, ctx)


def by_model(_ctx: click.Context, _parameter: click.Parameter, values: Sequence[tuple[str, int]]) -> dict[str, int]:
    """A callback of such options: the numbers by model, the last of each."""
    return dict(values)


def only_by_model(
    _ctx: click.Context, _parameter: click.Parameter, values: Sequence[tuple[str, int]]
) -> dict[str, int]:
    """The same where a number for all models would say nothing."""
    chosen = dict(values)
    if "" in chosen:
        raise click.BadParameter(f"say of which model, such as det={chosen['']}: a weight counts beside the others'")
    return chosen


def per_model_option(
    option: str, least: int, most: int, text: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option that may be given for one model, and for all."""
    return click.option(
        option,
        type=PerModel(least, most),
        multiple=True,
        callback=by_model,
        metavar="[MODEL=]NUMBER",
        help=f"{text}  Again for each model that is otherwise.",
    )


BATCH_OPTIONS: Final = (
    per_model_option("--slots", 1, 2**24, "Slots [default: from workers and batch, and 16 MiB of small items]."),
    per_model_option(
        "--max-batch", 1, 2**24, "Items in the largest batch [default: 8, or a slot's; on GPUs the plan's largest]."
    ),
    per_model_option(
        "--max-delay-us", 0, 60_000_000, "How long an item may wait for its batch to fill [default: 0, not at all]."
    ),
)
"""Of each command that starts a pool: how much memory, and what goes into a batch."""


def split(chosen: dict[str, dict[str, int]]) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """From numbers by option and model to those for all models, by option, and the others, by model and option."""
    common: dict[str, int] = {}
    per_model: dict[str, dict[str, int]] = {}
    for option, numbers in chosen.items():
        for model, number in numbers.items():
            if model:
                per_model.setdefault(model, {})[option] = number
            else:
                common[option] = number
    return common, per_model
