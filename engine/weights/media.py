"""The kinds of memory that weights may lie in, best first: hugetlbfs, transparent huge pages, plain pages."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from numoe.engine.numa import PAGE_BYTES

Kind = Literal["hugetlbfs", "transparent", "plain"]

SHM: Final = Path("/dev/shm")  # noqa: S108 - shared memory is what this is for
_HUGE: Final = Path("/sys/kernel/mm/hugepages")
_NODES: Final = Path("/sys/devices/system/node")
_SHMEM_ENABLED: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_AVAILABLE: Final = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
_UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_HUGE_TMPFS: Final = ("always", "within_size", "advise")


@dataclass(frozen=True)
class Medium:
    """A file system for weights: its kind, the folder for them, the bytes of its pages."""

    kind: Kind
    folder: Path
    page_bytes: int

    def free_bytes(self, nodes: Sequence[int] = ()) -> int:
        """Bytes that are free in it, on these nodes if any are given."""
        if self.kind != "hugetlbfs":
            status = os.statvfs(SHM)
            free = status.f_bavail * status.f_frsize
            return min(free, sum(_available(node) for node in nodes)) if nodes else free
        name = f"hugepages-{self.page_bytes >> 10}kB"
        pages = _number(_HUGE / name / "free_hugepages") - _number(_HUGE / name / "resv_hugepages")
        if nodes:
            pages = min(pages, sum(_number(_NODES / f"node{n}" / "hugepages" / name / "free_hugepages") for n in nodes))
        return max(0, pages) * self.page_bytes


def weights_root() -> Path:
    """The folder that names every slice of this user: /dev/shm/numoe, or one with the user's id if that is another's.

    It may not exist yet. A slice in hugetlbfs is a link here.
    """
    own, shared = SHM / f"numoe-weights-{os.getuid()}", SHM / "numoe"
    if own.exists():
        return own
    try:
        found = shared.lstat()  # once: another shard may be making it just now
    except OSError:
        return shared
    is_private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return shared if is_private else own


def choose_medium(nbytes: int, nodes: Sequence[int] = ()) -> Medium:
    """The best kind of memory that has room for a slice; plain pages if none has."""
    for medium in huge_media():
        if medium.free_bytes(nodes) >= nbytes:
            return medium
    return shm_medium()


class HugePools:
    """The huge pages that are set aside, given out to one slice after the other: for planning, nothing is taken."""

    def __init__(self) -> None:
        self._media = list(huge_media())
        self._taken: Counter[tuple[int, int | None]] = Counter()  # by the pages' bytes and node; None for all nodes

    def take(self, nbytes: int, nodes: Sequence[int] = ()) -> bool:
        """Whether a slice, spread over several nodes if there are several, still has room in one of them."""
        for medium in self._media:
            page = medium.page_bytes
            wanted = -(-nbytes // page) * page
            free = medium.free_bytes() - self._taken[page, None]
            if nodes:
                free = min(free, sum(medium.free_bytes((node,)) - self._taken[page, node] for node in nodes))
            if wanted <= free:
                self._taken[page, None] += wanted
                for node in nodes:
                    self._taken[page, node] += wanted // len(nodes)
                return True
        return False


def shm_medium() -> Medium:
    """What /dev/shm gives: huge pages if its mount options or the system's settings say so."""
    options = next((m[2] for m in _mounts() if m[1] == str(SHM)), "")
    mounted = next((o.removeprefix("huge=") for o in options.split(",") if o.startswith("huge=")), "never")
    system = _chosen(_SHMEM_ENABLED)
    huge = system == "force" or (system != "deny" and mounted in _HUGE_TMPFS)
    return Medium("transparent" if huge else "plain", weights_root(), PAGE_BYTES)


def huge_media() -> Iterator[Medium]:
    """The hugetlbfs mounts that this user may write to, largest pages first."""
    found = []
    for kind, place, options in _mounts():
        if kind == "hugetlbfs" and os.access(place, os.W_OK | os.X_OK):
            size = next((o.removeprefix("pagesize=") for o in options.split(",") if o.startswith("pagesize=")), "2M")
            unit = _UNITS.get(size[-1:], 0)
            if unit and size[:-1].isdigit():
                found.append(Medium("hugetlbfs", Path(place) / f"numoe-{os.getuid()}", int(size[:-1]) * unit))
    yield from sorted(found, key=lambda medium: -medium.page_bytes)


def _mounts() -> list[tuple[str, str, str]]:
    """Type, place and options of every mount; where several lie on one place, the last one first."""
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [(fields[2], fields[1], fields[3]) for fields in reversed(lines) if len(fields) > 3]


def _chosen(path: Path) -> str:
    """The word in brackets of a sysfs file, empty without the file."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def _available(node: int) -> int:
    """Bytes of a node's memory that are unused or hold files that can be dropped; any number without NUMA."""
    try:
        lines = (_NODES / f"node{node}" / "meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    values = {fields[2].rstrip(":"): int(fields[3]) for fields in map(str.split, lines) if len(fields) > 3}
    return sum(1024 * values.get(name, 0) for name in _AVAILABLE)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
