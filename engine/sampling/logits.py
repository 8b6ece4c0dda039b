"""A step's logits, wherever they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Shortlist:
    """The largest logits of a row: every one that is not smaller than the smallest here.

    ids: int64, ascending. logits: float32, theirs. total: the sum of exp(logit - largest) over the whole
    row, to within TOLERANCE of itself. vocab: how many logits the row has.
    """

    ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    total: float
    vocab: int

    TOLERANCE: ClassVar = 1e-6


class StepLogits(Protocol):
    """Logits [rows, vocab]. The likeliest tokens of a row are cheap; a whole row may have to be fetched."""

    def __len__(self) -> int:
        """Rows."""

    def __getitem__(self, row: int) -> npt.NDArray[np.float32]:
        """A row, float32 [vocab]."""

    def likeliest(self, row: int) -> tuple[int, float]:
        """The token with a row's largest logit, the lowest id of equals, and that logit; NaN if any of them is."""

    def shortlist(self, row: int) -> Shortlist | None:
        """A row's largest logits where all of it has to be fetched; None where it is at hand or has many equals."""

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

    def shortlist(self, row: int) -> None:
        """None: rows are at hand."""

    def __array__(self, *args: Any, **kwargs: Any) -> npt.NDArray[np.float32]:
        return np.array(self._rows, *args, **kwargs)
