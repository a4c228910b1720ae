"""Pinning the arena: every GPU worker registers all of it with CUDA, once, when it starts.

::

    mapping of the segment
    |<------ chunk 0, 64 GiB ------>|<------ chunk 1 ------>|<- 2 ->|
                                    ^ a copy that crosses is cut in two

`cudaHostRegister` locks the pages and gives the device addresses for them, so that a copy is one DMA from the
producer's very bytes.  What was seen to go wrong, and is answered here:

- Two processes that register the same memory at the same time can fail with "invalid argument": they take turns,
  by a POSIX lock on the memfd itself, which needs no file and ends with its holder.  (The memfd is one open file
  for everybody, so flock(2) and open file description locks would not tell the processes apart.)
- One call for 512 GiB or more fails (driver 580), so it is done in chunks; and a copy must not cross from one
  registration to the next.
- A call that fails leaves its error behind for the next unrelated call, so it is cleared, and what was registered
  before is taken back: all or nothing.
- In confidential computing the host's memory cannot be registered at all.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator, Sequence
from typing import Final

from trtpool.ipc.arena import format_bytes
from trtpool.ipc.errors import DeviceUnavailable

from . import cuda as c

log = logging.getLogger("trtpool.worker")

CHUNK_BYTES: Final = 64 * 2**30
"""Most bytes of one registration; a multiple of every page size."""


class Registration:
    """Host memory that is pinned for the GPU.

    Args:
        cuda: the device.
        address, size: the memory, from a page's start.
        fd: the memfd that is mapped there; processes that share it take turns.
        chunk_bytes: most bytes of one registration.

    Raises:
        DeviceUnavailable: the memory cannot be pinned; nothing of it is.
    """

    def __init__(self, cuda: c.Cuda, address: int, size: int, fd: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._cuda = cuda
        self._chunks: list[int] = []
        fcntl.lockf(fd, fcntl.LOCK_EX)
        try:
            for start in range(0, size, chunk_bytes):
                cuda.host_register(address + start, min(chunk_bytes, size - start))
                self._chunks.append(address + start)
        except c.CudaError as error:
            cuda.clear_error()
            self.close()
            raise DeviceUnavailable(_explain(error, size)) from error
        except BaseException:
            self.close()
            raise
        finally:
            fcntl.lockf(fd, fcntl.LOCK_UN)

    @property
    def bounds(self) -> list[int]:
        """Addresses that no copy may cross."""
        return self._chunks[1:]

    def close(self) -> None:
        """Unpin the memory.  Again: nothing.

        What cannot be unregistered stays so until the process ends; it must then stay mapped, too.
        """
        chunks, self._chunks = self._chunks, []
        for start in reversed(chunks):
            try:
                self._cuda.host_unregister(start)
            except c.CudaError as error:
                self._cuda.clear_error()
                log.warning("the arena stays pinned until this process ends: %s", error)


def pieces(address: int, size: int, bounds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The parts ``(address, size)`` of a copy that lie between `bounds`, which rise."""
    end = address + size
    for bound in bounds:
        if address < bound < end:
            yield address, bound - address
            address = bound
    yield address, end - address


def _explain(error: c.CudaError, size: int) -> str:
    what = f"{format_bytes(size)} of shared memory cannot be pinned for the GPU"
    if error.code == c.ERROR_MEMORY_ALLOCATION:
        return (
            f"{what}: the kernel or the driver has not so much memory to lock; lower --slots, --items-per-slot or "
            "--max-batch, or give the machine or container more memory"
        )
    if error.code == c.ERROR_NOT_SUPPORTED:
        return (
            f"{what}: the driver does not support it, as in confidential computing, where the GPU may not read the "
            "host's memory; use a machine with that turned off"
        )
    if error.code == c.ERROR_INSUFFICIENT_DRIVER:
        return f"{what}: the driver is too old for cuda-python; install a newer driver, or pip install 'trtpool[cu12]'"
    if error.code in (c.ERROR_INVALID_VALUE, c.ERROR_ALREADY_REGISTERED):
        return f"{what}: {error}; another program may be registering it; start the pool again, with fewer --slots"
    return f"{what}: {error}"
