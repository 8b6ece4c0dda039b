"""Activation buffers: equally spaced rows, and the table of their addresses that products read."""

from __future__ import annotations

import numpy as np

from numoe.engine.cpu.memory import address, align, aligned_bytes, aligned_copy
from numoe.engine.cpu.rows import activation_bytes


class Rows:
    """`rows` rows of `cols` columns, float32 or 8-bit; at `base` if given, else in memory of its own."""

    def __init__(self, rows: int, cols: int, kind: str = "f32", base: int | None = None) -> None:
        self.cols, self.kind = cols, kind
        self.stride = align(activation_bytes(cols, kind))
        self._memory = aligned_bytes(rows * self.stride if base is None else 0)
        self.base = address(self._memory) if base is None else base
        self._pointers = aligned_copy(self.base + self.stride * np.arange(rows, dtype=np.int64))

    @property
    def pointers(self) -> int:
        """The address of int64 [rows], the address of each row."""
        return address(self._pointers)

    def array(self) -> np.ndarray:
        """float32 [rows, stride / 4] of a buffer with memory of its own."""
        return self._memory.view(np.float32).reshape(-1, self.stride // 4)
