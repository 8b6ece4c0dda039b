"""Which NUMA nodes and which processors the threads of a model get."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from numoe.cluster.topology import NumaNode, Topology
from numoe.engine.errors import InputError
from numoe.engine.numa import current_cpu

NUMA_MODES = ("auto", "off", "distribute", "isolate", "numactl")
MANY_CORES = 8
"""A node with at least so many physical cores leaves one of them to polling and the system."""
FEW_CORES = 4
"""On a host with fewer physical cores every processor counts as one."""


@dataclass(frozen=True)
class Seats:
    """Where one actor's threads run and its memory lies.

    nodes: the NUMA nodes of its cores, none with `--numa off`. memory: those of its memory, none where the
    host has only one or memory is not bound. cpus: of its threads, one each, none where they are not pinned.
    threads: how many it has.
    """

    nodes: tuple[int, ...]
    memory: tuple[int, ...]
    cpus: tuple[int, ...]
    threads: int


class Seating:
    """The processors of a host, given out to the threads of shards and of attention."""

    def __init__(self, topology: Topology, numa: str, *, spare: bool = False) -> None:
        """numa: what `--numa` says; InputError if it makes no sense. spare: whether one core is left over for sure."""
        self._topology, self._is_off = topology, numa == "off"
        self.nodes = choose_nodes(topology, numa)
        self._cores = {
            node.id: tuple((cpu,) for cpu in node.cpus) if self._is_off else compute_cores(topology, node)
            for node in self.nodes
        }
        if spare and all(len(self._cores[node.id]) >= len(node.cores) for node in self.nodes):
            first = self.nodes[0].id
            self._cores[first] = self._cores[first][:-1] or self._cores[first]

    def shard(self, index: int, count: int, threads: int | None) -> Seats:
        """Those of shard `index` of `count`: on one node, shared with others, or on several nodes.

        threads: of all shards together, None for one on each core.
        """
        whole = len(self.nodes)
        first = whole * index // count
        nodes = self.nodes[first : max(whole * (index + 1) // count, first + 1)]
        mates = [i for i in range(count) if whole * i // count == first]
        place, cores = mates.index(index), list[tuple[int, ...]]()
        for node in nodes:
            own = self._cores[node.id]
            cores += own[len(own) * place // len(mates) : len(own) * (place + 1) // len(mates)] or own[:1]
        share = len(cores) if threads is None else threads * (index + 1) // count - threads * index // count
        return self._seats(nodes, _first_siblings_first(cores), max(1, share))

    def attention(self, threads: int | None, shards: Iterable[Seats]) -> Seats:
        """Those of attention on CPUs: on cores that no shard uses, on their cores' other siblings, else on the same."""
        taken = {cpu for seats in shards for cpu in seats.cpus}
        cores = [core for row in zip_longest(*self._cores.values()) for core in row if core]
        return self._seats(self.nodes, _free_first(cores, taken), len(cores) if threads is None else threads)

    def _seats(self, nodes: Sequence[NumaNode], cpus: Sequence[int], threads: int) -> Seats:
        if self._is_off:
            return Seats((), (), (), threads)
        numbers = tuple(node.id for node in nodes)
        memory = tuple(dict.fromkeys(self._topology.memory_for(number).id for number in numbers))
        is_alone = sum(node.has_memory for node in self._topology.nodes) < 2
        return Seats(numbers, () if is_alone else memory, tuple(cpus[i % len(cpus)] for i in range(threads)), threads)


def choose_nodes(topology: Topology, numa: str) -> tuple[NumaNode, ...]:
    """The nodes that `--numa` names; InputError if it makes no sense.

    auto, distribute (llama-server's word), numactl (within what numactl allows, as always) and off: all nodes.
    isolate: the one that this process runs on. Else their numbers, with commas between.
    """
    nodes = topology.compute_nodes
    if numa == "isolate":
        here = current_cpu()
        return tuple(node for node in nodes if here in node.cpus) or nodes[:1]
    if numa in NUMA_MODES:
        return nodes
    words = numa.split(",")
    if not all(word.isdecimal() for word in words):
        raise InputError(f"--numa {numa!r} is neither one of {', '.join(NUMA_MODES)} nor numbers of nodes, as in 0,1")
    wanted = {int(word) for word in words}
    found = tuple(node for node in nodes if node.id in wanted)
    if len(found) < len(wanted):
        raise InputError(
            f"--numa {numa} names a node without processors that may be used; "
            f"this host has {', '.join(str(node.id) for node in nodes)}"
        )
    return found


def compute_cores(topology: Topology, node: NumaNode) -> tuple[tuple[int, ...], ...]:
    """The processors of each core of a node for computing: of a hybrid processor the fast ones; of many all but one."""
    slow = set(topology.efficiency_cpus)
    cores = tuple(core for core in node.cores if not slow & set(core)) or node.cores
    if len(topology.cores) < FEW_CORES:
        return tuple((cpu,) for core in cores for cpu in core)
    return cores[:-1] if len(cores) >= MANY_CORES else cores


def _first_siblings_first(cores: Sequence[tuple[int, ...]]) -> list[int]:
    """A processor of each core, then the second of each, and so on."""
    return [cpu for row in zip_longest(*cores) for cpu in row if cpu is not None]


def _free_first(cores: Sequence[tuple[int, ...]], taken: Collection[int]) -> list[int]:
    """One processor of each free core, one free sibling of each of the others, then the rest, free ones first."""
    idle = [core[0] for core in cores if not any(cpu in taken for cpu in core)]
    beside = [
        next(cpu for cpu in reversed(core) if cpu not in taken)
        for core in cores
        if any(cpu in taken for cpu in core) and not all(cpu in taken for cpu in core)
    ]
    chosen = idle + beside
    rest = [cpu for core in cores for cpu in core if cpu not in chosen]
    return chosen + sorted(rest, key=lambda cpu: cpu in taken)
