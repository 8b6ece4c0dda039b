"""NVIDIA GPUs on the PCI bus: which node is nearest. No driver is asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from numoe.cluster.topology.nodes import NumaNode
from numoe.cluster.topology.tree import Tree

_DEVICES, _DRIVER = "/sys/bus/pci/devices", "/proc/driver/nvidia"
_NVIDIA, _DISPLAY = "0x10de", "0x03"


@dataclass(frozen=True, kw_only=True)
class PciGpu:
    """A GPU by its PCI address.

    name:       what the driver calls it, None without one.
    numa_node:  the node whose memory is nearest, None if the firmware does not tell.
    link_width: PCIe lanes in use, and max_link_width: what the GPU has; None if not known.
    """

    address: str
    name: str | None = None
    numa_node: int | None = None
    link_width: int | None = None
    max_link_width: int | None = None


def read_gpus(tree: Tree, nodes: Sequence[NumaNode]) -> tuple[PciGpu, ...]:
    """All NVIDIA GPUs in order of their addresses."""
    try:
        addresses = sorted(entry.name for entry in tree.path(_DEVICES).iterdir())
    except OSError:
        return ()
    return tuple(
        PciGpu(
            address=address,
            name=tree.fields(f"{_DRIVER}/gpus/{address}/information").get("Model"),
            numa_node=_nearest(tree, f"{_DEVICES}/{address}", nodes),
            link_width=tree.integer(f"{_DEVICES}/{address}/current_link_width"),
            max_link_width=tree.integer(f"{_DEVICES}/{address}/max_link_width"),
        )
        for address in addresses
        if tree.text(f"{_DEVICES}/{address}/vendor") == _NVIDIA
        and (tree.text(f"{_DEVICES}/{address}/class") or "").startswith(_DISPLAY)
    )


def read_driver(tree: Tree) -> str | None:
    """The version of NVIDIA's kernel driver, None without one."""
    version = tree.text("/sys/module/nvidia/version")
    if version:
        return version
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", tree.text(f"{_DRIVER}/version") or "")
    return found.group(1) if found else None


def _nearest(tree: Tree, device: str, nodes: Sequence[NumaNode]) -> int | None:
    """The node that the firmware tells, or the only one, or the one that has all CPUs near the device."""
    told = tree.integer(f"{device}/numa_node")
    if told is not None and told >= 0:
        return told
    near = set(tree.cpus(f"{device}/local_cpulist") or ())
    around = [node.id for node in nodes if near & set(node.online_cpus)] or [node.id for node in nodes]
    return around[0] if len(around) == 1 else None
