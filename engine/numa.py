"""Threads on processors and memory on NUMA nodes, by raw system calls, and where both are."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

_MBIND, _MOVE_PAGES = {"x86_64": (237, 279), "aarch64": (235, 239)}[platform.machine()]
_MPOL_BIND: Final = 2
_MPOL_INTERLEAVE: Final = 3
_MASK_WORDS: Final = 16
"""64-bit words of a node mask: 1024 nodes, as many as a kernel can have."""
_ASKED_AT_ONCE: Final = 1 << 16
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
BIND_CURE: Final = "allow a container mbind and move_pages: --cap-add SYS_NICE, or capabilities: add: [SYS_NICE]"
_SMAPS_PAGES: Final = ("Rss", "ShmemPmdMapped", "FilePmdMapped", "Shared_Hugetlb", "Private_Hugetlb")

_libc = ctypes.CDLL(None, use_errno=True)


def bind_memory(address: int, nbytes: int, *nodes: int) -> None:
    """Have the pages of a mapping that nobody has touched yet come from one node, or not at all.

    Of several nodes they come in turn. The mapping begins at a page. OSError where the kernel has no such
    node or no NUMA. In shared memory the policy belongs to the file, for as long as it is there.
    """
    mask = (ctypes.c_uint64 * _MASK_WORDS)()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    policy = _MPOL_BIND if len(nodes) == 1 else _MPOL_INTERLEAVE
    _call(
        _MBIND, ctypes.c_void_p(address), ctypes.c_ulong(nbytes), ctypes.c_int(policy), mask,
        ctypes.c_ulong(64 * _MASK_WORDS), ctypes.c_uint(0),
    )  # fmt: skip


def page_nodes(address: int, nbytes: int, page_bytes: int = PAGE_BYTES, at_most: int | None = None) -> Counter[int]:
    """How many of the pages of a mapping lie on each node; those that are not there have a negative number.

    address: of a page. at_most: how many pages to ask for, evenly spaced; all if not given.
    """
    count = -(-nbytes // page_bytes)
    asked = count if at_most is None else min(count, at_most)
    found: Counter[int] = Counter()
    for start in range(0, asked, _ASKED_AT_ONCE):
        stop = min(asked, start + _ASKED_AT_ONCE)
        places = (ctypes.c_void_p * (stop - start))(
            *(address + i * count // asked * page_bytes for i in range(start, stop))
        )
        nodes = (ctypes.c_int * (stop - start))()
        _call(
            _MOVE_PAGES, ctypes.c_int(0), ctypes.c_ulong(stop - start), places, ctypes.c_void_p(None), nodes,
            ctypes.c_int(0),
        )  # fmt: skip
        found.update(nodes)
    return found


def bound_page(node: int) -> int:
    """On which node a page lies that was bound to one. OSError where one cannot be, or nobody tells."""
    with mmap.mmap(-1, PAGE_BYTES) as page:
        place = ctypes.c_char.from_buffer(page)
        start = ctypes.addressof(place)
        try:
            bind_memory(start, PAGE_BYTES, node)
            ctypes.memset(start, 1, PAGE_BYTES)
            return next(iter(page_nodes(start, PAGE_BYTES)))
        finally:
            del place  # else the mapping could not be closed


def why_unbound(nodes: Iterable[int]) -> dict[int, str]:
    """The nodes to which memory cannot be bound, and why."""
    wrong: dict[int, str] = {}
    for node in nodes:
        try:
            found = bound_page(node)
            if found != node:
                wrong[node] = f"a page for node {node} lies on node {found}"
        except OSError as refused:
            wrong[node] = f"node {node}: {refused.strerror}"
    return wrong


class Pins:
    """Processors for a team's threads, one each; without any, threads run where the kernel puts them."""

    def __init__(self, cpus: Sequence[int] = ()) -> None:
        self.cpus, self._next = tuple(cpus), itertools.count()

    def pin(self, thread: int) -> None:
        """Have the calling thread run on the processor of a team's thread; where that is not allowed, as it does."""
        if self.cpus:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, {self.cpus[thread % len(self.cpus)]})

    def pin_next(self) -> None:
        """Have the calling thread run on the next processor."""
        self.pin(next(self._next))

    @contextlib.contextmanager
    def pinned(self) -> Iterator[None]:
        """Have the calling thread run on the first processor meanwhile."""
        if not self.cpus:
            yield
            return
        before = os.sched_getaffinity(0)
        self.pin(0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # none of them may be used any more: the cpuset has changed meanwhile
                os.sched_setaffinity(0, before)


def current_cpu() -> int:
    """The processor that the calling thread runs on."""
    return int(_libc.sched_getcpu())


def last_cpus(threads: Iterable[int]) -> list[int]:
    """The processor that each of this process's threads (native ids) ran on last."""
    found = []
    for thread in threads:
        fields = Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()
        found.append(int(fields[36]))
    return found


def huge_share(path: str) -> float:
    """The part of this process's mapping of a file, of what is mapped of it already, that are huge pages."""
    resident = huge = 0
    is_wanted = False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if " " in name:
                is_wanted = line.rstrip("\n").endswith(path)
            elif is_wanted and name in _SMAPS_PAGES:
                kilobytes = int(value.split()[0])
                resident += kilobytes if name in ("Rss", "Shared_Hugetlb", "Private_Hugetlb") else 0
                huge += kilobytes if name != "Rss" else 0
    return huge / resident if resident else 0.0


def _call(number: int, *arguments: object) -> None:
    if _libc.syscall(ctypes.c_long(number), *arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
