"""The NUMA nodes: their memory, how fast it is, and whether memory can be bound to them."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

from numoe.cluster.bandwidth import Bandwidth
from numoe.cluster.topology import NumaNode
from numoe.deploy.console import count
from numoe.deploy.doctor.check import Check, Host, error, gb, ok, warning
from numoe.deploy.doctor.dimms import DMI_TABLE, Slot, count_channels, read_slots
from numoe.engine import numa

_UNEVEN = 1.2
"""Nodes that differ by more than this factor in what should be the same are worth a word."""
_BUS_BYTES = 8


def check_nodes(host: Host) -> Check:
    """Cores and memory of each node."""
    nodes = host.topology.nodes
    values = {
        "nodes": [
            {
                "node": node.id,
                "cores": len(node.cores),
                "cpus": list(node.cpus),
                "package": node.package,
                "memory_bytes": node.memory_bytes,
                "available_bytes": node.available_bytes,
                "memory_allowed": node.memory_allowed,
                "distances": {str(other): distance for other, distance in node.distances.items()},
            }
            for node in nodes
        ]
    }
    text = "; ".join(f"node {node.id}: {_describe(node)}" for node in nodes)
    bare = [node.id for node in host.topology.compute_nodes if not node.memory_bytes]
    if bare and len(nodes) > 1:
        text = f"{text}: node {', '.join(map(str, bare))} has none of its own"
        return warning("nodes", text, "fill the slots of its memory channels", **values)
    sizes = [node.memory_bytes for node in host.topology.compute_nodes]
    if len(sizes) > 1 and max(sizes) > _UNEVEN * min(sizes):
        cure = "put the same modules into the same slots of each node: every node holds as much of the experts"
        return warning("nodes", f"{text}: not the same everywhere", cure, **values)
    return ok("nodes", text, **values)


def _describe(node: NumaNode) -> str:
    memory = f"{gb(node.memory_bytes)} ({gb(node.available_bytes)} available)" if node.memory_bytes else "no memory"
    what = count(len(node.cores), "core") if node.cores else "no cores" if not node.online_cpus else "cores of others"
    return f"{what}, {memory}{'' if node.memory_allowed else ', not for this process'}"


def check_memory_channels(host: Host) -> Check:
    """Memory modules, channels and their speed."""
    slots, channels = read_slots(host.tree), count_channels(host.tree)
    filled = [slot for slot in slots or () if slot.nbytes]
    speeds = [slot.configured or slot.speed for slot in filled]
    values = {
        "slots": None if slots is None else len(slots),
        "modules": None if slots is None else len(filled),
        "channels": channels,
        "mt_s": min(speeds, default=None) or None,
        "peak_gb_s": channels * _BUS_BYTES * min(speeds) / 1e3 if channels and speeds and min(speeds) else None,
    }
    if not filled and channels is None:
        hidden = host.tree.path(DMI_TABLE).exists() and slots is None
        why = "only root may read the firmware's table" if hidden else "the firmware or hypervisor tells nothing"
        return ok("memory_channels", f"not readable: {why}", **values)
    parts = [f"{count(channels, 'channel')} with modules"] if channels else []
    if filled and slots:
        kinds = Counter(_module(slot) for slot in filled)
        parts.append(f"{len(filled)} of {count(len(slots), 'slot')} filled")
        parts += [f"{number} × {kind}" for kind, number in kinds.items()]
    if values["peak_gb_s"]:
        parts.append(f"at most {values['peak_gb_s']:.0f} GB/s")
    text = ", ".join(parts)
    if len({(slot.kind, slot.nbytes, slot.configured) for slot in filled}) > 1:
        return warning("memory_channels", text, "use modules of one kind: the slowest sets the speed", **values)
    if any(0 < slot.configured < slot.speed for slot in filled):
        cure = "modules run below their speed: see the memory settings of the firmware, and what the processor allows"
        return warning("memory_channels", text, cure, **values)
    return ok("memory_channels", text, **values)


def _module(slot: Slot) -> str:
    speed = slot.configured or slot.speed  # which virtual machines do not tell
    return f"{slot.kind} {gb(slot.nbytes)}{f' at {speed} MT/s' if speed else ''}"


def check_bandwidth(host: Host, found: Bandwidth) -> Check:
    """Measured bandwidth of each pair of nodes."""
    topology = host.topology
    when = datetime.fromtimestamp(found.measured).astimezone().isoformat(timespec="seconds")
    values = {
        "measured": when,
        "reads": [{"cores": r.cores, "memory": r.memory, "gb_s": round(r.bytes_s / 1e9, 2)} for r in found.reads],
        "local_gb_s": round(found.total(topology) / 1e9, 2),
    }
    lines = []
    for node in topology.compute_nodes:
        speeds = ", ".join(f"{r.memory}: {r.bytes_s / 1e9:.1f}" for r in found.reads if r.cores == node.id)
        lines.append(f"cores of node {node.id} from node {speeds or 'none'}")
    text = f"GB/s read by {'; '.join(lines)} (measured {when})"
    for node in topology.compute_nodes:
        local, others = found.local(topology, node.id) or 0.0, [r for r in found.reads if r.cores == node.id]
        remote = [r.memory for r in others if r.bytes_s > _UNEVEN * local and topology.node(r.memory).cores]
        if remote:
            cure = "the firmware may interleave memory across sockets (node interleaving): turn that off"
            return warning("bandwidth", f"{text}: node {remote[0]} is faster than node {node.id}'s own", cure, **values)
    own = [found.local(topology, node.id) or 0.0 for node in topology.compute_nodes]
    per_core = [speed / len(node.cores) for speed, node in zip(own, topology.compute_nodes, strict=True)]
    if own and max(own) > _UNEVEN * min(own) and max(per_core) > _UNEVEN * min(per_core):
        cure = "are the channels of each node filled, and is nothing else running? --measure measures again"
        return warning("bandwidth", f"{text}: nodes differ", cure, **values)
    return ok("bandwidth", text, **values)


def check_binding(host: Host) -> Check:
    """Whether memory can be bound to each node, and the kernel says that it lies there."""
    nodes = [node.id for node in host.topology.nodes if node.has_memory]
    wrong = numa.why_unbound(nodes)
    values = {"nodes": nodes, "refused": sorted(wrong)}
    if not wrong:
        return ok("binding", f"memory can be bound to {count(len(nodes), 'node')}", **values)
    text = f"memory cannot be bound ({'; '.join(wrong.values())})"
    if len(nodes) == 1:
        return ok("binding", f"{text}; one node does without", **values)
    return error("binding", text, numa.BIND_CURE, **values)


def check_balancing(host: Host) -> Check:
    """Whether the kernel moves pages between nodes by itself."""
    value = host.tree.integer("/proc/sys/kernel/numa_balancing")
    if value and len(host.topology.nodes) > 1:
        text = "on: the kernel interrupts threads to see which memory they use, and moves what is not bound"
        return warning("numa_balancing", text, "sysctl kernel.numa_balancing=0 (as root)", enabled=True)
    states = {None: "the kernel has none", 0: "off"}
    return ok("numa_balancing", states.get(value, "on, of no account with one node"), enabled=bool(value))
