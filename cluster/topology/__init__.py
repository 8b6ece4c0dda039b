"""What this host has: nodes, cores, memory, huge pages and GPUs, within the limits of this process."""

from numoe.cluster.topology.gpus import PciGpu
from numoe.cluster.topology.hugepages import HugePages, TransparentHugePages
from numoe.cluster.topology.limits import Limits, available_memory
from numoe.cluster.topology.nodes import NumaNode
from numoe.cluster.topology.topology import Topology
from numoe.cluster.topology.tree import parse_cpu_list

__all__ = [
    "HugePages",
    "Limits",
    "NumaNode",
    "PciGpu",
    "Topology",
    "TransparentHugePages",
    "available_memory",
    "parse_cpu_list",
]
