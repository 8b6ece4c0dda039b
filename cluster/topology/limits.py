"""The limits of this process and its container: affinity mask, cpuset, memory and CPU time, of cgroups v1 and v2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from numoe.cluster.topology.tree import Tree, parse_cpu_list

_NO_LIMIT = 1 << 60
"""Bytes: cgroups v1 write no limit as the greatest number of whole pages."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this process may use; None where nothing limits it.

    affinity:     the CPUs of its affinity mask, which a cpuset has narrowed already.
    cpuset:       the CPUs of its cgroup. mems: the nodes whose memory it may take.
    cpu_quota:    processors' worth of time that its cgroup gets, e.g. 4.0.
    memory_bytes: of its cgroup, or of one around it.
    memory_available_bytes: what is left of that, where caches of files count as free.
    """

    affinity: tuple[int, ...] | None = None
    cpuset: tuple[int, ...] | None = None
    mems: tuple[int, ...] | None = None
    cpu_quota: float | None = None
    memory_bytes: int | None = None
    memory_available_bytes: int | None = None

    @property
    def cpus(self) -> frozenset[int] | None:
        """The CPUs that may be used: those of the affinity mask that are in the cpuset."""
        masks = [frozenset(mask) for mask in (self.affinity, self.cpuset) if mask]
        return frozenset.intersection(*masks) if masks else None


def read_limits(tree: Tree) -> Limits:
    """The limits of the process that reads them."""
    status = tree.fields("/proc/self/status")
    memory = [(limit, limit - used) for limit, used in _memory(tree)]
    quotas = list(_quotas(tree))
    return Limits(
        affinity=_list(status.get("Cpus_allowed_list")),
        cpuset=next(_cpusets(tree), None),
        mems=_list(status.get("Mems_allowed_list")),
        cpu_quota=min(quotas, default=None),
        memory_bytes=min((limit for limit, _ in memory), default=None),
        memory_available_bytes=min((max(0, left) for _, left in memory), default=None),
    )


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can still have: what the host has available, and its cgroups allow."""
    tree = Tree(root)
    host = int(tree.fields("/proc/meminfo").get("MemAvailable", "0 kB").split()[0]) * 1024
    allowed = read_limits(tree).memory_available_bytes
    return host if allowed is None else min(host, allowed)


def _memory(tree: Tree) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each cgroup around the process that has a limit; caches of files are no use."""
    for group, version in _cgroups(tree, "memory"):
        names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
        limits = [value for name in names if (value := tree.integer(f"{group}/{name}")) is not None]
        limit = min(limits, default=_NO_LIMIT)
        if limit < _NO_LIMIT:
            used = tree.integer(f"{group}/{'memory.current' if version == 2 else 'memory.usage_in_bytes'}") or 0
            statistics = (tree.text(f"{group}/memory.stat") or "").split()
            prefix = "" if version == 2 else "total_"
            counts = dict(zip(statistics[::2], statistics[1::2], strict=False))
            files = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield limit, max(0, used - files)


def _quotas(tree: Tree) -> Iterator[float]:
    """Processors' worth of time of each cgroup around the process that has a quota."""
    for group, version in _cgroups(tree, "cpu"):
        if version == 2:
            words = (tree.text(f"{group}/cpu.max") or "").split()
        else:
            words = [str(tree.integer(f"{group}/cpu.cfs_{name}_us") or "") for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            yield int(words[0]) / int(words[1])


def _cpusets(tree: Tree) -> Iterator[tuple[int, ...]]:
    """The CPUs of the cgroups around the process, the innermost first."""
    for group, version in _cgroups(tree, "cpuset"):
        names = ("cpuset.cpus.effective",) if version == 2 else ("cpuset.effective_cpus", "cpuset.cpus")
        for name in names:
            cpus = tree.cpus(f"{group}/{name}")
            if cpus:
                yield cpus


def _cgroups(tree: Tree, controller: str) -> Iterator[tuple[str, int]]:
    """The folders of the process's cgroup for a controller and of those around it, innermost first, and their version.

    In a container the path that the kernel tells may begin outside of what is mounted; then
    what is mounted is the container's own cgroup.
    """
    mounts = list(_mounts(tree))
    for line in (tree.text("/proc/self/cgroup") or "").splitlines():
        _, names, path = line.split(":", 2)
        version = 1 if names else 2
        if version == 1 and controller not in names.split(","):
            continue
        for kind, options, root, place in mounts:
            if (version == 2 and kind == "cgroup2") or (version == 1 and kind == "cgroup" and controller in options):
                inside = path.removeprefix(root) if root != "/" else path
                parts = [part for part in inside.split("/") if part]
                if ".." in parts or not tree.path("/".join((place, *parts))).is_dir():
                    parts = []
                for depth in range(len(parts), -1, -1):
                    yield "/".join((place, *parts[:depth])), version


def _mounts(tree: Tree) -> Iterator[tuple[str, list[str], str, str]]:
    """Of each mounted cgroup hierarchy: file system, options, which cgroup is at its root, where it is."""
    for line in (tree.text("/proc/self/mountinfo") or "").splitlines():
        before, dash, after = line.partition(" - ")
        words, rest = before.split(), after.split()
        if dash and rest and rest[0] in ("cgroup", "cgroup2"):
            yield rest[0], rest[-1].split(","), words[3], words[4]


def _list(text: str | None) -> tuple[int, ...] | None:
    return tuple(parse_cpu_list(text)) if text else None
