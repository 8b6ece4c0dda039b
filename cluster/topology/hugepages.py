"""Huge pages: those that are reserved on each node, and the kernel's transparent ones."""

from __future__ import annotations

import re
from dataclasses import dataclass

from numoe.cluster.topology.tree import Tree

_TRANSPARENT = "/sys/kernel/mm/transparent_hugepage"


@dataclass(frozen=True)
class HugePages:
    """The reserved pages of one size (bytes) on a node: how many there are, and how many nobody has taken."""

    size: int
    total: int
    free: int


@dataclass(frozen=True, kw_only=True)
class TransparentHugePages:
    """When the kernel gives huge pages by itself; None where it cannot.

    enabled:       to a process's own memory: always, madvise (to who asks), never.
    shmem_enabled: to shared memory that is no file: always, within_size, advise, never. Files of a tmpfs have them by
                   its mount option huge=, unless this is deny (never) or force (always).
    size:          of such a page in bytes.
    """

    enabled: str | None = None
    shmem_enabled: str | None = None
    size: int | None = None


def read_hugepages(tree: Tree, node: str) -> tuple[HugePages, ...]:
    """The sizes in the folder of a node (or of the host), smallest first."""
    try:
        folders = [entry.name for entry in tree.path(node).iterdir()]
    except OSError:
        return ()
    found = []
    for name in folders:
        size = re.fullmatch(r"hugepages-(\d+)kB", name)
        if size:
            total = tree.integer(f"{node}/{name}/nr_hugepages") or 0
            free = tree.integer(f"{node}/{name}/free_hugepages") or 0
            found.append(HugePages(int(size.group(1)) * 1024, total, free))
    return tuple(sorted(found, key=lambda pages: pages.size))


def read_transparent(tree: Tree) -> TransparentHugePages:
    """The modes that apply to pages of the usual huge size."""
    size = tree.integer(f"{_TRANSPARENT}/hpage_pmd_size")

    def mode(name: str) -> str | None:
        """The mode of that size where it has one of its own, else the mode of all."""
        own = tree.chosen(f"{_TRANSPARENT}/hugepages-{(size or 0) // 1024}kB/{name}")
        return own if own and own != "inherit" else tree.chosen(f"{_TRANSPARENT}/{name}")

    return TransparentHugePages(enabled=mode("enabled"), shmem_enabled=mode("shmem_enabled"), size=size)
