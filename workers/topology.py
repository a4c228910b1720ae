"""Which CPUs are near a GPU.

On a host with several NUMA nodes a copy to a GPU crosses the link between the nodes when the thread that asks for
it, or what that thread works on, is on the wrong side.  Sysfs says which CPUs share the GPU's side::

    /sys/devices/system/node/online                      0-1
    /sys/bus/pci/devices/0000:17:00.0/numa_node          1, or -1: the host does not say
    /sys/bus/pci/devices/0000:17:00.0/local_cpulist      32-63,96-127

See Documentation/ABI/testing/sysfs-bus-pci and sysfs-devices-node of the kernel.
"""

from __future__ import annotations

import os
from pathlib import Path

from trtpool.ipc.pci import sysfs_name


def bind_to_gpu(pci_bus_id: str, sysfs: Path = Path("/sys")) -> frozenset[int] | None:
    """Keep this thread, and those that it starts from now on, on the CPUs near a GPU, of those that it may use.

    Nothing changes on a host with one node, where the host does not say which CPUs are near, or where we may use none
    of these.

    Args:
        pci_bus_id: the GPU, as CUDA or `nvidia-smi` writes it.
        sysfs: where sysfs is mounted.

    Returns:
        The CPUs, or None if nothing was changed.
    """
    try:
        if len(_numbers((sysfs / "devices/system/node/online").read_text())) < 2:
            return None
        device = sysfs / "bus/pci/devices" / sysfs_name(pci_bus_id)
        if int((device / "numa_node").read_text()) < 0:
            return None
        ours = os.sched_getaffinity(0)
        near = ours & _numbers((device / "local_cpulist").read_text())
        if not near or near == ours:
            return None
        os.sched_setaffinity(0, near)
    except (OSError, ValueError):  # no sysfs as we know it, or a sandbox that forbids it: a worker runs anywhere too
        return None
    return frozenset(near)


def _numbers(text: str) -> set[int]:
    """The numbers in a list such as ``0-3,8``."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
