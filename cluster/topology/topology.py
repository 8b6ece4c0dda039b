"""`Topology`: everything about a host that placement needs, read once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from numoe.cluster.topology.gpus import PciGpu, read_driver, read_gpus
from numoe.cluster.topology.hugepages import TransparentHugePages, read_transparent
from numoe.cluster.topology.limits import Limits, read_limits
from numoe.cluster.topology.nodes import NumaNode, read_nodes
from numoe.cluster.topology.tree import Tree

_UNKNOWN_CPU = "unknown CPU"
_SLOW_SHARE = 0.75
"""A core with less than this share of the fastest one's capacity is an efficiency core."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A host as this process may use it.

    nodes:           all of them, also those without CPUs, without memory, or out of bounds for this process.
    efficiency_cpus: of the CPUs that may be used, those on the small cores of a hybrid processor.
    transparent_hugepages, limits: see there.
    gpus:            on the PCI bus, whether or not they can be used. gpu_driver: its version.
    """

    nodes: tuple[NumaNode, ...]
    cpu_model: str = _UNKNOWN_CPU
    efficiency_cpus: tuple[int, ...] = ()
    transparent_hugepages: TransparentHugePages = field(default_factory=TransparentHugePages)
    limits: Limits = field(default_factory=Limits)
    gpus: tuple[PciGpu, ...] = ()
    gpu_driver: str | None = None

    @classmethod
    def read(cls, root: Path = Path("/")) -> Topology:
        """Read the host from procfs and sysfs under `root`."""
        tree = Tree(root)
        limits = read_limits(tree)
        nodes = read_nodes(tree, limits.cpus, limits.mems)
        return cls(
            nodes=nodes,
            cpu_model=_cpu_model(tree),
            efficiency_cpus=_efficiency_cpus(tree, [cpu for node in nodes for cpu in node.cpus]),
            transparent_hugepages=read_transparent(tree),
            limits=limits,
            gpus=read_gpus(tree, nodes),
            gpu_driver=read_driver(tree),
        )

    @property
    def compute_nodes(self) -> tuple[NumaNode, ...]:
        """The nodes with CPUs that this process may use."""
        return tuple(node for node in self.nodes if node.cores)

    @property
    def allowed_cpus(self) -> tuple[int, ...]:
        """The CPUs that this process may use, in order."""
        return tuple(sorted(cpu for node in self.nodes for cpu in node.cpus))

    @property
    def cores(self) -> tuple[tuple[int, ...], ...]:
        """The physical cores of all nodes, node by node."""
        return tuple(core for node in self.nodes for core in node.cores)

    def node(self, number: int) -> NumaNode:
        """The node of that number; KeyError if there is none."""
        for node in self.nodes:
            if node.id == number:
                return node
        raise KeyError(number)

    def distance(self, source: int, target: int) -> int:
        """The distance between two nodes, 10 within one; what the firmware does not tell is 20."""
        return self.node(source).distances.get(target, 10 if source == target else 20)

    def memory_for(self, number: int) -> NumaNode:
        """The node whose memory is nearest to a node's cores: itself if it has memory that may be taken."""
        usable = [node for node in self.nodes if node.has_memory]
        return min(usable, key=lambda node: self.distance(number, node.id), default=self.node(number))


def _cpu_model(tree: Tree) -> str:
    fields = tree.fields("/proc/cpuinfo")
    if "model name" in fields:
        return " ".join(fields["model name"].split())
    parts = [fields[name] for name in ("CPU implementer", "CPU part") if name in fields]
    return f"ARM implementer {parts[0]} part {parts[1]}" if len(parts) == 2 else _UNKNOWN_CPU


def _efficiency_cpus(tree: Tree, cpus: list[int]) -> tuple[int, ...]:
    """From what x86 kernels tell of hybrid processors, else from the capacities that ARM kernels tell."""
    kinds = [tree.cpus(f"/sys/devices/cpu_{kind}/cpus") for kind in ("atom", "lowpower")]
    if any(kinds):
        slow = {cpu for kind in kinds for cpu in kind or ()}
    else:
        capacities = {cpu: tree.integer(f"/sys/devices/system/cpu/cpu{cpu}/cpu_capacity") or 0 for cpu in cpus}
        fastest = max(capacities.values(), default=0)
        slow = {cpu for cpu, capacity in capacities.items() if capacity < _SLOW_SHARE * fastest}
    return tuple(sorted(slow & set(cpus)))
