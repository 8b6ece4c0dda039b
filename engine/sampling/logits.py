"""A step's logits, wherever they are."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class StepLogits(Protocol):
    """Logits [rows, vocab]. The likeliest token of a row is cheap; a whole row may have to be fetched."""

    def __len__(self) -> int:
        """Rows."""

    def __getitem__(self, row: int) -> npt.NDArray[np.float32]:
        """A row, float32 [vocab]."""

    def likeliest(self, row: int) -> tuple[int, float]:
        """The token with a row's largest logit, the lowest id of equals, and that logit; NaN if any of them is."""

    def __array__(self, *args: Any, **kwargs: Any) -> npt.NDArray[np.float32]:
        """All rows, float32 [rows, vocab]."""


class HostLogits:
    """Logits in an array, which the next step may overwrite."""

    def __init__(self, rows: npt.NDArray[np.float32]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> npt.NDArray[np.float32]:
        values: npt.NDArray[np.float32] = self._rows[row]
        return values

    def likeliest(self, row: int) -> tuple[int, float]:
        """As of `StepLogits`; NumPy's argmax stops at a NaN."""
        values = self._rows[row]
        token = int(values.argmax())
        return token, float(values[token])

    def __array__(self, *args: Any, **kwargs: Any) -> npt.NDArray[np.float32]:
        return np.array(self._rows, *args, **kwargs)
