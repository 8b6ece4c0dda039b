"""Logits that stay in VRAM until somebody asks for a whole row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from numoe.engine.gpu import rows as ops
from numoe.engine.gpu.device import cupy

if TYPE_CHECKING:
    import cupy as cp


class DeviceLogits:
    """Room for the logits of `max_rows` rows, and their likeliest tokens, which are brought to the host.

    `find_likeliest` belongs to a step's kernels, the rest to the time between two steps.
    """

    def __init__(self, max_rows: int, vocab: int) -> None:
        import cupyx

        self.device: cp.ndarray = cupy().empty((max_rows, vocab), np.float32)
        # Pinned, so that kernels write to it: a copy may not be part of a captured graph.
        self._ids: npt.NDArray[np.int32] = cupyx.zeros_pinned((max_rows,), np.int32)
        self._largest: npt.NDArray[np.float32] = cupyx.zeros_pinned((max_rows,), np.float32)
        self._rows: npt.NDArray[np.int32] = np.zeros(0, np.int32)

    def find_likeliest(self, rows: int) -> None:
        """Find the largest of each row and write it to the host's memory, on the current stream."""
        ops.argmax(self.device, np.uint64(self._ids.ctypes.data), np.uint64(self._largest.ctypes.data), rows)

    def of_rows(self, rows: npt.NDArray[np.int32]) -> DeviceLogits:
        """These logits, as far as a step wants them: of `rows`, in this order."""
        self._rows = rows
        return self

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = self.device[int(self._rows[row])].get()
        return values

    def likeliest(self, row: int) -> tuple[int, float]:
        """As of `StepLogits`."""
        at = int(self._rows[row])
        return int(self._ids[at]), float(self._largest[at])

    def __array__(self, *args: Any, **kwargs: Any) -> npt.NDArray[np.float32]:
        rows = [self[i] for i in range(len(self))]
        return np.array(rows or np.empty((0, self.device.shape[1]), np.float32), *args, **kwargs)
