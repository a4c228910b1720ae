"""trtpool: a multi-process shared-memory inference worker pool.

Producers write each input once, into a slot of one shared arena; workers read it from that very address.

    import trtpool

    with trtpool.connect("default") as pool:          # or trtpool.Pool(model="det.onnx") to embed one
        with pool.lease() as slot:
            slot.inputs["x"][...] = image             # the one write
            result = slot.submit().result(timeout_s=5)
            print(result.outputs["y"].mean())         # a view too, valid until the slot is released
"""

from __future__ import annotations

from trtpool.broker.models import Model
from trtpool.broker.pool import Pool
from trtpool.ipc.client import Client
from trtpool.ipc.errors import (
    AccessDenied,
    ArenaTooLarge,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    DeviceUnavailable,
    EngineFailed,
    ForkedClient,
    InvalidInput,
    LeaseTooLarge,
    MissingExtra,
    ModelError,
    NameInUse,
    PoolBusy,
    PoolClosed,
    PoolError,
    PoolNotFound,
    ProtocolError,
    RunDirError,
    SpentHandle,
    StartFailed,
    TrtpoolError,
    UsageError,
    WorkerDied,
    WorkError,
)
from trtpool.ipc.handles import Lease, Leases, Result
from trtpool.ipc.histogram import Histogram
from trtpool.ipc.remote import PoolHandle, connect
from trtpool.ipc.report import (
    ClassReport,
    ClientReport,
    DeviceReport,
    HolderReport,
    ModelReport,
    PoolReport,
    WorkerReport,
)
from trtpool.ipc.settings import Priority
from trtpool.ipc.streams import Stream
from trtpool.ipc.submitted import Submitted
from trtpool.ipc.timings import Timings

__version__ = "0.1.0"

__all__ = [
    "AccessDenied",
    "ArenaTooLarge",
    "Cancelled",
    "ClassReport",
    "Client",
    "ClientReport",
    "ConfigError",
    "DeadlineExceeded",
    "DeviceReport",
    "DeviceUnavailable",
    "EngineFailed",
    "ForkedClient",
    "Histogram",
    "HolderReport",
    "InvalidInput",
    "Lease",
    "LeaseTooLarge",
    "Leases",
    "MissingExtra",
    "Model",
    "ModelError",
    "ModelReport",
    "NameInUse",
    "Pool",
    "PoolBusy",
    "PoolClosed",
    "PoolError",
    "PoolHandle",
    "PoolNotFound",
    "PoolReport",
    "Priority",
    "ProtocolError",
    "Result",
    "RunDirError",
    "SpentHandle",
    "StartFailed",
    "Stream",
    "Submitted",
    "Timings",
    "TrtpoolError",
    "UsageError",
    "WorkError",
    "WorkerDied",
    "WorkerReport",
    "connect",
]
