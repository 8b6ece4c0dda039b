"""What changes from step to step, on the device at fixed addresses, so that a captured graph can be run again."""

from __future__ import annotations

import numpy as np

from numoe.engine.cpu.memory import align
from numoe.engine.gpu.device import cupy
from numoe.engine.scheduler import Batch


class StepInputs:
    """A batch's arrays in VRAM, brought there by one copy from pinned memory.

    tokens, positions, slots, logit_rows: int32 [max_rows]. page_tables: int32 [slots, pages].
    """

    def __init__(self, max_rows: int, slots: int, pages: int) -> None:
        import cupyx

        self._row_ints, self._pages = align(max_rows, 4), pages
        self._host = cupyx.zeros_pinned(4 * self._row_ints + slots * pages, np.int32)
        self._device = cupy().zeros(len(self._host), np.int32)
        self.tokens, self.positions, self.slots, self.logit_rows = (
            self._device[i * self._row_ints : i * self._row_ints + max_rows] for i in range(4)
        )
        self.page_tables = self._device[4 * self._row_ints :].reshape(slots, pages)
        self._host_tables = self._host[4 * self._row_ints :].reshape(slots, pages)

    def load(self, batch: Batch) -> None:
        """Copy a batch, on the current stream; the copy before must be over."""
        for i, values in enumerate((batch.token_ids, batch.positions, batch.slots, batch.logit_rows)):
            start = i * self._row_ints
            self._host[start : start + len(values)] = values
        slots, pages = batch.page_tables.shape
        self._host_tables[:slots, :pages] = batch.page_tables
        self._device.data.copy_from_host_async(self._host.ctypes.data, self._host.nbytes)
