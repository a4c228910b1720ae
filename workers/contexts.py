"""Execution contexts of a plan: shapes, addresses, and memory for outputs whose shape only a run tells.

::

    shape of an output              its address                     its shape
    follows from the inputs'        bound once                      asked once the inputs' are set
    depends on the data             bound once, with an allocator   told to the allocator during a run, for which
                                    that hands out nothing else     the thread that enqueues waits

An allocator that has nothing more to give makes TensorRT refuse the run, as its documentation has it: so memory that
is too small is an error of one batch, and no fault of the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .engine import BatchRefused, EngineError
from .flavours import take_errors

Dims = tuple[int, ...]
"""The shape of a whole tensor, batch axis included."""


class Context:
    """An execution context: one batch at a time, on one stream.

    Args:
        raw: TensorRT's own.
        trt: the module that it comes from.
        profile: the optimization profile that it uses.
    """

    def __init__(self, raw: Any, trt: Any, profile: int) -> None:
        self._raw = raw
        self._trt = trt
        self._profile = profile
        self._set: Mapping[str, Dims] = {}
        self._allocators: dict[str, Any] = {}

    def select_profile(self, stream: Any) -> None:
        """Use its optimization profile; `stream` must be synchronized after it."""
        try:
            chosen = self._raw.set_optimization_profile_async(self._profile, int(stream))
        except Exception as error:  # a pybind11 class of its own in each version
            raise EngineError(take_errors() or str(error)) from error
        if chosen is False:
            raise EngineError(take_errors() or f"profile {self._profile} is in use by another context")

    def bind(self, name: str, address: int) -> None:
        """Say where a tensor is, once and for all."""
        if not self._raw.set_tensor_address(name, address):
            raise EngineError(take_errors() or f"tensor {name!r} takes no address")

    def bind_within(self, name: str, address: int, size: int) -> None:
        """Say where an output is whose shape only a run tells: in `size` bytes at most."""
        self.bind(name, address)
        allocator = _make_allocator(self._trt, address, size)
        if not self._raw.set_output_allocator(name, allocator):
            raise EngineError(take_errors() or f"output {name!r} takes no allocator")
        self._allocators[name] = allocator  # TensorRT keeps no reference

    def set_shapes(self, shapes: Mapping[str, Dims]) -> None:
        """Say which shapes the open inputs of the next batch have; those that they have already cost nothing.

        Raises:
            EngineError: TensorRT does not take one; then none counts as set.
        """
        if shapes == self._set:
            return
        before, self._set = self._set, {}
        for name, shape in shapes.items():
            if before.get(name) != shape and not self._raw.set_input_shape(name, shape):
                raise EngineError(take_errors() or f"input {name!r} takes no shape {shape}")
        self._set = shapes  # nobody changes it

    def shape(self, name: str) -> Dims:
        """The shape of a tensor with the inputs' that were set; -1 for what only a run tells."""
        return tuple(self._raw.get_tensor_shape(name))

    def most_bytes(self, name: str) -> int:
        """The most that an output takes within the profile; 0 if TensorRT does not know."""
        return max(0, int(self._raw.get_max_output_size(name)))

    def enqueue(self, shapes: Mapping[str, Dims], stream: int) -> None:
        """Put a batch on the stream whose handle is `stream`.

        Raises:
            BatchRefused: an output is larger than its memory.
            EngineError: TensorRT did not take it.
        """
        if shapes is not self._set:
            self.set_shapes(shapes)
        for allocator in self._allocators.values():
            allocator.begin()
        if not self._raw.execute_async_v3(stream):
            text = take_errors()
            for name, allocator in self._allocators.items():
                if allocator.refused:
                    raise BatchRefused(
                        f"output {name!r} needs {allocator.refused} bytes for this batch, and there is room for "
                        f"{allocator.size}; if it may be larger, start the pool with --shape {name}=..., the largest "
                        "item"
                    )
            raise EngineError(text or "TensorRT did not enqueue the batch, and did not say why")

    def found(self, name: str) -> Dims:
        """The shape that an output of `bind_within` has in the batch that was enqueued last.

        Raises:
            BatchRefused: TensorRT did not tell.
        """
        shape: Dims | None = self._allocators[name].shape
        if shape is None:
            raise BatchRefused(f"TensorRT did not tell the shape of output {name!r} for this batch")
        return shape

    def can_capture(self, stream: int) -> bool:
        """Whether TensorRT allows a CUDA graph of the next batch; only TensorRT for RTX can tell."""
        asks = getattr(self._raw, "is_stream_capturable", None)
        return asks is None or bool(asks(stream))

    def close(self) -> None:
        """Free the context's memory."""
        self._raw = None
        self._allocators.clear()


def _make_allocator(trt: Any, address: int, size: int) -> Any:
    """An ``IOutputAllocator`` that has `size` bytes at `address`, and no more."""
    base: Any = trt.IOutputAllocator

    class Allocator(base):  # type: ignore[misc]  # a class of the module's own, which is known only here
        def __init__(self) -> None:
            base.__init__(self)
            self.size = size
            self.begin()

        def begin(self) -> None:
            """Forget the last batch."""
            self.refused = 0
            self.shape: Dims | None = None

        def reallocate_output(self, _name: str, _memory: Any, wanted: int, _alignment: int) -> int:
            if wanted > size:
                self.refused = wanted
                return 0  # what the bindings make a null pointer of
            return address

        def reallocate_output_async(self, name: str, memory: Any, wanted: int, alignment: int, _stream: Any) -> int:
            """What TensorRT 10 and newer call."""
            return self.reallocate_output(name, memory, wanted, alignment)

        def notify_shape(self, _name: str, shape: Any) -> None:
            self.shape = tuple(shape)

    return Allocator()
