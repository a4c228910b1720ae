"""The server of `litserve.LitServe`: ``python -m scripts.peerlib.litserve_server``.

No ``from __future__ import annotations`` here: FastAPI looks at the annotation of `decode_request` itself.
"""

from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body
from scripts.benchlib.workload import Array
from scripts.peerlib.http import job_of_environment
from scripts.peerlib.job import answer

BATCH_IMAGES = 8
BATCH_SMALL = 64
BATCH_TIMEOUT_S = 0.001

Bytes = Annotated[bytes, Body(media_type="application/octet-stream")]


class Mean(litserve.LitAPI):  # type: ignore[misc,unused-ignore]
    def setup(self, device: str) -> None:  # noqa: ARG002  # the interface's
        self._job, _ = job_of_environment()
        self._compute = self._job.load()

    def decode_request(self, request: Bytes) -> Array:
        return np.frombuffer(request, np.float32).reshape(self._job.workload.shape)

    def batch(self, inputs: list[Array]) -> list[Array]:
        return inputs

    def predict(self, x: Any) -> Array:
        return answer(self._compute, self._job, [x] if self._job.one_at_a_time else x)

    def unbatch(self, output: Array) -> list[Array]:
        return list(output)

    def encode_response(self, output: Array) -> dict[str, list[float]]:
        return {"y": output.ravel().tolist()}


if __name__ == "__main__":
    job, port = job_of_environment()
    api = Mean(max_batch_size=job.pick(BATCH_IMAGES, BATCH_SMALL), batch_timeout=BATCH_TIMEOUT_S)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="error", generate_client_file=False)
