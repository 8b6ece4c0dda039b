"""NUMA nodes: their cores, memory, distances and huge pages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from numoe.cluster.topology.hugepages import HugePages, read_hugepages
from numoe.cluster.topology.tree import Tree

_NODES, _CPUS = "/sys/devices/system/node", "/sys/devices/system/cpu"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class NumaNode:
    """One NUMA node; memory in bytes.

    cores:           the CPUs of each physical core that this process may use, SMT siblings together.
    online_cpus:     all CPUs of the node, whoever may use them.
    package:         the socket, None for a node without CPUs.
    memory_bytes:    all of its memory. free_bytes: what is unused. available_bytes: that and caches of files.
    memory_allowed:  whether this process may take memory here.
    distances:       to each node, as the firmware tells: 10 to itself.
    hugepages:       the reserved pages of each size.
    cache_bytes:     the last-level caches of its cores together, 0 if not known.
    """

    id: int
    cores: tuple[tuple[int, ...], ...] = ()
    online_cpus: tuple[int, ...] = ()
    package: int | None = None
    memory_bytes: int = 0
    free_bytes: int = 0
    available_bytes: int = 0
    memory_allowed: bool = True
    distances: Mapping[int, int] = field(default_factory=dict, hash=False)
    hugepages: tuple[HugePages, ...] = ()
    cache_bytes: int = 0

    @property
    def cpus(self) -> tuple[int, ...]:
        """The CPUs that this process may use, in order."""
        return tuple(sorted(cpu for core in self.cores for cpu in core))

    @property
    def has_memory(self) -> bool:
        """Whether this process may take memory here."""
        return self.memory_allowed and self.memory_bytes > 0


def read_nodes(
    tree: Tree, allowed: Collection[int] | None, allowed_mems: Collection[int] | None
) -> tuple[NumaNode, ...]:
    """All nodes in order of their numbers; a kernel without NUMA has one.

    allowed, allowed_mems: the CPUs that may be used and the nodes whose memory may be taken, None for all.
    """
    numbers = tree.numbered(_NODES, "node")
    if not numbers:
        online = tree.cpus(f"{_CPUS}/online") or tuple(sorted(allowed or (0,)))
        node = _node(tree, 0, online, allowed, tree.fields("/proc/meminfo"))
        return (replace(node, hugepages=read_hugepages(tree, "/sys/kernel/mm/hugepages")),)
    nodes = []
    for number in numbers:
        folder = f"{_NODES}/node{number}"
        meminfo = {key.split()[-1]: value for key, value in tree.fields(f"{folder}/meminfo").items()}
        if len(numbers) == 1:  # its file may not tell of memory that was added while the host ran
            meminfo = max(meminfo, tree.fields("/proc/meminfo"), key=lambda lines: _bytes(lines, "MemTotal"))
        node = _node(tree, number, tree.cpus(f"{folder}/cpulist") or (), allowed, meminfo)
        distances = [int(word) for word in (tree.text(f"{folder}/distance") or "").split()]
        nodes.append(
            replace(
                node,
                memory_allowed=allowed_mems is None or number in allowed_mems,
                distances=dict(zip(numbers, distances, strict=False)) or node.distances,
                hugepages=read_hugepages(tree, f"{folder}/hugepages"),
            )
        )
    return tuple(nodes)


def _node(
    tree: Tree, number: int, online: tuple[int, ...], allowed: Collection[int] | None, meminfo: Mapping[str, str]
) -> NumaNode:
    """The node with these CPUs and this memory."""
    total, free = _bytes(meminfo, "MemTotal"), _bytes(meminfo, "MemFree")
    caches = _bytes(meminfo, "Active(file)", "Inactive(file)", "SReclaimable")
    return NumaNode(
        id=number,
        cores=_cores(tree, online if allowed is None else tuple(cpu for cpu in online if cpu in allowed)),
        online_cpus=online,
        package=tree.integer(f"{_CPUS}/cpu{online[0]}/topology/physical_package_id") if online else None,
        memory_bytes=total,
        free_bytes=free,
        available_bytes=min(total, free + caches),
        distances={number: 10},
        cache_bytes=_cache_bytes(tree, online),
    )


def _cores(tree: Tree, cpus: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """CPUs by physical core, in order of the cores' first CPUs."""
    cores, seen = [], set[int]()
    for cpu in sorted(cpus):
        if cpu not in seen:
            topology = f"{_CPUS}/cpu{cpu}/topology"
            siblings = tree.cpus(f"{topology}/core_cpus_list") or tree.cpus(f"{topology}/thread_siblings_list") or ()
            core = tuple(sorted({cpu, *siblings} & set(cpus)))
            cores.append(core)
            seen.update(core)
    return tuple(cores)


def _cache_bytes(tree: Tree, cpus: tuple[int, ...]) -> int:
    """The sizes of the different last-level caches of these CPUs, of each the share that is theirs."""
    shares: dict[tuple[int, ...], float] = {}
    for cpu in cpus:
        folder = f"{_CPUS}/cpu{cpu}/cache"
        levels = tree.numbered(folder, "index")
        size = tree.text(f"{folder}/index{levels[-1]}/size") if levels else None
        if size and size[-1] in _UNITS and size[:-1].isdigit():
            sharers = tree.cpus(f"{folder}/index{levels[-1]}/shared_cpu_list") or (cpu,)
            shares[sharers] = int(size[:-1]) * _UNITS[size[-1]] * len(set(sharers) & set(cpus)) / len(sharers)
    return int(sum(shares.values()))


def _bytes(meminfo: Mapping[str, str], *names: str) -> int:
    """The sum of these lines of meminfo, which are in kB."""
    return sum(int(meminfo[name].split()[0]) * 1024 for name in names if name in meminfo)
