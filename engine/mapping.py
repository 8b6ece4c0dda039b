"""Mapping a file so that its huge pages, if it has any, are mapped as such."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Final

import numpy as np
import numpy.typing as npt

HUGE_BYTES: Final = 2 << 20
"""The size of transparent huge pages, and the usual one in hugetlbfs."""
_MAP_FIXED: Final = 0x10
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def map_file(descriptor: int, *, writable: bool) -> npt.NDArray[np.uint8]:
    """A whole file in memory, uint8 [its bytes], shared with everybody who maps it; unmapped with the last array of it.

    Its address is a multiple of HUGE_BYTES, and of the file's page size: otherwise the kernel maps a huge page
    in small ones.
    """
    nbytes, page = os.fstat(descriptor).st_size, max(HUGE_BYTES, os.fstatvfs(descriptor).f_bsize)
    return np.asarray(_Placed(descriptor, nbytes, page, writable=writable))


class _Placed:
    """Addresses that Python's `mmap` sets aside and gives back, with the file in the midst of them."""

    def __init__(self, descriptor: int, nbytes: int, alignment: int, *, writable: bool) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._area = mmap.mmap(-1, nbytes + alignment, flags=flags, prot=mmap.PROT_READ)
        start: int = np.frombuffer(self._area, np.uint8).ctypes.data
        start += -start % alignment
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        found = _libc.mmap(start, nbytes, protection, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
        if found == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (start, not writable)}
