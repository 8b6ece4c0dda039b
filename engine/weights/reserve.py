"""Reserving the memory of a file before anything is written to it, on its node, as huge pages where possible."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from numoe.engine.advice import PART_BYTES, POPULATE_WRITE, advise, bind_if_possible, collapse
from numoe.engine.errors import ResourceError
from numoe.engine.weights.media import Medium

_NO_ROOM: Final = (errno.ENOMEM, errno.EFAULT, errno.ENOSPC)


def reserve(
    file: npt.NDArray[np.uint8], descriptor: int, path: Path, medium: Medium,
    *, nodes: tuple[int, ...], threads: int, on_thread: Callable[[], None],
) -> Medium:  # fmt: skip
    """Have every page of a new file, or raise ResourceError: a page that fails later is a bus error.

    file: mapped as `map_file` does. nodes: where the pages shall lie, none for anywhere. on_thread: run by each
    of the threads first. Returns the medium that it got: those in /dev/shm may become huge pages, see `collapse`.
    """
    nbytes, address = len(file), file.ctypes.data
    if medium.kind == "transparent":
        advise(address, nbytes, mmap.MADV_HUGEPAGE)
    with ThreadPoolExecutor(threads, thread_name_prefix="numoe-reserve", initializer=on_thread) as pool:
        if medium.kind != "hugetlbfs" and collapse(address, nbytes, nodes, pool.map):
            medium = replace(medium, kind="transparent")
        bind_if_possible(address, nbytes, nodes)
        parts = range(0, nbytes, PART_BYTES)
        codes = pool.map(lambda at: advise(address + at, min(PART_BYTES, nbytes - at), POPULATE_WRITE), parts)
        code = next((code for code in codes if code), 0)
    if code == errno.EINVAL:  # before Linux 5.14
        code = _allocate(descriptor, nbytes)
    if code in _NO_ROOM:
        raise no_room(path, nbytes, medium, nodes)
    if code:
        raise ResourceError(f"{path}: {nbytes / 1e9:.2f} GB of memory cannot be had: {os.strerror(code)}")
    return medium


def _allocate(descriptor: int, nbytes: int) -> int:
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        return error.errno or errno.ENOSPC
    return 0


def no_room(path: Path, nbytes: int, medium: Medium, nodes: tuple[int, ...]) -> ResourceError:
    """What to say when a medium, or the memory of the nodes, is full."""
    where = f" on node {' and '.join(map(str, nodes))}" if nodes else ""
    return ResourceError(
        f"shared memory has no room for {nbytes / 1e9:.2f} GB at {path} "
        f"({medium.free_bytes(nodes) / 1e9:.2f} GB free{where}); "
        "see what lies there with `numoe weights list`, remove it with `numoe weights rm`, or enlarge it "
        "(mount -o remount,size=... /dev/shm; in a container --shm-size)"
    )
