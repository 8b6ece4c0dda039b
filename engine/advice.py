"""Telling the kernel what memory is for: `madvise`, and pages that are there before they are needed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from numoe.engine.mapping import HUGE_BYTES
from numoe.engine.numa import PAGE_BYTES, bind_memory

logger = logging.getLogger(__name__)

POPULATE_WRITE: Final = 23
COLLAPSE: Final = 25
PART_BYTES: Final = 64 << 20
"""What is asked for at a time: more would keep others from changing the process's mappings for long."""

_PART_BLOCKS: Final = PART_BYTES // HUGE_BYTES

_libc = ctypes.CDLL(None, use_errno=True)


def advise(address: int, nbytes: int, advice: int) -> int:
    """Call madvise; 0 or the error's number. Where there is no memory it is an error, not a bus error."""
    while _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice):
        if (code := ctypes.get_errno()) != errno.EINTR and (code != errno.EAGAIN or advice == COLLAPSE):
            return code
    return 0


def bind_if_possible(address: int, nbytes: int, nodes: tuple[int, ...]) -> None:
    """Have pages that are touched from now on come from `nodes` in turn, if there are any and that can be had."""
    if nodes:
        with contextlib.suppress(OSError):  # no NUMA, or a container that forbids it
            bind_memory(address, nbytes, *nodes)


def collapse(address: int, nbytes: int, nodes: tuple[int, ...], each: Callable[..., Iterable[bool]] = map) -> bool:
    """Make huge pages of shared memory that hardly anybody has touched, on several nodes in turn; whether that worked.

    Linux since 6.1 does that when asked to, whatever the system's settings. address: a multiple of HUGE_BYTES.
    each: `map`, or that of an executor.
    """
    blocks, done = range(address, address + nbytes // HUGE_BYTES * HUGE_BYTES, HUGE_BYTES), list[bool]()
    for number in range(max(1, len(nodes))):
        bind_if_possible(address, nbytes, nodes[number : number + 1])
        mine = blocks[number :: max(1, len(nodes))]
        parts = [mine[start : start + _PART_BLOCKS] for start in range(0, len(mine), _PART_BLOCKS)]
        done += each(_collapse_blocks, parts)
    return bool(done) and all(done)


def _collapse_blocks(blocks: range) -> bool:
    """Touch a page of each block, to have it on its node; the kernel adds the others and makes them one."""
    if any(advise(block, PAGE_BYTES, POPULATE_WRITE) for block in blocks):
        return False
    if blocks.step == HUGE_BYTES:
        return advise(blocks[0], len(blocks) * HUGE_BYTES, COLLAPSE) == 0
    return not any(advise(block, HUGE_BYTES, COLLAPSE) for block in blocks)


def touch_beside(
    array: npt.NDArray[np.uint8], what: str, nodes: tuple[int, ...] = (), *, shared: bool = False
) -> threading.Thread:
    """Have the memory of a new array, beside everything else, so that whoever writes to it first need not wait.

    The kernel clears pages when they are touched, and a virtual machine's host has to find them then: it may take
    longer than a restore of what shall be in them. What was written already stays. nodes: from which the pages
    shall come in turn, none for wherever they are touched first. shared: it is `map_file`'s, and its pages shall be
    huge ones. Before Linux 5.14 nothing happens; where there is no memory the log says so, naming `what`.
    """
    ways = {"shared": shared}
    thread = threading.Thread(target=_touch, args=(array, what, nodes), kwargs=ways, name="numoe-touch", daemon=True)
    thread.start()
    return thread


def _touch(array: npt.NDArray[np.uint8], what: str, nodes: tuple[int, ...], *, shared: bool) -> None:
    first = array.ctypes.data
    start, end = -(-first // PAGE_BYTES) * PAGE_BYTES, (first + array.nbytes) // PAGE_BYTES * PAGE_BYTES
    if start >= end:
        return
    if shared:
        advise(start, end - start, mmap.MADV_HUGEPAGE)
        collapse(start, end - start, nodes)
    bind_if_possible(start, end - start, nodes)
    for at in range(start, end, PART_BYTES):
        code = advise(at, min(PART_BYTES, end - at), POPULATE_WRITE)
        if code == errno.EINVAL:
            return
        if code:
            logger.warning("memory for %s cannot be had: %s", what, os.strerror(code))
            return
