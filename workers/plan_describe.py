"""What a plan's tensors look like for one item: where the batch is, which shapes items have, how large outputs get.

A pool needs to know the largest shape of an item of every tensor before it starts.  Of inputs the plan says it, by its
optimization profiles, each of which has a range of batches and of shapes::

    first axes of the inputs                     then
    open in at least one                         that is the batch; an input with a fixed first axis, or with none, is
                                                 shared: it has one value for a whole batch
    the same number in all that have any         the plan takes batches of this size only; those with none are shared
    anything else                                nobody can tell; `--no-batch` serves the plan call by call

    profiles                                     then
    all take the same items                      a batch takes the one that suits its size
    items of different ranges                    what one of them covers is served, in batches that each range allows

Outputs are asked of an execution context, at the smallest and at the largest shapes of each profile.  One that depends
on the data has no bound but what the user gives.  What cannot be served is refused here, with a text that says what to
change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from trtpool.ipc.building import IO_FORMATS
from trtpool.ipc.errors import ModelError
from trtpool.ipc.settings import EngineSettings
from trtpool.ipc.tensors import ModelSpec, TensorSpec

from .contexts import Context, Dims
from .engine import EngineError
from .formats import LINEAR, Format, format_word
from .plan_profiles import Axes, ShapeProfile, largest_batch, read_profiles, show, spans
from .ranges import ends, show_range

DTYPES: Final = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
}
"""TensorRT's names of the dtypes that a plane can hold; `tensorrt.nptype` raises for some it has."""

Contexts = Callable[[int], AbstractContextManager[Context]]
"""An execution context on a profile, by its number, for as long as it is needed."""


class Description(NamedTuple):
    """A plan as it can be served.

    Attributes:
        spec: the model.
        profiles: those that are used.
        formats: of each tensor.
        open: inputs whose shape is to be set before a batch.
        told: outputs whose shape only a run tells.
    """

    spec: ModelSpec
    profiles: tuple[ShapeProfile, ...]
    formats: Mapping[str, Format]
    open: frozenset[str]
    told: frozenset[str]

    def best_shapes(self, profile: ShapeProfile) -> tuple[Dims, ...]:
        """The best shapes of a profile, of an item of each input that varies."""
        varying, _ = self.spec.varying
        return tuple(self.formats[one.name].in_memory(profile.items[one.name].best) for one in varying)

    def set_shapes(self, profile: ShapeProfile, items: int) -> dict[str, Dims]:
        """The largest shapes of a profile in a batch of `items` items, of each input whose shape is to be set."""
        return {
            one.name: self.call_shape(one, items, profile.items[one.name].high)
            for one in self.spec.inputs
            if one.name in self.open
        }

    def call_shape(self, tensor: TensorSpec, items: int, item: Dims) -> Dims:
        """The shape of a whole tensor in a batch of `items` items."""
        return item if tensor.shared or not self.spec.batched else (items, *item)


def describe(engine: Any, trt: Any, path: Path, name: str, settings: EngineSettings, contexts: Contexts) -> Description:
    """The plan in `engine` as it can be served under `name`.

    Args:
        engine: an ``ICudaEngine`` of the module `trt`.
        path: its file, absolute.
        name: what clients call the model.
        settings: `shapes`, `no_batch` and `partial` count.
        contexts: makes what outputs are asked of.

    Raises:
        ModelError: a tensor cannot be served, or `settings` do not fit the plan.
        MissingExtra: a dtype of it needs ml_dtypes.
    """
    return _Describer(engine, trt, path, name, settings, contexts).describe()


class _Describer:
    """See `describe`."""

    def __init__(
        self, engine: Any, trt: Any, path: Path, name: str, settings: EngineSettings, contexts: Contexts
    ) -> None:
        self._engine, self._trt = engine, trt
        self._path, self._name = path, name
        self._settings = settings
        self._given = settings.shapes
        self._contexts = contexts
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        self._inputs = [one for one in names if self._is_input(one)]
        self._outputs = [one for one in names if not self._is_input(one)]
        if not self._inputs or not self._outputs:
            raise ModelError(f"{path} has no {'outputs' if self._inputs else 'inputs'}; there is nothing to serve")
        self._dims = {one: tuple(engine.get_tensor_shape(one)) for one in names}
        self._batched = name not in settings.no_batch
        self._axes = Axes(path, name, self._inputs, self._dims, batched=self._batched)
        self._formats = {one: self._format(one) for one in names}

    def describe(self) -> Description:
        if unknown := self._given.keys() - self._dims.keys():
            raise ModelError(
                f"--shape {min(unknown)}: {self._path} has no such input; it has {', '.join(self._inputs)}"
            )
        profiles = read_profiles(self._engine, self._axes, self._given, self._formats)
        inputs = tuple(self._input(name, profiles) for name in self._inputs)
        outputs, told = self._describe_outputs(profiles)
        limit = largest_batch(profiles)
        is_one_size = limit > 1 and all(profile.least == profile.most == limit for profile in profiles)
        spec = ModelSpec(
            *(self._name, str(self._path), inputs, outputs, limit, min(max(1, one.least) for one in profiles)),
            batched=self._batched,
            whole_slots=self._settings.partial == "refuse" and is_one_size,
            profiles=spans(profiles, [one.name for one in inputs if one.least is not None], self._formats),
        )
        try:  # bounds are checked when a spec is decoded, elsewhere; here the file can be named
            spec = msgspec.convert(msgspec.to_builtins(spec), ModelSpec)
        except msgspec.ValidationError as error:
            raise ModelError(f"{self._path} is beyond what a pool can describe: {error}") from error
        is_open = frozenset(filter(self._axes.is_open, self._inputs))
        return Description(spec, profiles, self._formats, is_open, told)

    # ------------------------------------------------------------------ the batch

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    # ------------------------------------------------------------------ inputs

    def _input(self, name: str, profiles: tuple[ShapeProfile, ...]) -> TensorSpec:
        ranges = [profile.items[name] for profile in profiles]
        form = self._formats[name]
        least = tuple(min(sizes) for sizes in zip(*(form.in_memory(one.low) for one in ranges), strict=True))
        most = tuple(max(sizes) for sizes in zip(*(form.in_memory(one.high) for one in ranges), strict=True))
        return self._tensor(name, most, least, shared=name in self._axes.shared)

    # ------------------------------------------------------------------ outputs

    def _describe_outputs(self, profiles: tuple[ShapeProfile, ...]) -> tuple[tuple[TensorSpec, ...], frozenset[str]]:
        """The outputs, as contexts tell them at the ends of each profile, and those that depend on the data."""
        seen: dict[str, list[Dims]] = {name: [] for name in self._outputs}
        try:
            for profile in profiles:
                with self._contexts(profile.number) as context:
                    for high in (False, True):
                        for name, shape in self._ask(context, profile, high=high).items():
                            seen[name].append(shape)
        except EngineError as error:
            raise ModelError(f"{self._path} cannot be run: {error}") from error
        told = frozenset(name for name, shapes in seen.items() if min(map(min, filter(None, shapes)), default=0) < 0)
        return tuple(self._output(name, seen[name], is_told=name in told) for name in self._outputs), told

    def _ask(self, context: Context, profile: ShapeProfile, *, high: bool) -> dict[str, Dims]:
        """Shapes of an item of each output, at one end of a profile; they must not depend on the batch."""
        found: dict[str, Dims] = {}
        for items in sorted({profile.least, profile.most}):
            context.set_shapes(
                {
                    name: self._axes.call(name, items, one.high if high else one.low)
                    for name, one in profile.items.items()
                    if self._axes.is_open(name)
                }
            )
            for name in self._outputs:
                shape = context.shape(name)
                item = shape[1:] if self._batched else shape
                if (self._batched and shape[:1] != (items,)) or found.setdefault(name, item) != item:
                    raise ModelError(
                        f"output {name!r} of {self._path} has shape {show(shape)} in a batch of {items}: its first "
                        "axis must be the batch, and the others the same in each; change the model, remove this "
                        f"output, or run each item as a call of its own with --no-batch {self._name}"
                    )
        return found

    def _output(self, name: str, items: list[Dims], *, is_told: bool) -> TensorSpec:
        form, given = self._formats[name], self._given.get(name)
        if given is not None:
            most = ends(given)[0]
            bound, dims = form.declared(most), self._axes.item(name, self._dims[name])
            if len(bound) != len(dims) or not all(
                high == dim if dim >= 0 else high >= max(sizes)
                for high, dim, *sizes in zip(bound, dims, *items, strict=True)
            ):
                raise ModelError(
                    f"--shape {name}={show_range(given)} does not fit {self._path}, whose output has items of "
                    f"{show(items[-1])}"
                )
        elif is_told:
            sizes = "x".join(str(size if size >= 0 else 100) for size in items[0])
            raise ModelError(
                f"output {name!r} of {self._path} has items of {show(items[0])}, as the data says: give the largest, "
                f"for example --shape {name}={sizes or '100'}"
            )
        else:
            most = tuple(max(sizes) for sizes in zip(*(form.in_memory(item) for item in items), strict=True))
        # What is between the ends of the inputs' range need not be between those of the output's.
        open_axes = form.in_memory(self._axes.item(name, self._dims[name]))
        varies = is_told or given is not None or len(set(items)) > 1
        least = tuple(0 if varies and size < 0 else high for size, high in zip(open_axes, most, strict=True))
        return self._tensor(name, most, least)

    # ------------------------------------------------------------------ both

    def _format(self, name: str) -> Format:
        word, dims = format_word(self._engine, name), self._axes.item(name, self._dims[name])
        if word == LINEAR:
            return Format()
        if word not in IO_FORMATS or len(dims) < 2 or dims[0] < 0:
            raise ModelError(
                f"tensor {name!r} of {self._path} has the format {word!r}, which planes cannot hold; build it with "
                f"linear inputs and outputs, or with one of {', '.join(IO_FORMATS)} for a fixed number of channels"
            )
        return Format(word, dims[0])

    def _tensor(self, name: str, shape: Dims, least: Dims, *, shared: bool = False) -> TensorSpec:
        engine = self._engine
        shown = f"tensor {name!r} of {self._path}"
        dtype = DTYPES.get(engine.get_tensor_dtype(name).name)
        if dtype is None:
            raise ModelError(
                f"{shown} has dtype {engine.get_tensor_dtype(name).name}, which planes cannot hold; build it with one "
                f"of {', '.join(DTYPES.values())}, such as --io {name}=fp16"
            )
        if engine.get_tensor_location(name) == self._trt.TensorLocation.HOST:
            raise ModelError(f"{shown} is read on the host (a shape tensor); make it a constant of the model")
        if 0 in shape:
            sizes = self._axes.call(name, 1, shape)
            raise ModelError(f"{shown} is empty: its shape is {show(('N', *sizes[1:]))}; remove it")
        form = self._formats[name]
        tensor = TensorSpec(
            name, dtype, shape, None if least == shape else least, shared, "" if form.is_linear else form.word
        )
        _ = tensor.numpy_dtype  # now, and not when a client asks for an array
        return tensor
