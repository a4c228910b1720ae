"""A Ray cluster of this machine alone, for the time of a block."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Final

from .http import ROOT

OBJECT_STORE_BYTES: Final = 4 << 30
LOGICAL_CPUS: Final = 8
"""Ray schedules by declared CPUs; the worker and four producers are to run at once, however many cores there are."""


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """Start Ray without its dashboard, and stop it; yields the address.

    Its files are in a folder of their own: a job's would be too long a path for its sockets.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # else it warns, for every worker
    os.environ["RAY_AUTH_MODE"] = "disabled"  # else it leaves a token in the user's home; here is nobody else
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    import ray

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        context = ray.init(
            num_cpus=LOGICAL_CPUS, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False,
            log_to_driver=False, _temp_dir=folder,
        )  # fmt: skip
        try:
            yield str(context.address_info["gcs_address"])
        finally:
            ray.shutdown()
