"""Telling the kernel what memory is for: `madvise`, and pages that are there before they are needed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import threading
from typing import Final

import numpy as np
import numpy.typing as npt

from numoe.engine.numa import PAGE_BYTES, bind_memory

logger = logging.getLogger(__name__)

POPULATE_WRITE: Final = 23
COLLAPSE: Final = 25
PART_BYTES: Final = 64 << 20
"""What is asked for at a time: more would keep others from changing the process's mappings for long."""

_libc = ctypes.CDLL(None, use_errno=True)


def advise(address: int, nbytes: int, advice: int) -> int:
    """Call madvise; 0 or the error's number. Where there is no memory it is an error, not a bus error."""
    while _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice):
        if (code := ctypes.get_errno()) != errno.EINTR and (code != errno.EAGAIN or advice == COLLAPSE):
            return code
    return 0


def touch_beside(array: npt.NDArray[np.uint8], what: str, nodes: tuple[int, ...] = ()) -> threading.Thread:
    """Have the memory of a new array, beside everything else, so that whoever writes to it first need not wait.

    The kernel clears pages when they are touched, and a virtual machine's host has to find them then: it may take
    longer than a restore of what shall be in them. What was written already stays. nodes: from which the pages
    shall come in turn, none for wherever they are touched first. Before Linux 5.14 nothing happens; where there is
    no memory the log says so, naming `what`.
    """
    thread = threading.Thread(target=_touch, args=(array, what, nodes), name="numoe-touch", daemon=True)
    thread.start()
    return thread


def _touch(array: npt.NDArray[np.uint8], what: str, nodes: tuple[int, ...]) -> None:
    first = array.ctypes.data
    start, end = -(-first // PAGE_BYTES) * PAGE_BYTES, (first + array.nbytes) // PAGE_BYTES * PAGE_BYTES
    if nodes and start < end:
        with contextlib.suppress(OSError):  # no NUMA, or a container that forbids it
            bind_memory(start, end - start, *nodes)
    for at in range(start, end, PART_BYTES):
        code = advise(at, min(PART_BYTES, end - at), POPULATE_WRITE)
        if code == errno.EINVAL:
            return
        if code:
            logger.warning("memory for %s cannot be had: %s", what, os.strerror(code))
            return
