"""Which engine runs a model: the one place that knows them all.

Each is imported when it is asked for, so that a worker loads one inference library, and none is needed to import us.
"""

from __future__ import annotations

from trtpool.ipc.settings import InspectRequest

from .engine import Engine


def load(request: InspectRequest, cpus: int = 1) -> Engine:
    """Load a model on the device that its settings name.

    Args:
        request: the model and how to load it.
        cpus: CPUs that are this process's share, for an engine on the CPU.

    Raises:
        ModelError: the file cannot be served; the text says what to change.
        MissingExtra: the engine's package is not installed.
        DeviceUnavailable: the device cannot be used.
    """
    if request.engine.device == "gpu":
        from .tensorrt_engine import TensorrtEngine

        return TensorrtEngine(request.source, request.engine)
    from .onnx_engine import OnnxEngine

    return OnnxEngine(request.source, request.engine, cpus)
