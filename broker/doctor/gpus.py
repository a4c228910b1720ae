"""The driver, and each GPU: its bus, its NUMA node, and whether memory can be pinned for it.

Three things must meet: a device on the bus, the kernel's driver, and device files that a container was given::

    /sys/bus/pci/devices/*/vendor, class    0x10de, 0x03....    hardware, also in containers that were given none
    /proc/driver/nvidia/version             the kernel module   likewise
    /dev/nvidiactl, /dev/dxg (WSL)          what was given

See Documentation/ABI/testing/sysfs-bus-pci of the kernel for the link's files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from trtpool.ipc.arena import format_bytes
from trtpool.ipc.pci import sysfs_name
from trtpool.ipc.probing import GpuFound

from .asking import Answer
from .finding import Finding, Host

DEVICES: Final = "sys/bus/pci/devices"
NVIDIA: Final = "0x10de"


def look(host: Host, answer: Answer) -> Iterator[Finding]:
    """The driver, then CUDA, then each GPU."""
    yield from _driver(host, answer)
    if answer.died[0] == "gpus":
        yield Finding(
            "cuda", "problem", f"looking at the GPUs ended the process: {answer.died[1]}",
            "see nvidia-smi, and dmesg for lines with NVRM",
        )  # fmt: skip
    for number, found in enumerate(answer.gpus):
        yield from _gpu(host, number, found)


def hardware(host: Host) -> list[str]:
    """NVIDIA's display and compute devices on the bus, by address."""
    try:
        addresses = sorted(path.name for path in (host.root / DEVICES).iterdir())
    except OSError:
        return []
    return [
        address
        for address in addresses
        if host.text(f"{DEVICES}/{address}/vendor") == NVIDIA
        and (host.text(f"{DEVICES}/{address}/class") or "").startswith("0x03")
    ]


def _driver(host: Host, answer: Answer) -> Iterator[Finding]:
    found = hardware(host)
    module = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", host.text("proc/driver/nvidia/version") or "")
    given = host.exists("dev/nvidiactl") or host.exists("dev/dxg")
    if answer.gpus:
        major, minor = answer.gpus[0].gpu.driver
        version = f"NVIDIA {module[1]}, which runs" if module else "NVIDIA's runs"
        yield Finding("driver", "ok", f"{version} CUDA up to {major}.{minor}")
    elif module and not given:
        yield Finding(
            "driver", "warning", f"the host has NVIDIA's driver {module[1]}, and no GPU was given to this container",
            "docker run --gpus all, Kubernetes: resources.limits nvidia.com/gpu; without, pools run on the CPU",
        )  # fmt: skip
    elif found and not module and not given:
        yield Finding(
            "driver", "warning", f"an NVIDIA GPU is on the bus ({', '.join(found)}), and no driver is loaded",
            "install NVIDIA's driver and run nvidia-smi; until then pools run on the CPU",
        )  # fmt: skip
    elif not found and not module and not given:
        yield Finding("driver", "ok", "there is no NVIDIA GPU here; pools run on the CPU, as without --gpus")
        return
    for refusal in answer.refusals:
        text, _, remedy = refusal.text.partition("; ")
        yield Finding("cuda", "problem" if given else "warning", text, remedy or "see nvidia-smi")


def _gpu(host: Host, number: int, found: GpuFound) -> Iterator[Finding]:
    gpu = found.gpu
    yield Finding(
        "gpu", "ok",
        f"GPU {number}: {gpu.name}, compute capability {gpu.compute_capability}, {format_bytes(found.free_bytes)} of "
        f"{format_bytes(gpu.memory_bytes)} free, {gpu.uuid}",
    )  # fmt: skip
    try:
        folder = f"{DEVICES}/{sysfs_name(gpu.pci_bus_id)}"
    except ValueError:  # a name of its own kind, as in WSL
        folder = ""
    if folder:
        yield from _bus(host, number, folder)
        yield from _node(host, number, folder)
    if found.pin_error:
        yield Finding(
            "pinning", "problem", f"GPU {number}: shared memory cannot be pinned: {found.pin_error}",
            "raise the limit on locked memory (ulimit -l unlimited, docker: --ulimit memlock=-1); in a sandbox that "
            "forbids it, run outside",
        )  # fmt: skip
    else:
        yield Finding("pinning", "ok", f"GPU {number}: shared memory can be pinned")


def _bus(host: Host, number: int, folder: str) -> Iterator[Finding]:
    width, most = host.number(f"{folder}/current_link_width"), host.number(f"{folder}/max_link_width")
    speed, fastest = host.text(f"{folder}/current_link_speed"), host.text(f"{folder}/max_link_speed")
    if not width or not most:  # a virtual machine shows none, or 0
        yield Finding("bus", "ok", f"GPU {number}: this host does not say how it is connected")
        return
    text = f"GPU {number}: PCIe x{width} of x{most}, {_speed(speed)} of {_speed(fastest)} a lane"
    if width < most:
        yield Finding(
            "bus", "warning", text,
            "copies get that part of the bandwidth: use a slot with all lanes, reseat the card, or see how the "
            "firmware divides them",
        )  # fmt: skip
    elif speed != fastest:
        yield Finding("bus", "ok", f"{text}; an idle GPU lowers its speed, look again under load")
    else:
        yield Finding("bus", "ok", text)


def _speed(text: str | None) -> str:
    """``16.0 GT/s PCIe`` as it is called in data sheets."""
    return (text or "an unknown speed").removesuffix(" PCIe")


def _node(host: Host, number: int, folder: str) -> Iterator[Finding]:
    online = host.text("sys/devices/system/node/online") or "0"
    if online == "0":
        return
    node = host.number(f"{folder}/numa_node")
    if node is None or node < 0:
        yield Finding(
            "numa", "warning", f"GPU {number}: the host has NUMA nodes {online} and does not say which is near",
            "bind the pool yourself (numactl --cpunodebind), or have the firmware or hypervisor tell",
        )  # fmt: skip
        return
    cpus = host.text(f"{folder}/local_cpulist") or "not told"
    yield Finding("numa", "ok", f"GPU {number}: on NUMA node {node}, near CPUs {cpus}, to which its worker keeps")
