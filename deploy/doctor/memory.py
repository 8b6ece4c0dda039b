"""Memory: how much, in which pages, where weights would lie, and what may take it away."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import Any

from numoe.cluster.plan import Plan
from numoe.cluster.plan import check_memory as plan_memory
from numoe.deploy.doctor.check import Check, Host, error, gb, ok, warning
from numoe.engine.errors import ResourceError

SHM = "/dev/shm"  # noqa: S108 - shared memory is what this is about
_ANYTHING = 1 << 62
_LEAST_SHM = 1 << 30
_SHM_SHARE = 0.45
"""Of memory: the kernel's default for /dev/shm is a half."""
_LEAST_LOCKED = 1 << 30
_COLLAPSES = (6, 1)
"""Linux since then makes huge pages of any memory when it is asked to."""
_HUGE_TMPFS = ("always", "within_size", "advise")
_UNLIMITED = resource.RLIM_INFINITY
_SIZES = {1 << 30: "1G", 2 << 20: "2M"}


def check_memory(host: Host, plan: Plan | None = None) -> Check:
    """What is available, also within the container's limit, and whether the model fits."""
    meminfo, limits = host.tree.fields("/proc/meminfo"), host.topology.limits
    total, available = (_kb(meminfo.get(name)) for name in ("MemTotal", "MemAvailable"))
    text = f"{gb(available)} of {gb(total)} available"
    if limits.memory_bytes is not None and limits.memory_available_bytes is not None:
        available = min(available, limits.memory_available_bytes)
        text = f"{text}, {gb(available)} of the container's {gb(limits.memory_bytes)}"
    values = {"total_bytes": total, "available_bytes": available, "limit_bytes": limits.memory_bytes}
    return refusal("memory", plan, text, values, available=available) or ok("memory", text, **values)


def refusal(
    name: str, plan: Plan | None, text: str, values: dict[str, Any], available: int = _ANYTHING, shared: int = _ANYTHING
) -> Check | None:
    """The error that `numoe serve` would end with if so many bytes were free, None if it would not."""
    try:
        if plan:
            plan_memory(plan, available=available, shared=shared)
    except ResourceError as refused:
        message = str(refused)
        reason, _, cure = message.partition("; " if "; " in message else ": ")
        return error(name, f"{text}; {reason}", cure, **values)
    return None


def check_shared_memory(host: Host, plan: Plan | None = None, space: tuple[int, int] | None = None) -> Check:
    """The size of /dev/shm against memory, and against the model. space: its bytes, all and free, for tests."""
    total, free = space or _space(host.tree.path(SHM))
    memory = host.topology.limits.memory_bytes or _kb(host.tree.fields("/proc/meminfo").get("MemTotal"))
    values = {"total_bytes": total, "free_bytes": free, "model_bytes": plan.shared_bytes if plan else None}
    text = f"{SHM}: {gb(free)} of {gb(total)} free"
    larger = f"mount -o remount,size={round(0.9 * memory / (1 << 30))}G {SHM} (as root); in a container --shm-size"
    if plan:
        text = f"{text}, of which the model takes {gb(plan.shared_bytes)}"
        return refusal("shared_memory", plan, text, values, shared=free) or ok("shared_memory", text, **values)
    if total < _LEAST_SHM:
        return error("shared_memory", f"{text}: too little for any model's experts", larger, **values)
    if total < _SHM_SHARE * memory:
        return warning("shared_memory", f"{text}: experts have to fit in there", larger, **values)
    return ok("shared_memory", text, **values)


def check_huge_pages(host: Host) -> Check:
    """Reserved huge pages of each node, and whether they can be used."""
    found = [(node.id, pages) for node in host.topology.nodes for pages in node.hugepages if pages.total]
    mounts = [place for kind, place, _ in _mounts(host) if kind == "hugetlbfs" and _writable(host.tree.path(place))]
    values = {
        "pages": [{"node": n, "size_bytes": p.size, "total": p.total, "free": p.free} for n, p in found],
        "mounts": mounts,
    }
    if not found:
        return ok("huge_pages", "none reserved", **values)
    text = ", ".join(f"node {n}: {p.free} of {p.total} of {_SIZES.get(p.size, gb(p.size))} free" for n, p in found)
    if not mounts:
        size = _SIZES.get(max(pages.size for _, pages in found), "2M")
        cure = f"mount -t hugetlbfs -o pagesize={size},uid={os.getuid()},mode=0700 none /mnt/huge (as root)"
        return warning("huge_pages", f"{text}, but no hugetlbfs that this user may write to", cure, **values)
    return ok("huge_pages", f"{text}, at {', '.join(mounts)}", **values)


def check_transparent(host: Host, plan: Plan | None = None) -> Check:
    """Whether the kernel gives huge pages to weights and caches by itself."""
    modes = host.topology.transparent_hugepages
    options = next((options for _, place, options in reversed(_mounts(host)) if place == SHM), "")
    mounted = next((o.removeprefix("huge=") for o in options.split(",") if o.startswith("huge=")), "never")
    values = {"enabled": modes.enabled, "shmem_enabled": modes.shmem_enabled, "dev_shm": mounted}
    text = f"{modes.enabled or 'none'} for memory of its own, {mounted} for {SHM}"
    if modes.enabled in (None, "never"):
        cure = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root)"
        return warning("transparent_huge_pages", f"{text}: caches lie in small pages", cure, **values)
    if modes.shmem_enabled in ("deny", "force"):
        text = f"{text}, {modes.shmem_enabled} for all shared memory"
    huge = modes.shmem_enabled == "force" or (modes.shmem_enabled != "deny" and mounted in _HUGE_TMPFS)
    if not huge and modes.shmem_enabled != "deny" and _linux(host) >= _COLLAPSES:
        huge, text = True, f"{text}; weights get them on request"
    if not huge and _reserved(host) < max(1, plan.shared_bytes if plan else 1):
        cure = f"mount -o remount,huge=advise {SHM} (as root)"
        if modes.shmem_enabled == "deny":
            cure = f"echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled; {cure}"
        return warning("transparent_huge_pages", f"{text}: weights lie in small pages", cure, **values)
    return ok("transparent_huge_pages", text, **values)


def _linux(host: Host) -> tuple[int, ...]:
    """The kernel's version, such as (6, 8); empty if it cannot be read."""
    release = host.tree.text("/proc/sys/kernel/osrelease") or ""
    return tuple(int(number) for number in re.findall(r"\d+", release)[:2])


def check_memlock(host: Host, plan: Plan | None = None, limit: int | None = None) -> Check:
    """The limit of locked memory, which CUDA needs to map weights. limit: in bytes, for tests."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    needed = plan.shared_bytes if plan else _LEAST_LOCKED
    if limit == _UNLIMITED:
        return ok("memlock", "unlimited", bytes=None)
    text = f"{gb(limit)} may be locked"
    if host.topology.gpus and limit < needed:
        cure = "ulimit -l unlimited (LimitMEMLOCK=infinity in a systemd unit, --ulimit memlock=-1 in a container)"
        return warning("memlock", f"{text}: the GPU may be refused the experts' memory", cure, bytes=limit)
    return ok("memlock", f"{text}; only a GPU needs more" if not host.topology.gpus else text, bytes=limit)


def check_swap(host: Host) -> Check:
    """Whether weights may be swapped out: shared memory can be."""
    total = _kb(host.tree.fields("/proc/meminfo").get("SwapTotal"))
    swappiness = host.tree.integer("/proc/sys/vm/swappiness")
    values = {"total_bytes": total, "swappiness": swappiness}
    if total and swappiness is not None and swappiness > 1:
        text = f"{gb(total)}, swappiness {swappiness}: weights that were not read for a while may be swapped out"
        return warning("swap", text, "sysctl vm.swappiness=1, or swapoff -a (as root)", **values)
    return ok("swap", f"{gb(total)}, swappiness {swappiness}" if total else "none", **values)


def _reserved(host: Host) -> int:
    """Bytes in reserved huge pages that nobody has taken and this user may use."""
    if not any(kind == "hugetlbfs" and _writable(host.tree.path(place)) for kind, place, _ in _mounts(host)):
        return 0
    return sum(pages.size * pages.free for node in host.topology.nodes for pages in node.hugepages)


def _mounts(host: Host) -> list[tuple[str, str, str]]:
    """Kind, place and options of each mounted file system."""
    lines = [line.split() for line in (host.tree.text("/proc/self/mounts") or "").splitlines()]
    return [(words[2], words[1], words[3]) for words in lines if len(words) > 3]


def _writable(path: Path) -> bool:
    return os.access(path, os.W_OK | os.X_OK)


def _space(path: Path) -> tuple[int, int]:
    """Bytes of a file system: all, and free. Nothing where there is none."""
    try:
        status = os.statvfs(path)
    except OSError:
        return 0, 0
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def _kb(value: str | None) -> int:
    """Bytes of a value in /proc/meminfo."""
    return int(value.split()[0]) * 1024 if value else 0
