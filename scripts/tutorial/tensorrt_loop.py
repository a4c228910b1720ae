"""Where everybody begins on a GPU: `step0_loop.py` with TensorRT in place of onnxruntime, each page after the other.

With ``TUTORIAL_PLAN=det.plan`` `measure.py` has it as step 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
from cuda.bindings import runtime as cuda
from scripts.demo_pages import Region
from scripts.tutorial.pages import MODEL, SHAPE, lines_of, write_page


def check(returned: tuple[Any, ...]) -> Any:
    """What a CUDA call returned, behind its error."""
    error, *values = returned
    assert error == cuda.cudaError_t.cudaSuccess, error
    return values[0] if values else None


class Model:
    """An engine with memory for one page."""

    def __init__(self, plan: Path) -> None:
        check(cuda.cudaSetDevice(0))
        self.engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan.read_bytes())
        self.context = self.engine.create_execution_context()
        self.stream = check(cuda.cudaStreamCreate())
        self.context.set_input_shape("x", (1, *SHAPE))
        self.memory = {}
        for index in range(self.engine.num_io_tensors):
            name = self.engine.get_tensor_name(index)
            self.memory[name] = check(cuda.cudaMalloc(4 * math.prod(self.context.get_tensor_shape(name))))
            self.context.set_tensor_address(name, int(self.memory[name]))
        (self.output,) = (name for name in self.memory if name != "x")

    def __call__(self, x: Any) -> Any:
        outputs = np.empty(tuple(self.context.get_tensor_shape(self.output)), np.float32)
        to_gpu, from_gpu = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(cuda.cudaMemcpyAsync(self.memory["x"], x.ctypes.data, x.nbytes, to_gpu, self.stream))
        self.context.execute_async_v3(int(self.stream))
        check(
            cuda.cudaMemcpyAsync(outputs.ctypes.data, self.memory[self.output], outputs.nbytes, from_gpu, self.stream)
        )
        check(cuda.cudaStreamSynchronize(self.stream))
        return outputs


def load() -> Model:
    return Model(MODEL)


def find_text(model: Model, pages: Sequence[Path]) -> Iterator[tuple[Path, list[Region]]]:
    for page in pages:
        x = np.empty(SHAPE, np.float32)
        write_page(page, x)
        yield page, lines_of(page, model(x)[0])
