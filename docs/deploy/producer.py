"""A producer to try a deployment with: random items for each model of the pool, until stopped.

It writes each item in place, and says every few seconds how many came back.  `$TRTPOOL_RUN_DIR` names the pool; with
``--items N`` it ends after so many.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

import trtpool

SAY_EVERY_S = 5.0


def main() -> int:
    """Feed the pool; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, help="end after so many [default: when stopped]")
    wanted = parser.parse_args().items
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a container is stopped
    random = np.random.default_rng(os.getpid())

    def write(_: int, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        for array in inputs.values():
            array[...] = random.integers(0, 2, array.shape)

    done, since = 0, time.monotonic()
    try:
        with trtpool.connect() as pool:
            names = [model.spec.name for model in pool.models]
            print(f"user {os.getuid()}, process {os.getpid()}: attached to pool {pool.name!r}, {names}", flush=True)
            numbers = itertools.count() if wanted is None else range(wanted)
            for _, result in pool.map(write, numbers, model=names[0]):
                result.release()
                done += 1
                if time.monotonic() - since > SAY_EVERY_S:
                    since = time.monotonic()
                    print(f"{done} items came back", flush=True)
    except KeyboardInterrupt:
        pass
    except trtpool.TrtpoolError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{done} items came back, the end", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
