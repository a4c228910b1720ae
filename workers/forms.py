"""What a lane needs to know of the items of a batch, worked out once for each shape they come in.

::

    shapes of the items ---> form: bytes of an item of each tensor, which profiles take them, shapes of outputs
    items in the batch  ---> step: the context of one of these profiles, and the shapes to set
                                   how many are run: a batch below the profile's smallest is filled up

A model whose items are all of one shape has one form, which is kept; of the others, those that came last are.  Of
several profiles a batch takes the one that fills up least, and then the one whose best shapes are nearest.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Final, NamedTuple

from trtpool.ipc.tensors import TensorSpec

from .contexts import Context, Dims
from .copies import Buffer
from .engine import BatchRefused, Shapes
from .plan_describe import Description
from .plan_profiles import ShapeProfile

MAX_FORMS: Final = 1024
"""Forms that a lane keeps."""


class HostTensor(NamedTuple):
    """A tensor's plane in host memory: where it is, and the bytes of one row of it."""

    spec: TensorSpec
    address: int
    slot_bytes: int


class Step(NamedTuple):
    """How a batch of some number of items of a form is run.

    Attributes:
        context: what runs it.
        items: how many are run, those included that fill it up.
        shapes: of each open input.
        key: what is equal for all batches that one CUDA graph serves.
    """

    context: Context
    items: int
    shapes: Mapping[str, Dims]
    key: Hashable


class Form:
    """Items of some shapes.

    Attributes:
        shared, inputs, outputs: the tensors; of outputs whose shape only a run tells, those of the largest item.
        few_inputs, few_outputs: a batch that is one run is few copies, of nothing but `inputs`, or `outputs`, whose
            shapes are known.
        shapes: of the outputs that vary.
        declared: shape of an item of each input, as the network declares it.
        profiles: those that take it.
        steps: by the number of items.
    """

    def __init__(self, declared: Mapping[str, Dims], profiles: Sequence[ShapeProfile]) -> None:
        self.declared = declared
        self.profiles = profiles
        self.shared: list[Buffer] = []
        self.inputs: list[Buffer] = []
        self.outputs: list[Buffer] = []
        self.few_inputs = self.few_outputs = False
        self.shapes: Shapes = ()
        self.steps: dict[int, Step] = {}


class Forms:
    """The forms of one lane.

    Args:
        description: the plan.
        contexts: by profile.
        inputs, outputs: the planes.
        devices: where each tensor lies on the device, by name.
        items_per_slot: of the planes.
        few: how many copies are few; see `Form.few_inputs`.
    """

    def __init__(
        self,
        description: Description,
        contexts: Mapping[int, Context],
        inputs: Sequence[HostTensor],
        outputs: Sequence[HostTensor],
        devices: Mapping[str, int],
        items_per_slot: int,
        few: int,
    ) -> None:
        self._plan = description
        self._contexts = contexts
        self._inputs, self._outputs = inputs, outputs
        self._devices = devices
        self._items_per_slot = items_per_slot
        self._few = few
        self._is_single = len(contexts) == 1 and not any(tensor.spec.least is not None for tensor in inputs)
        self._kept: OrderedDict[Shapes, Form] = OrderedDict()

    def find(self, shapes: Shapes) -> Form:
        """The form of items whose inputs have `shapes`, those that vary.

        Raises:
            BatchRefused: the plan does not take them.
        """
        form = self._kept.get(shapes)
        if form is None:
            form = self._make(shapes)
            if len(self._kept) >= MAX_FORMS:
                self._kept.popitem(last=False)
            self._kept[shapes] = form
        else:
            self._kept.move_to_end(shapes)
        return form

    def step(self, form: Form, items: int) -> Step:
        """How to run a batch of `items` items.

        Raises:
            BatchRefused: no profile takes so many.
        """
        step = form.steps.get(items)
        if step is None:
            step = form.steps[items] = self._choose(form, items)
        return step

    # ------------------------------------------------------------------ making them

    def _make(self, shapes: Shapes) -> Form:
        spec = self._plan.spec
        varying, _ = spec.varying
        if len(shapes) != len(varying) or not all(map(TensorSpec.takes, varying, shapes)):
            taken = ", ".join(f"{tensor.name} {tensor.describe_shape()}" for tensor in varying)
            raise BatchRefused(f"model {spec.name!r} takes items of {taken or 'one shape'}, not {shapes}")
        given = dict(zip((tensor.name for tensor in varying), shapes, strict=True))
        items = {tensor.name: given.get(tensor.name, tensor.shape) for tensor in spec.inputs}
        declared = {name: self._plan.formats[name].declared(item) for name, item in items.items()}
        profiles = [profile for profile in self._plan.profiles if profile.takes(declared)]
        if not profiles:
            raise BatchRefused(f"model {spec.name!r} takes items of {spec.describe_profiles()}, not {shapes}")
        form = Form(declared, profiles)
        for tensor in self._inputs:
            (form.shared if tensor.spec.shared else form.inputs).append(self._buffer(tensor, items[tensor.spec.name]))
        asked: list[Dims] = []
        for tensor in self._outputs:
            item = tensor.spec.shape
            if tensor.spec.least is not None:
                if tensor.spec.name not in self._plan.told:
                    item = self._ask(form, tensor.spec)
                asked.append(item)
            form.outputs.append(self._buffer(tensor, item))
        form.shapes = tuple(asked)
        form.few_inputs = not form.shared and self._is_few(form.inputs)
        form.few_outputs = self._is_few(form.outputs)
        return form

    def _buffer(self, tensor: HostTensor, item: Dims) -> Buffer:
        item_bytes = math.prod(item) * tensor.spec.itemsize
        full_bytes = item_bytes * (1 if tensor.spec.shared else self._items_per_slot)
        return Buffer(tensor.address, item_bytes, tensor.slot_bytes, self._devices[tensor.spec.name], full_bytes)

    def _is_few(self, buffers: Sequence[Buffer]) -> bool:
        is_few = len(buffers) <= self._few and all(buffer.is_dense for buffer in buffers)
        return is_few and not self._plan.told

    def _ask(self, form: Form, tensor: TensorSpec) -> Dims:
        """The shape of an item of an output, which follows from those of the inputs."""
        profile = form.profiles[0]
        context = self._contexts[profile.number]
        context.set_shapes(self._open(form, profile.least))
        whole = context.shape(tensor.name)
        item = whole[1:] if self._plan.spec.batched else whole
        return self.fit(tensor, whole, profile.least, self._plan.formats[tensor.name].in_memory(item))

    def fit(self, tensor: TensorSpec, whole: Dims, items: int, item: Dims) -> Dims:
        """The shape of an item of an output, after checking that the rows hold it."""
        is_batch = not self._plan.spec.batched or whole[:1] == (items,)
        if not is_batch or not tensor.takes(item):
            raise BatchRefused(
                f"output {tensor.name!r} has shape {whole} in a batch of {items}, and its rows hold items of "
                f"{tensor.describe_shape()}; if it may be larger, start the pool with --shape {tensor.name}=..., the "
                "largest item"
            )
        return item

    def told(self, form: Form, step: Step) -> tuple[list[Buffer], Shapes]:
        """The outputs of a batch that was enqueued, as the run told them, and the shapes of those that vary.

        Raises:
            BatchRefused: one is larger than its rows.
        """
        outputs, shapes = list(form.outputs), list(form.shapes)
        at = 0
        for number, tensor in enumerate(self._outputs):
            spec = tensor.spec
            if spec.name in self._plan.told:
                whole = step.context.found(spec.name)
                declared = whole[1:] if self._plan.spec.batched else whole
                item = self.fit(spec, whole, step.items, self._plan.formats[spec.name].in_memory(declared))
                outputs[number] = self._buffer(tensor, item)
                shapes[at] = item
            at += spec.least is not None
        return outputs, tuple(shapes)

    def _choose(self, form: Form, items: int) -> Step:
        able = [profile for profile in form.profiles if profile.most >= items]
        if not able:
            most = max(profile.most for profile in form.profiles)
            raise BatchRefused(f"a batch of {items} items of these shapes is more than the {most} that the plan takes")

        def price(profile: ShapeProfile) -> tuple[int, float, int]:
            run = max(profile.least, items)
            pairs = [(run, profile.best)]
            for name, item in form.declared.items():
                pairs += zip(item, profile.items[name].best, strict=True)
            away = sum(abs(math.log(max(size, 1) / max(best, 1))) for size, best in pairs)
            return run - items, away, profile.number

        profile = min(able, key=price)
        run = max(profile.least, items)
        shapes = self._open(form, run)
        key = run if self._is_single else (profile.number, *shapes.values())
        return Step(self._contexts[profile.number], run, shapes, key)

    def _open(self, form: Form, items: int) -> dict[str, Dims]:
        """The shapes of the inputs that are to be set, in a batch of `items`."""
        return {
            tensor.name: self._plan.call_shape(tensor, items, form.declared[tensor.name])
            for tensor in self._plan.spec.inputs
            if tensor.name in self._plan.open
        }
