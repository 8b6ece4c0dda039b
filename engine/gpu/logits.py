"""Logits that stay in VRAM: what choosing a token takes is found there, a whole row leaves it only if need be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from numoe.engine.gpu.compiler import module
from numoe.engine.gpu.device import cupy
from numoe.engine.sampling import Shortlist

if TYPE_CHECKING:
    import cupy as cp

MOST_LISTED = 1024
"""Tokens of a shortlist at most; if more are as likely, a whole row is looked at."""

_SLICES, _THREADS = 32, 1024
_LIKELIEST_BYTES, _COUNTERS_BYTES = 12, 8


class DeviceLogits:
    """Room for the logits of `max_rows` rows, and their likeliest tokens, which are brought to the host.

    `prepare` belongs to a step's kernels (`cuda/choices.cu`), the rest to the time between two steps.
    """

    def __init__(self, max_rows: int, vocab: int) -> None:
        import cupyx

        self.device: cp.ndarray = cupy().empty((max_rows, vocab), np.float32)
        kernels = module("choices")
        self._survey, self._list = kernels.get_function("survey"), kernels.get_function("shortlist")
        self._likeliest = cupy().empty((max_rows, _SLICES * _LIKELIEST_BYTES), np.uint8)
        self._highs = cupy().empty((max_rows, _SLICES * 32), np.float32)
        self._counters = cupy().zeros((max_rows, _COUNTERS_BYTES), np.uint8)
        self._sums = cupy().empty((max_rows, _SLICES), np.float64)
        # Pinned, so that kernels write to it: a copy may not be part of a captured graph.
        self._ids: npt.NDArray[np.int32] = cupyx.zeros_pinned((max_rows,), np.int32)
        self._largest: npt.NDArray[np.float32] = cupyx.zeros_pinned((max_rows,), np.float32)
        self._counts: npt.NDArray[np.int32] = cupyx.zeros_pinned((max_rows,), np.int32)
        self._listed: npt.NDArray[np.int32] = cupyx.zeros_pinned((max_rows, MOST_LISTED), np.int32)
        self._values: npt.NDArray[np.float32] = cupyx.zeros_pinned((max_rows, MOST_LISTED), np.float32)
        self._totals: npt.NDArray[np.float64] = cupyx.zeros_pinned((max_rows,), np.float64)
        self._rows: npt.NDArray[np.int32] = np.zeros(0, np.int32)

    def prepare(self, rows: int) -> None:
        """Find the largest of each row and its shortlist and write them to the host's memory, on the current stream.

        A shortlist holds the largest logits, 256 or a few more, in no order.
        """
        grid, cols = (_SLICES, rows), np.int32(self.device.shape[1])
        self._survey(grid, (_THREADS,), (self.device, cols, self._likeliest, self._highs))
        host = (self._ids, self._largest, self._counts, self._listed, self._values, self._totals)
        self._list(
            grid, (_THREADS,),
            (
                self.device, cols, self._likeliest, self._highs, self._counters, self._sums,
                *(np.uint64(pinned.ctypes.data) for pinned in host),
            ),
        )  # fmt: skip

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

    def shortlist(self, row: int) -> Shortlist | None:
        """As of `StepLogits`."""
        at = int(self._rows[row])
        count = int(self._counts[at])
        if count > MOST_LISTED:
            return None
        order = np.argsort(self._listed[at, :count])
        ids, values = self._listed[at, :count][order], self._values[at, :count][order]
        return Shortlist(ids.astype(np.int64), values, float(self._totals[at]), self.device.shape[1])

    def __array__(self, *args: Any, **kwargs: Any) -> npt.NDArray[np.float32]:
        rows = [self[i] for i in range(len(self))]
        return np.array(rows or np.empty((0, self.device.shape[1]), np.float32), *args, **kwargs)
