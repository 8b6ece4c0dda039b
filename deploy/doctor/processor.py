"""The processor: what it can do, which of its CPUs may be used, and how fast they are allowed to run."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any

from numoe.deploy.console import count
from numoe.deploy.doctor.check import Check, Host, error, ok, ranges, warning
from numoe.engine.cpu.isa import choose_isa, host_isas

_FEATURES = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
_CPU = "/sys/devices/system/cpu"
_SLOW_PREFERENCES = ("power", "balance_power")


def check_processor(host: Host) -> Check:
    """Model, sockets, cores, SMT."""
    topology = host.topology
    sockets = len({node.package for node in topology.nodes if node.package is not None}) or 1
    cores, cpus, small = len(topology.cores), len(topology.allowed_cpus), len(topology.efficiency_cpus)
    text = f"{topology.cpu_model}: {count(sockets, 'socket')}, {count(cores, 'core')}, {count(cpus, 'CPU')}"
    return ok(
        "processor",
        text + (f", {small} of them on efficiency cores" if small else ""),
        model=topology.cpu_model,
        machine=platform.machine(),
        sockets=sockets,
        cores=cores,
        cpus=cpus,
        efficiency_cpus=small,
    )


def check_kernels(host: Host, available: Sequence[str] | None = None, refused: str = "") -> Check:
    """The instruction set that the kernels use.

    available: the paths this processor can run, best first. refused: why NUMOE_ISA cannot be done, if so.
    """
    available = host_isas() if available is None else available
    fields = host.tree.fields("/proc/cpuinfo")
    flags = f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
    features = [name for name in _FEATURES if name in flags]
    values: dict[str, Any] = {"features": features, "available": list(available)}
    if refused:
        return error("kernels", refused, "unset NUMOE_ISA", chosen=None, **values)
    values["chosen"] = chosen = choose_isa()
    text = f"path {chosen} ({', '.join(features) or 'no vector extensions that are known'})"
    if chosen != available[0]:
        return warning("kernels", f"{text}, by NUMOE_ISA; {available[0]} is faster", "unset NUMOE_ISA", **values)
    if chosen == "portable" and platform.machine() == "x86_64":
        return warning("kernels", text, "a processor with AVX2 is several times as fast", **values)
    return ok("kernels", text, **values)


def check_cpuset(host: Host) -> Check:
    """Which CPUs this process may use, and whether it may use the memory beside them."""
    topology = host.topology
    online = [cpu for node in topology.nodes for cpu in node.online_cpus]
    values = {"allowed": list(topology.allowed_cpus), "online": len(online), "mems": topology.limits.mems}
    text = f"{len(topology.allowed_cpus)} of {count(len(online), 'CPU')} may be used ({ranges(topology.allowed_cpus)})"
    far = [node.id for node in topology.compute_nodes if node.memory_bytes and not node.memory_allowed]
    if far:
        nodes = ", ".join(map(str, far))
        cure = "add the nodes to the container's --cpuset-mems, or take their CPUs from its --cpuset-cpus"
        return warning("cpuset", f"{text}, but not the memory of node {nodes}", cure, **values)
    partly = [node.id for node in topology.compute_nodes if len(node.cpus) < len(node.online_cpus)]
    if partly:
        nodes = ", ".join(map(str, partly))
        cure = "if that is not meant: taskset, the container's --cpuset-cpus, AllowedCPUs= of a systemd unit"
        return warning("cpuset", f"{text}: only a part of node {nodes}", cure, **values)
    return ok("cpuset", text, **values)


def check_cpu_time(host: Host) -> Check:
    """Whether a cgroup takes CPUs away for a part of the time."""
    quota, cores = host.topology.limits.cpu_quota, len(host.topology.cores)
    if quota is None:
        return ok("cpu_time", "not limited", cpus=None)
    text = f"a cgroup gives {quota:g} CPUs' time"
    if quota < cores:
        cure = f"raise --cpus or resources.limits.cpu to {cores}, or run with --threads {max(1, int(quota))}"
        return warning("cpu_time", f"{text} to {count(cores, 'core')}: all stop when it is used up", cure, cpus=quota)
    return ok("cpu_time", text, cpus=quota)


def check_governor(host: Host) -> Check:
    """Whether the processor's frequency follows the load only reluctantly."""
    kinds = Counter(
        tuple(
            host.tree.text(f"{_CPU}/cpu{cpu}/cpufreq/{name}")
            for name in ("scaling_driver", "scaling_governor", "energy_performance_preference")
        )
        for cpu in host.topology.allowed_cpus
    )
    found = {kind: number for kind, number in kinds.items() if kind[1]}
    if not found:
        return ok("governor", "not readable: the hypervisor or firmware decides", governors={})
    governors = Counter[str]()
    for (_, governor, _), number in found.items():
        governors[governor or ""] += number
    slow = [kind for kind in found if _is_slow(*kind)]
    text = ", ".join(
        f"{governor}{f' with {preference}' if preference else ''} ({driver or 'unknown driver'}) "
        f"on {count(number, 'CPU')}"
        for (driver, governor, preference), number in found.items()
    )
    if slow:
        cure = "cpupower frequency-set -g performance (as root)"
        return warning("governor", text, cure, governors=dict(governors))
    return ok("governor", text, governors=dict(governors))


def _is_slow(driver: str | None, governor: str | None, preference: str | None) -> bool:
    """Drivers that leave the frequency to the hardware call it powersave, and mean it only if told to prefer power."""
    if governor == "performance":
        return False
    by_hardware = governor == "powersave" and driver in ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")
    return preference in _SLOW_PREFERENCES or preference is None if by_hardware else True


