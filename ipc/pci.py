"""How devices on the PCI bus are called."""

from __future__ import annotations


def sysfs_name(pci_bus_id: str) -> str:
    """``00000000:3B:00.0``, as NVIDIA's tools write it, is ``0000:3b:00.0`` in sysfs."""
    domain, bus, rest = pci_bus_id.lower().split(":")
    return f"{int(domain, 16):04x}:{bus}:{rest}"
