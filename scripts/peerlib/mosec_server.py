"""The server of `mosec.Mosec`: ``python -m scripts.peerlib.mosec_server``."""

from __future__ import annotations

from typing import Any

import mosec
import numpy as np
from scripts.benchlib.workload import Array
from scripts.peerlib.http import job_of_environment
from scripts.peerlib.job import answer

BATCH_IMAGES = 8
BATCH_SMALL = 64


class Mean(mosec.Worker):  # type: ignore[misc,unused-ignore]
    """Takes and gives bytes: the default is JSON."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self._job, _ = job_of_environment()
        self._compute = self._job.load()

    def deserialize(self, data: bytes) -> Array:
        return np.frombuffer(data, np.float32).reshape(self._job.workload.shape)

    def forward(self, data: Any) -> Any:
        if self._job.one_at_a_time:
            return answer(self._compute, self._job, [data])[0]
        return list(answer(self._compute, self._job, data))

    def serialize(self, data: Array) -> bytes:
        return data.tobytes()


if __name__ == "__main__":
    job, _ = job_of_environment()
    server = mosec.Server()
    server.append_worker(Mean, max_batch_size=job.pick(BATCH_IMAGES, BATCH_SMALL), max_wait_time=1)
    server.run()
