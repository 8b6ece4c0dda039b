"""Leaving the page cache as it was found: which pages of a file were in it, and dropping those that were not."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from numoe.engine.numa import PAGE_BYTES
from numoe.engine.private import write_private

_LOOK_BYTES: Final = 1 << 30
_PROBE_BYTES: Final = 1 << 20
_SAVED: Final = "page-cache"
Ranges = list[tuple[int, int]]


class CachedPages(msgspec.Struct, frozen=True):
    """The ranges of pages, [first, behind the last), of each file that were in the page cache."""

    ranges: dict[str, Ranges]

    @classmethod
    def look(cls, paths: Iterable[str | Path]) -> CachedPages:
        """What is in the page cache now."""
        return cls({str(path): _cached_ranges(str(path)) for path in paths})

    def save(self, folder: Path) -> None:
        """Write it down for the other processes of a server, in its folder."""
        write_private(folder / _SAVED, msgspec.msgpack.encode(self))

    @classmethod
    def load(cls, folder: Path) -> CachedPages | None:
        """What was written down, None if nothing was."""
        try:
            return msgspec.msgpack.decode((folder / _SAVED).read_bytes(), type=cls)
        except FileNotFoundError:
            return None

    def drop(self, descriptor: int, path: str | Path, start: int, stop: int) -> None:
        """Drop the whole pages of bytes `start` to `stop` that were not in the page cache, unless they are mapped."""
        if str(path) in self.ranges:
            for first, last in _gaps(self.ranges[str(path)], -(-start // PAGE_BYTES), stop // PAGE_BYTES):
                os.posix_fadvise(descriptor, first * PAGE_BYTES, (last - first) * PAGE_BYTES, os.POSIX_FADV_DONTNEED)

    def drop_all(self) -> None:
        """Drop every page of the files that was not in the page cache."""
        for path in self.ranges:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                self.drop(descriptor, path, 0, os.fstat(descriptor).st_size + PAGE_BYTES)
            finally:
                os.close(descriptor)


class SharedReads:
    """Who of several processes has read which tensor: its pages go when the last one has.

    marks: uint8 [processes, tensors] in shared memory, zero at first.
    """

    def __init__(self, marks: npt.NDArray[np.uint8], index: int) -> None:
        self._marks, self._index = marks, index

    @classmethod
    def open(cls, path: Path, index: int, processes: int, tensors: int) -> SharedReads:
        """The marks in a file, which whoever comes first makes."""
        nbytes = max(1, processes * tensors)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            marks = np.frombuffer(mmap.mmap(descriptor, nbytes), np.uint8)
        finally:
            os.close(descriptor)
        return cls(marks[: processes * tensors].reshape(processes, tensors), index)

    def finished(self, tensor: int) -> bool:
        """Note that this process has read a tensor; whether all have now."""
        self._marks[self._index, tensor] = 1
        return bool(self._marks[:, tensor].all())

    def finish_all(self) -> None:
        """Note that this process reads nothing."""
        self._marks[self._index] = 1


def _gaps(ranges: Ranges, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """What of [start, stop) lies in none of the ranges, which ascend."""
    for first, last in ranges:
        if last <= start:
            continue
        if first >= stop:
            break
        if first > start:
            yield start, first
        start = last
    if start < stop:
        yield start, stop


def _cached_ranges(path: str) -> Ranges:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if _may_ask(path, descriptor):
            cached = np.concatenate(
                [np.empty(0, np.uint8)]
                + [_resident(descriptor, at, min(_LOOK_BYTES, size - at)) for at in range(0, size, _LOOK_BYTES)]
            )
            return _ranges(cached & np.uint8(1), 1)
        return _ranges(np.fromiter((_has_page(descriptor, at) for at in range(0, size, _PROBE_BYTES)), np.uint8),
                       _PROBE_BYTES // PAGE_BYTES)  # fmt: skip
    finally:
        os.close(descriptor)


def _may_ask(path: str, descriptor: int) -> bool:
    """Whether mincore tells the truth: of others' files that one cannot write it says that all is there."""
    return os.geteuid() in (0, os.fstat(descriptor).st_uid) or os.access(path, os.W_OK)


def _resident(descriptor: int, at: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """mincore of a part of a file, uint8 [pages]."""
    pages = np.zeros(-(-nbytes // PAGE_BYTES), np.uint8)
    libc: Any = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(descriptor, nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=at) as mapping:
        view = ctypes.c_char.from_buffer(mapping)
        start = ctypes.c_void_p(ctypes.addressof(view))
        code = libc.mincore(start, ctypes.c_size_t(nbytes), ctypes.c_void_p(pages.ctypes.data))
        del view
    if code:
        pages[:] = 1  # not known: leave everything alone
    return pages


def _has_page(descriptor: int, at: int) -> bool:
    """Whether the page at an offset can be read without waiting for a disk."""
    try:
        return os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) == 1
    except OSError:
        return False


def _ranges(cached: npt.NDArray[np.uint8], pages: int) -> Ranges:
    """Runs of ones, in units of `pages` pages."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], cached, [0]]).astype(np.int8)))
    return [(int(first) * pages, int(last) * pages) for first, last in edges.reshape(-1, 2)]
