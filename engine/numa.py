"""Binding memory to NUMA nodes and asking where it lies, by raw system calls."""

from __future__ import annotations

import ctypes
import os
import platform
from collections import Counter
from typing import Final

_MBIND, _MOVE_PAGES = {"x86_64": (237, 279), "aarch64": (235, 239)}[platform.machine()]
_MPOL_BIND: Final = 2
_MASK_WORDS: Final = 16
"""64-bit words of a node mask: 1024 nodes, as many as a kernel can have."""
_ASKED_AT_ONCE: Final = 1 << 16
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

_libc = ctypes.CDLL(None, use_errno=True)


def bind_memory(address: int, nbytes: int, node: int) -> None:
    """Have the pages of a mapping that nobody has touched yet come from one node, or not at all.

    The mapping begins at a page. OSError where the kernel has no such node or no NUMA. In shared
    memory the policy belongs to the file, for as long as it is there.
    """
    mask = (ctypes.c_uint64 * _MASK_WORDS)()
    mask[node // 64] = 1 << node % 64
    _call(
        _MBIND, ctypes.c_void_p(address), ctypes.c_ulong(nbytes), ctypes.c_int(_MPOL_BIND), mask,
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


def _call(number: int, *arguments: object) -> None:
    if _libc.syscall(ctypes.c_long(number), *arguments) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
