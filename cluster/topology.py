"""What this host has: NUMA nodes, their processors and memory, within the limits of this process."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from numoe.engine.gpu.device import Device

_SYSFS = Path("/sys/devices/system/node")


@dataclass(frozen=True)
class NumaNode:
    """One NUMA node: the processors of it that this process may use, and its memory in bytes."""

    id: int
    cpus: tuple[int, ...]
    memory: int


@dataclass(frozen=True)
class Topology:
    """The NUMA nodes of a host that have processors this process may use, at least one; the GPU that it may use."""

    nodes: tuple[NumaNode, ...]
    gpu: Device | None = None

    @property
    def cpus(self) -> int:
        """Processors this process may use."""
        return sum(len(node.cpus) for node in self.nodes)


def parse_cpu_list(text: str) -> list[int]:
    """The kernel's list format: "0-3,8" is [0, 1, 2, 3, 8]."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def read_topology(root: Path = _SYSFS, allowed: Collection[int] | None = None) -> Topology:
    """Read the nodes from sysfs.

    root: the folder of node0, node1, … (for tests). allowed: the processors that may be used,
    default those of this process's affinity mask. A host without NUMA in its kernel is one node.
    """
    usable = set(os.sched_getaffinity(0) if allowed is None else allowed)
    nodes = []
    for folder in sorted(root.glob("node[0-9]*"), key=lambda f: int(f.name[4:])):
        cpus = tuple(cpu for cpu in parse_cpu_list((folder / "cpulist").read_text()) if cpu in usable)
        if cpus:
            nodes.append(NumaNode(int(folder.name[4:]), cpus, _memory(folder / "meminfo")))
    return Topology(tuple(nodes) or (NumaNode(0, tuple(sorted(usable)), 0),))


def _memory(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if "MemTotal:" in line:
            return int(line.split()[-2]) * 1024
    return 0
