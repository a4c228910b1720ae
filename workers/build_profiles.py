"""The range of shapes that a plan is built for, of each input that a model leaves open."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from trtpool.ipc.errors import ModelError
from trtpool.ipc.settings import Profile, ShapeRange

from .build_onnx import GraphTensor


def make_profiles(
    tensors: Sequence[GraphTensor],
    given: Mapping[str, Profile],
    item_shapes: Mapping[str, ShapeRange],
    max_batch: int,
    *,
    outputs: Collection[str] = (),
    batched: bool = True,
) -> dict[str, Profile]:
    """The range of shapes of each input that is not fixed.

    Args:
        tensors: the model's inputs.
        given: profiles by input; one whose shapes have one number ranges over the batch alone.
        item_shapes: shapes without the batch, for inputs that leave theirs open; of a range, the largest is the best.
            Those of outputs do not matter here.
        max_batch: the largest batch where neither `given` nor the model says; the best is half of it.
        outputs: names of outputs.
        batched: inputs have the batch in front, but for those without axes, and for those whose first axis is fixed
            where that of others is open.

    Raises:
        ModelError: a profile does not fit its input, or an open axis has none.
    """
    unknown = (given.keys() | (item_shapes.keys() - set(outputs))) - {tensor.name for tensor in tensors}
    if unknown:
        raise ModelError(f"--shapes names {min(unknown)!r}, but the model's inputs are {', '.join(map(str, tensors))}")
    profiles = {}
    is_open = any(tensor.dims[0] is None for tensor in tensors if tensor.dims)
    for tensor in tensors:
        profile, item_shape = given.get(tensor.name), item_shapes.get(tensor.name)
        if batched and tensor.dims and not (is_open and tensor.dims[0] is not None):
            profile = _make_profile(tensor, profile, item_shape, max_batch)
        else:
            profile = profile or _make_whole_profile(tensor, item_shape)
        _check_profile(tensor, profile)
        if None in tensor.dims:
            profiles[tensor.name] = profile
    return profiles


def _make_profile(tensor: GraphTensor, given: Profile | None, item_shape: ShapeRange | None, max_batch: int) -> Profile:
    if given is not None and (len(given.min) > 1 or len(tensor.dims) == 1):
        return given
    batch = tensor.dims[0]
    default = (1, (max_batch + 1) // 2, max_batch) if batch is None else (batch, batch, batch)
    batches = (given.min[0], given.opt[0], given.max[0]) if given is not None else default
    item = tuple(item_shape) if item_shape is not None else tensor.dims[1:]
    fixed = tuple(dim for dim in item if dim is not None)
    if len(fixed) < len(item):
        sizes = [dim or (640 if len(item) > 2 else 128) for dim in item]
        example = ":".join("x".join(map(str, (items, *sizes))) for items in batches)
        raise ModelError(
            f"input {tensor} leaves more open than the batch: give its smallest, best and largest shape, for example "
            f"--shapes {tensor.name}={example}"
        )
    least, most = _ends(fixed)
    return Profile((batches[0], *least), (batches[1], *most), (batches[2], *most))


def _make_whole_profile(tensor: GraphTensor, given: ShapeRange | None) -> Profile:
    """That of an input without a batch axis."""
    shape = tensor.dims if given is None else given
    fixed = tuple(size for size in shape if size is not None)
    if len(fixed) < len(shape):
        example = "x".join(str(size or 128) for size in tensor.dims)
        raise ModelError(
            f"input {tensor}, which has no batch axis, leaves sizes open: give its smallest, best and largest shape, "
            f"for example --shapes {tensor.name}={example}:{example}:{example}"
        )
    least, most = _ends(fixed)
    return Profile(least, most, most)


def _ends(sizes: ShapeRange) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The smallest and the largest of them."""
    least, most = (tuple(size[end] if isinstance(size, tuple) else size for size in sizes) for end in (0, -1))
    return least, most


def _check_profile(tensor: GraphTensor, profile: Profile) -> None:
    shapes = (profile.min, profile.opt, profile.max)
    shown = f"--shapes {tensor.name}={':'.join('x'.join(map(str, shape)) for shape in shapes)}"
    for shape in shapes:
        fits = len(shape) == len(tensor.dims) and all(
            dim in (None, size) for dim, size in zip(tensor.dims, shape, strict=True)
        )
        if not fits:
            raise ModelError(
                f"{shown} does not fit the model's input {tensor}; give as many axes, and the fixed as they are"
            )
    if any(not low <= best <= high for low, best, high in zip(*shapes, strict=True)):
        raise ModelError(f"{shown} does not rise: give the smallest shape, then the best, then the largest")
