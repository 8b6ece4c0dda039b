"""Bringing a file's bytes to VRAM through pinned memory of a fixed size."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from numoe.engine.gpu.device import cupy

_SLOTS = 2


class Staging:
    """`_SLOTS` pairs of pinned and device buffers of `slot_bytes`; threads fill one while the GPU reads the other."""

    def __init__(self, slot_bytes: int = 32 << 20, threads: int = 8) -> None:
        import cupyx

        self.slot_bytes = slot_bytes
        self._pinned = [cupyx.empty_pinned(slot_bytes, np.uint8) for _ in range(_SLOTS)]
        self._device = [cupy().empty(slot_bytes, np.uint8) for _ in range(_SLOTS)]
        self._copied = [cupy().cuda.Event(disable_timing=True) for _ in range(_SLOTS)]
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="numoe-stage")
        self._turn = 0

    def upload(self, data: npt.NDArray[np.uint8], rows_at_once: int = 1) -> Iterator[tuple[int, int, int]]:
        """Rows of data, uint8 [rows, row_bytes], a multiple of `rows_at_once` of them at a time.

        Yields (first row, rows, device address); what is at the address may be used on the current
        stream until the next is taken.
        """
        row_bytes = data.shape[1]
        step = max(1, self.slot_bytes // row_bytes // rows_at_once) * rows_at_once
        if step * row_bytes > self.slot_bytes:
            raise ValueError(f"{rows_at_once} rows of {row_bytes} bytes do not fit {self.slot_bytes} bytes")
        for first in range(0, len(data), step):
            part = data[first : first + step].reshape(-1)
            slot = self._turn = (self._turn + 1) % _SLOTS
            self._copied[slot].synchronize()
            pinned, device = self._pinned[slot], self._device[slot]
            piece = -(-len(part) // self._threads)
            pieces = range(0, len(part), piece)
            parts = [part[i : i + piece] for i in pieces]
            list(self._pool.map(np.copyto, [pinned[i : i + len(p)] for i, p in zip(pieces, parts, strict=True)], parts))
            device.data.copy_from_host_async(pinned.ctypes.data, len(part))
            self._copied[slot].record()
            yield first, len(part) // row_bytes, device.data.ptr

    def close(self) -> None:
        """End the threads and free the memory, once everything that was uploaded has arrived."""
        self._pool.shutdown()
        for event in self._copied:
            event.synchronize()
        self._pinned, self._device = [], []
