"""Reserving the memory of a file before anything is written to it, on its node, as huge pages where possible."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from numoe.engine.errors import ResourceError
from numoe.engine.numa import bind_memory
from numoe.engine.weights.media import Medium

_POPULATE_WRITE: Final = 23
_PART_BYTES: Final = 64 << 20
_NO_ROOM: Final = (errno.ENOMEM, errno.EFAULT, errno.ENOSPC)


def reserve(
    mapping: mmap.mmap, descriptor: int, path: Path, medium: Medium,
    *, nodes: tuple[int, ...], threads: int, on_thread: Callable[[], None],
) -> None:  # fmt: skip
    """Have every page of a new file's mapping, or raise ResourceError: a page that fails later is a bus error.

    nodes: where the pages shall lie, none for anywhere. on_thread: run by each of the threads first.
    """
    nbytes, view = len(mapping), ctypes.c_char.from_buffer(mapping)
    try:
        address = ctypes.addressof(view)
        if nodes:
            with contextlib.suppress(OSError):  # a kernel without NUMA
                bind_memory(address, nbytes, *nodes)
        if medium.kind == "transparent":
            mapping.madvise(mmap.MADV_HUGEPAGE)
        with ThreadPoolExecutor(threads, thread_name_prefix="numoe-reserve", initializer=on_thread) as pool:
            codes = pool.map(lambda at: _populate(address + at, min(_PART_BYTES, nbytes - at)), _parts(nbytes))
            code = next((code for code in codes if code), 0)
        if code == errno.EINVAL:  # before Linux 5.14
            code = _allocate(descriptor, nbytes)
        if code in _NO_ROOM:
            raise no_room(path, nbytes, medium, nodes)
        if code:
            raise ResourceError(f"{path}: {nbytes / 1e9:.2f} GB of memory cannot be had: {os.strerror(code)}")
    finally:
        del view


def _parts(nbytes: int) -> range:
    return range(0, nbytes, _PART_BYTES)


def _populate(address: int, nbytes: int) -> int:
    """Make pages writable, without a bus error where there are none; 0 or the error's number."""
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _POPULATE_WRITE):
        if (code := ctypes.get_errno()) not in (errno.EINTR, errno.EAGAIN):
            return code
    return 0


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
