"""Arrays between pages that nobody may touch: a kernel that reads or writes outside of one dies.

    memory = GuardedMemory("end")
    x = memory.copy(values)
    ...
    memory.check()

Memory is handed out by pages and arrays are not whole pages: at side "end" an array's last byte is
the last of its pages, at side "start" its first byte is the first. Arrays of n elements of a power of
two bytes are then aligned to their elements, which is all that kernels ask for. What is left of the
pages is filled with a pattern that `check` looks for: a write there shows, a read does not, so
every kernel has to run at both sides.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest

from numoe.engine.cpu import memory as engine_memory
from numoe.engine.cpu.memory import address

SIDES = ("end", "start")
_PAGE = mmap.PAGESIZE
_PATTERN = 0xA5
_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def _place(sizes: Sequence[int], side: str) -> tuple[list[int], list[int]]:
    """Offsets of arrays of these sizes in a mapping, and of the forbidden pages around each."""
    starts, forbidden = [], [0]
    for size in sizes:
        first, nbytes = forbidden[-1] + _PAGE, max(_PAGE, -(-size // _PAGE) * _PAGE)
        starts.append(first + nbytes - size if side == "end" else first)
        forbidden.append(first + nbytes)
    return starts, forbidden


def offsets(sizes: Sequence[int], side: str) -> list[int]:
    """Where the arrays that `GuardedMemory.row_of` makes begin, from the first one on."""
    starts, _ = _place(sizes, side)
    return [start - starts[0] for start in starts]


class GuardedMemory:
    """Zeroed arrays, each between forbidden pages, for as long as this lives."""

    def __init__(self, side: str) -> None:
        self.side = side
        self._gaps: list[np.ndarray] = []

    def row_of(self, sizes: Sequence[int]) -> np.ndarray:
        """Arrays of these bytes behind each other, forbidden pages between: uint8, from the first to the last."""
        starts, forbidden = _place(sizes, self.side)
        whole = np.frombuffer(mmap.mmap(-1, forbidden[-1] + _PAGE), np.uint8)
        for start, size, (before, after) in zip(starts, sizes, pairwise(forbidden), strict=True):
            gaps = whole[before + _PAGE : start], whole[start + size : after]
            for gap in gaps:
                gap[:] = _PATTERN
            self._gaps += gaps
        for page in forbidden:
            if _libc.mprotect(ctypes.c_void_p(address(whole) + page), ctypes.c_size_t(_PAGE), _PROT_NONE):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return whole[starts[0] : starts[-1] + sizes[-1]]

    def aligned_bytes(self, nbytes: int, _alignment: int = 1) -> np.ndarray:
        """Stands in for the engine's `aligned_bytes`; kernels do without the alignment."""
        return self.row_of([nbytes])

    def zeros(self, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        """An array of zeros."""
        return self.copy(np.zeros(shape, dtype))

    def copy(self, values: np.ndarray) -> np.ndarray:
        """A copy of an array."""
        out = self.row_of([values.nbytes]).view(values.dtype).reshape(values.shape)
        out[...] = values
        return out

    def check(self) -> None:
        """Raise AssertionError if anything was written between an array and the forbidden pages."""
        for gap in self._gaps:
            assert (gap == _PATTERN).all(), (
                f"written outside of an array that touches a forbidden page at its {self.side}"
            )

    @contextmanager
    def everywhere(self) -> Iterator[pytest.MonkeyPatch]:
        """What the engine, or a test's helper, allocates for kernels lies in this memory meanwhile."""
        original = engine_memory.aligned_bytes
        with pytest.MonkeyPatch.context() as patch:
            for name, module in list(sys.modules.items()):
                if name.startswith(("numoe.", "tests.")) and vars(module).get("aligned_bytes") is original:
                    patch.setattr(module, "aligned_bytes", self.aligned_bytes)
            yield patch
