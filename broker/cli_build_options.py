"""Options that say how an ONNX file is built, of every command that may build one, and how their texts are read."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import click

from trtpool.ipc.building import IO_FORMATS
from trtpool.ipc.errors import ConfigError
from trtpool.ipc.normalization import NORMS, PIXEL_SCALE, Normalization
from trtpool.ipc.settings import BuildSettings, Profile

from .cli_options import add_options

IO_DTYPES: Final = ("fp32", "fp16", "uint8", "int8")
"""What inputs and outputs may be; float32 and float16 are understood as well."""

_UNITS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def _parse_io(_ctx: click.Context, _parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    wanted = {}
    for value in values:
        name, _, word = value.rpartition("=")
        word, colon, form = word.partition(":")
        dtype = {"float32": "fp32", "float16": "fp16"}.get(word, word)
        if dtype not in IO_DTYPES:
            raise click.BadParameter(f"{value!r} is not one of {', '.join(IO_DTYPES)}, or TENSOR= and one of them")
        if colon and form not in IO_FORMATS:
            raise click.BadParameter(
                f"{value!r} has no format behind the colon; formats are {', '.join(IO_FORMATS)}, such as {dtype}:chw16"
            )
        wanted[name] = dtype + colon + form
    return wanted


def parse_normalize(
    _ctx: click.Context, _parameter: click.Parameter, values: Sequence[str]
) -> dict[str, Normalization]:
    """``[INPUT=]mean=0.485,0.456,0.406,std=0.229,0.224,0.225[,scale=1]``, or one of `NORMS`, again and again."""
    wanted = {}
    for value in values:
        name, _, word = value.rpartition("=")
        if word in NORMS:
            mean, std = (numbers if len(set(numbers)) > 1 else numbers[:1] for numbers in NORMS[word])
            normalization = Normalization(mean=mean, std=std)
        else:
            name, normalization = _parse_numbers(value)
        try:
            normalization.check()
        except ConfigError as error:
            raise click.BadParameter(str(error)) from error
        wanted[name] = normalization
    return wanted


def _parse_numbers(value: str) -> tuple[str, Normalization]:
    match = re.fullmatch(r"(?:(.*?)=)??((?:mean|std|scale)=.*)", value)
    numbers: dict[str, tuple[float, ...]] = {}
    try:
        for part in re.split(r",(?=(?:mean|std|scale)=)", match[2] if match else ""):
            key, _, words = part.partition("=")
            if key in numbers:
                raise ValueError(part)
            numbers[key] = tuple(map(_number, words.split(",")))
        scale = numbers.pop("scale", (PIXEL_SCALE,))
        if match is None or not numbers or len(scale) != 1:
            raise ValueError(value)
    except (ValueError, ZeroDivisionError) as error:
        raise click.BadParameter(
            f"{value!r} is not [INPUT=]mean=0.485,0.456,0.406,std=0.229,0.224,0.225, with scale=1 behind it if these "
            f"are for pixels of 0 to 255, nor one of {', '.join(NORMS)}"
        ) from error
    return match[1] or "", Normalization(**numbers, scale=scale[0])


def _number(text: str) -> float:
    """``0.5``, or ``1/255``."""
    above, slash, below = text.partition("/")
    return float(above) / float(below) if slash else float(above)


def _parse_profiles(
    _ctx: click.Context, _parameter: click.Parameter, values: Sequence[str]
) -> list[dict[str, Profile]]:
    """What is given again for an input is for the next profile."""
    profiles: list[dict[str, Profile]] = [{}]
    for value in values:
        name, _, text = value.rpartition("=")
        shapes = [tuple(map(_size, part.split("x"))) for part in text.split(":")]
        shapes *= 3 if len(shapes) == 1 else 1
        if not name or len(shapes) != 3 or len({len(shape) for shape in shapes}) > 1 or any(0 in s for s in shapes):
            raise click.BadParameter(
                f"{value!r} is not INPUT=1x3x224x224:32x3x224x224:64x3x224x224, the smallest, the best and the largest "
                "shape, nor INPUT=1:32:64, the batch alone, nor INPUT=8x3x224x224, the only shape"
            )
        if all(name in profile for profile in profiles):
            profiles.append({})
        next(profile for profile in profiles if name not in profile)[name] = Profile(*shapes)
    return profiles


def _size(text: str) -> int:
    """A number of items, 0 if that is none."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0


def _parse_bytes(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> int:
    if value is None:
        return 0
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?) ?([KMGT]?)(?:i?B)?", value, re.IGNORECASE)
    count = math.floor(float(match[1]) * 1024 ** _UNITS[match[2].upper()]) if match else 0
    if not 0 < count <= 2**50:
        raise click.BadParameter(f"{value!r} is not a size, such as 4GiB or 512MiB")
    return count


_OPTIONS: Final = (
    click.option("--fp16", is_flag=True, help="Let layers run in float16."),
    click.option(
        "--io",
        multiple=True,
        callback=_parse_io,
        metavar="[TENSOR=]DTYPE[:FORMAT]",
        help="fp32, fp16, uint8 or int8 for an input or output, or for all that are floating-point (uint8 and int8: "
        f"all such inputs).  In plans, a format may stand behind it, as in fp16:chw16: {', '.join(IO_FORMATS)}.  Again "
        "for each.",
    ),
    click.option(
        "--normalize",
        multiple=True,
        callback=parse_normalize,
        metavar="[INPUT=]mean=M,M,M,std=S,S,S",
        help="Let an input take uint8 pixels, and normalise them inside the network: (pixel / 255 - mean) / std, one "
        "number or one for each channel; with scale=1 behind, for means of 0 to 255, without the division.  Or one of "
        f"{', '.join(NORMS)}.  Again for each.",
    ),
    click.option(
        "--shapes",
        "profiles",
        multiple=True,
        callback=_parse_profiles,
        metavar="INPUT=MIN:BEST:MAX",
        help="Shapes that an input takes, batch first, such as x=1x3x224x224:32x3x224x224:64x3x224x224; x=1:32:64 is "
        "the batch alone; one shape makes it fixed [default: batches of 1 to 64].  Again for each; again for the "
        "same one for a further optimization profile.",
    ),
    click.option(
        "--workspace",
        "workspace_bytes",
        callback=_parse_bytes,
        metavar="SIZE",
        help="Most scratch memory for a layer, such as 4GiB [default: TensorRT's].",
    ),
    click.option(
        "--optimization-level",
        type=click.IntRange(0, 5),
        help="How long to look for faster kernels: 0 builds soonest, 5 longest [default: TensorRT's, 3].",
    ),
)


def build_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a build to `command`, which gets them as one argument, ``build``: a `BuildSettings`."""

    @functools.wraps(command)
    def with_settings(
        *arguments: Any,
        fp16: bool,
        io: dict[str, str],
        normalize: dict[str, Normalization],
        profiles: list[dict[str, Profile]],
        workspace_bytes: int,
        optimization_level: int | None,
        **others: Any,
    ) -> Any:
        settings = BuildSettings(
            fp16=fp16,
            io=io,
            normalize=normalize,
            profiles=profiles[0],
            more=tuple(profiles[1:]),
            workspace_bytes=workspace_bytes,
            optimization_level=-1 if optimization_level is None else optimization_level,
        )
        return command(*arguments, build=settings, **others)

    return add_options(_OPTIONS)(with_settings)
